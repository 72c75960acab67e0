"""Passages from a file, and a checksum that tells one corpus from another.

The form is Search-R1's wiki-18 (`{"id", "contents"}`, contents = `"title"\\ntext`). Cutting documents into passages
and other document formats are left out: a corpus comes as passages.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from searchr1_lite.config import ROOT, resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.files import id_field, read_rows, text_field
from searchr1_lite.types import Passage


class CorpusError(UserError):
    """A corpus that cannot be used; the message names file and line."""


def read_corpus(path: str | os.PathLike) -> Iterator[Passage]:
    """Passages of a .jsonl or .jsonl.gz file, in file order: rows `{"id", "contents"}` or `{"id", "title", "text"}`.

    Lazily, so that an error in line n is raised when line n is reached. Raises CorpusError with file and line.
    """
    seen: dict[str, str] = {}
    for where, row in read_rows(path, CorpusError, "corpus"):
        passage = passage_of(row, where)
        if passage.id in seen:
            raise CorpusError(f"{where}: the id {passage.id!r} is already used in {seen[passage.id]}")
        seen[passage.id] = where
        yield passage


def passage_of(row: dict[str, Any], where: str) -> Passage:
    key = id_field(row, where, CorpusError)
    if "contents" in row or "text" not in row:
        title, text, quoted = split_contents(text_field(row, "contents", where, CorpusError))
    else:
        title, text = (text_field(row, name, where, CorpusError) for name in ("title", "text"))
        quoted = True
    if not (title.strip() or text.strip()):
        raise CorpusError(f"{where}: passage {key!r} is empty")
    return Passage(key, title, text, quoted)


def split_contents(contents: str) -> tuple[str, str, bool]:
    """Title without quotes, text, and whether there were quotes.

    The first line is the title (Search-R1 search_r1/llm_agent/generation.py, _passages2string).
    """
    title, _, text = contents.partition("\n")
    quoted = len(title) >= 2 and title[0] == title[-1] == '"'
    return title[1:-1] if quoted else title, text, quoted


def join_contents(passage: Passage) -> str:
    """`"title"\\ntext`, as the original's corpus file has it and as its encoder reads it."""
    return f"{passage.title_line}\n{passage.text}"


def in_shards(passages: Iterable[Passage], size: int) -> Iterator[list[Passage]]:
    """The passages, `size` at a time."""
    shard = []
    for passage in passages:
        shard.append(passage)
        if len(shard) == size:
            yield shard
            shard = []
    if shard:
        yield shard


def corpus_checksum(passages: Iterable[Passage]) -> str:
    """SHA-256 over ids, titles and texts in order; any change or another order gives another checksum."""
    digest = hashlib.sha256()
    for passage in passages:
        line = json.dumps([passage.id, passage.title_line, passage.text], ensure_ascii=False)
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def load_corpus(source: str) -> list[Passage]:
    """All passages of "toy" (data/toy/corpus.jsonl) or of a file; raises CorpusError."""
    path = ROOT / "data/toy/corpus.jsonl" if source == "toy" else resolve_path(source)
    return list(read_corpus(path))
