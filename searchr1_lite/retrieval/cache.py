"""Repeated queries answered from memory, and counted. Rows of a group often ask the same, and so do later steps."""

from searchr1_lite.types import Hit, Retriever


def remembered(retriever: Retriever) -> Retriever:
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
