"""Intervals that hold what they should, tests against scipy and by hand, power against simulation."""

import json
import sys
from functools import cache
from itertools import product
from math import inf, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, permutation_test

from searchr1_lite.config import ROOT
from searchr1_lite.evaluation import metrics
from searchr1_lite.evaluation.metrics import (
    bootstrap_interval,
    holm,
    paired_p,
    questions_needed,
    seed_interval,
    share_interval,
    smallest_difference,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import interval_coverage as benchmark  # benchmarks/interval_coverage.py


def scores_of(correct: int, total: int) -> list[float]:
    return [1.0] * correct + [0.0] * (total - correct)


@pytest.mark.parametrize(("correct", "total"), [(0, 125), (125, 125), (1, 1), (1, 60), (3, 125), (60, 125), (196, 200)])
def test_right_or_wrong_answers_of_one_seed_get_wilsons_interval(correct, total):
    """Or one that is a little wider, by a quarter of a question more at most where few are right or wrong."""
    low, high = bootstrap_interval([scores_of(correct, total)])
    wanted = share_interval(correct, total)
    assert low == pytest.approx(wanted[0], abs=0.6 / total) and high == pytest.approx(wanted[1], abs=0.6 / total)
    assert high - low >= 0.99 * (wanted[1] - wanted[0]) and 0 <= low <= correct / total <= high <= 1


def conditions(**wanted) -> list[dict]:
    return [one for one in benchmark.conditions() if all(one[key] in values for key, values in wanted.items())]


@pytest.mark.parametrize(
    "condition",
    conditions(scores=["right or wrong"], questions=[125], share=[0.02, 0.5, 0.98])
    + conditions(scores=["F1-like"], questions=[200], share=[0.1, 0.7])
    + conditions(seeds=[3], trained=[True], spread=[0.3, 1.0], share=[0.1, 0.98]),
    ids=lambda one: f"{one['scores']}, {one['share']}, {one['seeds']} seeds, {one['spread']}",
)
def test_intervals_hold_the_true_value_as_often_as_they_say(condition):
    """150 data sets each; 0.08 is four and a half standard errors of such a share at 0.95."""
    assert benchmark.measure(condition, 150)["coverage"] >= 0.95 - 0.08


def test_the_coverage_that_the_docstring_quotes_is_the_files():
    measured = json.loads((ROOT / "data/results/coverage.json").read_text())
    assert measured["sets"] >= 1000
    assert [
        {key: one[key] for key in wanted}
        for one, wanted in zip(measured["conditions"], benchmark.conditions(), strict=True)
    ] == benchmark.conditions()
    text = " ".join(metrics.bootstrap_interval.__doc__.split())

    def lowest_and_highest(rows):
        found = [one["coverage"] for one in rows]
        return f"{100 * min(found):.0f} to {100 * max(found):.0f} %"

    rows = measured["conditions"]
    middle = [one for one in rows if one["scores"] == "F1-like" and 0.1 <= one["share"] <= 0.9]
    ends = [one for one in rows if one["scores"] == "F1-like" and not 0.1 <= one["share"] <= 0.9]
    single = [one for one in rows if one["scores"] == "right or wrong" and one["seeds"] == 1]
    sampled = [one for one in rows if one["seeds"] == 3 and not one["trained"]]
    for group in (
        single,
        middle,
        ends,
        sampled,
        *([one for one in rows if one["trained"] and one["seeds"] == n] for n in (3, 5)),
    ):
        assert lowest_and_highest(group) in text


def test_a_file_of_coverage_is_made_again_by_the_same_numbers(tmp_path):
    condition = conditions(share=[0.98], questions=[125])[0]
    assert benchmark.measure(condition, 20) == benchmark.measure(condition, 20)
    assert benchmark.measure(condition, 20).keys() == condition.keys() | {"coverage", "mean_width"}


def test_seeds_of_a_trained_way_are_models():
    """All that the questions could vary is taken away: what is left is Student's interval over seeds."""
    seeds = [[0.4] * 50, [0.5] * 50, [0.6] * 50]
    low, high = bootstrap_interval(seeds, trained=True)
    wanted = seed_interval([0.4, 0.5, 0.6])
    assert high - low > 0.8 * (wanted[1] - wanted[0])
    untrained = bootstrap_interval(seeds)
    assert high - low > 1.5 * (untrained[1] - untrained[0])
    same = [scores_of(30, 50)] * 3
    assert bootstrap_interval(same, trained=True) == pytest.approx(bootstrap_interval(same[:1]))


def test_every_answer_right_is_no_certainty():
    assert bootstrap_interval([[1.0] * 200] * 3, trained=True) == pytest.approx(share_interval(200, 200))
    low, high = bootstrap_interval([[1.0, 0.0], [0.0, 1.0]])
    assert high - low > 0.5


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_an_interval_is_within_the_scale_and_holds_the_mean(scores, trained):
    low, high = bootstrap_interval(scores, trained)
    assert 0 <= low <= np.mean(scores) + 1e-9 and np.mean(scores) - 1e-9 <= high <= 1 and low < high


@pytest.mark.parametrize("scores", [[], [[]], [[0.5], [1.5]], [[float("nan")]], [0.0, 1.0]])
def test_scores_that_have_no_interval(scores):
    with pytest.raises(ValueError, match="scores from 0 to 1"):
        bootstrap_interval(scores)


def test_mcnemar_by_hand_and_by_scipy():
    # Eight questions that only the first gets right, one that only the second does: 2 (1 + 9) / 2^9.
    first, second = [[1] * 8 + [0] + [1] * 20], [[0] * 8 + [1] + [1] * 20]
    assert paired_p(first, second) == pytest.approx(20 / 512)
    assert paired_p(first, second) == pytest.approx(binomtest(8, 9).pvalue)
    assert paired_p(first, first) == 1.0


def test_the_known_ten_pairs_that_all_go_one_way():
    assert paired_p([[1] * 10], [[0] * 10]) == pytest.approx(2 / 1024)


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 6), min_size=1, max_size=8))
def test_several_seeds_are_counted_out(rows):
    """Against every sign of every question's summed difference, written out."""
    first, second = (np.array([row[part] for row in rows]).T for part in (slice(0, 3), slice(3, 6)))
    differences = (first - second).sum(axis=0)
    flipped = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(rows))]
    assert paired_p(first, second) == pytest.approx(np.mean([value >= abs(differences.sum()) for value in flipped]))


def test_other_scores_are_flipped_at_random():
    rng = np.random.default_rng(1)
    first = rng.random(12)
    second = np.clip(first + rng.normal(0.1, 0.2, 12), 0, 1)
    exact = permutation_test((first, second), lambda a, b: np.mean(a - b), permutation_type="samples").pvalue
    assert paired_p([first], [second]) == pytest.approx(exact, abs=5 * sqrt(0.25 / metrics.SIGN_FLIPS))
    assert paired_p([[0.9] * 40], [[0.1] * 40]) == pytest.approx(1 / (metrics.SIGN_FLIPS + 1))


def test_many_questions_take_little_time_and_keep_their_p():
    rng = np.random.default_rng(0)
    first, second = (rng.random((3, 20000)) < share for share in (0.5, 0.505))
    p = paired_p(first, second)
    differences = (first.astype(float) - second).sum(axis=0)
    z = abs(differences.sum()) / sqrt((differences**2).sum())
    assert p == pytest.approx(2 * norm.sf(z), abs=0.002)


def test_pairs_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="same seeds and questions twice"):
        paired_p([[1, 0]], [[1, 0, 1]])


def test_holm_by_hand():
    # Sorted: .01 x 4, .02 x 3, .03 x 2 = .06, .04 x 1 raised to .06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1))
def test_holm_lowers_nothing_keeps_the_order_and_stays_below_bonferroni(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert min(1.0, p) <= q <= min(1.0, p * len(p_values)) + 1e-12
    assert all(a <= b for (p, a), (o, b) in product(zip(p_values, adjusted, strict=True), repeat=2) if p < o)


@cache
def mcnemar(first: int, second: int) -> float:
    return binomtest(first, first + second).pvalue if first + second else 1.0


@pytest.mark.parametrize(("questions", "disagreement"), [(125, 0.3), (125, 0.5), (200, 0.1), (200, 0.5), (1000, 0.3)])
def test_the_smallest_difference_has_the_power_that_is_said(questions, disagreement):
    difference = smallest_difference(questions, disagreement)
    chances = [(disagreement + difference) / 2, (disagreement - difference) / 2, 1 - disagreement]
    pairs = np.random.default_rng(0).multinomial(questions, chances, size=2000)
    significant = [mcnemar(int(b), int(c)) <= 0.05 for b, c, _ in pairs]
    assert 0.77 <= np.mean(significant) <= 0.87


def test_125_questions_cannot_show_three_points():
    """However little two ways disagree: below 3 % they cannot differ by as much, above it takes more."""
    assert all(smallest_difference(125, share / 1000) > 0.03 for share in range(30, 1001))
    assert smallest_difference(125) == pytest.approx(0.18, abs=0.005)
    assert questions_needed(0.03) > 4000 and questions_needed(0.03, 0.03) > 125


@pytest.mark.parametrize("disagreement", [0.05, 0.2, 0.5, 1.0])
def test_questions_needed_is_the_other_way_round(disagreement):
    for difference in (0.02, 0.05):
        needed = questions_needed(difference, disagreement)
        assert smallest_difference(needed, disagreement) <= difference < smallest_difference(needed - 1, disagreement)
    assert smallest_difference(5, 0.1) == inf
    with pytest.raises(ValueError, match="cannot differ"):
        questions_needed(0.2, 0.1)
