"""What the paper claims, beside what the experiments measured: a verdict for every claim, each with its interval.

Reads result files (`searchr1 experiment` writes them) and the `claims:` of experiments/<name>.yaml; writes a .json, a
.md and, beside each result file, a .png. A claim names two sides and what it expects of them:

- the sides are two arms by one measure (`measure`, and arms as sides), or two measures of one arm (`arm`, and measures
  as sides; a number is allowed too);
- it expects `more` above `less`, or two `alike` sides that differ by no more than `within`.

A claim with a `reason` in place of all this is not testable. `value` says what a measure is. Why something came out as
it did is not said here; notebook 08 tries. No model is loaded, no torch.
"""

import os
import re
from collections.abc import Sequence
from math import ceil, floor, inf, isfinite
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from searchr1_lite.analysis.figures import DPI, save
from searchr1_lite.analysis.runs import RunError, read_mapping
from searchr1_lite.config import ROOT
from searchr1_lite.evaluation.metrics import mean, seed_interval
from searchr1_lite.files import write_json, write_whole
from searchr1_lite.printable import printable
from searchr1_lite.provenance import command

Record = dict[str, Any]

CLAIMS = ROOT / "searchr1_lite/experiments"  # <name>.yaml, and untestable.yaml
SAYS = {"claim", "paper", "source"}
SIDES = ({"measure", "more", "less"}, {"arm", "more", "less"})
SIDES += ({"measure", "alike", "within"}, {"arm", "alike", "within"}, {"reason"})
VERDICTS = ("agrees", "disagrees", "not separated", "not testable at this size", "not measured")
# Parts of training, the same for every run: the lowest of many noisy steps lies below the last one by chance alone.
WINDOWS = {"first": (0, 1 / 8), "early": (1 / 8, 1 / 3), "last": (7 / 8, 1)}
WINDOW_NAMES = {"first": "the first eighth", "early": "from an eighth to a third", "last": "the last eighth"}
MEASURES = {
    "final": "held-out exact match",
    "speed": "exact match in training, mean of all steps",
    "drop": "exact match in training, from the best three steps to the last three",
    "searches": "searches a held-out question",
    "answer_rate": "share of held-out questions answered",
    "after.mean_searches_by_hops.1": "searches a held-out question of one hop",
    "after.mean_searches_by_hops.3": "searches a held-out question of three hops",
}
# Columns of metrics.jsonl, for axes and sentences
COLUMNS = {"exact_match": "exact match in training", "searches": "searches in training"}
COLUMNS |= {"response_length": "tokens written in training", "grad_norm": "gradient norm in training"}
PANELS = {"dynamics": ("exact_match", "response_length", "searches"), "retriever": ("exact_match", "searches")}
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))  # told apart without colour, with the markers
MARKERS = "osD^vP*X<>hpd8"


# Reading


def load_result(path: str | Path) -> Record:
    """One experiment's result file; RunError where it is not one, or is not partial and its arms have other seeds."""
    record = read_mapping(Path(path))
    if missing := [key for key in ("experiment", "date", "arms") if key not in record]:
        raise RunError(f"{path}: lacks {', '.join(missing)}; is this a result file of searchr1_lite.experiments?")
    seeds = {arm: sorted(run["seed"] for run in runs) for arm, runs in record["arms"].items()}
    if len(set(map(tuple, seeds.values()))) > 1 and not record.get("missing"):
        raise RunError(
            f"{path}: the arms have other seeds, {seeds}; finish the experiment, or sum it up with --partial"
        )
    return record


def load_claims(name: str) -> list[Record]:
    """The claims of an experiment, or of "untestable". RunError where one says too little, too much or neither."""
    path = CLAIMS / f"{name}.yaml"
    if not path.is_file():
        raise RunError(f"{path}: is missing; the claims of the experiment {name!r} are looked for there")
    claims = read_mapping(path).get("claims") or []
    for number, claim in enumerate(claims, 1):
        if SAYS - claim.keys() or claim.keys() - SAYS not in SIDES:
            forms = "; ".join(", ".join(sorted(form)) for form in SIDES)
            raise RunError(f"{path}: claim {number} has {', '.join(claim)}; it needs claim, paper, source and: {forms}")
    return claims


def value(run: Record, measure: str | float) -> float:
    """One number of one run (an entry of a result file's arms). KeyError or ValueError where the run does not have it.

    A key of its `measures` ("final"); "<curve>@<window>", the curve's mean over a part of training; "<curve>~<curve>",
    Spearman's rank correlation over the steps (0 if one of the two stands still); a path ("after.f1"); or a number.
    """
    if not isinstance(measure, str):
        return float(measure)
    if "@" in measure:
        name, _, window = measure.partition("@")
        curve = _curve(run, name)
        start, end = (len(curve) * share for share in WINDOWS[window])
        return mean(known for known in curve[floor(start) : ceil(end)].tolist() if isfinite(known))
    if "~" in measure:
        table = np.array([_curve(run, name) for name in measure.split("~")])
        one, other = table[:, np.isfinite(table).all(axis=0)]
        return float(spearmanr(one, other).statistic) if np.ptp(one) and np.ptp(other) else 0.0
    found: Any = run["measures"] if measure in run["measures"] else run
    for key in measure.split("."):
        found = found[key]
    return float(found)


def _curve(run: Record, name: str) -> np.ndarray:
    return np.array(run["curves"][name], float)


# Judging


def estimate(values: Sequence[float]) -> Record:
    """Mean and Student's 95 % interval over seeds, n - 1 degrees of freedom; low and high are None for one seed."""
    low, high = (None, None) if len(values) < 2 else seed_interval(values)
    return {"mean": mean(values), "low": low, "high": high, "values": list(values)}


def verdict(low: float | None, high: float | None, within: float | None = None) -> str:
    """What the interval of a difference says: that it is above 0, or that it lies inside plus or minus `within`.

    "agrees" if all of the interval is on that side, "disagrees" if all of it is on the other, else "not separated".
    """
    lowest, highest = (0, inf) if within is None else (-within, within)
    if low is None or high is None:
        return "not separated"
    if lowest < low and high < highest:
        return "agrees"
    return "disagrees" if high < lowest or low > highest else "not separated"


def judge(claim: Record, record: Record, file: str) -> Record:
    """The claim with what was measured: each side's values by seed, their paired difference, the verdict.

    Only seeds that both sides have are paired; where there is none, in a partial result, nothing is measured.
    RunError where the claim names an arm or a measure that is not there.
    """
    if "reason" in claim:
        return {**claim, "experiment": None, "verdict": "not testable at this size"}
    sides = claim.get("alike") or [claim["more"], claim["less"]]
    pairs = [(claim.get("arm", side), claim.get("measure", side)) for side in sides]
    values = [_by_seed(record, arm, measure, file, claim["claim"]) for arm, measure in pairs]
    seeds = sorted(values[0].keys() & values[1].keys())
    first, second = ([side[seed] for seed in seeds] for side in values)
    judged = {**claim, "experiment": record["experiment"], "file": file, "seeds": seeds, "verdict": "not measured"}
    if not seeds:
        return judged
    both = [{"name": str(side), **estimate(its)} for side, its in zip(sides, (first, second), strict=True)]
    gap = estimate([round(one - other, 9) for one, other in zip(first, second, strict=True)])
    outcome = verdict(gap["low"], gap["high"], claim.get("within"))
    return {**judged, "sides": both, "difference": gap, "verdict": outcome}


def _by_seed(record: Record, arm: str, measure: str | float, file: str, claim: str) -> dict[int, float]:
    if arm not in record["arms"]:
        there = ", ".join(record["arms"])
        raise RunError(f"{file}: no arm {arm!r}, which the claim {claim!r} names; there are {there}")
    try:
        return {run["seed"]: value(run, measure) for run in record["arms"][arm]}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file}: {arm!r} has no {measure!r}, which the claim {claim!r} names ({error})") from None


def findings(records: dict[Path, Record]) -> Record:
    """All claims of these result files, in their order, then those that cannot be tested."""
    judged = []
    for path, record in records.items():
        file = os.path.relpath(path, ROOT) if path.absolute().is_relative_to(ROOT) else str(path)
        judged += [judge(claim, record, Path(file).as_posix()) for claim in load_claims(record["experiment"])]
    judged += [judge(claim, {}, "") for claim in load_claims("untestable")]
    dates = [record["date"] for record in records.values()]
    return {"date": max(dates, default=None), "confidence": 0.95, "claims": judged}


# Saying


def number(amount: float, signed: bool = False) -> str:
    digits = 2 if abs(amount) < 10 else 0
    return f"{amount:{'+' * signed}.{digits}f}"


def with_interval(known: Record, signed: bool = False) -> str:
    """'0.97 [0.93, 1.01]', or the mean alone for one seed."""
    told = number(known["mean"], signed)
    return told if known["low"] is None else f"{told} [{number(known['low'], signed)}, {number(known['high'], signed)}]"


def in_words(measure: str | float) -> str:
    """A measure as a person says it."""
    name, _, window = str(measure).partition("@")
    if window:
        return f"{COLUMNS.get(name, name)}, {WINDOW_NAMES[window]}"
    if "~" in name:
        return "rank correlation of " + " and ".join(COLUMNS.get(one, one) for one in name.split("~"))
    return MEASURES.get(name, name)


def measured(finding: Record) -> str:
    """A sentence with what was measured; what a difference had to be to be seen where none was."""
    if "difference" not in finding:
        return finding.get("reason", "no seed of both sides is finished yet")
    what = in_words(finding["measure"]) if "measure" in finding else finding["arm"]
    name = str if "measure" in finding else in_words
    claimed = finding.get("alike") or [finding["more"], finding["less"]]  # a number needs no measuring
    both = [side for side, its in zip(finding["sides"], claimed, strict=True) if isinstance(its, str)]
    sides = "; ".join(f"{name(side['name'])} {with_interval(side)}" for side in both)
    gap, seeds = finding["difference"], len(finding["seeds"])
    told = f"{what}: {sides}; difference {with_interval(gap, signed=True)}, {seeds} seed{'s' * (seeds > 1)}"
    if finding["verdict"] != "not separated":
        return told
    if gap["low"] is None:
        return f"{told}: one seed has no interval"
    if "within" in finding:
        return f"{told}: the interval crosses a bound of ±{finding['within']}"
    return f"{told}: only a difference of more than {number(gap['high'] - gap['mean'])} would have been seen"


def to_markdown(found: Record, folder: Path) -> str:
    """The table, for a file in `folder`, with the counts of verdicts above it."""
    counts = {name: sum(one["verdict"] == name for one in found["claims"]) for name in VERDICTS}
    lines = [", ".join(f"{count} {name}" for name, count in counts.items()) + ".", ""]
    lines += ["| claim | the paper | measured here | verdict | result file |", "|---|---|---|---|---|"]
    for one in found["claims"]:
        paper = f"{one['paper']} ({one['source']})"
        file = Path(os.path.relpath(ROOT / one["file"], folder)).as_posix() if one["experiment"] else ""
        link = f"[{one['experiment']}]({file})" if file else ""
        cells = [re.sub(r"([|*_<>\[\]~])", r"\\\1", printable(text)) for text in (one["claim"], paper, measured(one))]
        lines.append(f"| {' | '.join(cells)} | **{one['verdict']}** | {link} |")
    return "\n".join(lines) + "\n"


# Drawing


def _style(index: int, count: int) -> dict[str, Any]:
    shade = plt.get_cmap("viridis")(0.85 * index / max(1, count - 1))  # dark to light, in grey print as well
    return {"color": shade, "linestyle": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)]}


def draw_steps(axes: Axes, record: Record, column: str) -> None:
    """A line for each arm, mean over seeds of three steps' mean; a band, Student's 95 %, for four arms or fewer."""
    for index, runs in enumerate(record["arms"].values()):
        if not runs:  # in a partial result
            continue
        length, looks = min(len(run["curves"][column]) for run in runs), _style(index, len(record["arms"]))
        window = np.ones(min(3, length)) / min(3, length)
        steps = np.convolve(_curve(runs[0], "step")[:length], window, "valid")
        table = np.array([np.convolve(_curve(run, column)[:length], window, "valid") for run in runs])
        if len(runs) > 1 and len(record["arms"]) <= 4:
            low, high = np.transpose([seed_interval(values) for values in table.T.tolist()])
            bounds = (0, 1 if column == "exact_match" else None)  # which a share, or a count, cannot leave
            axes.fill_between(steps, low.clip(*bounds), high.clip(*bounds), color=looks["color"], alpha=0.15, lw=0)
        axes.plot(steps, table.mean(axis=0), linewidth=1.8, markersize=4, markevery=4, **looks)
    axes.set_xlabel("training step")
    axes.set_ylabel(COLUMNS.get(column, column))
    axes.set_ylim(0, 1 if column == "exact_match" else None)
    axes.grid(alpha=0.25)


def draw_ends(axes: Axes, record: Record) -> None:
    """Held-out exact match of each arm: a dot for each seed, and their mean with its interval, cut at 0 and 1.

    Its names and markers are the key to the other panels.
    """
    names = list(record["arms"])
    for row, runs in enumerate(record["arms"].values()):
        if not runs:
            continue
        known, looks = estimate([value(run, "final") for run in runs]), _style(row, len(names))
        axes.plot(known["values"], [row + 0.26] * len(runs), ".", color="#777777", markersize=5)
        if known["low"] is not None:
            axes.plot(np.clip([known["low"], known["high"]], 0, 1), [row, row], color=looks["color"], linewidth=2)
        axes.plot(known["mean"], row, color=looks["color"], marker=looks["marker"], markersize=7)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("held-out exact match")
    axes.set_title("mean, 95 %, seeds", fontsize="small")
    axes.grid(alpha=0.25)


def picture(record: Record) -> Figure:
    """Training by step on the left, the end on the right."""
    columns, arms = PANELS.get(record["experiment"], ("exact_match",)), len(record["arms"])
    names = 0.07 * max(0, max(map(len, record["arms"])) - 20)  # inches for what a common name does not take
    size, widths = (4.2 + 2.6 * len(columns) + names, max(2.6, 0.9 + 0.22 * arms)), [1.4] * len(columns) + [1]
    figure, panels = plt.subplots(1, len(widths), figsize=size, dpi=DPI, layout="constrained", width_ratios=widths)
    for axes, column in zip(panels, columns, strict=False):
        draw_steps(axes, record, column)
    draw_ends(panels[-1], record)
    return figure


def write_findings(results: Sequence[Path], out: Path) -> None:
    """`searchr1 report findings`: a picture beside each result, OUT.json and OUT.md; the verdicts in the terminal."""
    records = {path: load_result(path) for path in results}
    record = {"command": command(), **findings(records)}
    for path, result in records.items():
        save(picture(result), path.with_suffix(".png"))
    write_json(out.with_suffix(".json"), record)
    write_whole(out.with_suffix(".md"), to_markdown(record, out.parent))
    for claim in record["claims"]:
        print(f"{claim['verdict']:14} {claim['experiment'] or '':10} {claim['claim']}")
