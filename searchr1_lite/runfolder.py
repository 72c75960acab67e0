"""Which run a folder holds, and whether it came to its end. What a run writes there is in training/record.py.

Leaves out changing a run's settings: a folder with another run is refused.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from searchr1_lite.config import Profile, resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.types import Question

MODEL_FILES = ("config.json", "tokenizer*.json", "*.safetensors")  # what a run depends on; a folder may hold more


class RunFolderError(UserError):
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

    A setting that is younger than the run had its default there, and one that is gone since must have been off.
    """
    config = run_folder / "config.yaml"
    if not config.is_file():
        return
    newer = {name: field.default for name, field in type(profile).model_fields.items() if not field.is_required()}
    there = newer | (yaml.safe_load(config.read_text(encoding="utf-8")) or {})
    then = read_json(run_folder / "environment.json").get("inputs", {})
    there |= {f"contents of {key}": value for key, value in then.items()}
    asked = profile.model_dump() | {f"contents of {key}": value for key, value in inputs.items()}
    different = [
        f"{key}: {there[key]!r} there, {asked[key]!r} asked for"
        for key in sorted(there.keys() & asked.keys())
        if there[key] != asked[key]
    ]
    different += [
        f"{key}: {there[key]!r} there, and no setting here" for key in sorted(there.keys() - asked.keys()) if there[key]
    ]
    different += [f"{key}: a setting that did not exist" for key in sorted(asked.keys() - there.keys())]
    if different:
        raise RunFolderError(
            f"{run_folder} holds another run ({'; '.join(different)}). Give another run folder, or delete this one."
        )


def is_finished(run_folder: Path) -> bool:
    """Whether the run came to its end: the evaluation after training is the last thing written."""
    return (run_folder / "evaluation.json").is_file()
