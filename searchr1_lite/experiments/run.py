"""Train what an experiment lacks, some runs at a time, each in a process of its own on one thread.

A finished run is not made again and one that was cut off goes on; a failing one does not stop the others. The trainer
is loaded once, in a process from which the others are forked (Linux; elsewhere each loads it), so this module does not
import it. Leaves out: several machines.
"""

import importlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from searchr1_lite.analysis.runs import read_mapping
from searchr1_lite.config import Profile
from searchr1_lite.experiments.plan import Experiment, ExperimentError
from searchr1_lite.training.checkpoints import is_finished

WORKER = "searchr1_lite.experiments.worker"  # a module with train_run(profile, run_folder)


def run_experiment(
    experiment: Experiment,
    runs_folder: Path,
    workers: int = 2,
    progress: Callable[[str], Any] = print,
    worker: str = WORKER,
) -> None:
    """Make all runs of an experiment that are not finished; ExperimentError at the end if some failed.

    What a run prints is in `runs_folder/logs`. Interrupted, it ends the processes; the next call goes on.
    """
    planned = experiment.runs()
    waiting = [run for run in planned if not is_finished(runs_folder / run.name)]
    there, began = len(planned) - len(waiting), time.monotonic()
    progress(f"{experiment.name}: {there} of {len(planned)} runs are there, {len(waiting)} to go, {workers} at a time")
    (runs_folder / "logs").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload([worker])
    going, failed, made = {}, {}, 0
    try:
        while waiting or going:
            while waiting and len(going) < workers:
                run = waiting.pop(0)
                process = context.Process(target=_train, args=(worker, run.profile, runs_folder / run.name))
                process.start()
                going[process.sentinel] = run, process
                progress(f"{run.name}: started, {len(planned) - len(waiting)} of {len(planned)}")
            for sentinel in wait(list(going)):
                run, process = going.pop(sentinel)
                process.join()
                made += 1
                rest = (time.monotonic() - began) / made * (len(waiting) + len(going)) / 60
                outcome = f"about {rest:.0f} minutes left"
                if problem := _problem(runs_folder / run.name, process.exitcode):
                    failed[run.name] = problem
                    progress(f"{run.name}: FAILED, {problem}; {outcome}")
                else:
                    score = read_mapping(runs_folder / run.name / "evaluation.json")["after"]["exact_match"]
                    progress(f"{run.name}: finished, exact match {score:.3f}; {outcome}")
    finally:
        for _, process in going.values():
            process.terminate()
            process.join()
    if failed:
        lines = "\n".join(f"{name}: {problem}" for name, problem in failed.items())
        raise ExperimentError(f"{len(failed)} of {len(planned)} runs failed; the same command tries again\n{lines}")


def _log(run_folder: Path) -> Path:
    return run_folder.parent / "logs" / f"{run_folder.name}.log"


def _train(worker: str, profile: Profile, run_folder: Path) -> None:
    """In the new process: what is printed goes to the log, and the process does not outlive the one that asked."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(_log(run_folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    importlib.import_module(worker).train_run(profile, run_folder)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _problem(run_folder: Path, exitcode: int) -> str:
    """Empty for a run that came to its end; else the log's last line and where the log is."""
    if exitcode == 0 and is_finished(run_folder):
        return ""
    log = _log(run_folder)
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
    return (f"ended by signal {-exitcode}, the last line was: " if exitcode < 0 else "") + f"{last} ({log})"
