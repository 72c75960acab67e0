"""Many ask, one searches: queries that come during a call of the retriever go together into the next one.

The rollout's rows and the service's clients both ask through this. A retriever is so never called by two threads at
once, and the slower it is, the larger its batches. `cached` answers repeated queries
from memory: rows of a group often ask the same, and so do later steps.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

from searchr1_lite.types import Hit, QueryRefusedError, Question, RetrievalError, Retriever


class _Asked(NamedTuple):
    query: str
    k: int
    question: Question | None
    found: Future


class Batcher:
    """Asks `retriever` from one thread of its own, for at most `most` queries at a time."""

    def __init__(self, retriever: Retriever, most: int = 256) -> None:
        self.retriever, self.most = retriever, most
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
        self.queue: deque[_Asked] = deque()
        self.lock = Lock()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is still queued and wait for the call that is under way."""
        with self.lock:
            while self.queue:
                self.queue.popleft().found.cancel()
        self.pool.shutdown()

    def ask(self, queries: Sequence[str], k: int, questions: Sequence[Question] | None = None) -> list[Future]:
        """A future of at most `k` hits for each query. `questions`, one a query, are for a retriever that must know.

        A call that fails gives its error to those whose queries were in it. Where the retriever refuses a query
        (QueryRefusedError), the call's queries are asked one by one, so that only that one fails.
        """
        of = questions or [None] * len(queries)
        asked = [_Asked(query, k, question, Future()) for query, question in zip(queries, of, strict=True)]
        if asked:
            with self.lock:
                self.queue.extend(asked)
            self.pool.submit(self._answer)
        return [one.found for one in asked]

    def _answer(self) -> None:
        while batch := self._next_batch():
            self._settle(batch)

    def _next_batch(self) -> list[_Asked]:
        """The head of the queue and those behind it with the same `k`; futures that were cancelled are dropped."""
        batch: list[_Asked] = []
        with self.lock:
            waiting, self.queue = self.queue, deque()
            for one in waiting:
                if len(batch) == self.most or (batch and one.k != batch[0].k):
                    self.queue.append(one)
                elif one.found.set_running_or_notify_cancel():
                    batch.append(one)
        return batch

    def _settle(self, batch: list[_Asked]) -> None:
        try:
            found = _search(self.retriever, batch)
        except BaseException as error:  # whatever it is belongs to those who wait
            if isinstance(error, QueryRefusedError) and len(batch) > 1:
                for one in batch:
                    self._settle([one])
                return
            for one in batch:
                one.found.set_exception(error)
            return
        for one, hits in zip(batch, found, strict=True):
            one.found.set_result(hits)


def _search(retriever: Retriever, batch: Sequence[_Asked]) -> list[list[Hit]]:
    """One call for all queries; fewer than `k` hits, or none, are taken as they are."""
    queries, k = [one.query for one in batch], batch[0].k
    named = ", ".join(repr(query[:200]) for query in queries[:5]) + (", …" if len(queries) > 5 else "")
    knows = getattr(retriever, "search_for", None) if all(one.question for one in batch) else None
    try:
        found = knows(queries, [one.question for one in batch], k) if knows else retriever.search(queries, k)
    except QueryRefusedError:
        raise
    except Exception as error:
        raise RetrievalError(f"the retriever failed on {len(queries)} queries ({named}): {error}") from error
    if len(found) != len(queries):
        raise RetrievalError(f"the retriever returned {len(found)} lists of hits for {len(queries)} queries ({named})")
    for query, hits in zip(queries, found, strict=True):
        if len(hits) > k:
            raise RetrievalError(f"the retriever returned {len(hits)} hits for {query!r} where {k} were asked for")
    return found


def cached(retriever: Retriever) -> Retriever:
    """The retriever with its answers kept; an oracle, whose answers depend on the question too, as it is."""
    return retriever if hasattr(retriever, "search_for") else Cached(retriever)


class Cached:
    """The same hits as `retriever`, which is asked each query once while its answer is kept (at most `most` of them,
    the oldest going first).

    `asked` and `hits` count queries since the start; a query that stands twice in one call is asked once. Not for a
    retriever whose answer depends on more than the query (an oracle), nor for one that changes.
    """

    def __init__(self, retriever: Retriever, most: int = 20_000) -> None:
        self.retriever, self.most = retriever, most
        self.asked = self.hits = 0
        self.kept: dict[tuple[str, int], list[Hit]] = {}

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        new = [query for query in dict.fromkeys(queries) if (query, k) not in self.kept]
        found = {query: self.kept.get((query, k)) for query in queries}
        if new:
            found |= dict(zip(new, self.retriever.search(new, k), strict=True))
        self.asked, self.hits = self.asked + len(queries), self.hits + len(queries) - len(new)
        self.kept |= {(query, k): found[query] for query in new}
        for oldest in list(self.kept)[: max(0, len(self.kept) - self.most)]:
            del self.kept[oldest]
        return [list(found[query]) for query in queries]
