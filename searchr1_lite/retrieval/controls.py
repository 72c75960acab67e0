"""Retrievers that are wrong, or right, on purpose: what does a model learn from a better or a worse one?

Each is a retriever like any other. What is random depends on the seed and the query alone, so that the same query finds
the same. Documents that a language model makes up (ZeroSearch, arXiv 2505.04588) are left out: here noise is
passages that have nothing to do with the query.
"""

import time
import zlib
from collections.abc import Sequence

import numpy as np

from searchr1_lite.tasks.questions import supporting_ids
from searchr1_lite.types import Hit, Passage, Question, Retriever


class Oracle:
    """What the question needs comes first (as its metadata names it, in that order), then what is found.

    Only a rollout knows the question: a plain `search` finds what `retriever` finds.
    """

    def __init__(self, retriever: Retriever, passages: Sequence[Passage]) -> None:
        self.retriever = retriever
        self.by_id = {passage.id: passage for passage in passages}

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return self.retriever.search(queries, k)

    def search_for(self, queries: list[str], questions: Sequence[Question], k: int) -> list[list[Hit]]:
        """Raises ValueError for a question without supporting passages, or with some that the corpus lacks."""
        found = self.retriever.search(queries, k)
        return [self._gold_first(question, hits, k) for question, hits in zip(questions, found, strict=True)]

    def _gold_first(self, question: Question, hits: list[Hit], k: int) -> list[Hit]:
        ids = supporting_ids(question)
        if missing := [key for key in ids if key not in self.by_id]:
            raise ValueError(f"question {question.id!r} needs passages that the corpus lacks: {', '.join(missing)}")
        passages = [self.by_id[key] for key in ids] + [hit.passage for hit in hits if hit.passage.id not in ids]
        return ranked(passages[:k])


class Random:
    """`k` passages drawn without replacement, whatever is asked."""

    def __init__(self, passages: Sequence[Passage], seed: int = 0) -> None:
        self.passages, self.seed = passages, seed

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return [self._draw(query, min(k, len(self.passages))) for query in queries]

    def _draw(self, query: str, k: int) -> list[Hit]:
        chosen = _stream(self.seed, query).choice(len(self.passages), k, replace=False)
        return ranked([self.passages[int(i)] for i in chosen])


class Empty:
    """Finds nothing."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return [[] for _ in queries]


class Noisy:
    """Answers a share of the queries with random passages. A larger share, with the same seed, adds to them."""

    def __init__(self, retriever: Retriever, passages: Sequence[Passage], share: float, seed: int = 0) -> None:
        self.retriever, self.share, self.seed = retriever, share, seed
        self.random = Random(passages, seed + 1)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        found = self.retriever.search(queries, k)
        noisy = [_stream(self.seed, query).random() < self.share for query in queries]
        return [self.random.search([q], k)[0] if n else hits for q, n, hits in zip(queries, noisy, found, strict=True)]


class Delayed:
    """What `retriever` finds, each call `seconds` later."""

    def __init__(self, retriever: Retriever, seconds: float) -> None:
        self.retriever, self.seconds = retriever, seconds

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        time.sleep(self.seconds)
        return self.retriever.search(queries, k)


def noise_share(step: int, steps: int, start: float, end: float, base: float = 4.0) -> float:
    """The share of noise at `step` of `steps`: slowly, then faster, from `start` to `end`.

    ZeroSearch's curriculum, p_s + (b^(i/T) - 1) / (b - 1) (p_e - p_s) with b = 4 (arXiv 2505.04588).
    """
    return start + (base ** (step / steps) - 1) / (base - 1) * (end - start)


def ranked(passages: Sequence[Passage]) -> list[Hit]:
    """Hits in this order; the scores say no more than the rank."""
    return [Hit(passage, 1 / rank) for rank, passage in enumerate(passages, 1)]


def _stream(seed: int, query: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(query.encode("utf-8", "surrogatepass"))]))
