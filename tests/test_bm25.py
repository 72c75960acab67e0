"""retrieval/bm25.py: scores against the formula and bm25s, ties, saved indexes, long queries."""

import math
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.retrieval.bm25 import BM25Retriever, best_first, tokenize
from searchr1_lite.retrieval.corpus import CorpusError
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


def corpus(number: int, seed: int = 0) -> list[Passage]:
    """Passages of words as uneven as those of a language: w0 stands in most of them."""
    ranks = np.random.default_rng(seed).zipf(1.3, (number, 20)) % 3000
    return [Passage(str(i), f"w{row[0]}", " ".join(f"w{rank}" for rank in row)) for i, row in enumerate(ranks)]


def test_a_saved_index_is_mapped_and_finds_the_same(tmp_path: Path) -> None:
    passages = corpus(400)
    built = BM25Retriever.build(passages)
    built.index.save(tmp_path, show_progress=False)
    opened = BM25Retriever.open(tmp_path, passages)
    assert all(isinstance(opened.index.scores[name].base, np.memmap) for name in ("data", "indices", "indptr"))
    queries = ["w0", "w1 w2 w2 w900", "w7 xylophone", ""]
    assert opened.search(queries, 5) == built.search(queries, 5)
    theirs = opened.index.retrieve([["w1", "w2"]], k=1, show_progress=False)
    assert opened.search(["w1 w2"], 1)[0][0].score == pytest.approx(theirs.scores[0][0], rel=1e-6)


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
