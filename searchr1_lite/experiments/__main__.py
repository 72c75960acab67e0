"""Redo experiments: train the runs that are missing and write data/results/experiments/<name>.json.

python -m searchr1_lite.experiments mask            one, or several by name, or a .yaml file of yours
python -m searchr1_lite.experiments all             all of them; --list says which there are and how long they take

Each is notebook 09, executed by papermill into runs/experiments/<name>.ipynb. Stopped, the same command goes on.
"""

import sys

from searchr1_lite.config import ROOT
from searchr1_lite.experiments.plan import RUNS, Experiment
from searchr1_lite.printable import printable

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
        return printable(f"{experiment.name}: {error.evalue} ({out})")
    return ""
