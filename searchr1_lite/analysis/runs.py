"""A run is a folder; this reads it. No torch, no model: a run made on a GPU is looked at on any laptop.

What the files hold is said in `training/record.py`, which writes them. Comparing runs is here too (`load_runs`,
`by_mask`), drawing them is not.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from searchr1_lite.errors import UserError
from searchr1_lite.files import read_rows

# Settings in which runs that are averaged may differ: those under study, and those that change no number.
MAY_DIFFER = {"name", "seed", "masked", "steps", "device", "save_every", "save_trajectories_every"}
MAY_DIFFER |= {"rollout_rows", "micro_batch_tokens", "cuda_graphs"}


class RunError(UserError):
    """A run folder that cannot be read; the message names the file, and the line where there is one."""


@dataclass(frozen=True)
class Run:
    """One run. `metrics` has a row a step, indexed by step; nested values have columns such as
    "exact_match_by_hops.2". `evaluation` is None while the run is not finished."""

    name: str
    folder: Path
    profile: dict[str, Any]
    environment: dict[str, Any]
    metrics: pd.DataFrame
    evaluation: dict[str, Any] | None

    @property
    def masked(self) -> bool:
        return bool(self.profile["masked"])

    @property
    def hops(self) -> list[str]:
        """Hop counts of the questions trained on, "1", "2", …; empty where questions do not tell."""
        prefix = "exact_match_by_hops."
        return sorted((column.removeprefix(prefix) for column in self.metrics if column.startswith(prefix)), key=int)

    def trajectories(self, phase: str | None = None) -> Iterator[dict[str, Any]]:
        """Saved trajectories, read as they are asked for; `phase` is "before", "train" or "after"."""
        rows = read_rows(self.folder / "trajectories.jsonl.gz", RunError, "trajectories")
        return (row for _, row in rows if phase is None or row["phase"] == phase)


def load_run(folder: str | Path) -> Run:
    """Read a run folder; RunError where a file is missing or broken.

    A last line of metrics.jsonl that was cut off in writing is left out, with a warning: the run stopped there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such run folder")
    profile = read_mapping(folder / "config.yaml")
    if "masked" not in profile:
        raise RunError(f"{folder / 'config.yaml'}: the setting 'masked' is missing; is this a run's configuration?")
    evaluation = folder / "evaluation.json"
    return Run(
        name=folder.resolve().name,
        folder=folder,
        profile=profile,
        environment=read_mapping(folder / "environment.json"),
        metrics=_read_metrics(folder / "metrics.jsonl"),
        evaluation=_read_evaluation(evaluation) if evaluation.exists() else None,
    )


def load_runs(folder: str | Path) -> list[Run]:
    """The runs in a folder of run folders, by name; or the one run that the folder itself is."""
    folder = Path(folder)
    if (folder / "config.yaml").exists():
        return [load_run(folder)]
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not found:
        raise RunError(f"{folder}: no run is here (no config.yaml in it or one folder below); notebook 03 makes one")
    return [load_run(path) for path in found]


def by_mask(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs as {"masked": [...], "unmasked": [...]}, groups without runs left out.

    Raises RunError where the runs differ in more than mask, seed and length: their mean would mean nothing.
    """
    keys = set().union(*(run.profile for run in runs)) - MAY_DIFFER
    # a setting that is off, as `defects: []` of older runs, is as good as none
    differing = sorted(key for key in keys if len({json.dumps(run.profile.get(key) or None) for run in runs}) > 1)
    if differing:
        raise RunError(f"runs that differ in {', '.join(differing)} are not averaged; give them one by one")
    groups = {"masked": [run for run in runs if run.masked], "unmasked": [run for run in runs if not run.masked]}
    return {label: members for label, members in groups.items() if members}


def before_and_after(run: Run) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Trajectories of the same question before and after training, telling pairs first.

    Telling: wrong before and right after; among those, more hops first. Otherwise in the file's order.
    """
    before = {row["question"]["id"]: row for row in run.trajectories("before")}
    pairs = [
        (before[row["question"]["id"]], row) for row in run.trajectories("after") if row["question"]["id"] in before
    ]
    return sorted(pairs, key=lambda pair: (pair[0]["exact_match"] - pair[1]["exact_match"], -_hops(pair[1])))


def _hops(row: dict[str, Any]) -> int:
    return row["question"].get("metadata", {}).get("hops") or 0


def _read_text(path: Path) -> str:
    if not path.exists():
        raise RunError(f"{path}: is missing; a run folder has config.yaml, environment.json and metrics.jsonl")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: is not UTF-8 ({error})") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping; RunError if it does not."""
    text = _read_text(path)
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds a {type(value).__name__} where a mapping is expected")
    return value


def _read_evaluation(path: Path) -> dict[str, Any]:
    evaluation = read_mapping(path)
    missing = [key for key in ("before", "after", "closed_book") if key not in evaluation]
    if missing:
        raise RunError(f"{path}: lacks {', '.join(missing)}")
    return evaluation


def _read_metrics(path: Path) -> pd.DataFrame:
    text = _read_text(path)
    lines = text.splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                warnings.warn(f"{path}:{number}: the last line was cut off in writing and is left out", stacklevel=3)
                break
            raise RunError(f"{path}:{number}: {error}") from None
    if not rows:
        raise RunError(f"{path}: holds no step")
    steps = [row["step"] for row in rows]
    for number, (earlier, later) in enumerate(pairwise(steps), start=2):
        if later <= earlier:
            raise RunError(f"{path}:{number}: step {later} follows step {earlier}; the file holds more than one run")
    return pd.json_normalize(rows).set_index("step")


def _row(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("not a mapping with a whole number 'step'")
    return row
