"""What a run leaves behind while it goes: metrics, some trajectories, marks at checkpoints, and where it was made.

A run folder holds config.yaml (the profile), environment.json, metrics.jsonl (a line a step), trajectories.jsonl.gz,
evaluation.json (before, after, closed book; written last) and adapter/. `analysis/runs.py` reads it.

Where a run learns from demonstrations, a step's figures describe these: `reward` and `exact_match` are theirs, 1 by
their choice, and say nothing of the model. What falls is `loss`, the cross-entropy of their learned tokens at the
step's beginning; `entropy` is the model's at these tokens, `kl` and `clip_ratio` are null. How good the model is,
evaluation.json says alone. Rejection sampling leaves demonstrations.jsonl.gz as well.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import Tensor

from searchr1_lite.config import REINFORCED, Profile
from searchr1_lite.evaluation.metrics import mean
from searchr1_lite.evaluation.rollout_metrics import rollout_metrics
from searchr1_lite.files import append_rows
from searchr1_lite.rollouts.rows import trajectory_to_row
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.tasks.answers import exact_match
from searchr1_lite.training import losses
from searchr1_lite.training.score import Batch


@dataclass
class Recorder:
    """Writes a run's growing files and says how it goes: in the main process only, with figures of all processes."""

    profile: Profile
    run_folder: Path
    progress: Callable[[str], Any] = print
    tokenizer: Any = None
    row: dict[str, Any] = field(default_factory=dict)  # of the step that goes on
    step_seconds: list[float] = field(default_factory=list)
    started: float = 0.0  # trl_trainer.py: when the step began

    def rollout(
        self, step: int, trajectories: list[Trajectory], rewards: list[float], seconds: float, cache_hits: int | None
    ) -> None:
        """What the rollouts of a step say; some of them are kept."""
        trajectories, rewards = gather_object(trajectories), gather_object(rewards)  # in the order of one process
        self.row = {"step": step, **rollout_metrics(trajectories, rewards, self.profile.group_size)}
        self.row |= {} if cache_hits is None else {"cache_hits": cache_hits}
        self.row["seconds_rollout"] = seconds
        due = step == 1 or step % self.profile.save_trajectories_every == 0
        if due and PartialState().is_main_process:
            sampled = self.profile.algorithm != "sft"  # golden answers have no log-probabilities to show
            tokenizer = self.tokenizer if sampled else None
            append_trajectories(self.run_folder, trajectories, rewards, step, "train", tokenizer)

    def update(self, updates: Sequence[dict[str, float | None]], seconds: float) -> None:
        """The step's line, with the means over its updates (the last one's gradient norm and the largest ratio)."""
        if not PartialState().is_main_process:
            return
        columns = {name: [update[name] for update in updates] for name in updates[0]}
        means = {name: None if None in values else mean(values) for name, values in columns.items()}
        last = {name: columns[name][-1] for name in ("grad_norm", "learning_rate")}
        largest = {"ratio_max": max(columns["ratio_max"])} if None not in columns["ratio_max"] else {}
        self.row |= means | last | largest
        self.row |= {"seconds_training": seconds - self.row["seconds_rollout"], "seconds": seconds}
        with (self.run_folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.row) + "\n")
        self.step_seconds.append(seconds)
        self._say(self.row)

    def _say(self, row: dict[str, Any]) -> None:
        step, steps, failed = row["step"], self.profile.steps, row["failed_searches"]
        if step not in (1, steps) and step % max(1, round(steps / 8)):
            return
        rate = mean(self.step_seconds)
        going = f"exact match {row['exact_match']:.2f}  searches {row['searches']:.2f}"
        if self.profile.algorithm not in REINFORCED:
            going = f"loss {row['loss']:.3f}"
        left = f"{rate:.1f} s a step, {_duration(rate * (steps - step))} left"
        left += f"  {failed} trajectories left out: a search failed" if failed else ""
        self.progress(f"{self.run_folder.name}: step {step}/{steps}  {going}  {left}")


class Figures:
    """An update's figures, added up over its parts: means over tokens of all processes.

    `kl` and `entropy` are over the policy's own tokens, whatever is learned from.
    """

    def __init__(self, profile: Profile, device: torch.device) -> None:
        self.profile = profile
        self.sums = torch.zeros(7, device=device)  # loss, value loss, KL, entropy, own tokens; clipped, learned tokens
        self.ratio_max = torch.zeros(1, device=device)

    def add(self, part: Batch, logprobs: Tensor, entropies: Tensor, loss: Tensor, value_loss: Tensor) -> None:
        own, mask, profile = part.own * part.mask, part.mask, self.profile
        ratio = torch.exp((logprobs - (logprobs if part.old_logprobs is None else part.old_logprobs)) * mask)
        advantages = part.advantages if part.advantages.dim() > 1 else part.advantages.unsqueeze(1)
        high = profile.epsilon if profile.epsilon_high is None else profile.epsilon_high
        clipped = ((ratio < 1 - profile.epsilon) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
        reference = part.reference_logprobs
        kl = torch.zeros_like(logprobs) if reference is None else losses.k3_kl(logprobs, reference)
        sums = ((kl * own).sum(), (entropies * own).sum(), own.sum(), (clipped * mask).sum(), mask.sum())
        self.sums += torch.stack([loss, value_loss, *sums])
        self.ratio_max = torch.maximum(self.ratio_max, (ratio * mask).max())

    def means(self) -> dict[str, float | None]:
        loss, value_loss, kl, entropy, own, clipped, learned = losses.over_processes(self.sums).tolist()
        from_rewards, per_own = self.profile.algorithm in REINFORCED, max(own, 1)
        return {
            "kl": kl / per_own if from_rewards else None,
            "entropy": entropy / per_own,
            "clip_ratio": clipped / max(learned, 1) if from_rewards else None,
            "loss": loss + value_loss,
            "ratio_max": gather(self.ratio_max).max().item() if from_rewards else None,  # now to when it was sampled
            "value_loss": value_loss if self.profile.algorithm == "ppo" else None,
        }


def append_trajectories(
    run_folder: Path,
    trajectories: Sequence[Trajectory],
    rewards: Sequence[float],
    step: int,
    phase: str,
    tokenizer: Any = None,
) -> None:
    """Add a batch to trajectories.jsonl.gz; with a tokenizer, its tokens and log-probabilities too."""
    rows = []
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        right = exact_match(trajectory.policy_text, trajectory.question.golden_answers)
        extra = {"step": step, "phase": phase, "reward": reward, "exact_match": right}
        rows.append(trajectory_to_row(trajectory, tokenizer, **extra))
    append_rows(run_folder / "trajectories.jsonl.gz", rows)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
