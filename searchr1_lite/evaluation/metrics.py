"""Numbers over many answers: shares, means by hops, how far chance alone could move them, and what it cannot tell.

Works on plain numbers and needs no torch, so the analysis of finished runs uses it too. Judging one answer is
`tasks/answers.py`'s work.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from math import hypot, inf, isfinite, nan, sqrt

import numpy as np
from scipy.signal import convolve
from scipy.stats import binom, binomtest, norm, sem, t

RESAMPLES = 2000  # of a bootstrap, drawn in blocks so that the paper's 51,713 questions fit in memory
SIGN_FLIPS = 20000  # of a permutation test that cannot be counted out


def mean(values: Iterable[float]) -> float:
    """The mean; of nothing it is an error, since there is no number that would not mislead."""
    values = list(values)
    if not values:
        raise ValueError("the mean of no values is asked for")
    return sum(values) / len(values)


def share_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for the share `correct / total` of questions answered right."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total} is no share")
    interval = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def macro_average(shares: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The mean over data sets, each weighing the same whatever its size (the papers' "Avg"), between its bounds.

    Takes each set's (share, low, high), gives the same of their mean. Distances to the bounds are squared and added
    (Zou and Donner, Statistics in Medicine 27, 2008), which stays sensible where a share is 0 or 1.
    """
    average = mean(share for share, _, _ in shares)
    below = hypot(*(share - low for share, low, _ in shares)) / len(shares)
    above = hypot(*(high - share for share, _, high in shares)) / len(shares)
    return average, average - below, average + above


def seed_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval for the mean over seeds, the runs being the sample; (nan, nan) for fewer than two.

    With three seeds it is wide (4.3 standard errors), as three seeds say little.
    """
    if not all(map(isfinite, values)):
        raise ValueError(f"an interval over values that are not numbers: {list(values)}")
    if len(values) < 2:
        return nan, nan
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1) * sem(values))
    return mean(values) - half, mean(values) + half


def by_hops(values: Sequence[float], metadata: Sequence[Mapping]) -> dict[str, float]:
    """Mean of the values for each hop count, keys "1", "2", … in order; questions without hops are left out."""
    groups: dict[int, list[float]] = {}
    for value, described in zip(values, metadata, strict=True):
        if described.get("hops") is not None:
            groups.setdefault(int(described["hops"]), []).append(value)
    return {str(hops): mean(groups[hops]) for hops in sorted(groups)}


def bootstrap_interval(
    scores: Sequence[Sequence[float]], trained: bool = False, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval for the mean of scores between 0 and 1, (seeds, questions), over questions and, if `trained`, seeds.

    Questions are drawn anew with replacement, each with its scores of all seeds. An untrained way has one model, its
    seeds are only repeated samples; a trained way's are different models. Three of them cannot be drawn anew (one draw
    in nine takes the same one three times, and their spread comes out a third too small), so each draw adds what
    Student's t says that the mean of so few may be off by (a generalized interval: Weerahandi, JASA 88, 1993).

    Deviations are measured in units of sqrt(m (1 - m)) and turned back as Wilson's interval is: for right-or-wrong
    scores of one seed it is nearly Wilson's, and it has a width where every answer is right, which a percentile
    bootstrap has not: that of as many questions, whatever the seeds.

    Measured coverage of 95 % intervals, 1,000 made-up data sets each, give or take 1.4 (data/results/coverage.json,
    `python benchmarks/interval_coverage.py`), shares .02 to .98, 125 and 200 questions: right or wrong, one seed, 93 to
    97 %; three samples of one model 93 to 96 %; F1-like scores 94 to 97 %, but with a mean below .1 or above .9 91 to
    94 %, too few: rare partial credit is seen too seldom. Trained ways: three seeds 94 to 100 %, five 95 to 99 %; where
    the models hardly differ it is too much (99 %), since three cannot show that they do not.
    """
    table = np.asarray(scores, float)
    if table.ndim != 2 or not table.size or not ((table >= 0) & (table <= 1)).all():
        raise ValueError(f"an interval needs scores from 0 to 1, seeds by questions; got {table.shape}")
    questions, rng = table.mean(axis=0), np.random.default_rng(0)
    average, total = float(questions.mean()), table.shape[1]
    unit, z = sqrt(max(0.0, average * (1 - average))), float(norm.ppf((1 + confidence) / 2))
    if unit < 1e-6:
        return _wilson(average, z / sqrt(total))
    if np.ptp(questions) < 1e-9:  # nothing to draw from
        moved = unit / sqrt(total) * rng.standard_normal(RESAMPLES)
    else:
        blocks = [questions[rng.integers(total, size=(100, total))].mean(axis=1) for _ in range(RESAMPLES // 100)]
        moved = np.concatenate(blocks) - average
        # Few right or few wrong answers: the draws take few values, and their quantile can fall short.
        moved *= max(1.0, z * questions.std(ddof=1) / sqrt(total) / np.quantile(np.abs(moved), confidence))
    if trained and len(table) > 1:
        moved += rng.standard_t(len(table) - 1, RESAMPLES) * sem(table.mean(axis=1))
    return _wilson(average, float(np.quantile(np.abs(moved), confidence)) / unit)


def _wilson(share: float, units: float) -> tuple[float, float]:
    """The shares that lie within so many of their own units sqrt(s (1 - s)) of the one that was seen."""
    centre = (share + units**2 / 2) / (1 + units**2)
    half = units / (1 + units**2) * sqrt(share * (1 - share) + units**2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_p(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Two-sided p for two ways that answered the same questions, scores as (seeds, questions).

    The sign-flip test: where the ways are alike, each question's difference, summed over seeds, could as well have the
    other sign. Right-or-wrong scores are counted out exactly, with one seed this is McNemar's exact test; others (F1)
    get random flips, so that p is at least 1 / (SIGN_FLIPS + 1). Questions are the sample: it says what these very
    models would do on more such questions, not what the same training would come to with other seeds.
    """
    one, other = np.asarray(first, float), np.asarray(second, float)
    if one.shape != other.shape or one.ndim != 2:
        raise ValueError(f"a paired test needs the same seeds and questions twice, got {one.shape} and {other.shape}")
    differences = (one - other).sum(axis=0)
    seen = abs(float(differences.sum()))
    sizes = np.abs(differences)
    if not (sizes == np.round(sizes)).all():
        rng = np.random.default_rng(0)
        flipped = [abs(float(sizes @ rng.choice((-1, 1), len(sizes)))) for _ in range(SIGN_FLIPS)]
        return (1 + sum(value >= seen - 1e-9 for value in flipped)) / (SIGN_FLIPS + 1)
    chances = np.ones(1)  # of each sum of signed differences, from the least to the greatest, in steps of one
    for size, count in zip(*np.unique(sizes[sizes > 0].astype(int), return_counts=True), strict=True):
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, steps)
    sums = np.arange(len(chances)) - len(chances) // 2
    return float(np.clip(chances[np.abs(sums) >= seen].sum(), 0, 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, so corrected that one in twenty whole families, not tests, is below .05 by chance.

    Holm, Scandinavian Journal of Statistics 6, 1979; they come back in the order given.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def smallest_difference(questions: int, disagreement: float = 0.5, power: float = 0.8, alpha: float = 0.05) -> float:
    """The least difference in exact match that McNemar's exact test shows with `power`, inf where it never can.

    `disagreement` is the share of questions that one way gets right and the other wrong: at most 0.5 for ways that err
    independently, and less the more alike they are. Connor's formula (Biometrics 43, 1987) solved for the difference,
    and one question more, since the exact test counts whole ones.
    """
    z, z_power = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))
    inside = questions - z**2 + z_power**2
    if inside < 0:
        return inf
    difference = sqrt(disagreement) * (z * sqrt(questions) + z_power * sqrt(inside)) / (questions + z_power**2)
    difference += 1 / questions
    return difference if difference <= disagreement else inf


def questions_needed(difference: float, disagreement: float = 0.5, power: float = 0.8, alpha: float = 0.05) -> int:
    """The fewest paired questions whose `smallest_difference` is no more than this one."""
    if not 0 < difference <= disagreement:
        raise ValueError(f"two ways that disagree on {disagreement:.0%} cannot differ by {difference:.1%}")
    fits = range(1, 10**9)
    return fits[bisect_left(fits, True, key=lambda n: smallest_difference(n, disagreement, power, alpha) <= difference)]
