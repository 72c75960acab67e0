"""Train what an experiment lacks, some runs at a time, each in a process of its own on one thread.

A finished run is not made again and one that was cut off resumes; a failing one does not stop the others. The trainer
is loaded once, in a process from which the others are forked (Linux; elsewhere each loads it). Leaves out: several
machines.
"""

import importlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from filelock import FileLock

from searchr1_lite.analysis.summary import sum_up, write_result
from searchr1_lite.config import ROOT, Profile, load_profile
from searchr1_lite.errors import UserError
from searchr1_lite.experiments.plan import (
    RUNS,
    Experiment,
    ExperimentError,
    experiment_names,
    load_experiment,
    overview,
)

WORKER = "searchr1_lite.experiments.run"  # a module with train_run(profile, run_folder, also)
TRAINER = ["searchr1_lite.training.loop", "searchr1_lite.lab.defects"]  # what it needs, loaded once
TEN_WAYS = "ten_ways"


def run_experiments(names: Sequence[str], seeds: Sequence[int], partial: bool = False, workers: int = 2) -> None:
    """`searchr1 experiment`: run experiments one after another and write their results; without a name, list them.

    `partial` trains nothing and sums up what is finished. Raises ExperimentError, at the end, where some failed.
    """
    if TEN_WAYS in names:
        from searchr1_lite.experiments.methods import run_ten_ways

        if len(names) > 1 or partial:
            raise ExperimentError("ten_ways goes alone, and as a whole: searchr1 experiment ten_ways, with --seeds")
        run_ten_ways(ROOT / "runs/ten-ways", seeds or [0, 1, 2])
        return print("next: searchr1 report table runs/ten-ways --out data/results/ten_ways")
    chosen = experiment_names() if not names or "all" in names else list(dict.fromkeys(names))
    experiments = [load_experiment(name, seeds) for name in chosen]
    if not names:
        return print(overview(experiments))
    problems = []
    for experiment in experiments:
        try:
            if not partial:
                run_experiment(experiment, RUNS, workers)
            write_result(sum_up(experiment, RUNS, partial), experiment.result_file)
            print(f"{experiment.name}: {experiment.result_file}")
        except UserError as error:
            problems.append(f"{experiment.name}: {error}")
    if problems:
        raise ExperimentError("\n".join(problems))


def run_experiment(experiment: Experiment, runs_folder: Path, workers: int = 2, worker: str = WORKER) -> None:
    """Make all runs of an experiment that are not finished; ExperimentError at the end if some failed.

    What a run prints is in `runs_folder/logs`. Interrupted, it ends the processes; the next call goes on.
    """
    planned = experiment.runs()
    waiting = [run for run in planned if not experiment.is_made(runs_folder / run)]
    print(f"{experiment.name}: {len(waiting)} of {len(planned)} runs to make, {workers} at a time", flush=True)
    (runs_folder / "logs").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(TRAINER if worker == WORKER else [worker])
    going, failed, made, began = {}, [], 0, time.monotonic()
    try:
        while waiting or going:
            while waiting and len(going) < workers:
                run = waiting.pop(0)
                log = runs_folder / "logs" / f"{run}.log"
                log.write_text("")
                arguments = worker, planned[run][1], runs_folder / run, log, experiment.typed, experiment.also_evaluate
                process = context.Process(target=_work, args=arguments)
                process.start()
                going[process.sentinel] = run, process, log
                print(f"{run}: started, {len(planned) - len(waiting)} of {len(planned)}", flush=True)
            for sentinel in wait(list(going)):
                run, process, log = going.pop(sentinel)
                process.join()
                made += 1
                left = (time.monotonic() - began) / made * (len(waiting) + len(going)) / 60
                outcome = "finished"
                if process.exitcode or not experiment.is_made(runs_folder / run):
                    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                    outcome = f"FAILED: {last} (exit status {process.exitcode}, {log})"
                    failed.append(f"{run} {outcome}")
                print(f"{run}: {outcome}; about {left:.0f} minutes left", flush=True)
    finally:
        for _, process, _ in going.values():
            process.terminate()
            process.join()
    if failed:
        raise ExperimentError("\n".join([f"{len(failed)} runs failed; the same command tries again", *failed]))


def _work(worker: str, profile: Profile, run_folder: Path, log: Path, typed: str, also: dict[str, Any]) -> None:
    """In the new process, which does not outlive the one that asked for it."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: wait([parent]) and os._exit(1), daemon=True).start()
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
        stream.reconfigure(line_buffering=True)  # a process that is killed has said what it printed
    sys.argv = ["searchr1", "experiment", typed, "--seeds", str(profile.seed)]  # for environment.json
    importlib.import_module(worker).train_run(profile, run_folder, also)


def train_run(profile: Profile, run_folder: Path, also: dict[str, Any]) -> None:
    """Train, or wait while another command does so; two experiments that share a run may go on side by side."""
    import torch

    from searchr1_lite.evaluation.evaluate import evaluate_into
    from searchr1_lite.lab.defects import train_broken
    from searchr1_lite.lab.profile import BrokenProfile
    from searchr1_lite.training.loop import train

    torch.set_num_threads(1)
    with FileLock(run_folder.parent / "logs" / f"{run_folder.name}.lock"):
        train_it = train_broken if isinstance(profile, BrokenProfile) else train
        train_it(profile, run_folder, progress=lambda line: print(line, flush=True))
        if also:
            asked = load_profile(run_folder / "config.yaml", Profile, {"defects"}, **also)
            evaluate_into(run_folder / "again", asked, "greedy", run_folder / "adapter")
