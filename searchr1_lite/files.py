"""Reading JSON lines strictly (plain or gzipped, every error with its file and line), and writing JSON whole or not.

What a row must hold is for the callers to say (`retrieval/corpus.py`, `tasks/questions.py`).
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_rows(path: str | os.PathLike, error: type[Exception], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `("file:line", row)` for each line of a .jsonl or .jsonl.gz file, as UTF-8 JSON objects.

    Raises `error` for a missing, empty or cut-off file, and for a line that is blank, not UTF-8, not JSON or not an
    object. `what` names the content in messages ("corpus", "questions").
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"no {what} file at {path}")
    where = f"{path}:1"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                yield where, _row(line, where, error)
                where = f"{path}:{number + 1}"
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise error(f"{where}: the gzip file is cut off or damaged ({problem}); fetch or write it again") from None
    if not number:
        raise error(f"{path}: the file is empty, it holds no {what}")


def _row(line: bytes, where: str, error: type[Exception]) -> dict[str, Any]:
    if not line.strip():
        raise error(f"{where}: blank line; every line must be one JSON object")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 (byte {problem.start} of the line is 0x{line[problem.start]:02x})") from None
    except (json.JSONDecodeError, RecursionError) as problem:
        raise error(f"{where}: not JSON ({problem})") from None
    if not isinstance(row, dict):
        raise error(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def text_field(row: dict[str, Any], key: str, where: str, error: type[Exception]) -> str:
    """The string at `key`; `error` if it is missing, of another type, or holds half a surrogate pair."""
    if key not in row:
        raise error(f"{where}: the field {key!r} is missing; there are {', '.join(map(repr, row)) or 'none'}")
    value = row[key]
    if not isinstance(value, str):
        raise error(f"{where}: {key!r} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise error(f"{where}: {key!r} holds half a surrogate pair, which is no character") from None
    return value


def id_field(row: dict[str, Any], where: str, error: type[Exception]) -> str:
    """The row's id as text; whole numbers are taken as they are written."""
    if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
        return str(row["id"])
    value = text_field(row, "id", where, error)
    if not value.strip():
        raise error(f"{where}: 'id' is empty")
    return value


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a .jsonl.gz file, as a gzip member of their own."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("ab") as file:
        file.write(gzip.compress(text.encode("utf-8"), mtime=0))


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a value as JSON."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write so that a reader, or a run that goes on, finds the old file or the new one, never half of one.

    Text is written as UTF-8, its line ends as they are. The folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(beside, path)
