"""How a training run is doing: one figure of small panels, and alarms that name the likely cause and what to try.

An alarm at a step is made from the metrics up to this step alone, so the same function judges a run that goes on
(training/early_stop.py) and one that has ended. Every threshold is relative to the run's own beginning, its first
three steps: something has doubled or halved since. `judge` says how such alarms did on a finished run.
Needs no torch. Leaves out: mending a run, and alarms on columns that no collapsed run has yet been seen with
(repeated n-grams, likelihood of right answers, ratios), which are drawn only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from searchr1_lite.analysis.figures import DPI
from searchr1_lite.analysis.runs import Run

WINDOW = 3  # steps: the run's beginning, and what a value of "now" is the mean of; a single step's questions vary a lot
FACTOR = 2.0  # what has doubled or halved is an alarm
GAIN = 0.1  # a change of exact match or reward that is more than chance; the fall that alarms should come before

COLUMNS = ("exact_match", "reward", "kl", "entropy", "answer_rate", "response_length", "searches")
CAUSES = {  # sign: (kind, likely cause and what to try), in the order in which they are looked at
    "kl": (
        "collapse",
        "the policy moves away from its start faster than it learns. Likely: retrieved tokens are learned (masked), "
        "the learning rate is too high, or too many updates are made of one batch. Lower learning_rate or "
        "updates_per_rollout, or raise beta or llds_coef",
    ),
    "entropy": (
        "collapse",
        "the model's words become random. Likely: updates without a signal (no group with variance) or against "
        "tokens that are not its own. Look at groups without variance and at masked; lower learning_rate or "
        "entropy_coef",
    ),
    "answer_rate": (
        "collapse",
        "half of the answers are gone. Likely: the model has lost the format. Read its latest trajectories, go back to "
        "an earlier checkpoint and lower learning_rate",
    ),
    "length": (
        "length blow-up",
        "the model writes twice as much a turn. Likely: it does not end its turns, or length pays. Read its latest "
        "trajectories; lower max_response_tokens, and look at invalid actions",
    ),
    "searches": (
        "search abandonment",
        "the model searches half as often as it did. Likely: what it finds does not help, answers pay without it, or "
        "it no longer writes the tags. Check the retriever, read trajectories, or reward searching for a while",
    ),
    "gaming": (
        "reward gaming",
        "the reward rises and exact match does not follow. Likely: the reward pays for something else (format, "
        "searching, partial answers). Read the best paid wrong answers, and lower what pays for them",
    ),
}

# Panels: title, unit, and the columns in it with their names
PANELS = (
    ("Reward and exact match", "mean", {"reward": "reward", "exact_match": "exact match"}),
    ("Answers and invalid actions", "a rollout", {"answer_rate": "answers", "invalid_actions": "invalid actions"}),
    ("Searches", "a rollout", {"searches": "all"} | {f"searches_by_hops.{n}": f"{n}-hop" for n in range(1, 5)}),
    ("Length of what it writes", "tokens", {"response_length": "tokens"}),
    ("Repeated 4-grams in thinking", "share", {"repeated_ngrams": "repeated"}),
    ("Entropy", "nats a token", {"entropy": "entropy"}),
    ("KL to the start", "nats a token", {"kl": "KL"}),
    ("Likelihood of its answers", "log-prob. a token", {"right_logprob": "right", "wrong_logprob": "wrong"}),
    ("Gradient norm", "norm", {"grad_norm": "gradient"}),
    ("Groups without variance", "share", {"zero_variance_groups": "groups"}),
    ("Clipped importance ratios", "share of tokens", {"clip_ratio": "clipped"}),
    ("Largest importance ratio", "new / old", {"ratio_max": "largest"}),
)
LOGARITHMIC = ("kl", "grad_norm", "ratio_max")  # these leap by orders of magnitude
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
SHADES = ("#111111", "#0b6fb8", "#c2571a", "#777777", "#3a9d5d")


@dataclass(frozen=True)
class Alarm:
    """Something looks wrong at this step for the first time; the message says what, why probably, and what to try."""

    step: int
    kind: str  # "collapse", "length blow-up", "search abandonment" or "reward gaming"
    message: str


def alarms(metrics: pd.DataFrame | Sequence[Mapping[str, Any]]) -> list[Alarm]:
    """The first alarm of each kind, by step: from a run's metrics, or the rows of metrics.jsonl up to now.

    Adding rows changes no alarm that there was. There is none before the third step, and none from a column that the
    rows lack.
    """
    if not isinstance(metrics, pd.DataFrame):
        metrics = pd.DataFrame(list(metrics), columns=["step", *COLUMNS]).set_index("step")
    first: dict[str, Alarm] = {}
    for sign, found in signs(metrics).items():
        kind, cause = CAUSES[sign]
        if found.any():
            alarm = Alarm(int(found.idxmax()), kind, f"{sign.replace('_', ' ')}: {cause}")
            first[kind] = min(first.get(kind, alarm), alarm, key=lambda one: one.step)
    return sorted(first.values(), key=lambda one: one.step)


def signs(metrics: pd.DataFrame) -> dict[str, pd.Series]:
    """For each sign, at which steps it is there. "Now" is the mean of the last 3 steps, the start that of the first 3.

    kl: KL over twice the starting entropy: the policy is further from its start than all it was undecided about. One
        such step in the last 3 is enough where exact match has not grown by 0.1 since the first step, else two: with
        several updates a batch, single leaps also happen while a run learns.
    entropy, length (tokens a turn: more searches need more turns), answer_rate: twice, twice and half the start.
    searches: half of the most so far. gaming: reward has grown by 0.2 more than exact match, which grew half as much.
    """
    table = metrics.reindex(columns=COLUMNS).astype(float)
    table["length"] = table["response_length"] / (1 + table["searches"])
    now, start = table.rolling(WINDOW).mean(), table.iloc[:WINDOW].mean()
    grown = now - start
    learned = now["exact_match"] >= table["exact_match"].iloc[:1].sum() + GAIN
    leaps = (table["kl"] > FACTOR * start["entropy"]).rolling(WINDOW).sum()
    most = now["searches"].cummax()
    return {
        "kl": (leaps >= 2) | (leaps >= 1) & ~learned,
        "entropy": now["entropy"] > FACTOR * start["entropy"],
        "answer_rate": now["answer_rate"] < start["answer_rate"] / FACTOR,
        "length": now["length"] > FACTOR * start["length"],
        "searches": (now["searches"] < most / FACTOR) & (most > GAIN),
        "gaming": (grown["reward"] > FACTOR * grown["exact_match"])
        & (grown["reward"] - grown["exact_match"] > FACTOR * GAIN),
    }


def health_view(run: Run) -> Figure:
    """Small panels of whatever the run recorded; dashed lines with a letter are alarms, named above the panels."""
    there = [panel for panel in PANELS if any(known(run, column) for column in panel[2])]
    rows = -(-len(there) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(11, 2.3 * rows), dpi=DPI, layout="constrained", squeeze=False)
    found = alarms(run.metrics)
    for axes, panel in zip(grid.flat, there, strict=False):
        draw_panel(axes, run, *panel)
        for letter, alarm in zip("ABCD", found, strict=False):
            axes.axvline(alarm.step, color="black", linestyle="--", linewidth=1)
            axes.annotate(
                letter, (alarm.step, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize="small"
            )
    for axes in grid.flat[len(there) :]:
        axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    named = ", ".join(f"{letter}: {one.kind} (step {one.step})" for letter, one in zip("ABCD", found, strict=False))
    figure.suptitle(f"{run.name}: {named or 'no alarm'}")
    return figure


def known(run: Run, column: str) -> bool:
    return column in run.metrics and run.metrics[column].notna().any()


def draw_panel(axes: Axes, run: Run, title: str, unit: str, columns: Mapping[str, str]) -> None:
    """The columns that the run has; lines differ in kind as well as in shade."""
    drawn = [column for column in columns if known(run, column)]
    for column, line, shade in zip(drawn, LINES, SHADES, strict=False):
        axes.plot(run.metrics[column].astype(float), linestyle=line, color=shade, label=columns[column])
    if drawn[0] in LOGARITHMIC:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_title(title, fontsize="medium", pad=11)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    if len(drawn) > 1:
        axes.legend(fontsize="x-small", frameon=False)
