"""Dense search: the exact inner product of normalised vectors, with a flat FAISS index.

Approximate indexes and GPU search are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.encoders import Encoder
from searchr1_lite.retrieval.manifest import IndexMismatchError, belongs_to, check_index, save_index
from searchr1_lite.types import Hit, Passage

LIBRARIES = ["faiss-cpu", "sentence-transformers", "numpy"]


@contextmanager
def blas_from_four_queries(dimension: int) -> Iterator[None]:
    """Have FAISS search batches of four queries or more by matrix product.

    FAISS 1.15.1 does so only from queries x dimension >= 128,000; below, its scan is about ten times slower on one
    core, while for one to three queries the scan is the faster way. The setting is global and is put back.
    """
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 4 * dimension
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


@dataclass(frozen=True)
class DenseRetriever:
    passages: list[Passage]
    encoder: Encoder
    index: faiss.IndexFlatIP

    @classmethod
    def build(cls, passages: list[Passage], encoder: Encoder) -> "DenseRetriever":
        """Encode and index every passage; raises CorpusError where there is none."""
        passages = list(passages)
        if not passages:
            raise CorpusError("nothing to index: no passages")
        vectors = encoder.encode_passages(passages)
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return cls(passages, encoder, index)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The `k` passages nearest to each query (all, where the corpus is smaller), best first.

        A blank query finds nothing. Equal scores come in corpus order. A score may differ in its last digits with the
        size of the batch.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        asked = [i for i, query in enumerate(queries) if query.strip()]
        found: list[list[Hit]] = [[] for _ in queries]
        if not asked:
            return found
        vectors = self.encoder.encode_queries([queries[i] for i in asked])
        with blas_from_four_queries(self.index.d):
            scores, positions = self.index.search(vectors, min(k, len(self.passages)))
        for i, row_scores, row in zip(asked, scores, positions, strict=True):
            order = np.lexsort((row, -row_scores))
            found[i] = [Hit(self.passages[row[j]], float(row_scores[j])) for j in order]
        return found

    def save(self, folder: str | Path) -> None:
        """Write the vectors (not the passages) and their manifest; an older index in `folder` is replaced at once."""
        manifest = self._belongs_to(self.passages, self.encoder) | {"dimension": self.index.d}
        save_index(
            Path(folder), manifest, LIBRARIES, lambda fresh: faiss.write_index(self.index, str(fresh / "vectors.faiss"))
        )

    @classmethod
    def load(cls, folder: str | Path, passages: list[Passage], encoder: Encoder) -> "DenseRetriever":
        """The saved index of exactly these passages and this encoder; raises IndexMismatchError otherwise."""
        passages = list(passages)
        manifest = check_index(Path(folder), cls._belongs_to(passages, encoder))
        index = faiss.read_index(str(Path(folder) / "vectors.faiss"))
        if index.ntotal != len(passages) or index.d != manifest["dimension"]:
            raise IndexMismatchError(
                f"{folder}: {index.ntotal} vectors of {index.d} numbers, but the manifest says {len(passages)} "
                f"of {manifest['dimension']}; build the index again"
            )
        return cls(passages, encoder, index)

    @staticmethod
    def _belongs_to(passages: list[Passage], encoder: Encoder) -> dict:
        return belongs_to("dense", passages, encoder=encoder.identity())
