"""What the processes of `run.py` load, and nothing else does: the trainer, on one thread."""

# ruff: noqa: E402
import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses optional kernels

from pathlib import Path

from filelock import FileLock

from searchr1_lite.config import Profile
from searchr1_lite.lab.defects import train_broken
from searchr1_lite.lab.profile import BrokenProfile
from searchr1_lite.training.loop import train


def train_run(profile: Profile, run_folder: Path) -> None:
    """Train, or wait while another command does so; two experiments that share a run may go on side by side."""
    with FileLock(run_folder.parent / "logs" / f"{run_folder.name}.lock"):
        train_it = train_broken if isinstance(profile, BrokenProfile) else train
        train_it(profile, run_folder, progress=lambda line: print(line, flush=True))
