"""Your own documents as a corpus: text, Markdown and HTML, cut into passages of about 100 words as wiki-18 has.

`searchr1 index documents notes/ page.html --out corpus.jsonl` writes rows `{"id", "contents"}`,
which `corpus.read_corpus` reads and the original's tools too. Ids are the file's path below the folder that all files
share, and a number: "notes/rome.md#3". Titles are the page's, the first heading, or else the file's name.
No word is lost but what trafilatura takes for a page's menus, and its comments. Markdown keeps its marks. Left out:
PDF and office formats, passages that overlap, and documents that do not fit in memory.
"""

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from searchr1_lite.errors import UserError
from searchr1_lite.retrieval.corpus import join_contents
from searchr1_lite.types import Passage

MARKDOWN, HTML = (".md", ".markdown"), (".html", ".htm")
SUPPORTED = (".txt", *MARKDOWN, *HTML)
WORDS = 100  # as DPR cut Wikipedia (arXiv 2004.04906, section 4.1)
# "# ..." is no heading in the settings before a document or in code
ASIDE = re.compile(r"\A---\s*$.*?^---\s*$|^ {0,3}(```|~~~).*?^ {0,3}\1", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(\S.*?)[ \t\r#]*$|^(\S.*)\n=+[ \t\r]*$", re.MULTILINE)


class DocumentError(UserError):
    """A document that cannot be used; the message names the file."""


def find_files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The files, and all files in the folders, in the order of their paths; DocumentError for one of another type."""

    def stop(error: OSError) -> None:
        raise error

    files: set[Path] = set()
    for path in (Path(os.path.abspath(path)) for path in paths):
        folders = os.walk(path, onerror=stop, followlinks=True)
        files.update(
            [Path(folder, name) for folder, _, names in folders for name in names] if path.is_dir() else [path]
        )
    for file in files:
        if not file.name.lower().endswith(SUPPORTED):
            raise DocumentError(f"{file}: not a type that can be read; there are {', '.join(SUPPORTED)}")
    return sorted(files)


def cut(text: str, words: int = WORDS) -> list[str]:
    """Passages of at most `words` words: all of the text's words, each once, in order.

    semchunk cuts where a paragraph, else a sentence, else a clause ends. Alone it leaves headings and short ends as
    passages; so it cuts into pieces of half the length, which are joined while they fit.
    """
    spans: list[tuple[int, int]] = []
    half = max(1, words // 2)
    for start, end in _optional("semchunk").chunk(text, half, _count, memoize=False, offsets=True)[1]:
        if spans and _count(text[spans[-1][0] : end]) <= words:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return [text[start:end].strip() for start, end in spans]


def passages_of(file: Path, name: str, words: int = WORDS) -> Iterator[Passage]:
    """The passages of one file, with ids "name#1", "name#2", ...; raises DocumentError."""
    title, text = _document(file)
    if not text.strip():
        raise DocumentError(f"{file}: there is no text in it")
    for number, passage in enumerate(cut(text, words), 1):
        yield Passage(f"{name}#{number}", " ".join(title.split()) or Path(name).name, passage)


def write_corpus(paths: Iterable[str | os.PathLike], out: Path, words: int = WORDS) -> int:
    """Write the passages of all documents to `out`, whole or not at all; returns how many. Raises DocumentError."""
    files = find_files(paths)
    if not files:
        raise DocumentError(f"no documents in {', '.join(map(str, paths))}")
    base = Path(os.path.commonpath([file.parent for file in files]))
    beside = out.with_name(out.name + ".new")
    out.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as to:
            for file in tqdm(files, unit="file", disable=None):  # None: only where a person looks on
                name = os.fsencode(file.relative_to(base).as_posix()).decode(errors="replace")
                for passage in passages_of(file, name, words):
                    count += 1
                    row = {"id": passage.id, "contents": join_contents(passage)}
                    to.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    return count


def _document(file: Path) -> tuple[str, str]:
    """Title (or "") and text."""
    if file.name.lower().endswith(HTML):
        return _page(file)
    text = _decoded(file, file.read_bytes(), "utf-8-sig")
    heading = HEADING.search(ASIDE.sub("", text)) if file.name.lower().endswith(MARKDOWN) else None
    return heading[1] or heading[2] if heading else "", text


def _page(file: Path) -> tuple[str, str]:
    data = file.read_bytes()
    declared = re.search(rb"<meta[^>]+charset=[\"']?([\w-]+)", data[:4096], re.IGNORECASE)
    page = _decoded(file, data, declared[1].decode() if declared else "utf-8-sig")
    article = _optional("trafilatura").extract_with_metadata(page, include_comments=False)
    return (article.title or "", article.text or "") if article else ("", "")


def _decoded(file: Path, data: bytes, charset: str) -> str:
    try:
        latin = codecs.lookup(charset).name == "iso8859-1"
        return data.decode("cp1252" if latin else charset)  # what browsers do with pages that say latin-1
    except (UnicodeDecodeError, LookupError) as error:
        raise DocumentError(f"{file}: cannot be read as {charset} ({error}); save it as UTF-8") from None


def _count(text: str) -> int:
    return len(text.split())


def _optional(library: str) -> ModuleType:
    try:
        return import_module(library)
    except ImportError:
        raise DocumentError(f"{library} is not installed; run: pip install 'searchr1_lite[documents]'") from None
