"""The few values that travel between the rooms of the package, all frozen.

`Turn` and `Trajectory`, which only the rollout makes, are in `rollouts/trajectory.py`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from searchr1_lite.errors import UserError


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable text. `title` is without quotes; `quoted` says whether the corpus file writes them, as wiki-18
    does for most of its passages.
    """

    id: str
    title: str
    text: str
    quoted: bool = True

    @property
    def title_line(self) -> str:
        """The title as the corpus file has it, which is what Search-R1 shows the model and its encoder."""
        return f'"{self.title}"' if self.quoted else self.title


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


class RetrievalError(UserError):
    """A search that failed for good; the message names queries and cause."""


class QueryRefusedError(UserError):
    """A retriever does not take one of the queries it was given, whatever the others are; the message says why."""


class Retriever(Protocol):
    """Anything that finds passages: one list of at most `k` hits a query, best first, in query order.

    One that must know which question a query belongs to (an oracle) has `search_for(queries, questions, k)` as well,
    which the rollout then calls instead.
    """

    def search(self, queries: list[str], k: int) -> list[list[Hit]]: ...
