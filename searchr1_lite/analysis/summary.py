"""One file with every number that README and the notebooks quote, made from run folders:

python -m searchr1_lite.analysis.summary data/results/runs/* --out data/results/summary.json

It copies, and computes nothing that the run folders do not hold.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searchr1_lite.analysis.runs import Run, RunError, load_run
from searchr1_lite.jsonl import write_json


def run_entry(run: Run) -> dict[str, Any]:
    """What is quoted of one run; RunError if it is not finished."""
    if run.evaluation is None:
        raise RunError(f"{run.folder}: evaluation.json is missing; the run is not finished (start it again to resume)")
    return {
        "name": run.name,
        "profile": run.profile["name"],
        "seed": run.profile["seed"],
        "masked": run.masked,
        "steps": int(run.metrics.index[-1]),
        "seconds": round(float(run.metrics["seconds"].sum()), 1),
        "date": run.environment["date"],
        "machine": run.environment["machine"],
        "command": run.environment["command"],
        "quantization": run.environment.get("quantization", run.profile.get("quantization")),
        "before": run.evaluation["before"],
        "after": run.evaluation["after"],
        "closed_book": run.evaluation["closed_book"],
    }


def summarise_runs(runs: Sequence[Run], command: str) -> dict[str, Any]:
    """The summary; date, machine and versions are those of the newest run, and runs of other versions are refused."""
    if not runs:
        raise RunError("no run folder is given")
    newest = max(runs, key=lambda run: run.environment["date"])
    for run in runs:
        if run.environment["versions"] != newest.environment["versions"]:
            raise RunError(f"{run.folder} and {newest.folder} were made with different versions; summarise them apart")
    return {
        "date": newest.environment["date"],
        "machine": newest.environment["machine"],
        "versions": newest.environment["versions"],
        "command": command,
        "runs": [run_entry(run) for run in sorted(runs, key=lambda run: run.name)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m searchr1_lite.analysis.summary", description="Sum up run folders.")
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    given = parser.parse_args(arguments)
    parents = sorted({str(folder.parent) for folder in given.folders})
    command = f"{parser.prog} {' '.join(f'{parent}/*' for parent in parents)} --out {given.out}"
    try:
        summary = summarise_runs([load_run(folder) for folder in given.folders if folder.is_dir()], command)
    except RunError as error:
        sys.exit(f"error: {error}")
    write_json(given.out, summary)
    print(f"{given.out}: {len(summary['runs'])} runs")


if __name__ == "__main__":
    main()
