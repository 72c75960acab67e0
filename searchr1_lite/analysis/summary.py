"""Runs as one small file: what each came to, and its curves; the numbers that README, docs and notebooks quote.

It copies what run folders hold, for a list of runs (`summarise_runs`) or for the arms of an experiment (`sum_up`).
Verdicts are not drawn here.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searchr1_lite.analysis.figures import learning_curves, save
from searchr1_lite.analysis.runs import Run, RunError, by_mask, load_run
from searchr1_lite.config import Profile
from searchr1_lite.evaluation.metrics import mean, seed_interval
from searchr1_lite.files import write_whole
from searchr1_lite.provenance import command

# Columns of metrics.jsonl that are kept, where a run has them; searches_by_hops.1 and so on as well
CURVES = ("reward", "exact_match", "searches", "response_length", "invalid_actions", "answer_rate", "entropy", "kl")
CURVES += ("grad_norm", "clip_ratio", "zero_variance_groups")


def curve_measures(exact_match: Sequence[float]) -> dict[str, float]:
    """What a run's exact match in training, step by step, comes to.

    speed: its mean over all steps, the area under the curve. peak: the largest mean of three steps in a row. drop: how
    far the mean of the last three is below the peak.
    """
    width = min(3, len(exact_match))
    windows = [mean(exact_match[start : start + width]) for start in range(len(exact_match) - width + 1)]
    return {"speed": mean(exact_match), "peak": max(windows), "drop": max(windows) - windows[-1]}


def run_entry(run: Run, with_again: bool = False) -> dict[str, Any]:
    """What is kept of one run, `with_again` what it was asked once more; RunError if it is not finished.

    Of the measures, final, searches, length (the model's own tokens) and answer_rate are of held-out questions; curves
    and measures have four significant digits.
    """
    if run.evaluation is None:
        raise RunError(f"{run.folder}: evaluation.json is missing; the run is not finished (start it again to resume)")
    before, after = run.evaluation["before"], run.evaluation["after"]
    names = [name for name in run.metrics if name in CURVES or name.startswith("searches_by_hops.")]
    curves = {name: run.metrics[name].astype(float).tolist() for name in names}
    held_out = {"final": "exact_match", "searches": "mean_searches", "length": "response_length"}
    measures = {name: after[key] for name, key in (held_out | {"answer_rate": "answer_rate"}).items()}
    seconds = float(run.metrics["seconds"].sum())
    rounded = {
        "seconds": seconds + before["seconds"] + after["seconds"],
        "measures": measures | curve_measures(curves["exact_match"]),
        "curves": {"step": run.metrics.index.tolist()} | curves,
    }
    # JSON has no NaN: null where a step has no such questions
    text = json.dumps(rounded)
    rounded = json.loads(text, parse_float=lambda x: float(f"{float(x):.4g}"), parse_constant=lambda _: None)
    again = run.folder / "again" / "evaluation.json"
    more = {"again": json.loads(again.read_text(encoding="utf-8"))["greedy"]} if with_again else {}
    kept = ("profile", "seed", "masked", "steps", "quantization")
    profile = run.profile | {"profile": run.profile["name"], "steps": int(run.metrics.index[-1])}
    profile |= {"quantization": run.environment.get("quantization", run.profile.get("quantization"))}
    return {
        "run": run.name,
        **{name: profile[name] for name in kept},
        **{name: run.environment[name] for name in ("date", "machine", "command")},
        "training_seconds": round(seconds, 1),
        **run.evaluation,
        **more,
        **rounded,
    }


def _newest(runs: Sequence[Run]) -> dict[str, Any]:
    """Date, machine and versions of the newest run; RunError where another has other versions."""
    if not runs:
        raise RunError("no run folder is given")
    newest = max(runs, key=lambda run: run.environment["date"])
    for run in runs:
        if run.environment["versions"] != newest.environment["versions"]:
            raise RunError(f"{run.folder} and {newest.folder} were made with different versions; summarise them apart")
    return {name: newest.environment[name] for name in ("date", "machine", "versions")}


def summarise_runs(runs: Sequence[Run], typed: str) -> dict[str, Any]:
    """The summary of runs, by name; `typed` is the command."""
    entries = [run_entry(run) for run in sorted(runs, key=lambda run: run.name)]
    return _newest(runs) | {"command": typed, "runs": entries}


def write_summary(folders: Sequence[Path], out: Path) -> None:
    """`searchr1 report runs`: OUT.json and OUT.png, and the table in the terminal."""
    runs = [load_run(folder) for folder in folders if folder.is_dir()]
    summary = summarise_runs(runs, command())
    write_result(summary, out.with_suffix(".json"))
    save(learning_curves(by_mask(runs)), out.with_suffix(".png"))
    print(f"{out}.json, {out}.png: {len(runs)} runs\n\n{markdown_table(summary)}")


def sum_up(experiment: Any, runs_folder: Path, partial: bool = False) -> dict[str, Any]:
    """The record of an Experiment; of the finished runs alone where `partial`, and it names those that are missing.

    Raises RunError where runs are missing otherwise, none is there, one was made with other settings than the
    experiment's, or two with different versions, and for a run folder that cannot be read.
    """
    planned = experiment.runs()
    missing = [name for name in planned if not experiment.is_made(runs_folder / name)]
    if missing and not (partial and len(missing) < len(planned)):
        few = f"{len(missing)} of {len(planned)} runs are missing: {', '.join(missing)}"
        raise RunError(f"{experiment.name}: {few}; run it, or sum up what is there (--partial)")
    younger = {name: field.default for name, field in Profile.model_fields.items() if not field.is_required()}
    runs = [load_run(runs_folder / name) for name in planned if name not in missing]
    for run in runs:
        settings = younger | run.profile  # a setting younger than the run had its default
        if other := [key for key, value in planned[run.name][1] if settings.get(key) != value]:
            raise RunError(f"{run.folder}: made with another {', '.join(other)}; delete it to train it again")
    again = bool(experiment.also_evaluate)
    arms = {arm: [run_entry(run, again) for run in runs if planned[run.name][0] == arm] for arm in experiment.arms}
    options = f"--seeds {','.join(map(str, experiment.seeds))}{' --partial' * bool(missing)}"
    return {
        **_newest(runs),
        "command": f"searchr1 experiment {experiment.typed} {options}",
        "experiment": experiment.name,
        "seeds": experiment.seeds,
        **({"missing": missing, "finished": {arm: len(its) for arm, its in arms.items()}} if missing else {}),
        "seconds": round(sum(entry["seconds"] for its in arms.values() for entry in its)),
        "settings": experiment.arms,
        "arms": arms,
    }


def write_result(record: dict[str, Any], file: Path) -> None:
    """As JSON with a line for each list of numbers."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_whole(file, re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text) + "\n")


def markdown_table(summary: dict[str, Any]) -> str:
    """The summary as docs/results.md shows it: mean over seeds and half the width of Student's 95 % interval."""
    runs = summary["runs"]
    columns = {"before training": [run["before"] for run in runs if run["masked"]] or [run["before"] for run in runs]}
    columns["after, masked"] = [run["after"] for run in runs if run["masked"]]
    columns["after, unmasked"] = [run["after"] for run in runs if not run["masked"]]
    columns = {name: scores for name, scores in columns.items() if scores}
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
