"""The held-out questions of a training run, answered before and after it; several processes share the work."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from searchr1_lite.config import Profile
from searchr1_lite.evaluation.evaluate import closed_book, evaluate, summarise
from searchr1_lite.files import write_json
from searchr1_lite.preflight import memory_for
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.runfolder import read_json
from searchr1_lite.training.early_stop import STOPPED
from searchr1_lite.training.record import append_trajectories
from searchr1_lite.training.rewards import group_rewards
from searchr1_lite.types import Question, Retriever

EVALUATION_SAMPLES = 24  # trajectories kept of each evaluation, of the same questions before and after


@dataclass
class HeldOut:
    """The questions and what answers them; `before` and `after` training, greedily."""

    questions: list[Question]
    retriever: Retriever
    profile: Profile
    run_folder: Path
    progress: Callable[[str], Any]

    def before(self, policy: Policy) -> None:
        """The base model on held-out questions: with search, and with one turn and no search (closed book)."""
        summary = self._evaluate(policy, "before", 0)
        own = self._share()
        right = sum(gather_object([closed_book(policy, own, self.profile) * len(own)]))
        result = {"before": summary, "closed_book": round(right) / len(self.questions)}
        if PartialState().is_main_process:
            write_json(self.run_folder / "checkpoints/before.json", result)
        self.progress(
            f"{self.run_folder.name}: before, exact match {summary['exact_match']:.2f} on {summary['questions']} "
            f"held-out questions, {summary['mean_searches']:.2f} searches; closed book {result['closed_book']:.2f}"
        )

    def after(self, policy: Policy) -> None:
        """The trained model on the same questions. evaluation.json is written last: it makes a run finished."""
        before = read_json(self.run_folder / "checkpoints/before.json")
        summary = self._evaluate(policy, "after", self.profile.steps)
        result = {"before": before["before"], "after": summary, "closed_book": before["closed_book"]}
        if PartialState().is_main_process:
            write_json(self.run_folder / "evaluation.json", result)
        steps = read_json(self.run_folder / STOPPED).get("step", self.profile.steps)
        self.progress(
            f"{self.run_folder.name}: after {steps} steps, exact match {summary['exact_match']:.2f}, "
            f"{summary['mean_searches']:.2f} searches"
        )

    def _evaluate(self, policy: Policy, phase: str, step: int) -> dict[str, Any]:
        with memory_for("rollout", self.profile, "rollout_rows", "max_context_tokens"):
            summary, own = evaluate(policy, self._share(), self.retriever, self.profile)
        shares = gather_object([own])
        trajectories = [shares[n % len(shares)][n // len(shares)] for n in range(len(self.questions))]
        samples = trajectories[:EVALUATION_SAMPLES]
        rewards = group_rewards(samples, self.profile.model_copy(update={"group_size": 1}))
        if PartialState().is_main_process:
            append_trajectories(self.run_folder, samples, rewards, step, phase, policy.tokenizer)
        return summary | summarise(trajectories)

    def _share(self) -> list[Question]:
        """The questions of this process: every n-th, where there are n processes."""
        return self.questions[PartialState().process_index :: PartialState().num_processes]
