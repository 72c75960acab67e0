"""Search-R1 in notebooks and a small package. What most people need is here, loaded when it is first used:

    from searchr1_lite import load_policy, load_profile, load_questions, load_retriever, load_run, rollout, train

The command is in `cli.py`; docs/architecture.md says what is where.
"""

from importlib import import_module
from typing import Any

FRONT = {
    "load_policy": "rollouts.policy",
    "load_profile": "config",
    "load_questions": "tasks.questions",
    "load_retriever": "retrieval.index",
    "load_run": "analysis.runs",
    "rollout": "rollouts.engine",
    "train": "training.loop",
}
__all__ = list(FRONT)


def __getattr__(name: str) -> Any:
    if name not in FRONT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FRONT[name]}"), name)  # late: torch takes seconds, and some need none
