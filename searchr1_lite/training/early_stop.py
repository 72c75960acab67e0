"""Stops a run at the first alarm of analysis/health.py; the run then ends with the weights of its best step.

The best step is the one with the highest exact match of training rollouts, mean over three steps. Its weights are
those that wrote its rollouts, from before its updates: these may be what broke the model. Every step that is the best
so far leaves best/step-<n>.safetensors; once there is a checkpoint, older ones go. A run that goes on from that
checkpoint so finds the best up to there, and drops what later steps had left. Leaves out: a run without an alarm, which
ends with its last weights, and runs that learn from demonstrations, whose metrics say nothing of the model.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save

from searchr1_lite.analysis.health import WINDOW, Alarm, alarms
from searchr1_lite.config import Profile
from searchr1_lite.files import write_json, write_whole
from searchr1_lite.runfolder import read_json

STOPPED = "stopped.json"  # step, kind and message of the alarm, best_step and best_exact_match


@dataclass
class EarlyStop:
    """Reads the metrics.jsonl that the Recorder writes. Only the main process reads and writes."""

    profile: Profile
    run_folder: Path
    progress: Callable[[str], Any] = print
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def forget_after(self, done: int) -> None:
        """A run begins, or goes on after step `done`: what later steps had left goes."""
        if PartialState().is_main_process:
            (self.run_folder / STOPPED).unlink(missing_ok=True)
            for step, path in saved_steps(self.run_folder).items():
                if step > done:
                    path.unlink()

    def keep(self, model: torch.nn.Module) -> None:
        """The weights that write a step's rollouts, before it changes them."""
        if PartialState().is_main_process:
            trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
            self.weights = {name: weight.detach().to("cpu", copy=True) for name, weight in trained}

    def look(self) -> Alarm | None:
        """After a step: its alarm, in all processes."""
        return broadcast_object_list([self._look() if PartialState().is_main_process else None])[0]

    def drop_older(self) -> None:
        """After a checkpoint: of the steps saved up to it, the best, which is the last, is enough."""
        for path in list(saved_steps(self.run_folder).values())[:-1]:
            path.unlink()

    def _look(self) -> Alarm | None:
        """Save the step's weights if it is the best so far; the first alarm, if there is one."""
        text = (self.run_folder / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        if len(rows) < WINDOW:
            return None
        recent = [fmean(row["exact_match"] for row in rows[end - WINDOW : end]) for end in range(WINDOW, len(rows) + 1)]
        highest = recent.index(max(recent))
        best = rows[highest + WINDOW - 1]["step"]
        if best == rows[-1]["step"]:
            write_whole(self.run_folder / f"best/step-{best}.safetensors", save(self.weights))
        found = alarms(rows)
        if not found:
            return None
        stopped = asdict(found[0]) | {"best_step": best, "best_exact_match": recent[highest]}
        write_json(self.run_folder / STOPPED, stopped)
        self.progress(
            f"{self.run_folder.name}: stopped at step {found[0].step}, {found[0].kind} ({found[0].message}). "
            f"The run ends with the weights of step {best}, exact match {recent[highest]:.2f}"
        )
        return found[0]


def saved_steps(run_folder: Path) -> dict[int, Path]:
    """The steps whose weights are kept, in order, and where."""
    paths = (run_folder / "best").glob("step-*.safetensors")
    return dict(sorted((int(path.stem.partition("-")[2]), path) for path in paths))


def restore_best(model: torch.nn.Module, run_folder: Path) -> None:
    """Put the best step's weights into the model, if the run was stopped."""
    if stopped := read_json(run_folder / STOPPED):
        parameters = dict(model.named_parameters())
        for name, weight in load_file(run_folder / f"best/step-{stopped['best_step']}.safetensors").items():
            parameters[name].data.copy_(weight)
