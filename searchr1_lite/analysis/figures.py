"""Pictures of runs: thin lines are single runs, thick ones their mean, bands the interval over seeds.

Masked is a solid dark line with discs, unmasked a dashed light one with squares, so that grey print keeps them apart.
Every function draws on axes that it is given or returns a figure; none shows or saves one, except the command below,
which makes the README's picture:

searchr1 report runs data/results/runs/* --out data/results/summary
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from searchr1_lite.analysis.runs import Run, RunError
from searchr1_lite.evaluation.metrics import seed_interval

Groups = Mapping[str, Sequence[Run]]  # "masked" and "unmasked", as runs.by_mask gives them

STYLES = {
    "masked": {"color": "#0b4f8a", "linestyle": "-", "marker": "o"},
    "unmasked": {"color": "#e08214", "linestyle": "--", "marker": "s"},
}
IDEAL = {"color": "#555555", "linestyle": ":", "linewidth": 1.2}
DPI = 80  # in notebooks, which are kept small; files are written with twice as many


def over_seeds(runs: Sequence[Run], column: str) -> pd.DataFrame:
    """Columns mean, low, high, indexed by step: the steps that every run reached, 95 % interval over runs.

    low and high are NaN for a single run. Raises RunError where a run does not have the column.
    """
    for run in runs:
        if column not in run.metrics:
            raise RunError(f"{run.folder}: metrics.jsonl has no {column!r}")
    steps = pd.concat([run.metrics[column].astype(float) for run in runs], axis=1, join="inner")
    rows = []
    for _, values in steps.iterrows():
        known = values.dropna().tolist()
        rows.append((np.mean(known) if known else np.nan, *seed_interval(known)))
    return pd.DataFrame(rows, index=steps.index, columns=["mean", "low", "high"])


def draw_curves(axes: Axes, groups: Groups, column: str, bounds: tuple[float, float | None] = (0, None)) -> None:
    """One group of lines for each of the groups; the band is cut at `bounds`, which the value cannot leave."""
    for label, runs in groups.items():
        style, curve = STYLES[label], over_seeds(runs, column)
        if len(runs) > 1:
            for run in runs:
                axes.plot(run.metrics[column].astype(float), color=style["color"], alpha=0.5, linewidth=0.9)
            low, high = curve["low"].clip(*bounds), curve["high"].clip(*bounds)
            axes.fill_between(curve.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
        name = f"{label} ({len(runs)} {'run' if len(runs) == 1 else 'seeds'})"
        every = max(1, len(curve) // 8)
        axes.plot(curve["mean"], label=name, linewidth=2.2, markersize=5, markevery=every, **style)
    axes.set_xlabel("training step")
    axes.grid(alpha=0.25)


def learning_curves(groups: Groups) -> Figure:
    """Mean reward of the rollouts of each step: the README's picture."""
    figure, axes = plt.subplots(figsize=(7, 4), dpi=DPI, layout="constrained")
    draw_curves(axes, groups, "reward", (0, 1))
    axes.set_ylim(0, 1)
    axes.set_ylabel("mean reward of the step's rollouts")
    axes.set_title("Learning to search, with and without the retrieved-token mask" if len(groups) > 1 else "Learning")
    axes.legend(loc="best", frameon=False)
    return figure


def curves_by_hops(groups: Groups, column: str, label: str, *, top: float | None = None, ideal: bool = False) -> Figure:
    """A panel for each hop count of `<column>_by_hops`, or one for all questions where hops are not known.

    `ideal` draws the number of hops as the ideal number of searches.
    """
    hops = sorted({hop for runs in groups.values() for run in runs for hop in run.hops}, key=int)
    count = max(1, len(hops))
    figure, panels = plt.subplots(
        1, count, figsize=(max(5, 3.4 * count), 3.4), dpi=DPI, layout="constrained", sharey=True, squeeze=False
    )
    if not hops:
        draw_curves(panels[0][0], groups, column, (0, top))
        panels[0][0].set_title("all questions")
    for axes, hop in zip(panels[0], hops, strict=False):
        draw_curves(axes, groups, f"{column}_by_hops.{hop}", (0, top))
        axes.set_title(f"{hop}-hop questions")
        if ideal:
            axes.axhline(int(hop), label="ideal", **IDEAL)
    panels[0][0].set_ylim(0, top)  # last: an axis limit ends autoscaling, and the panels share theirs
    panels[0][0].set_ylabel(label)
    panels[0][-1].legend(loc="best", frameon=False, fontsize="small")
    return figure


def single_curve(groups: Groups, column: str, label: str) -> Figure:
    """One value of every step, e.g. response length in tokens."""
    figure, axes = plt.subplots(figsize=(6, 3.2), dpi=DPI, layout="constrained")
    draw_curves(axes, groups, column)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    axes.legend(loc="best", frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without the software's name and version in it, so that the same runs give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=2 * DPI, metadata={"Software": None})
    plt.close(figure)
