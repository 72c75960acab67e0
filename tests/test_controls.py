"""Retrievers that are wrong, or right, on purpose, and the cache; what they find depends on seed and query alone."""

import time

import pytest
from conftest import OverlapRetriever
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.retrieval.batching import Cached
from searchr1_lite.retrieval.controls import Delayed, Empty, Noisy, Oracle, Random, noise_share
from searchr1_lite.types import Passage, Question

PASSAGES = [Passage(str(n), f"T{n}", f"word{n} shared") for n in range(40)]
FINDS = OverlapRetriever(PASSAGES)
QUERIES = [f"word{n}" for n in range(40)]


def ids(rows) -> list[list[str]]:
    return [[hit.passage.id for hit in hits] for hits in rows]


def test_oracle_puts_what_is_needed_first():
    oracle = Oracle(FINDS, PASSAGES)
    who = [Question("a", "?", ("x",), {"supporting_ids": ["9", "3"]}), Question("b", "?", ("x",), {"gold_ids": ["5"]})]
    assert ids(oracle.search_for(["word3 shared", "word7"], who, 4)) == [["9", "3", "0", "1"], ["5", "7"]]
    assert ids(oracle.search_for(["word3 shared"], who[:1], 1)) == [["9"]]
    assert oracle.search(["word7"], 3) == FINDS.search(["word7"], 3)  # without a question it knows no more


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({}, "'q' names no supporting passages"), ({"supporting_ids": ["1", "missing"]}, "'q' needs .* lacks: missing")],
)
def test_an_oracle_that_does_not_know_says_so(metadata, message):
    with pytest.raises(ValueError, match=message):
        Oracle(FINDS, PASSAGES).search_for(["word1"], [Question("q", "?", ("x",), metadata)], 3)


def test_random_passages_are_spread_evenly_and_repeatable():
    retriever = Random(PASSAGES, seed=1)
    rows = ids(retriever.search([f"query {n}" for n in range(2000)], 4))
    assert all(len(set(row)) == 4 for row in rows)
    drawn = [sum(row.count(passage.id) for row in rows) for passage in PASSAGES]
    assert all(120 < n < 290 for n in drawn)  # 200 each on average, standard deviation 13
    assert ids(retriever.search(["query 7"], 4)) == [rows[7]] != ids(Random(PASSAGES, seed=2).search(["query 7"], 4))
    assert len(retriever.search(["more than there are"], 100)[0]) == len(PASSAGES)


def test_empty_finds_nothing():
    assert Empty().search(["word1", "word2"], 3) == [[], []]


def test_noise_replaces_its_share_and_grows_by_adding():
    few, many = (Noisy(FINDS, PASSAGES, share, seed=5) for share in (0.25, 0.75))
    queries = [f"word{n % 40} {'x' * n}" for n in range(400)]
    right = FINDS.search(queries, 1)
    noisy = [{n for n, hits in enumerate(r.search(queries, 1)) if hits != right[n]} for r in (few, many)]
    assert 70 < len(noisy[0]) < 130 and 260 < len(noisy[1]) < 340 and noisy[0] < noisy[1]
    assert Noisy(FINDS, PASSAGES, 0.0).search(queries, 2) == FINDS.search(queries, 2)
    assert all(len(hits) == 2 for hits in Noisy(FINDS, PASSAGES, 1.0).search(queries, 2))


def test_curriculum_is_zerosearchs():
    """By hand: (4 ** 0.5 - 1) / 3 = 1 / 3 of the way at half of the steps."""
    assert noise_share(0, 100, 0.1, 0.7) == 0.1
    assert noise_share(50, 100, 0.1, 0.7) == pytest.approx(0.3)
    assert noise_share(100, 100, 0.1, 0.7) == pytest.approx(0.7)


def test_delay_waits_once_a_call():
    began = time.monotonic()
    assert Delayed(FINDS, 0.05).search(QUERIES, 3) == FINDS.search(QUERIES, 3)
    assert 0.05 <= time.monotonic() - began < 0.5


@given(st.lists(st.tuples(st.lists(st.sampled_from([*QUERIES, "", "shared"])), st.integers(1, 3))), st.integers(1, 6))
def test_cached_answers_are_the_same(calls, most):
    inner = OverlapRetriever(PASSAGES)
    cached = Cached(inner, most)
    for queries, k in calls:
        assert cached.search(queries, k) == FINDS.search(queries, k)
    assert cached.asked == sum(len(queries) for queries, _ in calls)
    assert cached.asked - cached.hits == sum(map(len, inner.calls))
    assert len(cached.kept) <= most and all(inner.calls)  # it is never asked for nothing


def test_hits_are_counted_and_the_oldest_goes_first():
    inner = OverlapRetriever(PASSAGES)
    cached = Cached(inner, most=2)
    cached.search(["word1", "word2", "word1"], 3)
    assert (cached.asked, cached.hits) == (3, 1)
    cached.search(["word2", "word3"], 3)
    assert (cached.asked, cached.hits) == (5, 2)
    cached.search(["word1"], 3)
    cached.search(["word3"], 2)  # another k is another question
    assert inner.calls == [["word1", "word2"], ["word3"], ["word1"], ["word3"]]


def test_changing_an_answer_does_not_change_the_next():
    cached = Cached(FINDS)
    cached.search(["shared"], 3)[0].clear()
    assert cached.search(["shared"], 3) == FINDS.search(["shared"], 3)
