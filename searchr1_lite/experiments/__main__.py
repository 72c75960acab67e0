"""Redo experiments: train the runs that are missing and write data/results/experiments/<name>.json.

python -m searchr1_lite.experiments mask            one, or several by name, or a .yaml file of yours
python -m searchr1_lite.experiments all             all of them; --list says which there are and how long they take

Each is notebook 09, executed by papermill into runs/experiments/<name>.ipynb. Stopped, the same command goes on.
"""

import sys
from argparse import ArgumentParser

from searchr1_lite.analysis.runs import RunError
from searchr1_lite.config import ROOT
from searchr1_lite.experiments.plan import RUNS, Experiment, ExperimentError, experiment_names, load_experiment
from searchr1_lite.plain import plain

NOTEBOOK = ROOT / "notebooks" / "09_one_experiment.ipynb"


def overview(experiments: list[Experiment]) -> str:
    lines = []
    for one in experiments:
        size = f"{len(one.arms)} arms x {len(one.seeds)} seeds = {len(one.runs())} runs, {one.minutes:g} minutes"
        lines.append(f"{one.name}: {one.title} ({size})\n  {' | '.join(one.arms)}")
    distinct = {run.name: run.profile.rollouts_per_step for one in experiments for run in one.runs()}
    share = sum(distinct.values()) / sum(run.profile.rollouts_per_step for one in experiments for run in one.runs())
    hours = share * sum(one.minutes for one in experiments) / 60
    return "\n".join(
        [*lines, f"together {len(distinct)} runs, as some are shared: about {hours:.1f} hours on two cores"]
    )


def execute(experiment: Experiment, **parameters: object) -> None:
    """Notebook 09 with its printed lines in the terminal; raises papermill's error."""
    import papermill  # heavy, and needed here only

    papermill.execute_notebook(
        NOTEBOOK,
        RUNS / f"{experiment.name}.ipynb",
        parameters={"experiment": experiment.typed, "seeds": experiment.seeds, **parameters},
        kernel_name="python3",
        progress_bar=False,
        stdout_file=sys.stdout,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m searchr1_lite.experiments", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="an experiment, a .yaml file, or all")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="these in place of the experiment's")
    parser.add_argument("--partial", action="store_true", help="train nothing, sum up the runs that are finished")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (2)")
    given = parser.parse_args(arguments)
    if not given.names and not given.list:
        parser.error("name an experiment, or all, or --list")
    names = experiment_names() if "all" in given.names or not given.names else list(dict.fromkeys(given.names))
    try:
        experiments = [load_experiment(name, given.seeds) for name in names]
    except (ExperimentError, RunError) as error:
        sys.exit(f"error: {plain(str(error))}")
    if given.list:
        return print(overview(experiments))
    from papermill.exceptions import PapermillExecutionError

    failed = []
    RUNS.mkdir(parents=True, exist_ok=True)
    for number, experiment in enumerate(experiments, 1):
        print(f"[{number} of {len(experiments)}] {experiment.title}", flush=True)
        try:
            execute(experiment, partial=given.partial, workers=given.workers)
        except PapermillExecutionError as error:
            failed.append(f"{experiment.name}: {plain(str(error.evalue))}")
            print(failed[-1], flush=True)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on from here")
    if failed:
        sys.exit("error: " + "\n".join(failed))


if __name__ == "__main__":
    main()
