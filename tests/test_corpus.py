"""retrieval/corpus.py: what a corpus file may hold, and that what it may not is named by file and line."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.config import ROOT
from searchr1_lite.retrieval.corpus import (
    CorpusError,
    corpus_checksum,
    join_contents,
    load_corpus,
    read_corpus,
    split_contents,
)
from searchr1_lite.types import Passage

SHARED = Path(ROOT).parent / "shared/data"
GOOD = '{"id": "a", "contents": "\\"Oslo\\"\\nOslo is the capital."}'


def write(path: Path, *lines: str | bytes) -> Path:
    data = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_rows_become_passages_in_order(tmp_path: Path, name: str) -> None:
    lines = [
        GOOD,
        '{"id": 7, "title": "B\\u00e5tsfjord", "text": "A port."}',
        '{"id": "c", "contents": "No quotes\\nline one\\nline two"}',
        '{"id": "d", "contents": "\\"The \\"Best\\" Of\\"\\nAn album."}',
        '{"id": "e", "contents": "\\"Alone\\""}',
    ]
    assert list(read_corpus(write(tmp_path / name, *lines))) == [
        Passage("a", "Oslo", "Oslo is the capital."),
        Passage("7", "Båtsfjord", "A port."),
        Passage("c", "No quotes", "line one\nline two", quoted=False),
        Passage("d", 'The "Best" Of', "An album."),
        Passage("e", "Alone", ""),
    ]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("", "blank line"),
        ('{"contents": "\\"T\\"\\nx"}', "'id' is missing"),
        ('{"id": "b"}', "'contents' is missing"),
        ('{"id": "b", "text": "no title"}', "'title' is missing"),
        ('{"id": "b", "contents": 5}', "'contents' must be a string, got int"),
        ('{"id": true, "contents": "x"}', "'id' must be a string, got bool"),
        ('{"id": " ", "contents": "x"}', "'id' is empty"),
        ('{"id": "b", "contents": " \\n "}', "passage 'b' is empty"),
        ('{"id": "b", "contents": "\\ud800 half"}', "half a surrogate pair"),
        (b'{"id": "b", "contents": "\xff"}', "not UTF-8"),
        (GOOD, "'a' is already used in"),
    ],
)
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path: Path, name: str, bad: str | bytes, says: str) -> None:
    path = write(tmp_path / name, GOOD, bad, '{"id": "z", "contents": "last"}')
    with pytest.raises(CorpusError) as caught:
        list(read_corpus(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert says in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no corpus file at .*nowhere\.jsonl"):
        list(read_corpus(tmp_path / "nowhere.jsonl"))
    for name in ("empty.jsonl", "empty.jsonl.gz"):
        with pytest.raises(CorpusError, match=rf"{name}: the file is empty"):
            list(read_corpus(write(tmp_path / name)))


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_damaged_gzip_is_an_error_and_not_a_short_corpus(tmp_path: Path, damage: str) -> None:
    rows = [json.dumps({"id": str(i), "contents": f"{i * 7919}\ntext {i * i}"}) for i in range(3000)]
    path = write(tmp_path / "c.jsonl.gz", *rows)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "plain": b"plain text\n"}[damage])
    with pytest.raises(CorpusError, match=r"c\.jsonl\.gz:\d+: "):
        list(read_corpus(path))


PASSAGES = st.lists(
    st.builds(Passage, st.text(max_size=4), st.text(max_size=6), st.text(max_size=6)), min_size=2, max_size=5
)


@given(PASSAGES, st.randoms())
def test_checksum_changes_with_order_and_content(passages: list[Passage], random) -> None:
    moved = random.sample(passages, len(passages))
    assert (corpus_checksum(moved) == corpus_checksum(passages)) == (moved == passages)
    first = passages[0]
    longer = [Passage(first.id, first.title + "x", first.text), *passages[1:]]
    assert corpus_checksum(longer) != corpus_checksum(passages)
    assert corpus_checksum(passages[:-1]) != corpus_checksum(passages)


def test_checksum_sees_where_a_field_ends() -> None:
    assert corpus_checksum([Passage("1", "ab", "c")]) != corpus_checksum([Passage("1", "a", "bc")])
    assert corpus_checksum([Passage("1", "a", 'b"]\n["2')]) != corpus_checksum([Passage("1", "a", "b")])


TITLE_LINES = st.text(alphabet=st.characters(exclude_characters="\n")) | st.sampled_from(['"', '""', '"a', '"a" "b"'])


@given(TITLE_LINES | st.text().map(lambda line: '"' + line.replace("\n", "") + '"'), st.text())
def test_contents_survive_splitting_and_joining(title_line: str, text: str) -> None:
    contents = f"{title_line}\n{text}"
    assert join_contents(Passage("1", *split_contents(contents))) == contents


def test_quotes_around_a_title_are_remembered() -> None:
    assert split_contents('"Oslo"\ntext') == ("Oslo", "text", True)
    assert split_contents("Oslo\ntext") == ("Oslo", "text", False)
    assert corpus_checksum([Passage("1", "a", "b", True)]) != corpus_checksum([Passage("1", "a", "b", False)])


def test_toy_corpus_loads() -> None:
    passages = load_corpus("toy")
    assert len(passages) > 100
    assert not any(passage.title.startswith('"') for passage in passages)


def test_real_corpora_load_whole() -> None:
    if not SHARED.is_dir():
        pytest.skip("no real data beside the project (../shared/data)")
    counts = {name: len(load_corpus(str(SHARED / name / "corpus.jsonl.gz"))) for name in ("hotpotqa", "scifact")}
    assert counts == {"hotpotqa": 15011, "scifact": 5183}
