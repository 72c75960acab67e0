"""Scores over many answers: hand-computed values, an independent Wilson formula, and batches that change nothing."""

from dataclasses import replace
from math import isnan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.evaluation import evaluate as module
from searchr1_lite.evaluation.evaluate import closed_book, evaluate, figures, scored_row, summarise
from searchr1_lite.evaluation.metrics import by_hops, macro_average, mean, seed_interval, share_interval
from searchr1_lite.rollouts.trajectory import Trajectory, Turn
from searchr1_lite.types import Question


def trajectory(answer: str | None, searches: int = 0, hops: int | None = None, written: int = 3) -> Trajectory:
    """Searches as often as told, then answers; the golden answer is "yes", and every passage offers it."""
    found = "<information><answer>yes</answer></information>"
    turns = [Turn("<search>q</search>", "search", query="q", observation=found)] * searches
    turns += [Turn("dunno", "invalid") if answer is None else Turn(f"<answer>{answer}</answer>", "answer")]
    question = Question(f"{answer}{searches}{hops}", "q?", ("yes",), {} if hops is None else {"hops": hops})
    mask = (1,) * written + (0,) * searches
    return Trajectory(question, (1,), mask, mask, (0.0,) * len(mask), tuple(turns), answer is not None, "answer")


def test_a_summary_by_hand():
    four = [
        trajectory("yes", 1, 1),
        trajectory("no", 1, 1),
        trajectory("Yes!", 2, 2, written=7),
        trajectory(None, 3, 2),
    ]
    summary = summarise(four)
    assert summary["questions"] == 4
    assert summary["exact_match"] == 0.5
    assert summary["exact_match_by_hops"] == {"1": 0.5, "2": 0.5}
    assert summary["mean_searches"] == 7 / 4
    assert summary["mean_searches_by_hops"] == {"1": 1.0, "2": 2.5}
    assert summary["response_length"] == 4.0  # written tokens 3, 3, 7, 3: what was retrieved does not count
    assert summary["answer_rate"] == 0.75
    assert summary["invalid_actions"] == 0.25


def test_an_answer_inside_a_passage_is_not_the_models():
    assert summarise([trajectory(None, 1)])["exact_match"] == 0.0


def test_a_question_whose_search_failed_is_counted_and_in_no_mean():
    failed = replace(trajectory(None, 5), stop_reason="search failed")
    fine = [trajectory("yes", 1), trajectory("no", 2)]
    summary = summarise([fine[0], failed, fine[1]])
    assert summary == summarise(fine) | {"failed_searches": 1}
    assert (summary["questions"], summary["exact_match"], summary["mean_searches"]) == (2, 0.5, 1.5)
    with pytest.raises(ValueError, match=r"the search of every question failed \(2\)"):
        summarise([failed, failed])


def test_words_and_substrings_by_hand():
    asked = Question("q", "Which river?", ("blue Nile",))
    answers = ("Blue Nile river", "the Nile", "Blue Nile", None)
    summary = summarise([replace(trajectory(answer), question=asked) for answer in answers])
    assert summary["exact_match"] == 1 / 4
    assert summary["f1"] == pytest.approx((4 / 5 + 2 / 3 + 1 + 0) / 4)
    assert summary["substring_match"] == 2 / 4


def test_a_written_row_says_all_that_the_summary_needs():
    rows = [scored_row(trajectory("yes", 2, 2), decoding="greedy"), scored_row(trajectory(None, 1), decoding="greedy")]
    assert [(row["exact_match"], row["f1"], row["invalid_actions"]) for row in rows] == [(1.0, 1.0, 0), (0.0, 0.0, 1)]
    assert figures(rows[0]) == {
        "exact_match": 1.0,
        "f1": 1.0,
        "substring_match": 1.0,
        "searches": 2,
        "response_length": 3,
        "retrieved_tokens": 2,
        "finished": True,
        "invalid_actions": 0,
        "hops": 2,
        "failed": False,
    }


def test_the_mean_over_sets_weighs_sets_not_questions():
    assert macro_average([(0.5, 0.4, 0.7)]) == pytest.approx((0.5, 0.4, 0.7))
    # Distances down 0.3 and 0.4 make 0.5, up 0.6 and 0.8 make 1.0; halved, for two sets.
    assert macro_average([(0.3, 0.0, 0.9), (0.7, 0.3, 1.5)]) == pytest.approx((0.5, 0.25, 1.0))


def test_the_interval_over_sets_covers_the_mean_that_it_should():
    """Drawn many times from known shares, one of them 1: the interval holds their mean at least as often as it says."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(500):
        right = [int(rng.binomial(size, share)) for size, share in ((125, 0.3), (400, 0.5), (50, 1.0))]
        sizes = (125, 400, 50)
        sets = [(k / n, *share_interval(k, n)) for k, n in zip(right, sizes, strict=True)]
        _, low, high = macro_average(sets)
        covered += low <= 0.6 <= high
    assert 0.93 <= covered / 500 <= 0.99


def test_questions_without_hops_are_counted_but_not_grouped():
    summary = summarise([trajectory("yes"), trajectory("yes", 1, 1), trajectory("no")])
    assert summary["exact_match"] == pytest.approx(2 / 3)
    assert summary["exact_match_by_hops"] == {"1": 1.0}
    assert summarise([trajectory("yes")])["exact_match_by_hops"] == {}


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_is_wilsons(counts):
    correct, total = counts
    share, z = correct / total, 1.959963984540054
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low, high = share_interval(correct, total)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert -1e-12 <= low <= share <= high + 1e-12


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_an_impossible_share_is_an_error(correct, total):
    with pytest.raises(ValueError, match="is no share"):
        share_interval(correct, total)


def test_interval_over_seeds():
    # Mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653.
    assert seed_interval([1, 2, 3]) == pytest.approx((2 - 4.302653 / sqrt(3), 2 + 4.302653 / sqrt(3)), abs=1e-6)
    assert all(map(isnan, seed_interval([1.0])))
    with pytest.raises(ValueError, match="not numbers"):
        seed_interval([1.0, float("nan")])


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([None, 1, 2, 3, 10])), min_size=1))
def test_means_by_hops_weigh_up_to_the_mean_of_all_that_have_hops(rows):
    known = [(value, hops) for value, hops in rows if hops is not None]
    groups = by_hops([value for value, _ in rows], [{"hops": hops} if hops else {} for _, hops in rows])
    assert list(groups) == [str(hops) for hops in sorted({hops for _, hops in known})]
    total = sum(groups[str(hops)] for _, hops in known)
    assert total == pytest.approx(sum(value for value, _ in known))


def test_the_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        mean([])


def questions(count: int) -> list[Question]:
    return [
        Question(str(number), f"Where is place {number}?", ("x",), {"hops": 1 + number % 2}) for number in range(count)
    ]


def test_rows_in_memory_change_nothing(policy, retriever, profile):
    asked = questions(5)
    whole, few = (profile.model_copy(update={"rollout_rows": size, "max_turns": 1}) for size in (5, 2))
    for greedy in (True, False):
        in_order = []
        summary, trajectories = evaluate(policy, asked, retriever, whole, greedy, seed=7)
        summary_of_few, of_few = evaluate(policy, asked, retriever, few, greedy, seed=7, done=in_order.append)
        assert [trajectory.question for trajectory in trajectories] == asked
        assert [t.completion_ids for t in trajectories] == [t.completion_ids for t in of_few]
        assert in_order == of_few
        for one in (summary, summary_of_few):
            assert one.pop("seconds") > 0 and one["greedy"] is greedy
        assert summary == summary_of_few


def test_what_a_question_samples_depends_on_the_question_alone(policy, retriever, profile):
    """So one that was cut off goes on as it would have gone."""
    asked, small = questions(5), profile.model_copy(update={"rollout_rows": 2, "max_turns": 1})
    _, whole = evaluate(policy, asked, retriever, small, greedy=False, seed=7)
    _, rest = evaluate(policy, asked[2:], retriever, small, greedy=False, seed=7)
    _, other = evaluate(policy, asked[2:], retriever, small, greedy=False, seed=8)
    assert [t.completion_ids for t in rest] == [t.completion_ids for t in whole[2:]]
    assert [t.completion_ids for t in other] != [t.completion_ids for t in rest]


def test_nothing_to_evaluate_is_an_error(policy, retriever, profile):
    with pytest.raises(ValueError, match="no questions"):
        evaluate(policy, [], retriever, profile)


def test_closed_book_is_one_turn_and_finds_nothing(policy, profile, monkeypatch):
    seen = []

    def answer_from_memory(policy, batch, retriever, profile, *, greedy, seed, done):
        seen.append((profile.max_turns, greedy, retriever.search(["a", "b"], 3)))
        return [trajectory("yes" if question.id == "0" else "no") for question in batch]

    monkeypatch.setattr(module, "rollout", answer_from_memory)
    assert closed_book(policy, questions(4), profile) == 0.25
    assert seen == [(0, True, [[], []])]


def test_closed_book_runs_through_the_engine(policy, profile):
    small = profile.model_copy(update={"max_response_tokens": 4})
    assert closed_book(policy, questions(2), small) == 0.0
