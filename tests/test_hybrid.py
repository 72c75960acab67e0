"""Reciprocal-rank fusion against sums worked out by hand, and against exact fractions over random rankings."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.rerank import Hybrid
from searchr1_lite.types import Hit, Passage


class Ranked:
    """Finds the passages whose ids are the letters of a fixed ranking, whatever is asked."""

    def __init__(self, ranking: str, note: str = "") -> None:
        self.hits = [Hit(Passage(key, f"Title {key}", f"text {key}{note}"), -float(i)) for i, key in enumerate(ranking)]
        self.asked: list[int] = []

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        self.asked.append(k)
        return [self.hits[:k] if query.strip() else [] for query in queries]


def fused(*rankings: str, k: int = 9, **settings) -> str:
    [hits] = Hybrid([Ranked(ranking) for ranking in rankings], **settings).search(["q"], k)
    return "".join(hit.passage.id for hit in hits)


def test_sums_worked_out_by_hand():
    [hits] = Hybrid([Ranked("abc"), Ranked("cad")]).search(["q"], 9)
    assert [hit.passage.id for hit in hits] == ["a", "c", "b", "d"]
    #                                                 a: ranks 1, 2    c: ranks 3, 1    b: rank 2  d: rank 3
    assert [hit.score for hit in hits] == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62, 1 / 63], rel=1e-15)


def test_c_weighs_one_first_place_against_two_lower_ones():
    assert fused("ab", "cb", c=0)[:2] == "ac"  # b: 1/2 + 1/2 = 1, as a and c; theirs is the better best rank
    assert fused("ab", "cb", c=1)[0] == "b"  # 1/3 + 1/3 > 1/2


def test_ties_go_to_the_better_best_rank_and_then_to_the_earlier_retriever():
    assert fused("ab", "ba") == "ab"
    assert fused("ab", "cd") == "acbd"
    assert fused("cd", "ab") == "cadb"
    assert fused("efghb", "acd", "bjkla").startswith("ab")  # both: ranks 1 and 5; a is first with the second retriever
    # with c = 2: x has ranks 1 and 10 (1/3 + 1/12 = 5/12), y ranks 2 and 4 (1/4 + 1/6 = 5/12)
    assert fused("xy", "abcydefghx", c=2, k=2) == "xy"
    assert fused("abcydefghx", "xy", c=2, k=2) == "xy"


def test_where_one_finds_nothing_the_other_keeps_its_order():
    assert fused("", "dbac") == "dbac"
    assert fused("", "") == ""
    assert Hybrid([Ranked("ab"), Ranked("cd")]).search(["  ", "q"], 1)[0] == []
    assert Hybrid([Ranked("ab")]).search([], 1) == []


def test_each_retriever_is_asked_to_the_depth_or_for_k():
    first, second = Ranked("abcd"), Ranked("dcba")
    hybrid = Hybrid([first, second], depth=2)
    assert [hit.passage.id for hit in hybrid.search(["q"], 1)[0]] == ["a"]
    hybrid.search(["q"], 3)
    assert first.asked == second.asked == [2, 3]


def test_one_id_with_two_texts_is_refused():
    with pytest.raises(CorpusError, match=r"passage 'b' is 'Title b' .* same corpus"):
        Hybrid([Ranked("ab"), Ranked("cb", note=" of another corpus")]).search(["q"], 1)


@pytest.mark.parametrize("settings", [{"retrievers": []}, {"depth": 0}, {"c": -1}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match="fusion needs"):
        Hybrid(**{"retrievers": [Ranked("a")]} | settings)
    with pytest.raises(ValueError, match="k must be at least 1"):
        Hybrid([Ranked("a")]).search(["q"], 0)


@given(
    st.lists(st.permutations("abcdefgh"), min_size=1, max_size=4), st.lists(st.integers(0, 8), min_size=4, max_size=4)
)
def test_as_exact_fractions_say(orders, lengths):
    rankings = ["".join(order[:length]) for order, length in zip(orders, lengths, strict=False)]

    def place(key: str) -> tuple:
        at = [ranking.index(key) + 1 if key in ranking else None for ranking in rankings]
        there = [rank for rank in at if rank]
        return -sum(Fraction(1, 60 + rank) for rank in there), min(there), at.index(min(there))

    assert fused(*rankings) == "".join(sorted(set("".join(rankings)), key=place))


def test_over_real_retrievers_a_passage_both_find_comes_first():
    passages = [Passage("1", "Fox", "red"), Passage("2", "Bird", "red fox song"), Passage("3", "Stone", "cold")]
    both = Hybrid([BM25Retriever.build(passages), Ranked("")])
    alone = BM25Retriever.build(passages).search(["fox", "stone", ""], 3)
    assert [[hit.passage for hit in hits] for hits in both.search(["fox", "stone", ""], 3)] == [
        [hit.passage for hit in hits] for hits in alone
    ]
