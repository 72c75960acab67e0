"""How good a policy is: answer questions, judge the answers, sum up.

The profile's strategy says how they are answered: by `rollout`, or as `strategies.py` has it. The command that
evaluates into a folder is `__main__.py`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from searchr1_lite.config import Profile
from searchr1_lite.evaluation.metrics import by_hops, mean, share_interval
from searchr1_lite.evaluation.strategies import STRATEGIES, Attempt, answer
from searchr1_lite.retrieval.controls import Empty
from searchr1_lite.rollout.engine import rollout
from searchr1_lite.rollout.policy import Policy
from searchr1_lite.rollout.rows import trajectory_to_row
from searchr1_lite.rollout.trajectory import Trajectory
from searchr1_lite.tasks.answers import exact_match, f1, substring_match
from searchr1_lite.types import Question, Retriever

Answered = Trajectory | Attempt
SECONDS_BETWEEN_LINES = 10.0
SCORES = {"exact_match": exact_match, "f1": f1, "substring_match": substring_match}
FIGURES = (*SCORES, "searches", "response_length", "retrieved_tokens", "finished", "invalid_actions")


def evaluate(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    profile: Profile,
    greedy: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] = print,
    done: Callable[[Answered], None] = lambda trajectory: None,
) -> tuple[dict, list[Answered]]:
    """One trajectory (or attempt) a question, in order, and their summary (see `summarise`).

    `progress` gets a line with the rate and the time left, at most every ten seconds; a short evaluation is silent.
    `done` gets each trajectory, in order, as soon as it is ready.
    """
    if not questions:
        raise ValueError("there are no questions to evaluate on; check the profile's questions and test_split")
    started = said = time.monotonic()
    ready = 0

    def one_more(trajectory: Answered) -> None:
        nonlocal ready, said
        ready += 1
        done(trajectory)
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES and ready < len(questions):
            said = now
            progress(progress_line(ready, len(questions), now - started))

    work_through = answer if profile.strategy in STRATEGIES else rollout
    trajectories = work_through(policy, questions, retriever, profile, greedy=greedy, seed=seed, done=one_more)
    summary = summarise(trajectories)
    return summary | {"seconds": round(time.monotonic() - started, 3), "greedy": greedy}, trajectories


def scored_row(trajectory: Answered, tokenizer: Any = None, **extra: Any) -> dict[str, Any]:
    """`trajectory_to_row`, with the scores of what the model wrote; retrieved text is never judged."""
    golden = trajectory.question.golden_answers
    scores = {name: score(trajectory.policy_text, golden) for name, score in SCORES.items()}
    return trajectory_to_row(trajectory, tokenizer, **extra, **scores, invalid_actions=trajectory.invalid_actions)


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """The little of a scored row that a summary needs; the texts, which would fill the memory, are left behind."""
    more = {"hops": row["question"]["metadata"].get("hops"), "failed": row["stop_reason"].startswith("search ")}
    return {name: row[name] for name in FIGURES} | more


def summarise(trajectories: Sequence[Answered]) -> dict:
    """Means over trajectories, one of which belongs to each question; see `summarise_figures`."""
    return summarise_figures([figures(scored_row(trajectory)) for trajectory in trajectories])


def summarise_figures(rows: Sequence[dict[str, Any]]) -> dict:
    """Means over the `figures` of answered questions.

    `exact_match` judges what the model wrote, never retrieved text; its interval is Wilson's, 95 %. `f1` is of words,
    `substring_match` the share whose answer holds a golden one.
    `response_length` is in tokens that the model wrote, `retrieved_tokens` in those of what it was shown, both a
    trajectory, as `invalid_actions` and searches are; `answer_rate` is the share that ended in an answer. The
    `_by_hops` values have keys "1", "2", … for the hop counts that the questions' metadata names, and are empty where
    it names none. A question whose search failed is in no mean and not among `questions`; `failed_searches` counts
    them. Raises ValueError where no other is left.
    """
    failed = sum(row["failed"] for row in rows)
    rows = [row for row in rows if not row["failed"]]
    if not rows:
        raise ValueError(f"the search of every question failed ({failed}): there is nothing to sum up")
    column = {name: [float(row[name]) for row in rows] for name in FIGURES}
    correct = column["exact_match"]
    return {
        "questions": len(rows),
        "exact_match": mean(correct),
        "exact_match_interval": list(share_interval(round(sum(correct)), len(correct))),
        "exact_match_by_hops": by_hops(correct, rows),
        "f1": mean(column["f1"]),
        "substring_match": mean(column["substring_match"]),
        "mean_searches": mean(column["searches"]),
        "mean_searches_by_hops": by_hops(column["searches"], rows),
        "response_length": mean(column["response_length"]),
        "retrieved_tokens": mean(column["retrieved_tokens"]),
        "answer_rate": mean(column["finished"]),
        "invalid_actions": mean(column["invalid_actions"]),
        "failed_searches": failed,
    }


def closed_book(policy: Policy, questions: Sequence[Question], profile: Profile) -> float:
    """Exact match when nothing can be looked up: one turn, no search, greedy."""
    summary, _ = evaluate(policy, questions, Empty(), profile.model_copy(update={"max_turns": 0}))
    return summary["exact_match"]


def progress_line(done: int, total: int, seconds: float, before: int = 0) -> str:
    """`done` of `total` questions, of which `before` were answered earlier and `seconds` say nothing."""
    rate = (done - before) / seconds
    return f"{done} of {total} questions, {rate:.1f} a second, {(total - done) / rate:.0f} s left"
