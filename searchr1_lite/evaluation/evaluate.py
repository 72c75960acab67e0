"""How good a policy is: answer questions, judge the answers, sum up.

A loop over `rollout`, in batches of `eval_batch_size`. Other ways to answer and other scores than exact match are
not here.
"""

import time
from collections.abc import Callable, Sequence

from searchr1_lite.config import Profile
from searchr1_lite.evaluation.metrics import by_hops, mean, share_interval
from searchr1_lite.rollout.engine import rollout
from searchr1_lite.rollout.policy import Policy
from searchr1_lite.rollout.trajectory import Trajectory
from searchr1_lite.training.rewards import exact_match
from searchr1_lite.types import Hit, Question, Retriever

SECONDS_BETWEEN_LINES = 10.0


class NoRetriever:
    """Finds nothing, whatever is asked."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return [[] for _ in queries]


def evaluate(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    profile: Profile,
    greedy: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> tuple[dict, list[Trajectory]]:
    """One trajectory a question, in order, and their summary (see `summarise`).

    `progress` gets a line with the rate and the time left, at most every ten seconds; a short evaluation is silent.
    """
    if not questions:
        raise ValueError("there are no questions to evaluate on; check the profile's questions and test_split")
    trajectories: list[Trajectory] = []
    started = said = time.monotonic()
    for start in range(0, len(questions), profile.eval_batch_size):
        batch = list(questions[start : start + profile.eval_batch_size])
        trajectories += rollout(policy, batch, retriever, profile, greedy=greedy, seed=seed + start)
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES and len(trajectories) < len(questions):
            said = now
            progress(_progress_line(len(trajectories), len(questions), now - started))
    summary = summarise(trajectories)
    return summary | {"seconds": round(time.monotonic() - started, 3), "greedy": greedy}, trajectories


def summarise(trajectories: Sequence[Trajectory]) -> dict:
    """Means over trajectories, one of which belongs to each question.

    `exact_match` judges what the model wrote, never retrieved text; its interval is Wilson's, 95 %.
    `response_length` is in tokens that the model wrote, `invalid_actions` and searches are counts a trajectory,
    `answer_rate` is the share that ended in an answer. The `_by_hops` values have keys "1", "2", … for the hop counts
    that the questions' metadata names, and are empty where it names none.
    """
    correct = [exact_match(one.policy_text, one.question.golden_answers) for one in trajectories]
    searches = [float(one.searches) for one in trajectories]
    metadata = [one.question.metadata for one in trajectories]
    return {
        "questions": len(trajectories),
        "exact_match": mean(correct),
        "exact_match_interval": list(share_interval(round(sum(correct)), len(correct))),
        "exact_match_by_hops": by_hops(correct, metadata),
        "mean_searches": mean(searches),
        "mean_searches_by_hops": by_hops(searches, metadata),
        "response_length": mean(one.response_length for one in trajectories),
        "answer_rate": mean(float(one.finished) for one in trajectories),
        "invalid_actions": mean(one.invalid_actions for one in trajectories),
    }


def closed_book(policy: Policy, questions: Sequence[Question], profile: Profile) -> float:
    """Exact match when nothing can be looked up: one turn, no search, greedy."""
    summary, _ = evaluate(policy, questions, NoRetriever(), profile.model_copy(update={"max_turns": 0}))
    return summary["exact_match"]


def _progress_line(done: int, total: int, seconds: float) -> str:
    rate = done / seconds
    return f"{done} of {total} questions, {rate:.1f} a second, {(total - done) / rate:.0f} s left"
