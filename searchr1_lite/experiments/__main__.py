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
    runs, minutes = {run for one in experiments for run in one.runs()}, sum(one.minutes for one in experiments)
    return "\n".join([*lines, f"{len(runs)} different runs; less than {minutes:g} minutes, as some are shared"])


def execute(experiment: Experiment, **parameters: object) -> str:
    """Notebook 09 with its printed lines in the terminal; returns the error that ended it, or nothing."""
    import papermill  # heavy, and needed here only

    out = RUNS / f"{experiment.name}.ipynb"
    parameters |= {"experiment": experiment.typed, "seeds": experiment.seeds}
    options = {"stdout_file": sys.stdout, "progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    try:
        papermill.execute_notebook(NOTEBOOK, out, parameters, kernel_name="python3", **options)
    except papermill.exceptions.PapermillExecutionError as error:
        return plain(f"{experiment.name}: {error.evalue} ({out})")
    return ""


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m searchr1_lite.experiments", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="an experiment, a .yaml file, or all; none: --list")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="these in place of the experiment's")
    parser.add_argument("--partial", action="store_true", help="train nothing, sum up the runs that are finished")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (2)")
    given = parser.parse_args(arguments)
    names = experiment_names() if "all" in given.names or not given.names else dict.fromkeys(given.names)
    try:
        experiments = [load_experiment(name, given.seeds) for name in names]
        if given.list or not given.names:
            return print(overview(experiments))
        RUNS.mkdir(parents=True, exist_ok=True)
        problems = [execute(one, partial=given.partial, workers=given.workers) for one in experiments]
    except (ExperimentError, RunError) as error:
        sys.exit(f"error: {plain(str(error))}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    if any(problems):
        sys.exit("error: " + "\n".join(filter(None, problems)))


if __name__ == "__main__":
    main()
