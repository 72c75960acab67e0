"""The held-out questions of a training run, answered before and after it; several processes share the work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from searchr1_lite.config import Profile
from searchr1_lite.evaluation.evaluate import closed_book, evaluate, summarise
from searchr1_lite.jsonl import write_json
from searchr1_lite.rollout.policy import Policy
from searchr1_lite.runfolder import read_json
from searchr1_lite.training.early_stop import STOPPED
from searchr1_lite.training.preflight import memory_for
from searchr1_lite.training.record import append_trajectories
from searchr1_lite.training.rewards import group_rewards
from searchr1_lite.types import Question, Retriever

EVALUATION_SAMPLES = 24  # trajectories kept of each evaluation, of the same questions before and after


def evaluate_before(
    run_folder: Path,
    policy: Policy,
    questions: list[Question],
    retriever: Retriever,
    profile: Profile,
    progress: Callable[[str], Any],
) -> None:
    """The base model on held-out questions: with search, and with one turn and no search (closed book)."""
    summary = _evaluate(run_folder, policy, questions, retriever, profile, "before", progress)
    own = _share(questions)
    right = sum(gather_object([closed_book(policy, own, profile) * len(own)]))
    result = {"before": summary, "closed_book": round(right) / len(questions)}
    if PartialState().is_main_process:
        write_json(run_folder / "checkpoints/before.json", result)
    progress(
        f"{run_folder.name}: before, exact match {summary['exact_match']:.2f} on {summary['questions']} held-out "
        f"questions, {summary['mean_searches']:.2f} searches; closed book {result['closed_book']:.2f}"
    )


def evaluate_after(
    run_folder: Path,
    policy: Policy,
    questions: list[Question],
    retriever: Retriever,
    profile: Profile,
    progress: Callable[[str], Any],
) -> None:
    """The trained model on the same questions. evaluation.json is written last: it makes a run finished."""
    before = read_json(run_folder / "checkpoints/before.json")
    summary = _evaluate(run_folder, policy, questions, retriever, profile, "after", progress)
    result = {"before": before["before"], "after": summary, "closed_book": before["closed_book"]}
    if PartialState().is_main_process:
        write_json(run_folder / "evaluation.json", result)
    steps = read_json(run_folder / STOPPED).get("step", profile.steps)
    progress(
        f"{run_folder.name}: after {steps} steps, exact match {summary['exact_match']:.2f}, "
        f"{summary['mean_searches']:.2f} searches"
    )


def _evaluate(
    run_folder: Path,
    policy: Policy,
    questions: list[Question],
    retriever: Retriever,
    profile: Profile,
    phase: str,
    progress: Callable[[str], Any],
) -> dict[str, Any]:
    with memory_for("rollout", profile, "rollout_rows", "max_context_tokens"):
        summary, own = evaluate(policy, _share(questions), retriever, profile, progress=progress)
    shares = gather_object([own])
    trajectories = [shares[n % len(shares)][n // len(shares)] for n in range(len(questions))]
    samples = trajectories[:EVALUATION_SAMPLES]
    rewards = group_rewards(samples, profile.model_copy(update={"group_size": 1}))
    if PartialState().is_main_process:
        step = 0 if phase == "before" else profile.steps
        append_trajectories(run_folder, samples, rewards, step, phase, policy.tokenizer)
    return summary | summarise(trajectories)


def _share(questions: list[Question]) -> list[Question]:
    """The questions of this process: every n-th, where there are n processes."""
    return questions[PartialState().process_index :: PartialState().num_processes]
