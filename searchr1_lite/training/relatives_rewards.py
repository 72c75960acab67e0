"""What ReSearch, R1-Searcher and AutoRefine pay. Tags, prompt and what counts as right format stay Search-R1's."""

import re

from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.tasks.answers import stands_in

CONSOLATION = 0.1  # for a wrong answer: in right format (ReSearch), or that stood in the refine step (AutoRefine)
FIRST_STAGE = 1 / 3  # R1-Searcher's first stage, as a share of training (there 350 of 8,498 questions)
FORMAT_PENALTY = 2.0  # R1-Searcher's second stage (arXiv 2503.05592 and its code for Qwen; for Llama the code takes 1)


def research_reward(score: float, valid: bool, answer: str | None) -> float:
    """ReSearch (arXiv 2503.19470): F1 or, where that is 0, 0.1; 0 in bad format or without an answer."""
    return (score or CONSOLATION) if valid and answer else 0.0


def r1_searcher_reward(score: float, valid: bool, searches: int, progress: float) -> float:
    """R1-Searcher (arXiv 2503.05592): first 0.5 for a search and 0.5 for format, then F1 less 2 for bad format.

    The first stage pays for no answer: it teaches to call the search engine at all.
    """
    if progress < FIRST_STAGE:
        return 0.5 * (searches > 0) + 0.5 * valid
    return score - FORMAT_PENALTY * (not valid)


def autorefine_reward(score: float, trajectory: Trajectory) -> float:
    """AutoRefine (arXiv 2505.11277): F1 or, where that is 0, 0.1 if a golden answer stands in the refine step."""
    refined = stands_in(refine_steps(trajectory), trajectory.question.golden_answers)
    return score or (CONSOLATION if refined else 0.0)


def refine_steps(trajectory: Trajectory) -> list[str]:
    """What the model distils from passages: its `<refine>` texts after the first search or, without any, its thinking.

    Search-R1's prompt knows no `<refine>`; a model trained with it sums passages up in the next `<think>`.
    """
    first = next((i for i, turn in enumerate(trajectory.turns) if turn.query is not None), len(trajectory.turns))
    written = "".join(turn.text for turn in trajectory.turns[first + 1 :])
    found = (re.findall(rf"<{tag}>(.*?)</{tag}>", written, re.DOTALL) for tag in ("refine", "think"))
    return next(filter(None, found), [])
