"""How long the same rollouts take with our engine and with four others, one after the other in one process.

    python benchmarks/rollout.py --search-r1 PATH    # a checkout of Search-R1; without it that peer is left out

A round runs every engine once, ours first; ratios are taken within a round. Every run must come to exactly the ids and
masks that our first run came to. The script in the sampler's place, and how little it costs, is in workload.py; what
each peer was given is in peers.py.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peers
import torch
from workload import (
    LENGTHS,
    QUICK_LENGTHS,
    RECORDED,
    SHAPE,
    Clock,
    Work,
    Written,
    learn_histories,
    make_policy,
    make_work,
    ours,
)

from searchr1_lite.config import ROOT
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance

LIBRARIES = ["torch", "transformers", "trl", "bm25s", "numpy"]
TARGETS = {"trl_tools": 3.0, "generate_loop": 3.0, "search_r1": 3.0, "continuous_batching": 2.0}
Engine = Callable[[], list[Written]]


def engines(work: Work, checkout: Path | None) -> dict[str, Engine]:
    """Ours first, then every peer; those of Search-R1 only with a checkout."""

    def run_ours() -> list[Written]:
        return [(list(one.completion_ids), list(one.loss_mask)) for one in ours(work)]

    found: dict[str, Engine] = {
        "ours": run_ours,
        "trl_tools": peers.TrlTools(work),
        "generate_loop": lambda: peers.generate_loop(work),
        "continuous_batching": lambda: peers.continuous_batching(work, share=True),
        "continuous_batching, no sharing": lambda: peers.continuous_batching(work, share=False),
    }
    if checkout:
        found["search_r1"] = lambda: peers.search_r1(work, checkout, stop_at_tag=False)
        found["search_r1, stopped at tags"] = lambda: peers.search_r1(work, checkout, stop_at_tag=True)
    return found


def measure(work: Work, found: dict[str, Engine], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, and the share of them that went into scripting. Raises where ids or masks are not ours."""
    expected = learn_histories(work, ours(work))
    clock = Clock(list(found) * repeats)
    runs: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "cpu_seconds": [], "scripting_share": []} for name in found
    }
    for _ in range(repeats):
        for name, engine in found.items():
            work.scripted = 0.0
            start, start_cpu = time.perf_counter(), time.process_time()
            with torch.no_grad():
                written = engine()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            for row, (own, other) in enumerate(zip(expected, written, strict=True)):
                if (list(other[0]), list(other[1])) != own:
                    raise RuntimeError(f"{name}: row {row} has other ids or another mask than ours")
            clock.ran(name, seconds)
            runs[name]["seconds"].append(seconds)
            runs[name]["cpu_seconds"].append(cpu_seconds)
            runs[name]["scripting_share"].append(work.scripted / seconds)
    return runs


def report(work: Work, runs: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    rows, own = len(work.prompts), runs["ours"]["seconds"]
    result = {}
    for name, run in runs.items():
        seconds = median(run["seconds"])
        cpu = [other / mine for other, mine in zip(run["cpu_seconds"], runs["ours"]["cpu_seconds"], strict=True)]
        ratios = [other / mine for other, mine in zip(run["seconds"], own, strict=True)]
        result[name] = {
            "seconds": run["seconds"],
            "cpu_seconds": run["cpu_seconds"],  # of all threads; on a busy machine the steadier of the two
            "median_seconds": seconds,
            "trajectories_per_second": rows / seconds,
            "written_tokens_per_second": work.written_tokens / seconds,
            "times_as_long_as_ours": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
            "times_our_cpu_seconds": median(cpu),
            "target": TARGETS.get(name),
            "scripting_share": median(run["scripting_share"]),
            "same_ids_and_masks": True,  # anything else ends the benchmark
        }
    return result


def command(arguments: argparse.Namespace) -> str:
    """What a person types from the project's root, without where the checkout lay on this machine."""
    typed = ["PATH" if arguments.search_r1 and one == str(arguments.search_r1) else one for one in sys.argv[1:]]
    return " ".join(["python benchmarks/rollout.py", *typed])


def describe(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    turns = sorted(len(turn) for script in work.scripts for turn in script)
    spans = [len(history) // 8 for history in work.rows]
    return {
        "parameters": sum(p.numel() for p in work.policy.model.parameters()),
        "dtype": "float32",
        "torch_threads": torch.get_num_threads(),
        "questions": len(work.questions),
        "group_size": work.group_size,
        "rows": len(work.prompts),
        "searches": work.profile.max_turns,
        "max_response_tokens": work.profile.max_response_tokens,
        "prompt_tokens": [min(map(len, work.prompts)), max(map(len, work.prompts))],
        "longest_history_tokens": max(spans),
        "turn_tokens": {
            "drawn": dict(zip(("median", "sigma", "least", "most"), arguments.lengths, strict=True)),
            "mean": sum(turns) / len(turns),
            "p50": turns[len(turns) // 2],
            "p95": turns[int(len(turns) * 0.95)],
            "longest": turns[-1],
        },
        "recorded_turns_for_comparison": RECORDED,
        "written_tokens": work.written_tokens,
        "notes": {
            "max_response_tokens": "Search-R1's scripts allow 500 a turn; only search_r1 without stops runs that far",
            "trl_tools": "tools loop of GRPOTrainer._generate; ends at tags, which TRL itself cannot ask for",
            "generate_loop": "batched, rows that are done leave, ids never encoded again",
            "search_r1": "no stop strings, as upstream; searches without a server",
            "continuous_batching": "8 requests at once, told each turn's length; the faster of sharing and not counts",
        },
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search-r1", type=Path, metavar="PATH", help="a checkout of PeterGriffinJin/Search-R1")
    parser.add_argument("--quick", action="store_true", help="the tiny model, 2 questions x 2, one repeat: a dry run")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--searches", type=int, default=2, help="a row's turns, less the one that answers")
    parser.add_argument("--lengths", type=float, nargs=4, default=LENGTHS, metavar=("MEDIAN", "SIGMA", "LEAST", "MOST"))
    parser.add_argument("--max-response-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="ENGINE", help="these peers only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/benchmarks/rollout.json")
    arguments = parser.parse_args(argv)
    if arguments.search_r1 and not (arguments.search_r1 / peers.GENERATION).is_file():
        sys.exit(f"error: {arguments.search_r1} is no checkout of Search-R1: it has no {peers.GENERATION}")
    if arguments.quick:
        arguments.questions, arguments.group_size, arguments.repeats = 2, 2, 1
        arguments.lengths, arguments.max_response_tokens = QUICK_LENGTHS, 40
    return arguments


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    policy = make_policy({} if arguments.quick else SHAPE, arguments.seed)

    def work_and_engines(questions: int, group_size: int) -> tuple[Work, dict[str, Engine]]:
        work = make_work(
            policy,
            questions=questions,
            group_size=group_size,
            searches=arguments.searches,
            lengths=tuple(arguments.lengths),
            max_response_tokens=arguments.max_response_tokens,
            seed=arguments.seed,
        )
        found = engines(work, arguments.search_r1)
        wanted = {"ours", *arguments.only} if arguments.only else set(found)
        return work, {name: engine for name, engine in found.items() if name in wanted}

    if not arguments.quick:
        print("a small round to warm up", flush=True)
        measure(*work_and_engines(1, 2), 1)
    work, found = work_and_engines(arguments.questions, arguments.group_size)
    print(f"{arguments.repeats} rounds of {len(work.prompts)} rows", flush=True)
    result = report(work, measure(work, found, arguments.repeats))
    skipped = {} if arguments.search_r1 else {"search_r1": "no checkout was given (--search-r1 PATH)"}
    workload = describe(work, arguments)
    whole = provenance(LIBRARIES) | {"command": command(arguments), "workload": workload}
    whole |= {"engines": result, "skipped": skipped}
    write_json(arguments.out, whole)
    for name, one in result.items():
        ratio = one["times_as_long_as_ours"]
        print(
            f"{name:<34} {one['median_seconds']:7.2f} s  {one['trajectories_per_second']:6.2f} trajectories/s  "
            f"{one['written_tokens_per_second']:7.0f} tokens/s  {ratio['median']:5.2f}x "
            f"({ratio['least']:.2f} to {ratio['most']:.2f}), "
            f"CPU {one['times_our_cpu_seconds']:.2f}x  scripting {one['scripting_share']:.2%}"
        )
    for name, reason in skipped.items():
        print(f"{name:<34} left out: {reason}")
    return whole


if __name__ == "__main__":
    main()
