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
from multiprocessing.connection import wait
from pathlib import Path

from searchr1_lite.config import Profile
from searchr1_lite.experiments.plan import FOLDER, Experiment, ExperimentError
from searchr1_lite.runfolder import is_finished

WORKER = "searchr1_lite.experiments.worker"  # a module with train_run(profile, run_folder)


def run_experiment(experiment: Experiment, runs_folder: Path, workers: int = 2, worker: str = WORKER) -> None:
    """Make all runs of an experiment that are not finished; ExperimentError at the end if some failed.

    What a run prints is in `runs_folder/logs`. Interrupted, it ends the processes; the next call goes on.
    """
    planned = experiment.runs()
    waiting = [run for run in planned if not is_finished(runs_folder / run)]
    print(f"{experiment.name}: {len(waiting)} of {len(planned)} runs to make, {workers} at a time", flush=True)
    (runs_folder / "logs").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload([worker])  # where nothing is forked this does nothing
    going, failed, made, began = {}, [], 0, time.monotonic()
    try:
        while waiting or going:
            while waiting and len(going) < workers:
                run = waiting.pop(0)
                log = runs_folder / "logs" / f"{run}.log"
                log.write_text("")
                arguments = worker, planned[run][1], runs_folder / run, log, experiment.typed
                process = context.Process(target=_train, args=arguments)
                process.start()
                going[process.sentinel] = run, process, log
                print(f"{run}: started, {len(planned) - len(waiting)} of {len(planned)}", flush=True)
            for sentinel in wait(list(going)):
                run, process, log = going.pop(sentinel)
                process.join()
                made += 1
                left = (time.monotonic() - began) / made * (len(waiting) + len(going)) / 60
                outcome = "finished"
                if process.exitcode or not is_finished(runs_folder / run):
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


def _train(worker: str, profile: Profile, run_folder: Path, log: Path, typed: str) -> None:
    """In the new process, which does not outlive the one that asked for it."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: wait([parent]) and os._exit(1), daemon=True).start()
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
        stream.reconfigure(line_buffering=True)  # a process that is killed has said what it printed
    sys.argv = [str(FOLDER / "__main__.py"), typed, "--seeds", str(profile.seed)]  # for environment.json
    importlib.import_module(worker).train_run(profile, run_folder)
