"""Checkpoints of a run: a folder each, and a mark written last that says how long the run's growing files were then.

Going on means cutting those files back to the mark; a checkpoint without a mark was not finished and does not count.
Leaves out what makes two runs the same (runfolder.py).
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from searchr1_lite.files import write_json
from searchr1_lite.runfolder import RunFolderError, read_json

GROWING = ("metrics.jsonl", "trajectories.jsonl.gz")
MARK = "complete.json"
STATE = "state.pt"
KEPT = 2  # checkpoints


def save_checkpoint(run_folder: Path, step: int, state: dict[str, Any]) -> None:
    """Save what training needs to go on after `step`, mark it, and drop older checkpoints."""
    folder = run_folder / f"checkpoints/checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / STATE)
    mark_checkpoint(run_folder, folder, step)
    for older in sorted(folder.parent.glob(f"checkpoint-*/{MARK}"), key=lambda mark: read_json(mark)["step"])[:-KEPT]:
        shutil.rmtree(older.parent)


def load_checkpoint(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """What `save_checkpoint` saved."""
    return torch.load(checkpoint / STATE, map_location=device, weights_only=True)


def mark_checkpoint(run_folder: Path, checkpoint: Path, step: int) -> None:
    sizes = {name: _size(run_folder / name) for name in GROWING}
    write_json(checkpoint / MARK, {"step": step, "bytes": sizes})


def latest_checkpoint(run_folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint with its mark, and its step; (None, 0) without one.

    Raises RunFolderError for a checkpoint of a version before 0.7, which nothing can go on with.
    """
    marks = {path.parent: read_json(path).get("step") for path in (run_folder / "checkpoints").glob(f"*/{MARK}")}
    if old := [checkpoint for checkpoint, step in marks.items() if step is None]:
        raise RunFolderError(f"{old[0]}: an older version's, which cannot be gone on with; delete {run_folder}")
    return max(marks.items(), key=lambda pair: pair[1], default=(None, 0))


def rewind(run_folder: Path, checkpoint: Path | None) -> None:
    """Cut the growing files back to where they were at `checkpoint` (None: the start); drop unfinished checkpoints."""
    sizes = read_json(checkpoint / MARK)["bytes"] if checkpoint else dict.fromkeys(GROWING, 0)
    for name in GROWING:
        path = run_folder / name
        if _size(path) < sizes[name]:
            raise RunFolderError(
                f"{path} is shorter than when {checkpoint.name} was written ({_size(path)} bytes, not {sizes[name]}): "
                f"it was changed since. Delete {run_folder} to start again."
            )
        if path.is_file():
            os.truncate(path, sizes[name])
    for folder in (run_folder / "checkpoints").glob("checkpoint-*"):
        if not (folder / MARK).is_file():
            shutil.rmtree(folder)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
