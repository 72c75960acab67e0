"""Several retrievers as one, by reciprocal-rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009).

Only ranks count, so that scores of different kinds (BM25's and cosines) need no common scale. Weights and other ways
to fuse are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.types import Hit, Passage, Retriever


@dataclass(frozen=True)
class Hybrid:
    """Fuses the `depth` best passages of each retriever; `c` is the k of the paper, which found 60 to serve well."""

    retrievers: Sequence[Retriever]
    depth: int = 100  # passages that each retriever is asked for (`k` of a search, where that is more)
    c: int = 60

    def __post_init__(self) -> None:
        if not self.retrievers or self.depth < 1 or self.c < 0:
            raise ValueError(f"fusion needs a retriever, depth >= 1 and c >= 0, got {self}")

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` passages a query by the sum of 1 / (c + rank), rank from 1, over the retrievers that found them.

        Equal sums: the better best rank first, then the earlier retriever's. Passages are the same by id. That the
        retrievers search one corpus is checked on what they find: CorpusError where an id has two texts.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found = [retriever.search(list(queries), max(k, self.depth)) for retriever in self.retrievers]
        return [self._fuse(lists, k) for lists in zip(*found, strict=True)]

    def _fuse(self, lists: Sequence[list[Hit]], k: int) -> list[Hit]:
        passages: dict[str, Passage] = {}
        ranks: dict[str, list[tuple[int, int]]] = {}  # of each passage: rank and retriever
        for retriever, hits in enumerate(lists):
            for rank, passage in enumerate((hit.passage for hit in hits), 1):
                known = passages.setdefault(passage.id, passage)
                if (known.title, known.text) != (passage.title, passage.text):
                    raise CorpusError(
                        f"passage {passage.id!r} is {known.title!r} to one retriever and {passage.title!r}, or another "
                        "text of that title, to a second; retrievers to be fused must search the same corpus"
                    )
                ranks.setdefault(passage.id, []).append((rank, retriever))
        scores = {key: fsum(1 / (self.c + rank) for rank, _ in ranks[key]) for key in ranks}
        best = sorted(scores, key=lambda key: (-scores[key], min(ranks[key])))
        return [Hit(passages[key], scores[key]) for key in best[:k]]
