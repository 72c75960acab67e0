"""A run folder that can be cut off at any moment and go on to the same result.

The trainer's own checkpoints hold weights, optimizer, scheduler and data position. Beside each one a mark is written
last: how long the run's growing files were then. Going on means cutting those files back to the mark; a checkpoint
without a mark was not finished and does not count. Leaves out: runs on several machines, changing a run's settings.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from searchr1_lite.config import Profile, resolve_path
from searchr1_lite.jsonl import write_json
from searchr1_lite.types import Question

GROWING = ("metrics.jsonl", "trajectories.jsonl.gz")
MARK = "complete.json"
MODEL_FILES = ("config.json", "tokenizer*.json", "*.safetensors")  # what a run depends on; a folder may hold more


class RunFolderError(ValueError):
    """A run folder that cannot be used for this run; the message says why and what to do."""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fingerprint(profile: Profile, questions: list[Question], eval_questions: list[Question]) -> dict[str, str]:
    """Checksums of what a profile only names: the model's files (of a local folder) and the questions."""
    folder = resolve_path(profile.model)
    parts = [path for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))]
    return {
        "model": _digest(path.read_bytes() for path in parts) if parts else profile.model,
        "questions": _digest(_question_bytes(question) for question in questions),
        "eval_questions": _digest(_question_bytes(question) for question in eval_questions),
    }


def _question_bytes(question: Question) -> bytes:
    return repr((question.id, question.question, question.golden_answers)).encode()


def _digest(pieces: Any) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]


def check_same_run(run_folder: Path, profile: Profile, inputs: dict[str, str]) -> None:
    """Refuse a folder that holds a run with other settings or inputs; a folder without a run is fine.

    A setting that is younger than the run had its default there.
    """
    config = run_folder / "config.yaml"
    if not config.is_file():
        return
    newer = {name: field.default for name, field in Profile.model_fields.items() if not field.is_required()}
    there = newer | (yaml.safe_load(config.read_text(encoding="utf-8")) or {})
    then = read_json(run_folder / "environment.json").get("inputs", {})
    there |= {f"contents of {key}": value for key, value in then.items()}
    asked = profile.model_dump() | {f"contents of {key}": value for key, value in inputs.items()}
    different = [
        f"{key}: {there[key]!r} there, {asked[key]!r} asked for"
        for key in sorted(there.keys() & asked.keys())
        if there[key] != asked[key]
    ]
    different += [f"{key}: a setting that is gone since" for key in sorted(there.keys() - asked.keys())]
    different += [f"{key}: a setting that did not exist" for key in sorted(asked.keys() - there.keys())]
    if different:
        raise RunFolderError(
            f"{run_folder} holds another run ({'; '.join(different)}). Give another run folder, or delete this one."
        )


def is_finished(run_folder: Path) -> bool:
    """Whether the run came to its end: the evaluation after training is the last thing written."""
    return (run_folder / "evaluation.json").is_file()


def mark_checkpoint(run_folder: Path, checkpoint: Path) -> None:
    sizes = {name: _size(run_folder / name) for name in GROWING}
    write_json(checkpoint / MARK, {"bytes": sizes})


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint with its mark."""
    marked = [path.parent for path in (run_folder / "checkpoints").glob(f"checkpoint-*/{MARK}")]
    return max(marked, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def rewind(run_folder: Path, checkpoint: Path | None) -> None:
    """Cut the growing files back to where they were at `checkpoint` (None: the start); drop unfinished checkpoints."""
    sizes = read_json(checkpoint / MARK)["bytes"] if checkpoint else dict.fromkeys(GROWING, 0)
    for name in GROWING:
        path = run_folder / name
        if _size(path) < sizes[name]:
            raise RunFolderError(
                f"{path} is shorter than when {checkpoint.name} was written ({_size(path)} bytes, not {sizes[name]}): "
                f"it was changed since. Delete {run_folder} to start again."
            )
        if path.is_file():
            os.truncate(path, sizes[name])
    for folder in (run_folder / "checkpoints").glob("checkpoint-*"):
        if not (folder / MARK).is_file():
            shutil.rmtree(folder)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
