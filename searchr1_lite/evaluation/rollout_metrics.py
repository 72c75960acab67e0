"""What a batch of training rollouts looks like in figures: a step's columns of metrics.jsonl that need no gradient."""

import re
from collections.abc import Sequence
from typing import Any

from searchr1_lite.evaluation.metrics import by_hops, mean
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.tasks.answers import exact_match


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
