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
from searchr1_lite.jsonl import write_whole
from searchr1_lite.training.checkpoints import is_finished

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


def measures(run: Run) -> dict[str, float]:
    """One number each; final, searches, length (the model's own tokens) and answer_rate are of held-out questions."""
    after = run.evaluation["after"]
    return {
        "final": after["exact_match"],
        **curve_measures(run.metrics["exact_match"].astype(float).tolist()),
        "searches": after["mean_searches"],
        "length": after["response_length"],
        "answer_rate": after["answer_rate"],
    }


def run_entry(run: Run) -> dict[str, Any]:
    """What is kept of one finished run; numbers have four significant digits."""
    names = [name for name in run.metrics if name in CURVES or name.startswith("searches_by_hops.")]
    evaluated = {key: run.evaluation[key] for key in ("before", "after", "closed_book")}
    seconds = run.metrics["seconds"].sum() + sum(evaluated[key]["seconds"] for key in ("before", "after"))
    curves = {name: run.metrics[name].astype(float).tolist() for name in names}
    return rounded(
        {"run": run.name, "seed": run.profile["seed"], "date": run.environment["date"], **evaluated}
        | {"seconds": float(seconds), "measures": measures(run)}
        | {"curves": {"step": run.metrics.index.tolist()} | curves}
    )


def rounded(value: Any) -> Any:
    """Floats, however deep, with four significant digits; None for what is not a number (JSON has no NaN)."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    return value


def sum_up(experiment: Experiment, runs_folder: Path, partial: bool = False) -> dict[str, Any]:
    """The record of an experiment; of the finished runs alone where `partial`, and it names those that are missing.

    Raises ExperimentError where runs are missing otherwise, none is there, one was made with other settings than the
    experiment's, or two with different versions; RunError for a run folder that cannot be read.
    """
    planned = experiment.runs()
    missing = [run.name for run in planned if not is_finished(runs_folder / run.name)]
    if missing and not (partial and len(missing) < len(planned)):
        few = f"{len(missing)} of {len(planned)} runs are missing: {', '.join(missing)}"
        raise ExperimentError(f"{experiment.name}: {few}; run it, or sum up what is there (--partial)")
    younger = {name: field.default for name, field in Profile.model_fields.items() if not field.is_required()}
    arms: dict[str, list[Run]] = {arm: [] for arm in experiment.arms}
    for arm, _, profile, name in planned:
        if name in missing:
            continue
        run = load_run(runs_folder / name)
        there, asked = younger | run.profile, profile.model_dump()
        if other := [key for key in asked if there[key] != asked[key]]:
            raise ExperimentError(f"{run.folder}: made with another {', '.join(other)}; delete it to train it again")
        arms[arm].append(run)
    runs = [run for its in arms.values() for run in its]
    newest = max(runs, key=lambda run: run.environment["date"])
    for run in runs:
        if run.environment["versions"] != newest.environment["versions"]:
            both = f"{run.folder} and {newest.folder}"
            raise ExperimentError(
                f"{both} were made with different versions; delete the older ones to train them again"
            )
    profiles = {run.arm: run.profile.model_dump() for run in planned if run.seed == experiment.seeds[0]}
    varied = [key for key in profiles[planned[0].arm] if len({str(one[key]) for one in profiles.values()}) > 1]
    entries = {arm: [run_entry(run) for run in its] for arm, its in arms.items()}
    seeds = f" --seeds {' '.join(map(str, experiment.seeds))}"
    return {
        **{key: newest.environment[key] for key in ("date", "machine", "versions")},
        "command": f"python -m searchr1_lite.experiments {experiment.typed}{seeds}{' --partial' * partial}",
        "experiment": experiment.name,
        "seeds": experiment.seeds,
        **({"missing": missing, "finished": {arm: len(its) for arm, its in arms.items()}} if missing else {}),
        "seconds": round(sum(entry["seconds"] for its in entries.values() for entry in its)),
        "settings": {arm: {key: one[key] for key in varied} for arm, one in profiles.items()},
        "arms": entries,
    }


def write_result(record: dict[str, Any], file: Path) -> None:
    """As JSON with a line for each list of numbers."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_whole(file, re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n")
