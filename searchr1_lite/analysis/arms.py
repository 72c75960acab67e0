"""The arms of an experiment, runs that differ in one thing, as one small file: what each came to, and its curve.

python -m searchr1_lite.analysis.arms runs/retrievers/* --again runs/retrievers-bm25 --out data/results/retrievers.json

A run folder is named <arm>-seed<number>. `--again` holds evaluations of the same adapters, under the same names, with
something else in place (here another retriever). Verdicts are not drawn here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searchr1_lite.analysis.runs import Run, RunError
from searchr1_lite.config import Profile

CURVES = ("reward", "exact_match", "searches", "response_length", "invalid_actions")


def run_entry(run: Run, again: Path | None) -> dict[str, Any]:
    """What is kept of one run; RunError if it is not finished."""
    if run.evaluation is None:
        raise RunError(f"{run.folder}: evaluation.json is missing; the run is not finished (start it again to resume)")
    entry = {"seed": run.profile["seed"], "date": run.environment["date"], "command": run.environment["command"]}
    entry |= {key: run.evaluation[key] for key in ("before", "after", "closed_book")}
    if again and (again / run.name / "evaluation.json").is_file():
        other = load_run_evaluation(again / run.name / "evaluation.json")
        entry["again"] = {key: value for key, value in other.items() if key != "by_data_set"}
    curves = {name: [round(float(x), 4) for x in run.metrics[name]] for name in CURVES}
    return entry | {"curves": {"step": [int(step) for step in run.metrics.index]} | curves}


def load_run_evaluation(file: Path) -> dict[str, Any]:
    """The greedy summary of what `searchr1_lite.evaluation` wrote."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if "greedy" not in found:
        raise RunError(f"{file}: no greedy evaluation; evaluate with --decoding greedy")
    return found["greedy"]


def sum_up(runs: Sequence[Run], again: Path | None, command: str) -> dict[str, Any]:
    """The record. Raises RunError where arms have other seeds than each other, or were made with other versions."""
    arms: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.name):
        arm, seed, _ = run.name.rpartition("-seed")
        if not seed:
            raise RunError(f"{run.folder}: a run of an experiment is named <arm>-seed<number>")
        arms.setdefault(arm, []).append(run)
    newest = max(runs, key=lambda run: run.environment["date"])
    seeds = {arm: sorted(run.profile["seed"] for run in its) for arm, its in arms.items()}
    if len(set(map(tuple, seeds.values()))) > 1:
        raise RunError(f"the arms have not the same seeds: {seeds}")
    for run in runs:
        if run.environment["versions"] != newest.environment["versions"]:
            raise RunError(f"{run.folder} and {newest.folder} were made with different versions; sum them up apart")
    younger = {name: field.default for name, field in Profile.model_fields.items() if not field.is_required()}
    of = {arm: [younger | run.profile for run in its] for arm, its in arms.items()}  # a younger setting: its default

    def differing(profiles: list[dict[str, Any]]) -> list[str]:
        keys = [key for key in profiles[0] if key not in ("seed", "name")]
        return [key for key in keys if len({str(profile.get(key)) for profile in profiles}) > 1]

    for arm, profiles in of.items():
        if keys := differing(profiles):
            raise RunError(f"the runs of {arm} differ in {', '.join(keys)}: they are not one arm")
    varied = differing([profiles[0] for profiles in of.values()])
    return {
        **{key: newest.environment[key] for key in ("date", "machine", "versions")},
        "command": command,
        "seeds": next(iter(seeds.values())),
        "settings": {arm: {key: profiles[0].get(key) for key in varied} for arm, profiles in of.items()},
        "arms": {arm: [run_entry(run, again) for run in its] for arm, its in arms.items()},
    }
