"""One file with every number that README and the notebooks quote, made from run folders:

python -m searchr1_lite.analysis.summary data/results/runs/* --out data/results/summary.json

It copies, and computes nothing that the run folders do not hold.
"""

from collections.abc import Sequence
from typing import Any

from searchr1_lite.analysis.runs import Run, RunError
from searchr1_lite.evaluation.metrics import mean, seed_interval


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


def markdown_table(summary: dict[str, Any]) -> str:
    """The summary as README shows it: mean over seeds and half the width of Student's 95 % interval."""
    runs = summary["runs"]
    columns = {"before training": [run["before"] for run in runs if run["masked"]]}
    columns["after, masked"] = [run["after"] for run in runs if run["masked"]]
    columns["after, unmasked"] = [run["after"] for run in runs if not run["masked"]]
    hops = sorted(runs[0]["before"]["exact_match_by_hops"])
    rows = {"exact match": lambda scores: scores["exact_match"]}
    rows |= {f"exact match, {hop} hop": lambda scores, hop=hop: scores["exact_match_by_hops"][hop] for hop in hops}
    rows |= {f"searches, {hop} hop": lambda scores, hop=hop: scores["mean_searches_by_hops"][hop] for hop in hops}
    rows |= {"tokens written": lambda scores: scores["response_length"]}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, value in rows.items():
        digits = 0 if name == "tokens written" else 2
        cells = [_mean_and_half_width([value(scores) for scores in column], digits) for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_and_half_width(values: list[float], digits: int) -> str:
    low, high = seed_interval(values)
    spread = f" ± {(high - low) / 2:.{digits}f}" if high > low else ""
    return f"{mean(values):.{digits}f}{spread}"
