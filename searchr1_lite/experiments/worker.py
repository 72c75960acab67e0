"""What the processes of `run.py` load, and nothing else does: the trainer, on one thread."""

# ruff: noqa: E402
import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses optional kernels

import sys
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from searchr1_lite.config import Profile, load_profile
from searchr1_lite.experiments.plan import changes
from searchr1_lite.training import __main__ as training

torch.set_num_threads(1)


def train_run(profile: Profile, run_folder: Path) -> None:
    """Train, or wait while another command does so; two experiments that share a run may go on side by side."""
    settings = changes(profile, load_profile("tiny")) | {"seed": profile.seed}
    typed = (f"{key}={value}".replace("'", "").replace(" ", "") for key, value in settings.items())
    sys.argv = [training.__file__, "--run-folder", str(run_folder), *typed]  # environment.json tells how to make it
    with FileLock(run_folder.parent / "logs" / f"{run_folder.name}.lock"):
        training.train(profile, run_folder, progress=partial(print, flush=True))
