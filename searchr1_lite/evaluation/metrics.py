"""Numbers over many answers: shares, means by hops, and how far chance alone could move them.

Works on plain numbers and needs no torch, so the analysis of finished runs uses it too. Judging one answer is
`training/rewards.py`'s work.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import hypot, isfinite, nan

from scipy.stats import binomtest, sem, t


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
