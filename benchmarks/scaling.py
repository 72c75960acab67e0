"""What a rollout costs as rows, turns and context grow: our engine, and `generate` on the whole history beside it.

    python benchmarks/scaling.py

The work and the script in the sampler's place are those of rollout.py. With more rows the same 16 rows are repeated,
so that every row of a point costs what it costs at the others. Points are interleaved: a round measures each once.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import generate_loop
from workload import LENGTHS, QUICK_LENGTHS, SHAPE, Clock, Work, learn_histories, make_policy, make_work, ours

from searchr1_lite.config import ROOT
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance

AXES = {"rows": "rows in memory", "turns": "turns of a row", "context": "tokens of the longest row"}
MARKS = {"ours": ("o", "-", "black"), "generate_loop": ("s", "--", "0.5")}
NAMES = {"ours": "ours", "generate_loop": "generate, all read again every turn"}


def repeated(work: Work, times: int) -> Work:
    """The same rows `times` over, all in memory at once."""
    profile = work.profile.model_copy(update={"rollout_rows": len(work.prompts) * times})
    return replace(
        work,
        questions=work.questions * times,
        scripts=work.scripts * times,
        prompts=work.prompts * times,
        profile=profile,
        rows={},
    )


def points(quick: bool, seed: int) -> dict[str, dict[int, Work]]:
    """By axis and value, the work to be timed. The value of `context` is the length that the longest row comes to."""
    policy = make_policy({} if quick else SHAPE, seed, context=4096)
    small: dict[str, Any] = {"questions": 2, "group_size": 2 if quick else 8, "seed": seed}
    if quick:
        small |= {"lengths": QUICK_LENGTHS, "max_response_tokens": 40}
    base = make_work(policy, **small)
    found: dict[str, dict[int, Work]] = {"rows": {}, "turns": {}, "context": {}}
    for times in (1, 2) if quick else (1, 2, 4, 8):
        found["rows"][len(base.prompts) * times] = repeated(base, times)
    small["questions"] = 1
    for searches in (0, 1) if quick else range(5):
        found["turns"][searches + 1] = make_work(policy, searches=searches, **small)
    for passages in (1, 3) if quick else (1, 7, 21):
        work = make_work(policy, topk=passages, max_observation_tokens=1200, **small)
        longest = max(len(one.prompt_ids) + len(one.completion_ids) for one in ours(work))
        found["context"][longest] = work
    return found


Runs = dict[str, dict[int, dict[str, list[float]]]]


def measure(found: dict[str, dict[int, Work]], repeats: int) -> Iterator[Runs]:
    """Seconds a row, by axis, value and engine, after each round with all rounds so far.

    The peer is checked to come to our ids and masks at every point.
    """
    runs: Runs = {axis: {} for axis in found}
    plan: list[tuple[str, int, str, Callable]] = []
    for axis, works in found.items():
        for value, work in works.items():
            expected = learn_histories(work, ours(work))  # the warm-up, too
            plan.append((axis, value, "ours", lambda work=work: ours(work)))
            if axis != "rows" and generate_loop(work) != expected:
                raise RuntimeError(f"{axis} = {value}: generate_loop has other ids or another mask than ours")
            if axis != "rows":
                plan.append((axis, value, "generate_loop", lambda work=work: generate_loop(work)))
    clock = Clock([" ".join(map(str, one[:3])) for one in plan] * repeats)
    for _ in range(repeats):
        for axis, value, name, engine in plan:
            start = time.perf_counter()
            with torch.no_grad():
                engine()
            seconds = time.perf_counter() - start
            clock.ran(f"{axis} {value} {name}", seconds)
            engines = runs[axis].setdefault(value, {})
            engines.setdefault(name, []).append(seconds / len(found[axis][value].prompts))
        yield runs


def report(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """A list of points for each axis; `relative` is to the first point, within a round."""
    result: dict[str, list[dict[str, Any]]] = {axis: [] for axis in runs}
    for axis, values in runs.items():
        first = values[min(values)]
        for value, engines in sorted(values.items()):
            point: dict[str, Any] = {axis: value}
            for name, seconds in engines.items():
                relative = [one / other for one, other in zip(seconds, first[name], strict=True)]
                point[name] = {
                    "seconds_a_row": seconds,
                    "median": median(seconds),
                    "relative": {"median": median(relative), "least": min(relative), "most": max(relative)},
                }
            result[axis].append(point)
    return result


def draw(result: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Three panels, one an axis; points are medians, bars reach from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for panel, (axis, found) in zip(panels, result.items(), strict=True):
        for name in found[0]:
            if name == axis:
                continue
            middle = [point[name]["median"] for point in found]
            below = [m - min(point[name]["seconds_a_row"]) for m, point in zip(middle, found, strict=True)]
            above = [max(point[name]["seconds_a_row"]) - m for m, point in zip(middle, found, strict=True)]
            marker, line, colour = MARKS[name]
            panel.errorbar(
                [point[axis] for point in found],
                middle,
                yerr=[below, above],
                marker=marker,
                linestyle=line,
                color=colour,
                capsize=3,
                label=NAMES[name],
            )
        panel.set_xlabel(AXES[axis])
        panel.set_ylim(0, panel.get_ylim()[1] * 1.1)
        if axis == "rows":
            panel.set_xscale("log", base=2)
        if axis != "context":
            panel.set_xticks([point[axis] for point in found], [str(point[axis]) for point in found])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a row (median; bars: least to most)")
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model, few rows and points, once: a dry run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/benchmarks/scaling.json")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    found = points(arguments.quick, arguments.seed)
    one = found["turns"][1]
    policy, rows = one.policy, len(one.prompts)
    workload = {
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "dtype": "float32",
        "torch_threads": torch.get_num_threads(),
        "rows": "the same rows repeated, all in memory; 3 turns, 3 passages a search",
        "turns": f"{rows} rows; the last turn answers, the others search",
        "context": f"{rows} rows, 3 turns; longer by more passages a search",
        "turn_tokens": dict(
            zip(("median", "sigma", "least", "most"), QUICK_LENGTHS if arguments.quick else LENGTHS, strict=True)
        ),
    }
    typed = " ".join(["python benchmarks/scaling.py", *(sys.argv[1:] if argv is None else argv)])
    about = provenance(["torch", "transformers", "numpy"]) | {"command": typed, "workload": workload}
    for runs in measure(found, 1 if arguments.quick else arguments.repeats):
        result = report(runs)
        whole = about | result
        write_json(arguments.out, whole)
        draw(result, arguments.out.with_suffix(".png"))
    for axis, values in result.items():
        for point in values:
            engines = {name: one for name, one in point.items() if name != axis}
            print(axis, point[axis], *(f"{n} {one['median']:.3f} s a row" for n, one in engines.items()))
    return whole


if __name__ == "__main__":
    main()
