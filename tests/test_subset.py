"""retrieval/subset.py: what a question needs, by hand and against a slow search; the cut-out corpus and its index."""

import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.cli import main
from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.retrieval import encoders, index, subset
from searchr1_lite.retrieval.corpus import join_contents, load_corpus
from searchr1_lite.retrieval.encoders import Encoder, EncoderError
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.retrieval.subset import AnswerSearch, sample_rest, things_needed, word_weights
from searchr1_lite.tasks.questions import load_questions, read_questions
from searchr1_lite.types import Passage, Question

HOTPOT = ROOT.parent / "shared/data/hotpotqa"

ROWS = [
    {"id": "0", "contents": '"Law & Order"\nA drama of New York, broadcast from 1990.'},
    {"id": "1", "contents": '"Law & Order"\nIts creator is Dick Wolf.'},
    {"id": 2, "contents": '"""Weird Al"" Yankovic"\nA singer of parodies.'},
    {"id": "3", "contents": '"Moon landing"\nThe last men on the Moon left it in December 1972.'},
    {"id": "4", "contents": '"Moon"\nIn December of 1972 the Moon saw its last visitors, as was told.'},
    {"id": "5", "contents": '"Apollo"\nThe last crew was back on Earth in December 1972.'},
    {"id": "6", "contents": '"1972"\nDecember 1972 was a cold month.'},
    {"id": "7", "contents": "Unquoted title\nSome text \u2013 “naïve”\nand a line more."},
    {"id": "8", "contents": "one line alone"},
    {"id": "9", "title": "Columns", "text": "of their own \U0001f600"},
    {"id": "10", "contents": '"Sea"\nThe Beatles did not sing of the deep sea.', "url": "kept"},
    {"id": "11", "contents": '"Tide"\nThe tide comes and goes.'},
]
QUESTIONS = [
    {"id": "ids", "question": "By id?", "golden_answers": ["x"], "metadata": {"supporting_ids": [2, "11"]}},
    {
        "id": "hotpot",
        "question": "By title?",
        "golden_answers": ["x"],
        "metadata": {
            "supporting_facts": {"title": ["LAW &amp; Order", '"Weird Al" Yankovic', "Gone"], "sent_id": [0, 1, 0]}
        },
    },
    {
        "id": "moon",
        "question": "When was the last time anyone was on the Moon?",
        "golden_answers": ["14 December 1972", "the December 1972"],
        "metadata": {},
    },
    {"id": "none", "question": "Who knows?", "golden_answers": ["nobody at all", "?!"], "metadata": {}},
]


class FakeModel:
    """A unit vector for each text, the same for the same text; counts what it is asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode_query(self, texts: list[str], **_) -> np.ndarray:
        self.texts += texts
        vectors = np.array([np.random.default_rng([*text.encode()]).normal(size=16) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_document = encode_query


def write_rows(path: Path, rows: list[dict]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_index(path: Path, corpus: Path, encoder: Encoder) -> np.ndarray:
    vectors = encoder.encode_passages(load_corpus(str(corpus)))
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(path))
    encoder.model.texts.clear()
    return vectors


@pytest.fixture
def encoder(monkeypatch) -> Encoder:
    """In the place of e5, for the command and for `load_retriever`."""
    fake = Encoder("intfloat/e5-base-v2", "weights", FakeModel(), "query: ", "passage: ")
    for module in (subset, encoders):
        monkeypatch.setattr(module, "load_encoder", lambda name, device=None: fake)
    return fake


@pytest.fixture
def made(tmp_path: Path, monkeypatch, capsys):
    """Run the command on ROWS and QUESTIONS; what it printed, or the message it stopped with."""
    monkeypatch.setattr(index, "ROOT", tmp_path)  # so that indexes go to tmp_path/data/cache
    write_rows(tmp_path / "corpus.jsonl", ROWS)
    write_rows(tmp_path / "questions.jsonl.gz", QUESTIONS)

    def run(*arguments: object) -> str:
        # of arguments that stand twice, the command takes the later
        standard = ["--out", tmp_path / "sub", "--distractors", 2]
        given = list(arguments)
        places = [given.pop(0) if given and isinstance(given[0], Path) else default for default in files]
        with pytest.raises(SystemExit) as stop:
            main(["index", "subset", *map(str, [*places, *standard, *given])])
        return str(stop.value.code) if stop.value.code else capsys.readouterr().out

    files = [tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl.gz"]
    return run


def record(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "sub/subset.json").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_needs_by_hand(made, tmp_path) -> None:
    """Passage 3 shares "last on moon was(no)": of 3, 4, 5 and 6, number 4 has the words but not the phrase."""
    said = made("--per-question", 2)
    needs = record(tmp_path)["needs"]
    assert needs["ids"] == {"id 2": ["2"], "id 11": ["11"]}
    assert needs["hotpot"] == {"title law & order": ["0", "1"], "title weird al yankovic": ["2"], "title gone": []}
    assert needs["moon"] == {"answers": ["3", "5"]}
    assert needs["none"] == {"answers": []}
    counts = {
        key: record(tmp_path)[key] for key in ("corpus_passages", "passages", "needed", "distractors", "questions")
    }
    assert counts == {"corpus_passages": 12, "passages": 8, "needed": 6, "distractors": 2, "questions": 4}
    assert record(tmp_path)["nothing_found"] == ["none"] and record(tmp_path)["partly_met"] == ["hotpot"]
    assert "nothing_found: 1" in said and "partly_met: 1" in said


def test_the_corpus_is_the_rows_as_they_were_in_order(made, tmp_path) -> None:
    made("--distractors", 100)
    assert rows_of(tmp_path / "sub/corpus.jsonl.gz") == ROWS
    passages = load_corpus(str(tmp_path / "sub/corpus.jsonl.gz"))
    assert passages == load_corpus(str(tmp_path / "corpus.jsonl"))
    assert join_contents(passages[7]) == ROWS[7]["contents"]
    assert record(tmp_path)["distractors"] == 12 - record(tmp_path)["needed"]
    made("--distractors", 0)
    some = rows_of(tmp_path / "sub/corpus.jsonl.gz")
    assert some == [row for row in ROWS if row in some] and len(some) == record(tmp_path)["needed"]


def test_the_same_seed_gives_the_same_file(made, tmp_path) -> None:
    files = []
    for seed in (0, 0, 1, 2, 3):
        made("--seed", seed)
        files.append((tmp_path / "sub/corpus.jsonl.gz").read_bytes())
    assert files[0] == files[1] and files[0][4:8] == bytes(4)  # and on another day: no time in the gzip header
    assert len(set(files)) > 2


def test_a_file_of_questions_is_taken_whole_unless_a_split_is_asked(made, tmp_path) -> None:
    made()
    assert record(tmp_path)["questions"] == 4
    drawn = set()
    for seed in range(8):
        made("--limit", 2, "--seed", seed)
        drawn.add(tuple(record(tmp_path)["needs"]))
    every = [question["id"] for question in QUESTIONS]
    assert len(drawn) > 1 and all(len(keys) == 2 and sorted(keys, key=every.index) == list(keys) for keys in drawn)
    assert "no questions in split 'dev'" in made("--split", "dev")


def test_the_questions_come_along_with_their_splits(made, tmp_path) -> None:
    made()
    assert read_questions(tmp_path / "sub/questions.jsonl.gz") == read_questions(tmp_path / "questions.jsonl.gz")
    (tmp_path / "ten").mkdir()
    for split in ("train", "test"):
        row = {"question": "Who?", "golden_answers": ["A"], "metadata": {}}
        write_rows(tmp_path / f"ten/{split}.jsonl", [{"id": f"{split}{i}"} | row for i in range(10)])
    made(tmp_path / "corpus.jsonl", tmp_path / "ten", "--split", "train+test", "--limit", 7)
    for split in ("train", "test"):
        keys = [question.id for question in load_questions(str(tmp_path / "sub/questions.jsonl.gz"), split)]
        assert len(keys) == 7 and all(key.startswith(split) for key in keys)
    assert "share ids" in made(tmp_path / "corpus.jsonl", tmp_path / "ten", "--split", "test+test")


@pytest.mark.parametrize("wrong", [("--distractors", -1), ("--per-question", 0), ("--limit", 0)])
def test_numbers_that_cannot_be_are_refused(made, tmp_path, wrong, capsys) -> None:
    assert made(*wrong) == "2" and wrong[0] in capsys.readouterr().err
    assert not (tmp_path / "sub").exists()


def test_an_older_record_does_not_stay_beside_a_new_corpus(made, tmp_path, monkeypatch) -> None:
    made()
    monkeypatch.setattr(subset, "load_retriever", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert made("--seed", 1) == "130"
    assert not (tmp_path / "sub/subset.json").exists()


def test_musique_titles() -> None:
    hops = [{"id": 1, "support_paragraph": {"title": title, "paragraph_text": "…"}} for title in ("A", "B  c")]
    assert things_needed(Question("q", "?", ("x",), {"question_decomposition": hops})) == ["title a", "title b c"]
    facts = {"supporting_facts": [["A", 0], ["B", 3]], "supporting_ids": []}
    assert things_needed(Question("q", "?", ("x",), facts)) == ["title a", "title b"]
    assert things_needed(Question("q", "?", ("x",), {"supporting_facts": {"title": None}})) == ["answers"]
    assert things_needed(Question("q", "?", ("x",), {"supporting_facts": None})) == ["answers"]


def test_bm25_is_what_load_retriever_finds(made, tmp_path, capsys) -> None:
    made()
    passages = load_corpus(str(tmp_path / "sub/corpus.jsonl.gz"))
    found = load_retriever(load_profile("tiny", retriever="bm25"), passages).search(["Dick Wolf"], 1)
    assert found[0][0].passage.id == "1"
    assert "passages opened in" in capsys.readouterr().out


def test_vectors_are_the_big_index_s_own(made, encoder, tmp_path, capsys) -> None:
    vectors = write_index(tmp_path / "big.index", tmp_path / "corpus.jsonl", encoder)
    assert "error" not in made("--index", tmp_path / "big.index")
    assert len(encoder.model.texts) == 5  # four and a query, only to see that the index is this encoder's
    passages = load_corpus(str(tmp_path / "sub/corpus.jsonl.gz"))
    profile = load_profile("tiny", retriever="flat", encoder="intfloat/e5-base-v2")
    folders = [path for path in (tmp_path / "data/cache/indexes").iterdir() if path.is_dir()]
    assert len(folders) == 1
    for cache_dir in (None, folders[0]):
        retriever = load_retriever(profile, passages, cache_dir=cache_dir)
        assert "passages opened in" in capsys.readouterr().out
    rows = [[str(row["id"]) for row in ROWS].index(passage.id) for passage in passages]
    assert np.array_equal(retriever.index.reconstruct_n(0, len(rows)), vectors[rows])
    query = encoder.encode_queries(["Who?"])[0]
    best = max(range(len(rows)), key=lambda i: vectors[rows[i]] @ query)
    assert retriever.search(["Who?"], 1)[0][0].passage == passages[best]


def test_an_index_that_does_not_belong_is_refused_before_the_long_work(made, encoder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(subset, "find_needed", lambda *_: pytest.fail("the index was not looked at first"))
    write_rows(tmp_path / "short.jsonl", ROWS[:-1])
    write_index(tmp_path / "short.index", tmp_path / "short.jsonl", encoder)
    said = made("--index", tmp_path / "short.index")
    assert "short.index is an IndexFlatIP of 11 vectors" in said and "of 12 is needed" in said
    (tmp_path / "cut.index").write_bytes((tmp_path / "short.index").read_bytes()[:-1])
    assert "cut.index is no whole FAISS index" in made("--index", tmp_path / "cut.index")
    assert "no whole FAISS index" in made("--index", tmp_path / "missing.index")
    other = faiss.IndexHNSWFlat(16, 4, faiss.METRIC_INNER_PRODUCT)
    other.add(np.eye(12, 16, dtype=np.float32))
    faiss.write_index(other, str(tmp_path / "graph.index"))
    assert "IndexHNSWFlat" in made("--index", tmp_path / "graph.index")
    assert not (tmp_path / "sub").exists()


def test_an_index_in_another_order_is_refused(made, encoder, tmp_path) -> None:
    write_rows(tmp_path / "turned.jsonl", ROWS[1:] + ROWS[:1])
    write_index(tmp_path / "turned.index", tmp_path / "turned.jsonl", encoder)
    said = made("--index", tmp_path / "turned.index")
    assert "have other vectors than the encoder gives them" in said and "not in the corpus's order" in said
    narrow = faiss.IndexFlatIP(8)
    narrow.add(np.ones((12, 8), dtype=np.float32))
    faiss.write_index(narrow, str(tmp_path / "narrow.index"))
    assert "these are of another encoder" in made("--index", tmp_path / "narrow.index")
    assert not (tmp_path / "sub/subset.json").exists()


def test_without_the_encoder_it_says_what_to_fetch(made, tmp_path, monkeypatch) -> None:
    def missing(name: str) -> None:
        raise EncoderError(f"encoder {name!r}: not here")

    monkeypatch.setattr(subset, "load_encoder", missing)
    said = made("--index", tmp_path / "big.index")
    assert said.startswith("error: encoder 'intfloat/e5-base-v2': not here")


@pytest.mark.parametrize("line", ["{", '{"id": "5"}', '{"id": "5", "contents": 3}', ""])
def test_a_broken_line_is_named_and_nothing_is_left(made, tmp_path, line) -> None:
    lines = (tmp_path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    lines[5] = line
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert f"error: {tmp_path / 'corpus.jsonl'}:6: " in made()
    assert not (tmp_path / "sub").exists()


WORDS = st.lists(st.sampled_from(["a", "the", "moon", "sea", "red", "1972", "von", "it"]), min_size=1, max_size=6)
TEXTS = st.builds(" ".join, WORDS)


def slow_search(passages: list[Passage], question: Question, keep: int) -> list[int]:
    """Every passage, every answer, nothing skipped."""

    def words(text: str) -> list[str]:
        return [word for word in re.split(r"\W+", text.lower()) if word not in ("", "a", "an", "the")]

    texts = [words(f"{passage.title} {passage.text}") for passage in passages]
    df = Counter(word for text in texts for word in set(text))
    weight = {word: math.log(len(texts) / df[word]) for word in df}
    answers = [words(answer) for answer in question.golden_answers]
    scored = []
    for row, text in enumerate(texts):
        holds = any(a and text[i : i + len(a)] == a for a in answers for i in range(len(text)))
        shared = set(text) & set(words(question.question))
        score = sum(sorted(weight[word] for word in shared))
        if holds and score > 0:
            scored.append((-score, row))
    return [row for _, row in sorted(scored)[:keep]]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(TEXTS, min_size=1, max_size=25),
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_the_quick_search_finds_what_the_slow_one_finds(texts: list[str], asked: list[tuple], keep: int) -> None:
    passages = [Passage(str(i), "It", text) for i, text in enumerate(texts)]
    questions = [Question(str(i), q, (one, two)) for i, (q, one, two) in enumerate(asked)]
    search = AnswerSearch(questions, word_weights(passages, len(passages), questions), keep)
    for row, passage in enumerate(passages):
        search.look(row, passage)
    for question, best in zip(questions, search.best, strict=True):
        assert [-row for _, row in sorted(best, reverse=True)] == slow_search(passages, question, keep)


@given(st.integers(0, 40), st.sets(st.integers(0, 39)), st.integers(0, 50), st.integers(0, 9))
def test_distractors_are_rows_of_the_rest(total: int, needed: set[int], number: int, seed: int) -> None:
    needed = {row for row in needed if row < total}
    drawn = sample_rest(total, needed, number, seed)
    assert len(drawn) == len(set(drawn)) == min(number, total - len(needed))
    assert not needed & set(drawn) and set(drawn) <= set(range(total))


def test_each_row_of_the_rest_is_as_likely() -> None:
    """3 of 9 rows, 3,000 times: 1,000 each, and five standard deviations are 130."""
    counts = Counter(row for seed in range(3000) for row in sample_rest(10, {3}, 3, seed))
    assert set(counts) == set(range(10)) - {3}
    assert all(abs(count - 1000) < 130 for count in counts.values())


@pytest.mark.skipif(not HOTPOT.is_dir(), reason="needs ../shared/data/hotpotqa")
def test_hotpotqa(tmp_path, made) -> None:
    """50 real questions: what the judgements name is all there, found by id and by title alike."""
    rows = rows_of(HOTPOT / "questions.jsonl.gz")[:50]
    needed = {key for row in rows for key in row["metadata"]["gold_ids"]}
    for number, row in enumerate(rows):
        del row["metadata"]["gold_ids" if number % 2 else "supporting_titles"]
    questions = write_rows(tmp_path / "hotpot.jsonl", rows)
    made(HOTPOT / "corpus.jsonl.gz", questions, "--distractors", 300)
    passages = load_corpus(str(tmp_path / "sub/corpus.jsonl.gz"))
    assert needed <= {passage.id for passage in passages}
    made_of = record(tmp_path)
    assert made_of["partly_met"] == made_of["nothing_found"] == [] and made_of["met_by_answers"] == 0
    for things in made_of["needs"].values():
        assert all(found == [thing.removeprefix("id ")] for thing, found in things.items() if thing.startswith("id "))
    assert len(passages) == made_of["needed"] + 300 and made_of["needed"] >= len(needed)
    original = {row["id"]: row["contents"] for row in rows_of(HOTPOT / "corpus.jsonl.gz")}
    assert all(join_contents(passage) == original[passage.id] for passage in passages)
