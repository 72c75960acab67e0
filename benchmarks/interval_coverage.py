"""How often bootstrap_interval (searchr1_lite/evaluation/metrics.py) holds the true value, on data with a known one.

    python benchmarks/interval_coverage.py

Made up: right-or-wrong scores, whose chance depends on the question and, where `spread` is not 0, on the trained model
that a seed is (normal on the logit scale, questions with a deviation of 2, models with `spread`); and scores between 0
and 1 that pile up at both ends as F1 does (a beta distribution). No model and no question is involved.
"""

import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from searchr1_lite.config import ROOT
from searchr1_lite.evaluation.metrics import bootstrap_interval
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance

QUESTION_SPREAD = 2.0
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
ENDS = (0.02, 0.1, 0.5, 0.9, 0.98)
SHARES = (0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98)


def conditions() -> list[dict[str, Any]]:
    """What is tried: one seed; three samples of one model; three and five trained models."""

    def one(scores: str, share: float, questions: int, seeds: int = 1, spread: float | None = None) -> dict[str, Any]:
        asked = {"scores": scores, "share": share, "questions": questions, "seeds": seeds}
        return asked | {"trained": spread is not None, "spread": spread or 0.0}

    single = [one(kind, share, n) for kind in ("right or wrong", "F1-like") for n in (125, 200) for share in SHARES]
    sampled = [one("right or wrong", share, 200, 3) for share in ENDS]
    trained = [(3, spread) for spread in (0.0, 0.1, 0.3, 1.0)] + [(5, 0.3), (5, 1.0)]
    return single + sampled + [one("right or wrong", share, 200, *more) for more in trained for share in ENDS]


def draw(condition: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """One data set, (seeds, questions), whose scores have the mean `share` over all questions and models there are."""
    share, shape = condition["share"], (condition["seeds"], condition["questions"])
    if condition["scores"] == "F1-like":
        return rng.beta(0.8 * share, 0.8 * (1 - share), shape)
    deviation = np.hypot(QUESTION_SPREAD, condition["spread"])
    middle = brentq(lambda x: expit(x + deviation * NODES) @ WEIGHTS / WEIGHTS.sum() - share, -60, 60)
    models, questions = rng.standard_normal((shape[0], 1)), rng.standard_normal(shape[1])
    return (rng.random(shape) < expit(middle + condition["spread"] * models + QUESTION_SPREAD * questions)).astype(
        float
    )


def measure(condition: dict[str, Any], sets: int) -> dict[str, Any]:
    """The condition, the share of intervals that held the true value, and their mean width."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(draw(condition, rng), condition["trained"]) for _ in range(sets)]
    held = sum(low <= condition["share"] <= high for low, high in intervals)
    width = sum(high - low for low, high in intervals) / sets
    return condition | {"coverage": held / sets, "mean_width": round(width, 4)}


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/coverage.json")
    parser.add_argument("--sets", type=int, default=1000, help="data sets a condition")
    given = parser.parse_args(arguments)
    results, started, asked = [], time.monotonic(), conditions()
    for number, condition in enumerate(asked, 1):
        results.append(measure(condition, given.sets))
        left = (time.monotonic() - started) / number * (len(asked) - number)
        print(f"{number} of {len(asked)}, {left:.0f} s left: {results[-1]}", flush=True)
    about = {"what": "coverage of 95 % intervals on made-up data", "sets": given.sets}
    write_json(given.out, provenance(["numpy", "scipy"]) | about | {"conditions": results})


if __name__ == "__main__":
    main()
