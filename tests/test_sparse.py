"""retrieval/sparse.py: BM25 scores against the formula and bm25s, indexes made in shards, kills, long queries."""

import contextlib
import math
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from unittest import mock

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.retrieval import sparse
from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.bm25 import BM25Retriever, best_first, tokenize, write_bm25
from searchr1_lite.types import Hit, Passage

PASSAGES = [
    Passage("0", "Oslo", "Oslo is the capital of Norway."),
    Passage("1", "Bergen", "Bergen is a city in Norway. The rain in Bergen is famous."),
    Passage("2", "Malmö", "Malmö is a Swedish city."),
    Passage("3", "Rain", "Rain falls from clouds."),
]


def ids(rows: list[list[Hit]]) -> list[list[str]]:
    return [[hit.passage.id for hit in row] for row in rows]


def slow_bm25(query: str, documents: list[list[str]], k1: float = 0.9, b: float = 0.4) -> list[float]:
    """The formula, word by word, on words that stemming and stopwords leave as they are."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        counts, score = Counter(words), 0.0
        for word in query.split():
            having = sum(word in other for other in documents)
            if not having:
                continue
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            tf = counts[word]
            score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
        scores.append(score)
    return scores


WORDS = st.lists(st.sampled_from(["lamp", "fox", "river", "stone", "moon"]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS, min_size=1, max_size=6), WORDS, st.integers(1, 8))
def test_scores_order_and_number_of_hits_follow_the_formula(documents, query, k) -> None:
    passages = [Passage(str(i), words[0], " ".join(words[1:])) for i, words in enumerate(documents)]
    [hits] = BM25Retriever.build(passages).search([" ".join(query)], k)
    scores = slow_bm25(" ".join(query), documents)
    assert len(hits) == min(k, sum(score > 0 for score in scores))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert hit.score == pytest.approx(scores[int(hit.passage.id)], rel=1e-5)
    if hits:  # nothing that was left out is better than the worst hit
        left = set(range(len(passages))) - {int(hit.passage.id) for hit in hits}
        assert all(scores[i] <= hits[-1].score + 1e-5 for i in left)


def test_one_score_by_hand() -> None:
    # "capital" stands once in one of 4 passages. Words without stopwords: Oslo Oslo capital Norway = 4,
    # Bergen Bergen city Norway rain Bergen famous = 7, Malmö Malmö Swedish city = 4, Rain Rain falls from clouds = 5
    idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
    by_hand = idf * 1 / (1 + 0.9 * (1 - 0.4 + 0.4 * 4 / 5))
    [[hit]] = BM25Retriever.build(PASSAGES).search(["capital"], 3)
    assert hit.passage.id == "0" and hit.score == pytest.approx(by_hand, rel=1e-5)


def test_batch_title_stems_case_and_unicode() -> None:
    retriever = BM25Retriever.build(PASSAGES)
    queries = ["capitals of NORWAY", "malmö", "raining cloud"]
    assert ids(retriever.search(queries, 1)) == [["0"], ["2"], ["3"]]
    assert retriever.search(queries, 2) == [retriever.search([query], 2)[0] for query in queries]
    titled = BM25Retriever.build([Passage("t", "Zanzibar", "An island."), *PASSAGES])
    assert ids(titled.search(["Zanzibar"], 3)) == [["t"]]


@pytest.mark.parametrize("query", ["", "   ", "the of is", "xylophone", "?!", "a"])
def test_a_query_without_a_known_word_finds_nothing(query: str) -> None:
    assert ids(BM25Retriever.build(PASSAGES).search([query, "Oslo"], 3)) == [[], ["0"]]


def test_words_are_snowballs_english_stems() -> None:
    # Porter's first stemmer makes "gener" and "dy" of them; single characters and stopwords are no words
    words = ["generous", "lit", "ray", "die", "citi", "ölpreis"]
    assert tokenize(["The generously lit X-rays of 3 dying cities, Ölpreise"]) == [words]


def test_unknown_words_change_nothing() -> None:
    retriever = BM25Retriever.build(PASSAGES)
    assert retriever.search(["xylophone rain in Bergen"], 3) == retriever.search(["rain in Bergen"], 3)


def test_ties_come_in_corpus_order() -> None:
    same = [Passage(str(i), "Fox", "a red fox") for i in range(50)]
    assert ids(BM25Retriever.build(same).search(["fox"], 7)) == [[str(i) for i in range(7)]]
    mixed = np.arange(300, dtype=np.float32) % 3  # scores 0 1 2 0 1 2 ...: 100 twos, then the first 20 of the ones
    assert best_first(mixed, 120).tolist() == [*range(2, 300, 3), *range(1, 60, 3)]


def test_k_and_empty_batches() -> None:
    retriever = BM25Retriever.build(PASSAGES)
    assert retriever.search([], 3) == []
    assert sorted(ids(retriever.search(["Oslo Bergen Malmö clouds"], 99))[0]) == ["0", "1", "2", "3"]
    for k in (0, -1):
        with pytest.raises(ValueError, match="k must be at least 1"):
            retriever.search(["Oslo"], k)


@pytest.mark.parametrize("passages", [[], [Passage("0", "?", "a I !")]])
def test_nothing_to_index_is_an_error(passages: list[Passage]) -> None:
    with pytest.raises(CorpusError, match="nothing to index"):
        BM25Retriever.build(passages)


def write(passages: list[Passage], root: Path, shard: int = 3) -> Path:
    """A folder with bm25s' files, made in shards; `root` keeps the counts of the shards."""
    folder = root / "index"
    folder.mkdir(exist_ok=True, parents=True)
    write_bm25(passages, root, folder, shard, lambda line: None)
    return folder


def postings(index: bm25s.BM25) -> dict[str, tuple[list[int], list[float]]]:
    """Of each word its passages and what it adds to them, whatever number the word has."""
    pointers = index.scores["indptr"]
    parts = {word: slice(pointers[i], pointers[i + 1]) for word, i in index.vocab_dict.items() if word}
    return {
        word: (index.scores["indices"][part].tolist(), index.scores["data"][part].tolist())
        for word, part in parts.items()
    }


TEXTS = st.lists(
    st.lists(st.sampled_from(["lamp", "fox", "river", "Stones", "moon", "Malmö", "x", "the", "😀"]), max_size=9),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(1, 13), st.integers(1, 13), st.integers(1, 40))
def test_whatever_the_shard_the_index_is_the_one_that_bm25s_makes_in_memory(texts, shard, other, block) -> None:
    passages = [Passage(str(i), "fox" if i == 0 else "?", " ".join(words)) for i, words in enumerate(texts)]
    with tempfile.TemporaryDirectory() as root, mock.patch.object(sparse, "BLOCK", block):
        folders = [write(passages, Path(root, str(i)), size) for i, size in enumerate((shard, other))]
        first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
        assert first == second
        loaded = bm25s.BM25.load(folders[0], mmap=True)
        opened = BM25Retriever.open(folders[0], passages)
        built = BM25Retriever.build(passages)
        assert postings(loaded) == postings(built.index)  # to the last bit
        assert (loaded.k1, loaded.b, loaded.method, loaded.scores["num_docs"]) == (0.9, 0.4, "lucene", len(passages))
        queries = ["fox", "moon moon stone", "lamp river xylophone", "?", " ".join(map(" ".join, texts))]
        assert opened.search(queries, 3) == built.search(queries, 3)
        ours, theirs = opened.search(["fox river"], 1), loaded.retrieve([["fox", "river"]], k=1, show_progress=False)
        assert ours[0][0].score == pytest.approx(theirs.scores[0][0], rel=1e-6)


def corpus(number: int, seed: int = 0) -> list[Passage]:
    """Passages of words as uneven as those of a language: w0 stands in most of them."""
    ranks = np.random.default_rng(seed).zipf(1.3, (number, 20)) % 3000
    return [Passage(str(i), f"w{row[0]}", " ".join(f"w{rank}" for rank in row)) for i, row in enumerate(ranks)]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_looking_common_words_up_finds_what_adding_everything_finds(k: int) -> None:
    passages = corpus(4000)
    retriever = BM25Retriever.build(passages)
    rng = np.random.default_rng(1)
    queries = [" ".join(f"w{rank}" for rank in rng.zipf(1.3, size) % 3000) for size in rng.integers(1, 12, 150)]
    able, narrowed = sparse._able, []

    def watched(scores, added, k, more):
        found = able(scores, added, k, more)
        narrowed.append(more > 0 and found is not None)
        return found

    with mock.patch.object(sparse, "_able", watched):
        found = retriever.search(queries, k)
    assert sum(narrowed) > 20  # else this tests nothing
    for query, hits in zip(queries, found, strict=True):
        scores = retriever.index.get_scores(tokenize([query])[0])  # every passage, in the order of the query's words
        best = np.sort(scores[scores > 0])[::-1][:k]
        assert [hit.score for hit in hits] == pytest.approx(best.tolist(), rel=1e-5)
        assert [hit.score for hit in hits] == pytest.approx([scores[int(hit.passage.id)] for hit in hits], rel=1e-5)
        keys = [(-hit.score, int(hit.passage.id)) for hit in hits]
        assert keys == sorted(keys)
    assert retriever.search(queries[::-1], k) == found[::-1]  # no query leaves anything behind


class Killed(BaseException):
    pass


def dying(after: int, does=lambda *args: None):
    """Does as told `after` times, then dies."""
    left = iter(range(after))

    def call(*args):
        if next(left, None) is None:
            raise Killed
        does(*args)

    return call


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("where", ["before a shard is whole", "between two lines of progress"])
def test_killed_anywhere_and_gone_on_with_it_is_the_same_index(tmp_path: Path, where: str, after: int) -> None:
    passages = corpus(20)
    whole = {file.name: file.read_bytes() for file in write(passages, tmp_path / "whole", 5).iterdir()}
    root = tmp_path / "killed"
    folder = root / "index"
    folder.mkdir(parents=True)
    with mock.patch.object(sparse, "BLOCK", 100), contextlib.suppress(Killed):  # 4 shards; more than 3 blocks
        if where == "between two lines of progress":
            write_bm25(passages, root, folder, 5, dying(after))
            pytest.fail("it was never killed")
        with mock.patch.object(sparse.os, "replace", dying(after, os.replace)):
            write_bm25(passages, root, folder, 5, lambda line: None)
        assert after >= 4
    done = len(list(root.glob("*.words.npz")))
    lines = []
    write_bm25(passages, root, folder, 5, lines.append)
    assert sum(line.startswith("words:") for line in lines) == 4 - done  # no finished shard is counted again
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_another_process_goes_on_with_the_same_vocabulary(tmp_path: Path) -> None:
    code = """
import sys; from pathlib import Path; from test_sparse import corpus, write
print(write(corpus(20), Path(sys.argv[1]), 5))
"""
    write(corpus(20), tmp_path / "here", 5)
    for file in tmp_path.glob("here/bm25-1*-*"):  # two of the four shards are left
        file.unlink()
    seed = {"PYTHONHASHSEED": "7", "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent)}
    whole = {file.name: file.read_bytes() for file in (tmp_path / "here/index").iterdir()}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "here")], env=os.environ | seed, check=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "here/index").iterdir()} == whole


def test_an_opened_index_is_mapped_and_not_read(tmp_path: Path) -> None:
    index = BM25Retriever.open(write(PASSAGES, tmp_path), PASSAGES).index
    assert all(isinstance(index.scores[name].base, np.memmap) for name in ("data", "indices", "indptr"))
    files = {"data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy", "params.index.json"}
    assert {file.name for file in (tmp_path / "index").iterdir()} == files | {"vocab.index.json"}


@pytest.mark.parametrize("passages", [[], [Passage("0", "?", "a I !")] * 4])
def test_nothing_to_write_is_an_error(tmp_path: Path, passages: list[Passage]) -> None:
    with pytest.raises(CorpusError, match=f"nothing to index: {len(passages)} passages"):
        write(passages, tmp_path)


LONG = {
    "words": " ".join(f"w{i % 3000}" for i in range(20_000)),
    "one word many times": "w1 " * 33_000,
    "one long word": "w" * 100_000,
    "control characters": "\x00\x1b[31m\x7f\u202e" * 12_500,
    "control characters among words": "w1\x00w2\r\nw3" * 8_000,
    "stopwords": "the of is " * 10_000,
    "half a surrogate pair": "\ud800 " * 50_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_query_of_100_000_characters(name: str) -> None:
    passages = [*corpus(2000), *PASSAGES]
    retriever = BM25Retriever.build(passages)
    begun = time.perf_counter()
    tracemalloc.start()
    hits, oslo = retriever.search([LONG[name], "Oslo"], 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(hits) == (3 if "words" in name.split() or name == "one word many times" else 0)
    assert oslo[0].passage == PASSAGES[0]
    assert time.perf_counter() - begun < 10 and peak < 30e6
