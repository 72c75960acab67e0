"""Documents to passages: nothing lost or doubled, ids and titles as promised, every fault named with its file."""

import codecs
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.cli import main
from searchr1_lite.retrieval.corpus import read_corpus
from searchr1_lite.retrieval.documents import DocumentError, cut, find_files, passages_of, write_corpus

PROSE = "The den is old. The fox sleeps, it seems (or waits). Nobody knows! Is it so? "
PARAGRAPHS = [f"This is sentence {i} of a page. It tells <b>of &quot;R&amp;D&quot;</b> in café {i}." for i in range(9)]
PAGE = (
    '<html><head>{charset}<title>A "quoted" page &amp; more</title></head><body>'
    "<nav><a href='/'>Home menu</a></nav><article>"
    + "".join(f"<p>{p}</p>" for p in PARAGRAPHS)
    + "</article></body></html>"
)


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_", ".", 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def corpus(*paths, words: int = 100) -> list:
    out = paths[0].parent / f"{paths[0].name}-out" / "corpus.jsonl"
    assert write_corpus(paths, out, words) == len(list(read_corpus(out)))
    return list(read_corpus(out))


WORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
SPACES = st.text(" \n\t\r\u2028\xa0\x1c", min_size=1, max_size=3)
ANY_TEXT = st.lists(st.tuples(WORD, SPACES), max_size=60).map(lambda pairs: "".join(a + b for a, b in pairs))


@given(ANY_TEXT, st.integers(1, 12))
@settings(deadline=None)
def test_all_words_once_and_in_order(text, words):
    passages = cut(text, words)
    assert [word for passage in passages for word in passage.split()] == text.split()
    assert all(1 <= len(passage.split()) <= words for passage in passages)


@given(st.lists(st.sampled_from([PROSE, "# Heading\n\n", "one two\n", "\n\n", "- item\n"]), min_size=1, max_size=80))
@settings(deadline=None, max_examples=30)
def test_no_passage_is_so_short_that_it_fits_with_the_next(parts):
    passages = cut("".join(parts), 40)
    lengths = [len(passage.split()) for passage in passages]
    assert all(a + b > 40 for a, b in pairwise(lengths))


def test_sentences_are_kept_whole_where_they_can_be():
    passages = cut(PROSE * 40)  # of 4 sentences and 17 words
    assert all(passage[-1] in ".!?" for passage in passages)
    assert all(60 <= len(passage.split()) <= 100 for passage in passages[:-1])


def test_ids_are_paths_and_numbers_and_titles_come_from_the_document(tmp_path):
    write(
        tmp_path / "docs",
        b_txt=PROSE * 12,
        a__z_md="---\n# no heading\n---\n```\n# no heading\n```\nfirst\r\n\n## The *real* one ##\r\n\n# Later\n",
        a__y_MARKDOWN="Under lined\r\n===\r\ntext",
        a__x_md="no heading at all, #tag",
        d_html=PAGE.format(charset=""),
    )
    found = {passage.id: (passage.title, passage.text) for passage in corpus(tmp_path / "docs")}
    assert list(found)[:6] == ["a/x.md#1", "a/y.MARKDOWN#1", "a/z.md#1", "b.txt#1", "b.txt#2", "b.txt#3"]
    assert found["a/x.md#1"] == ("x.md", "no heading at all, #tag")
    assert found["a/y.MARKDOWN#1"] == ("Under lined", "Under lined\r\n===\r\ntext")
    assert found["a/z.md#1"][0] == "The *real* one"
    assert found["b.txt#1"][0] == "b.txt"
    assert " ".join(found[f"b.txt#{n}"][1] for n in (1, 2, 3)).split() == (PROSE * 12).split()
    assert found["d.html#1"][0] == 'A "quoted" page & more'


def test_ids_are_below_the_folder_that_all_files_share_and_each_file_counts_once(tmp_path):
    write(tmp_path / "all", one__a_txt="first", two__a_txt="second", two__b_txt="third")
    one, two = tmp_path / "all/one", tmp_path / "all/two"
    ids = [passage.id for passage in corpus(two / "a.txt", one, two, two / ".." / "two")]
    assert ids == ["one/a.txt#1", "two/a.txt#1", "two/b.txt#1"]
    assert [passage.id for passage in corpus(two / "b.txt")] == ["b.txt#1"]


@pytest.mark.parametrize(
    ("charset", "encoding"),
    [
        ("", "utf-8"),
        ("", "utf-8-sig"),
        ('<meta charset="utf-8">', "utf-8"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-1">', "cp1252"),
        ("<META CHARSET=shift_jis>", "shift_jis"),
    ],
)
def test_pages_are_read_in_the_charset_they_declare(tmp_path, charset, encoding):
    cafe, quotes = ("静か", "…") if encoding == "shift_jis" else ("café", "“…”")
    page = PAGE.format(charset=charset).replace("café", cafe).replace("tells", quotes)
    write(tmp_path / "docs", a_html=page.encode(encoding))
    text = " ".join(passage.text for passage in corpus(tmp_path / "docs"))
    for i in range(9):  # no sentence of the article is lost or doubled, and the menu is not in it
        assert text.count(f'It {quotes} of "R&D" in {cafe} {i}.') == text.count(f"sentence {i} of") == 1
    assert "menu" not in text


def test_a_page_with_an_xml_declaration(tmp_path):
    write(tmp_path, a_html='<?xml version="1.0" encoding="utf-8"?>\n' + PAGE.format(charset=""))
    assert "café 8" in " ".join(passage.text for passage in passages_of(tmp_path / "a.html", "a"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"good\n\xe9t\xe9", r"a\.txt: cannot be read as utf-8-sig .*byte 0xe9 in position 5"),
        (
            "a.md",
            codecs.BOM_UTF16_LE + "hello".encode("utf-16-le"),
            r"a\.md: cannot be read as utf-8.*save it as UTF-8",
        ),
        ("a.txt", b" \n\t", r"a\.txt: there is no text in it"),
        ("a.md", b"", r"a\.md: there is no text in it"),
        ("a.html", b"<html><body></body></html>", r"a\.html: there is no text in it"),
        ("a.html", b"", r"a\.html: there is no text in it"),
        ("a.html", b"<meta charset=klingon><p>text</p>", r"a\.html: cannot be read as klingon \(unknown encoding"),
        ("a.html", b"<meta charset=utf-8><p>caf\xe9</p>", r"a\.html: cannot be read as utf-8"),
        ("a.pdf", b"%PDF", r"a\.pdf: not a type that can be read; there are \.txt, \.md, .*\.htm"),
        ("README", b"text", r"README: not a type"),
    ],
)
def test_each_fault_is_named_and_nothing_is_written(tmp_path, name, content, says):
    docs, out = tmp_path / "docs", tmp_path / "out/corpus.jsonl"
    docs.mkdir()
    (docs / "0 good.txt").write_text("a good document")
    assert write_corpus([docs], out) == 1
    before = out.read_bytes()
    (docs / name).write_bytes(content)
    with pytest.raises(DocumentError, match=says):
        write_corpus([docs], out)
    assert out.read_bytes() == before and os.listdir(out.parent) == ["corpus.jsonl"]


def test_files_that_are_not_there_or_not_to_be_read(tmp_path, monkeypatch):
    (tmp_path / "docs/empty").mkdir(parents=True)
    with pytest.raises(DocumentError, match=r"no documents in .*empty"):
        write_corpus([tmp_path / "docs/empty"], tmp_path / "c.jsonl")
    (tmp_path / "docs/broken.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match=r"broken\.txt"):
        write_corpus([tmp_path / "docs"], tmp_path / "c.jsonl")
    (tmp_path / "docs/broken.txt").unlink()
    (tmp_path / "docs" / os.fsdecode(b"\xff.txt")).write_text("text")
    assert [passage.id for passage in corpus(tmp_path / "docs")] == ["\ufffd.txt#1"]

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match=r"docs"):
        find_files([tmp_path / "docs"])


def test_folders_behind_links_are_read_too(tmp_path):
    write(tmp_path, real__a_txt="text", docs__b_txt="text")
    (tmp_path / "docs/link").symlink_to(tmp_path / "real")
    assert [passage.id for passage in corpus(tmp_path / "docs")] == ["b.txt#1", "link/a.txt#1"]


@pytest.mark.parametrize(("library", "name"), [("semchunk", "a.txt"), ("trafilatura", "a.html")])
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, library, name):
    (tmp_path / name).write_text(PAGE.format(charset=""))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        DocumentError, match=rf"{library} is not installed; run: pip install 'searchr1_lite\[documents\]'"
    ):
        list(passages_of(tmp_path / name, name))


def test_the_command(tmp_path, monkeypatch, capsys):
    write(tmp_path, docs__a_txt=PROSE * 12, bad__a_txt=b"\xff")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["index", "documents", "docs", "--out", "c.jsonl", "--words", "60"])
    assert end.value.code == 0 and capsys.readouterr().out == "c.jsonl: 4 passages\n"
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"a.txt#{n}" for n in range(1, 5)]
    assert all(row["contents"].startswith('"a.txt"\n') for row in rows)
    with pytest.raises(SystemExit, match=r"^error: .*a\.txt: cannot be read as utf-8"):
        main(["index", "documents", "bad", "--out", "d.jsonl"])
    assert not (tmp_path / "d.jsonl").exists()
