"""What a run leaves behind while it goes: metrics, some trajectories, marks at checkpoints, and where it was made.

A run folder holds config.yaml (the profile), environment.json, metrics.jsonl (a line a step), trajectories.jsonl.gz,
evaluation.json (before, after, closed book; written last) and adapter/. `analysis/runs.py` reads it.

Where a run learns from demonstrations, a step's figures describe these: `reward` and `exact_match` are theirs, 1 by
their choice, and say nothing of the model. What falls is `loss`, the cross-entropy of their learned tokens at the
step's beginning; `entropy` is the model's at these tokens, `kl` and `clip_ratio` are null. How good the model is,
evaluation.json says alone. Rejection sampling leaves demonstrations.jsonl.gz as well.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from searchr1_lite.config import REINFORCED, Profile
from searchr1_lite.evaluation.metrics import by_hops, mean
from searchr1_lite.jsonl import append_rows
from searchr1_lite.provenance import provenance
from searchr1_lite.rollout.policy import Policy
from searchr1_lite.rollout.trajectory import Trajectory, trajectory_to_row
from searchr1_lite.training import checkpoints
from searchr1_lite.training.rewards import exact_match


@dataclass
class Recorder(TrainerCallback):
    """Writes a run's growing files, marks its checkpoints and says how it goes: in the main process only."""

    profile: Profile
    run_folder: Path
    progress: Callable[[str], Any] = print
    tokenizer: Any = None
    rollouts: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    def record(self, step: int, trajectories: list[Trajectory], rewards: list[float], seconds: float) -> None:
        """What the rollouts of a step say; some of them are kept."""
        self.rollouts = {"step": step, **rollout_metrics(trajectories, rewards, self.profile.group_size)}
        self.rollouts["seconds_rollout"] = seconds
        if step == 1 or step % self.profile.save_trajectories_every == 0:
            sampled = self.profile.algorithm != "sft"  # golden answers have no log-probabilities to show
            tokenizer = self.tokenizer if sampled else None
            append_trajectories(self.run_folder, trajectories, rewards, step, "train", tokenizer)

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step % self.profile.updates_per_rollout == 0:
            self.started = time.perf_counter()

    def on_log(self, args, state, control, logs: dict[str, float], **_) -> None:
        if "grad_norm" not in logs or not state.is_world_process_zero:  # without it: the summary after training
            return
        seconds = time.perf_counter() - self.started
        metrics = self.rollouts | {
            "kl": logs.get("kl"),
            "entropy": logs["entropy"],
            "grad_norm": logs["grad_norm"],
            "clip_ratio": logs.get("clip_ratio/region_mean"),
            "loss": logs["loss"],
            "ratio_max": logs.get("ratio_max"),  # of a token's probability now to when it was sampled
            "value_loss": logs.get("value_loss"),  # PPO's
            "learning_rate": logs["learning_rate"],
            "seconds_training": seconds - self.rollouts["seconds_rollout"],
            "seconds": seconds,
        }
        with (self.run_folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        self.step_seconds.append(seconds)
        self._say(metrics)

    def on_save(self, args, state, control, **_) -> None:
        PartialState().wait_for_everyone()  # every process has written its part
        if state.is_world_process_zero:
            checkpoints.mark_checkpoint(self.run_folder, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _say(self, metrics: dict[str, Any]) -> None:
        step, steps = metrics["step"], self.profile.steps
        if step != 1 and step != steps and step % max(1, round(steps / 8)):
            return
        rate = sum(self.step_seconds) / len(self.step_seconds)
        going = f"exact match {metrics['exact_match']:.2f}  searches {metrics['searches']:.2f}"
        if self.profile.algorithm not in REINFORCED:
            going = f"loss {metrics['loss']:.3f}"
        self.progress(
            f"{self.run_folder.name}: step {step}/{steps}  {going}  {rate:.1f} s a step, "
            f"{_duration(rate * (steps - step))} left"
            + (
                f"  {metrics['failed_searches']} trajectories left out: a search failed"
                * bool(metrics["failed_searches"])
            )
        )


def rollout_metrics(trajectories: Sequence[Trajectory], rewards: Sequence[float], group_size: int) -> dict[str, Any]:
    """Means over a batch of rollouts; by hops where the questions say how many they need.

    `failed_searches` counts trajectories that a failing search ended; they are in no mean.
    """
    groups = [rewards[start : start + group_size] for start in range(0, len(rewards), group_size)]
    failed = sum(trajectory.search_failed for trajectory in trajectories)
    kept = [(t, r) for t, r in zip(trajectories, rewards, strict=True) if not t.search_failed]
    trajectories, rewards = zip(*kept, strict=True) if kept else (trajectories, rewards)
    scores = [exact_match(trajectory.policy_text, trajectory.question.golden_answers) for trajectory in trajectories]
    searches = [trajectory.searches for trajectory in trajectories]
    metadata = [trajectory.question.metadata for trajectory in trajectories]
    hops = [described["hops"] for described in metadata if described.get("hops") is not None]
    by_score = {score: [t for t, s in zip(trajectories, scores, strict=True) if s == score] for score in (0.0, 1.0)}
    return {
        "reward": mean(rewards),
        "exact_match": mean(scores),
        "exact_match_by_hops": by_hops(scores, metadata),
        "searches": mean(searches),
        "searches_by_hops": by_hops(searches, metadata),
        "ideal_searches": mean(hops) if hops else None,
        "invalid_actions": mean([trajectory.invalid_actions for trajectory in trajectories]),
        "response_length": mean([trajectory.response_length for trajectory in trajectories]),
        "retrieved_tokens": mean([len(t.completion_ids) - t.response_length for t in trajectories]),
        "answer_rate": mean([trajectory.finished for trajectory in trajectories]),
        "zero_variance_groups": mean([len(set(group)) == 1 for group in groups]) if group_size > 1 else None,
        "failed_searches": failed,
        "repeated_ngrams": mean([repeated_ngrams(trajectory.policy_text) for trajectory in trajectories]),
        "right_logprob": token_logprob(by_score[1.0]),
        "wrong_logprob": token_logprob(by_score[0.0]),
    }


def repeated_ngrams(text: str, n: int = 4) -> float:
    """Share of the runs of `n` words in a text's thinking (all but queries and answers) that stood there before."""
    words = re.sub(r"<(search|answer)>.*?</\1>|</?think>", " ", text, flags=re.DOTALL).split()
    runs = list(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def token_logprob(trajectories: Sequence[Trajectory]) -> float | None:
    """Mean log-probability of a token that the model wrote; None without any, or where none was recorded (sft)."""
    own = [value for t in trajectories for value, wrote in zip(t.logprobs, t.loss_mask, strict=True) if wrote]
    return mean(own) if any(own) else None


def append_trajectories(
    run_folder: Path,
    trajectories: Sequence[Trajectory],
    rewards: Sequence[float],
    step: int,
    phase: str,
    tokenizer: Any = None,
) -> None:
    """Add a batch to trajectories.jsonl.gz; with a tokenizer, its tokens and log-probabilities too."""
    rows = [
        trajectory_to_row(
            trajectory,
            tokenizer,
            step=step,
            phase=phase,
            reward=reward,
            exact_match=exact_match(trajectory.policy_text, trajectory.question.golden_answers),
        )
        for trajectory, reward in zip(trajectories, rewards, strict=True)
    ]
    append_rows(run_folder / "trajectories.jsonl.gz", rows)


def environment(policy: Policy) -> dict[str, Any]:
    """When, on what and with what a run was made."""
    made = provenance(["torch", "transformers", "trl", "peft", "bitsandbytes"])
    made["machine"]["gpu"] = torch.cuda.get_device_name() if policy.device.type == "cuda" else None
    return made | {"quantization": policy.quantization, "processes": PartialState().num_processes}


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
