"""The few values that travel between the rooms of the package, all frozen.

`Turn` and `Trajectory`, which only the rollout makes, are in `rollout/trajectory.py`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable text. `title` carries no surrounding quotes, whatever the corpus file had."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """One question with every answer that counts as right.

    `metadata` is free; the package reads `hops` (int, searches an ideal reader needs) and
    `supporting_ids` (list of passage ids) where they are present.
    """

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage found for a query; a higher score is a better match."""

    passage: Passage
    score: float


class Retriever(Protocol):
    """Anything that finds passages: one list of at most `k` hits a query, best first, in query order."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]: ...
