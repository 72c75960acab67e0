"""Sentences about runs, made from their numbers, so that text beside a picture cannot say what the picture does not.

The beginning and the end of a run are means over its first and last five steps: one step's 96 rollouts or so are
too few to quote. Nothing here decides whether a difference matters; intervals are given and compared.
"""

from collections.abc import Mapping, Sequence
from math import inf

import pandas as pd

from searchr1_lite.analysis.runs import Run, RunError
from searchr1_lite.evaluation.metrics import mean, seed_interval

WIDTH = 5


def ends(run: Run, column: str) -> tuple[float, float]:
    """Mean of a column over the run's first and last five steps; over half of it each where a run is shorter."""
    values = _values(run, column)
    width = _width(values)
    return mean(values[:width]), mean(values[-width:])


def best(run: Run, column: str) -> float:
    """The highest mean of five steps in a row (of half the run where it is shorter)."""
    values = _values(run, column)
    return float(values.rolling(_width(values)).mean().max())


def with_interval(values: Sequence[float], digits: int = 2, top: float = inf) -> str:
    """The mean and its 95 % interval over seeds, e.g. "0.92 (0.90 to 0.94)"; of one run, the value alone.

    The interval is cut at 0 and at `top`, which the value cannot leave: shares have top=1.
    """
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = seed_interval(values)
    return f"{mean(values):.{digits}f} ({max(0, low):.{digits}f} to {min(top, high):.{digits}f})"


def from_to(groups: Mapping[str, Sequence[Run]], column: str, digits: int = 2, top: float = inf) -> str:
    """A line a group: where the value began and where it ended, with intervals over seeds."""
    lines = []
    for label, runs in groups.items():
        first, last = zip(*(ends(run, column) for run in runs), strict=True)
        count = "1 run" if len(runs) == 1 else f"{len(runs)} seeds"
        lines.append(
            f"{label}, {count}: from {with_interval(first, digits, top)} to {with_interval(last, digits, top)}"
        )
    return "\n".join(lines)


def compare(groups: Mapping[str, Sequence[float]], what: str) -> str:
    """Masked beside unmasked: the difference of the means, and whether the intervals over seeds touch."""
    if set(groups) != {"masked", "unmasked"}:
        return f"Only {' and '.join(groups)} runs are here: there is nothing to compare the {what} with."
    difference = mean(groups["masked"]) - mean(groups["unmasked"])
    verdict = f"Masked minus unmasked, {what}: {difference:+.2f}."
    if min(map(len, groups.values())) < 2:
        return f"{verdict} With one run a side, chance cannot be told from effect."
    (low, high), (other_low, other_high) = (seed_interval(groups[label]) for label in ("masked", "unmasked"))
    touch = low <= other_high and other_low <= high
    return f"{verdict} The 95 % intervals over seeds {'overlap' if touch else 'do not touch'}."


def _values(run: Run, column: str) -> pd.Series:
    if column not in run.metrics:
        raise RunError(f"{run.folder}: metrics.jsonl has no {column!r}")
    return run.metrics[column].astype(float).dropna()


def _width(values: pd.Series) -> int:
    return max(1, min(WIDTH, len(values) // 2))
