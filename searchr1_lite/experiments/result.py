"""An experiment's runs as one small file: what each came to, and its curves. Verdicts are not drawn here."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searchr1_lite.analysis.runs import Run, load_run
from searchr1_lite.config import Profile
from searchr1_lite.evaluation.metrics import mean
from searchr1_lite.experiments.plan import Experiment, ExperimentError
from searchr1_lite.files import write_whole
from searchr1_lite.runfolder import is_finished

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


def run_entry(run: Run) -> dict[str, Any]:
    """What is kept of one finished run; numbers have four significant digits.

    Of the measures, final, searches, length (the model's own tokens) and answer_rate are of held-out questions.
    """
    before, after = run.evaluation["before"], run.evaluation["after"]
    names = [name for name in run.metrics if name in CURVES or name.startswith("searches_by_hops.")]
    curves = {name: run.metrics[name].astype(float).tolist() for name in names}
    held_out = {"final": "exact_match", "searches": "mean_searches", "length": "response_length"}
    held_out = {name: after[key] for name, key in (held_out | {"answer_rate": "answer_rate"}).items()}
    entry = {
        **{"run": run.name, "seed": run.profile["seed"], "date": run.environment["date"]},
        **run.evaluation,
        "seconds": float(run.metrics["seconds"].sum()) + before["seconds"] + after["seconds"],
        "measures": held_out | curve_measures(curves["exact_match"]),
        "curves": {"step": run.metrics.index.tolist()} | curves,
    }
    # JSON has no NaN: null where a step has no such questions
    return json.loads(json.dumps(entry), parse_float=lambda x: float(f"{float(x):.4g}"), parse_constant=lambda _: None)


def sum_up(experiment: Experiment, runs_folder: Path, partial: bool = False) -> dict[str, Any]:
    """The record of an experiment; of the finished runs alone where `partial`, and it names those that are missing.

    Raises ExperimentError where runs are missing otherwise, none is there, one was made with other settings than the
    experiment's, or two with different versions; RunError for a run folder that cannot be read.
    """
    planned = experiment.runs()
    missing = [name for name in planned if not is_finished(runs_folder / name)]
    if missing and not (partial and len(missing) < len(planned)):
        few = f"{len(missing)} of {len(planned)} runs are missing: {', '.join(missing)}"
        raise ExperimentError(f"{experiment.name}: {few}; run it, or sum up what is there (--partial)")
    younger = {name: field.default for name, field in Profile.model_fields.items() if not field.is_required()}
    runs = [load_run(runs_folder / name) for name in planned if name not in missing]
    for run in runs:
        there = younger | run.profile  # a setting younger than the run had its default
        if other := [key for key, value in planned[run.name][1] if there.get(key) != value]:
            raise ExperimentError(f"{run.folder}: made with another {', '.join(other)}; delete it to train it again")
    newest = max(runs, key=lambda run: run.environment["date"]).environment
    if old := [run.name for run in runs if run.environment["versions"] != newest["versions"]]:
        raise ExperimentError(f"made with other versions than the newest run, delete to train again: {', '.join(old)}")
    arms = {arm: [run_entry(run) for run in runs if planned[run.name][0] == arm] for arm in experiment.arms}
    options = f"--seeds {' '.join(map(str, experiment.seeds))}{' --partial' * bool(missing)}"
    return {
        **{key: newest[key] for key in ("date", "machine", "versions")},
        "command": f"python -m searchr1_lite.experiments {experiment.typed} {options}",
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
    write_whole(file, re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n")
