"""Questions with their golden answers: the paper's sets by name, the toy world's, or your own files, by split.

Rows are `{"id", "question", "golden_answers", "metadata"}`, the columns of RUC-NLPIR/FlashRAG_datasets, and may say
where they are from in `data_source`, as Search-R1's own files do. Files are read here, row by row, so that an error has
its line and nothing is copied into a cache; hub sets are read by the `datasets` library. Left out: `metadata.context`,
the paragraphs that HotpotQA and 2WikiMultihopQA hand out with each question (gigabytes, and here the model searches),
and files that hold only a rendered `prompt`. The toy world itself is generated in `toy_world.py`.
"""

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from searchr1_lite.config import ROOT, Profile, resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.files import id_field, read_rows, text_field
from searchr1_lite.types import Question

TRAIN_SHARE = 0.8  # of the questions of a file that names no splits
COLUMNS = ("id", "question", "golden_answers")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# The seven sets of the paper's evaluation and the rows of the splits that Search-R1's qa_search_test_merge.py takes.
EVALUATION = {
    "nq": 3_610,
    "triviaqa": 11_313,
    "popqa": 14_267,
    "hotpotqa": 7_405,
    "2wikimultihopqa": 12_576,
    "musique": 2_417,
    "bamboogle": 125,
}
MIX = "nq_hotpotqa_train"
HUB = {name: f"RUC-NLPIR/FlashRAG_datasets:{name}" for name in EVALUATION} | {MIX: f"PeterJinGo/{MIX}"}
ROWS = {(name, "test"): count for name, count in EVALUATION.items()} | {(MIX, "train"): 169_615, (MIX, "test"): 51_713}

Named = tuple[str, Question]  # the name of its set, and the question with its id in that set


class QuestionError(UserError):
    """Questions that cannot be used; the message names file and line (in parquet, row), or the source."""


def supporting_ids(question: Question) -> list[str]:
    """Ids of the passages that the question needs, from `supporting_ids` or `gold_ids`; QuestionError if none."""
    ids = question.metadata.get("supporting_ids") or question.metadata.get("gold_ids")
    if not ids:
        raise QuestionError(
            f"question {question.id!r} names no supporting passages (metadata supporting_ids or gold_ids)"
        )
    return [str(key) for key in ids]


def read_questions(path: str | os.PathLike) -> list[Question]:
    """All questions of a .jsonl, .jsonl.gz or .parquet file, in file order. Raises QuestionError with file and line."""
    return keep_apart(_read_file(Path(path)), str(path))


def load_questions(source: str, split: str) -> list[Question]:
    """The questions of one split.

    `source` is one of these, or several of them joined by "+":
    - "nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle": the sets of the paper's
      evaluation, and "paper", all seven (RUC-NLPIR/FlashRAG_datasets);
    - "nq_hotpotqa_train": what Search-R1 trains on ("train"), and all seven ("test") (PeterJinGo/nq_hotpotqa_train);
    - "toy" (data/toy/questions.jsonl), a .jsonl, .jsonl.gz or .parquet file, or a folder of such files named by split;
    - another hub dataset, "owner/name" or "owner/name:config".
    What is on the hub is looked for in data/cache/name/config first.

    Where the questions are of more than one set (by `data_source`, or as joined), each id is prefixed by its set, so
    that equal ids of two sets stay apart; Search-R1 merges their GRPO groups. In a single file, the split is each row's
    `metadata.split` or `extra_info.split`; a file without any is divided by a hash of the id into "train" (80 %) and
    "test" (20 %), the same on every machine and whatever else the file holds; "all" is the whole file. A set without
    "test" gives its "dev" for it, as Search-R1's scripts/data_process/qa_search_test_merge.py does; that script would
    go on to "train", which no set of the paper needs and which is refused here.
    Raises QuestionError, also where a set loaded by its name has not as many questions as the paper's.
    """
    return keep_apart(load_by_set(source, split), source)


def load_by_set(source: str, split: str) -> list[Named]:
    """As `load_questions`, each question with the name of its set and its id without prefix."""
    parts = [source] if resolve_path(source).exists() else source.split("+")
    parts = [name for part in parts for name in (EVALUATION if part == "paper" else [part])]
    return [pair for part in parts for pair in _load_one(part, split, parts)]


def keep_apart(pairs: list[Named], source: str) -> list[Question]:
    """The questions with ids that are unique over all sets; `source` is named in the error where they are not.

    Where there are several sets, the metadata says which a question is of, as `data_source`.
    """
    several = len({name for name, _ in pairs}) > 1
    seen: dict[str, Question] = {}
    for name, question in pairs:
        key = f"{name}/{question.id}" if several else question.id
        if key in seen:
            raise QuestionError(f"{source}: two of the joined sources share the id {key!r}; name each source once")
        origin = {"data_source": name} if several else {}
        seen[key] = replace(question, id=key, metadata=question.metadata | origin)
    return list(seen.values())


def _load_one(source: str, split: str, parts: list[str]) -> list[Named]:
    if not source.strip():
        raise QuestionError("an empty source of questions; give 'toy', the name of a set, a file, or a hub dataset")
    if source in HUB:
        return _load_named(source, split, parts)
    path = ROOT / "data/toy/questions.jsonl" if source == "toy" else resolve_path(source)
    if path.is_dir():
        file = _file_of_split(path, split)
        if file is None:
            there = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
            raise QuestionError(f"{path}: no {split}{' or '.join(SUFFIXES)} in this folder; there is {there}")
        return _read_file(file, path.resolve().name)
    if path.is_file() or source == "toy" or source.endswith(SUFFIXES):
        return _split_of_file(_read_file(path, "toy" if source == "toy" else ""), split, path)
    if source.count("/") != 1:  # a hub dataset has an owner
        raise QuestionError(f"no questions called {source!r}, and no such file; there are toy, paper, {', '.join(HUB)}")
    return _load_hub(source, split, [source.partition(":")[2]])


def _load_named(name: str, split: str, parts: list[str]) -> list[Named]:
    """A set of as many questions as the paper's, or an error."""
    folders = [part for part in parts if part in EVALUATION] if name in EVALUATION else []
    pairs = _load_hub(HUB[name], split, folders)
    expected = ROWS.get((name, split), len(pairs))
    if len(pairs) != expected:
        raise QuestionError(
            f"{name}: {len(pairs):,} questions, but the {split} set of the paper has {expected:,}; what was loaded is "
            f"cut off or was changed. Fetch it again, or give {HUB[name]!r} as questions to take it as it is"
        )
    return pairs


def _file_of_split(folder: Path, split: str) -> Path | None:
    """`train.jsonl`, `test.parquet`, ... in a folder; "dev" stands in for a missing "test"."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        raise QuestionError(f"{folder}: both {found[0].name} and {found[1].name}; keep one of them")
    if not found and split == "test":
        return _file_of_split(folder, "dev")
    return found[0] if found else None


def _read_file(path: Path, name: str = "") -> list[Named]:
    rows = _parquet_rows(path) if path.suffix == ".parquet" else read_rows(path, QuestionError, "questions")
    whole = path.resolve()
    return _checked(rows, name or f"{whole.parent.name}-{whole.name.partition('.')[0]}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("file:row n", row)`, rows counted from 1, of the columns that are used here."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if not path.is_file():
        raise QuestionError(f"no questions file at {path}")
    try:
        with ParquetFile(path) as file:
            rows = file.read(_wanted(file.schema_arrow, path)).to_pylist()
    except (UnicodeDecodeError, pyarrow.ArrowException, OSError) as problem:
        reason = str(problem).partition("\n")[0]
        raise QuestionError(f"{path}: the parquet file is cut off or damaged ({reason}); fetch it again") from None
    if not rows:
        raise QuestionError(f"{path}: the file is empty, it holds no questions")
    return ((f"{path}:row {number}", row) for number, row in enumerate(rows, 1))


def _wanted(schema: Any, path: Path) -> list[str]:
    """The columns to read, and the fields of those that have some."""
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        hint = " (a rendered prompt will not do: the question itself is needed)" if "prompt" in schema.names else ""
        raise QuestionError(f"{path}: no column {missing[0]!r}{hint}; there are {', '.join(schema.names)}")
    used = [field for field in schema if field.name in (*COLUMNS, "data_source", "extra_info", "metadata")]
    return [leaf.name for field in used for leaf in field.flatten() if leaf.name != "metadata.context"]


def _checked(rows: Iterable[tuple[str, dict[str, Any]]], name: str) -> list[Named]:
    """`name` is the set of the rows that have no `data_source`."""
    questions: dict[Named, Question] = {}
    for where, row in rows:
        question = _question(row, where)
        source = text_field(row, "data_source", where, QuestionError) if row.get("data_source") else name
        if (source, question.id) in questions:
            raise QuestionError(f"{where}: the id {question.id!r} is used twice in {source!r}")
        questions[source, question.id] = question
    return [(source, question) for (source, _), question in questions.items()]


def _question(row: dict[str, Any], where: str) -> Question:
    key = id_field(row, where, QuestionError)
    text = text_field(row, "question", where, QuestionError)
    if not text.strip():
        raise QuestionError(f"{where}: question {key!r} is empty")
    answers = row.get("golden_answers")
    if not isinstance(answers, list) or not answers:
        raise QuestionError(f"{where}: question {key!r} needs 'golden_answers', a list of at least one answer")
    if not all(isinstance(answer, str) for answer in answers) or not any(map(str.strip, answers)):
        raise QuestionError(
            f"{where}: 'golden_answers' of question {key!r} must be strings, and one of them not blank, got {answers!r}"
        )
    for name in ("metadata", "extra_info"):
        if not isinstance(row.get(name), dict | None):
            raise QuestionError(f"{where}: {name!r} of question {key!r} must be an object, got {row[name]!r}")
    metadata = {"split": (row.get("extra_info") or {}).get("split")} | (row.get("metadata") or {})
    kept = {name: value for name, value in metadata.items() if name != "context" and value is not None}
    return Question(key, text, tuple(answers), kept)


def _split_of_file(pairs: list[Named], split: str, path: Path) -> list[Named]:
    if split == "all":
        return pairs
    named = sum("split" in question.metadata for _, question in pairs)
    if named not in (0, len(pairs)):
        raise QuestionError(f"{path}: {named} of {len(pairs)} rows have metadata.split; all or none must")
    splits = [question.metadata["split"] if named else hash_split(question.id) for _, question in pairs]
    chosen = [pair for pair, name in zip(pairs, splits, strict=True) if name == split]
    if not chosen:
        names = ", ".join(sorted(map(str, set(splits))))
        raise QuestionError(f"{path}: no questions in split {split!r}; there are {names}")
    return chosen


def hash_split(key: str) -> str:
    """ "train" or "test" for an id, by the first 8 bytes of its SHA-256."""
    fraction = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") / 2**64
    return "train" if fraction < TRAIN_SHARE else "test"


def _load_hub(source: str, split: str, folders: list[str]) -> list[Named]:
    """A hub dataset, or what was fetched of it into data/cache; `folders` of it are what the message tells to fetch."""
    repository, _, config = source.partition(":")
    name = repository.rpartition("/")[2]
    cached = _file_of_split(ROOT / "data/cache" / name / config, split)
    if cached:
        return _read_file(cached, config or name)
    import datasets

    columns = {"columns": [*COLUMNS, "data_source", "metadata"]} if source == HUB[MIX] else {}  # not the prompts
    try:
        splits = datasets.load_dataset(repository, config or None, **columns)
    except Exception as error:  # datasets and the hub client raise many kinds
        reason = str(error.__cause__ or error).partition("\n")[0]
        only = "".join(f" --include '{folder}/*'" for folder in folders if folder)
        raise QuestionError(
            f"questions {source!r}: neither a file here nor a dataset that could be loaded "
            f"({type(error).__name__}: {reason}). With a connection, fetch it once, in the project's folder:\n"
            f"  hf download {repository} --repo-type dataset{only} --local-dir data/cache/{name}\n"
            f"It is found there, and {Path('data/cache', name, config).as_posix()} can be given as questions"
        ) from error
    chosen = "dev" if split == "test" and split not in splits and "dev" in splits else split
    if chosen not in splits:
        raise QuestionError(f"{source}: no split {split!r}; there are {', '.join(splits)}")
    rows = ((f"{source}[{chosen}]:{number}", row) for number, row in enumerate(splits[chosen], 1))
    return _checked(rows, config or name)


def held_out(profile: Profile) -> list[Question]:
    """The `eval_questions` questions asked before and after training: the same ones whatever the run's seed."""
    questions = load_questions(profile.questions, profile.test_split)
    return random.Random(0).sample(questions, min(profile.eval_questions, len(questions)))


def question_order(questions: Sequence[Question], profile: Profile) -> list[Question]:
    """The questions of all steps, one after another: a new shuffle for each pass over them, made from the seed."""
    if len({question.id for question in questions}) < len(questions):
        raise QuestionError("two training questions share an id; ids must be unique")
    if len(questions) < profile.questions_per_step:
        raise QuestionError(f"questions_per_step = {profile.questions_per_step}, but there are only {len(questions)}")
    shuffle, order = random.Random(profile.seed), []
    needed = profile.steps * profile.questions_per_step
    while len(order) < needed:
        # A pass ends with its last whole step, so that no step asks a question twice.
        whole = len(questions) // profile.questions_per_step * profile.questions_per_step
        order += shuffle.sample(list(questions), whole)
    return order[:needed]
