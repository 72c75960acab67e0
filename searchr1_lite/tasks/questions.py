"""Questions with their golden answers: the toy world's, a file's, or a hub dataset's, by split.

Rows are `{"id", "question", "golden_answers", "metadata"}`, the columns of RUC-NLPIR/FlashRAG_datasets. The toy world
itself is generated in `toy_world.py`.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from searchr1_lite.config import ROOT, resolve_path
from searchr1_lite.jsonl import id_field, read_rows, text_field
from searchr1_lite.types import Question

TRAIN_SHARE = 0.8  # of the questions of a file that names no splits


class QuestionError(ValueError):
    """Questions that cannot be used; the message names file and line, or the source."""


def read_questions(path: str | os.PathLike) -> list[Question]:
    """All questions of a .jsonl or .jsonl.gz file, in file order. Raises QuestionError with file and line."""
    return _checked(read_rows(path, QuestionError, "questions"))


def load_questions(source: str, split: str) -> list[Question]:
    """The questions of one split.

    `source` is "toy" (data/toy/questions.jsonl), a .jsonl(.gz) file, or a hub dataset "owner/name" or
    "owner/name:config"; several joined by "+" follow one another, each id prefixed by its source's short name.
    In files, the split is each row's `metadata.split`; a file without any is divided by a hash of the id into "train"
    (80 %) and "test" (20 %), the same on every machine and whatever else the file holds. A hub dataset without "test"
    gives its "dev" for it, as Search-R1's scripts/data_process/qa_search_test_merge.py does.
    Raises QuestionError.
    """
    parts = source.split("+")
    if len(parts) == 1 or resolve_path(source).exists():
        return _load_one(source, split)
    questions = [_prefixed(question, _short_name(part)) for part in parts for question in _load_one(part, split)]
    if len({question.id for question in questions}) != len(questions):
        raise QuestionError(f"{source}: two of the joined sources share a name and ids; name each source once")
    return questions


def _load_one(source: str, split: str) -> list[Question]:
    if not source.strip():
        raise QuestionError("an empty source of questions; give 'toy', a .jsonl(.gz) file or a hub dataset")
    path = ROOT / "data/toy/questions.jsonl" if source == "toy" else resolve_path(source)
    if path.is_file() or source == "toy" or source.endswith((".jsonl", ".jsonl.gz")):
        return _split_of_file(read_questions(path), split, path)
    return _load_hub(source, split)


def _checked(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Question]:
    questions: dict[str, Question] = {}
    for where, row in rows:
        question = _question(row, where)
        if question.id in questions:
            raise QuestionError(f"{where}: the id {question.id!r} is used twice")
        questions[question.id] = question
    return list(questions.values())


def _question(row: dict[str, Any], where: str) -> Question:
    key = id_field(row, where, QuestionError)
    text = text_field(row, "question", where, QuestionError)
    if not text.strip():
        raise QuestionError(f"{where}: question {key!r} is empty")
    answers = row.get("golden_answers")
    if not isinstance(answers, list) or not answers:
        raise QuestionError(f"{where}: question {key!r} needs 'golden_answers', a list of at least one answer")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise QuestionError(f"{where}: 'golden_answers' of question {key!r} must be non-empty strings, got {answers!r}")
    metadata = row.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise QuestionError(f"{where}: 'metadata' of question {key!r} must be an object, got {metadata!r}")
    return Question(key, text, tuple(answers), metadata or {})


def _split_of_file(questions: list[Question], split: str, path: Path) -> list[Question]:
    named = sum("split" in question.metadata for question in questions)
    if named not in (0, len(questions)):
        raise QuestionError(f"{path}: {named} of {len(questions)} rows have metadata.split; all or none must")
    splits = [question.metadata["split"] if named else hash_split(question.id) for question in questions]
    chosen = [question for question, its in zip(questions, splits, strict=True) if its == split]
    if not chosen:
        raise QuestionError(f"{path}: no questions in split {split!r}; there are {', '.join(sorted(set(splits)))}")
    return chosen


def hash_split(key: str) -> str:
    """ "train" or "test" for an id, by the first 8 bytes of its SHA-256."""
    fraction = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") / 2**64
    return "train" if fraction < TRAIN_SHARE else "test"


def _load_hub(source: str, split: str) -> list[Question]:
    import datasets

    name, _, config = source.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # datasets and the hub client raise many kinds
        raise QuestionError(
            f"questions {source!r}: neither a file here nor a dataset that could be loaded "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). With a connection, load it once with "
            f"datasets.load_dataset({name!r}, {config or None!r}), which keeps a copy for offline use"
        ) from error
    chosen = "dev" if split == "test" and split not in splits and "dev" in splits else split
    if chosen not in splits:
        raise QuestionError(f"{source}: no split {split!r}; there are {', '.join(splits)}")
    return _checked((f"{source}[{chosen}]:{number}", row) for number, row in enumerate(splits[chosen], 1))


def _short_name(source: str) -> str:
    """`nq` for "owner/name:nq", `hotpotqa-questions` for ".../hotpotqa/questions.jsonl.gz"."""
    if source.endswith((".jsonl", ".jsonl.gz")):
        path = resolve_path(source).resolve()
        return f"{path.parent.name}-{path.name.partition('.jsonl')[0]}"
    return source.partition(":")[2] or source.rpartition("/")[2]


def _prefixed(question: Question, name: str) -> Question:
    return Question(f"{name}/{question.id}", question.question, question.golden_answers, question.metadata)
