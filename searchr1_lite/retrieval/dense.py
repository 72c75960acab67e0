"""Dense search: passages whose normalised vectors have the largest inner product with the query's, found by FAISS.

The kinds and their figures on 15,011 real passages: data/results/benchmarks/retrieval.json. GPU search is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.encoders import Encoder, EncoderError
from searchr1_lite.types import Hit, Passage

LIBRARIES = ["faiss-cpu", "sentence-transformers", "numpy"]
KINDS = ("flat", "hnsw", "ivf-sq8", "ivf-pq")  # and "faiss:<factory string>"
EF_CONSTRUCTION, EF_SEARCH = 100, 64  # recall@3 0.995 of flat's on 15,011 passages of HotpotQA with MiniLM's vectors
NPROBE = 64  # lists looked into
MAX_LISTS = 16_384
BLOCK = 65_536  # vectors added to an index at once
SAME = 0.95  # cosine of a passage with itself, encoded in fp16 and in fp32, is above; that of two passages is below


@contextmanager
def blas_from(queries: int, dimension: int) -> Iterator[None]:
    """Have FAISS search batches of so many queries or more by matrix product.

    FAISS 1.15.1 does so only from queries x dimension >= 128,000; below, its scan is several times slower on two
    cores, while for a few queries the scan is the faster way. The setting is global and is put back.
    """
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = queries * dimension
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


@contextmanager
def _one_thread(needed: bool) -> Iterator[None]:
    """HNSW's graph depends on the order in which threads put vectors in; with one thread it is always the same."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if needed else before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def checked(vectors: np.ndarray, names: Sequence[str], encoder: Encoder, dimension: int | None) -> np.ndarray:
    """The vectors, if there is a finite one of `dimension` numbers for each name; raises EncoderError otherwise."""
    shape = (len(names), dimension or vectors.shape[-1])
    if vectors.shape != shape or vectors.dtype != np.float32:
        raise EncoderError(
            f"the encoder {encoder.name!r} gives {vectors.dtype} of shape {vectors.shape} for {names[0]} and on, "
            f"float32 of {shape} is needed"
        )
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise EncoderError(
            f"the encoder {encoder.name!r} gives {names[wrong[0]]} a vector that is not of finite numbers "
            f"({len(wrong)} of {len(names)} are so); look at its text, or use another encoder"
        )
    return vectors


def encode(passages: Sequence[Passage], encoder: Encoder, dimension: int | None = None) -> np.ndarray:
    """(passages, dimension) float32; raises EncoderError that names the passage whose vector cannot be used."""
    names = [f"passage {passage.id!r}" for passage in passages]
    return checked(encoder.encode_passages(passages), names, encoder, dimension)


def factory_of(kind: str, dimension: int, number: int) -> str:
    """FAISS's factory string for a kind of index over so many vectors."""
    # FAISS wants 39 vectors or more a list to learn it from; searching 16,384 lists by a graph is the faster way
    lists = max(1, min(int(4 * math.sqrt(number)), number // 39, MAX_LISTS))
    coarse = f"IVF{lists}" + "_HNSW32" * (lists == MAX_LISTS)
    if kind == "ivf-pq":
        if number < 256:
            raise CorpusError(f"ivf-pq learns its 256 codes from 256 passages or more, got {number}; use flat")
        codes = max(n for n in range(1, max(1, dimension // 4) + 1) if dimension % n == 0)  # bytes a vector
        return f"{coarse},PQ{codes}np"  # np: without polysemous training, which takes 20 times as long as the rest
    kinds = {"flat": "Flat", "hnsw": "HNSW32,Flat", "ivf-sq8": f"{coarse},SQ8"}
    if kind not in kinds and not kind.startswith("faiss:"):
        raise CorpusError(
            f"there is no index of kind {kind!r}; there are {', '.join(KINDS)} and faiss:<factory string>"
        )
    return kinds.get(kind) or kind.removeprefix("faiss:")


def new_index(kind: str, dimension: int, number: int) -> faiss.Index:
    """An empty index, for so many vectors; how far a search looks is set in it, and kept in its file."""
    factory = factory_of(kind, dimension, number)
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise CorpusError(f"FAISS makes no index {factory!r} of {dimension} numbers: {_reason(error)}") from None
    ivf = faiss.try_extract_index_ivf(index)
    for graph in (index, ivf and faiss.downcast_index(ivf.quantizer)):
        if isinstance(graph, faiss.IndexHNSW):
            graph.hnsw.efConstruction, graph.hnsw.efSearch = EF_CONSTRUCTION, EF_SEARCH
    if ivf:
        ivf.nprobe = min(NPROBE, ivf.nlist)
    if isinstance(index, faiss.IndexIVFPQ):
        index.pq.cp.min_points_per_centroid = 1  # FAISS warns once for each byte of the code
    return index


def _reason(error: Exception) -> str:
    """FAISS's messages name its source files first."""
    return str(error).strip().partition("\n")[0].rpartition("Error: ")[2]


def make_index(kind: str, parts: Sequence[np.ndarray]) -> faiss.Index:
    """The index of all rows of `parts`, float32 arrays (mapped ones as well) that are read one after the other."""
    number, dimension = sum(map(len, parts)), parts[0].shape[1]
    index = new_index(kind, dimension, number)
    factory = factory_of(kind, dimension, number)
    if not index.is_trained:
        ivf = faiss.try_extract_index_ivf(index)
        sample = _sample(parts, max(100_000, 40 * ivf.nlist if ivf else 0))
        # k-means over the short vectors of PQ is where the scan costs most: 129 s instead of 9
        with blas_from(4, 1), _one_thread("HNSW" in factory):
            try:
                index.train(sample)
            except RuntimeError as error:
                raise CorpusError(f"{len(sample)} passages are not enough for {factory}: {_reason(error)}") from None
    with _one_thread(isinstance(index, faiss.IndexHNSW)):
        for block in _blocks(parts):
            index.add(block)
    return index


def _blocks(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """All rows, BLOCK at a time however the parts are cut: what is added in one call matters to HNSW."""
    rest = parts[0][:0]
    for part in parts:
        rows = np.concatenate([rest, part])
        whole = len(rows) - len(rows) % BLOCK
        yield from (rows[start : start + BLOCK] for start in range(0, whole, BLOCK))
        rest = rows[whole:]
    if len(rest):
        yield rest


def _sample(parts: Sequence[np.ndarray], number: int) -> np.ndarray:
    """So many rows (all, where there are fewer), each as likely as any other, always the same, in order."""
    ends = np.cumsum([len(part) for part in parts])
    chosen = np.sort(np.random.default_rng(0).choice(ends[-1], min(number, ends[-1]), replace=False))
    rows = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return np.concatenate([part[at - end + len(part)] for part, at, end in zip(parts, rows, ends, strict=True)])


def write_index(index: faiss.Index, file: Path) -> None:
    """`faiss.write_index` does not tell when the disk is full at the very end; Python's files do."""
    with file.open("wb") as out:
        faiss.write_index(index, faiss.PyCallbackIOWriter(out.write))


def read_index(file: Path, lists: bool) -> faiss.Index:
    """Lists, or else the vectors of flat and HNSW, are mapped into memory rather than read."""
    if not lists:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    # FAISS would start 32 threads a search to read ahead, several times as long as the search where lists are cached
    faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists).prefetch_nthread = 0
    return index


def stored_vectors(file: Path, number: int) -> np.ndarray:
    """(number, dimension) float32 of a flat FAISS index or a .npy file, left on disk; raises CorpusError."""
    try:
        if file.suffix == ".npy":
            vectors, kind = np.load(file, mmap_mode="r"), "array"
        else:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
            kind, shape = type(index).__name__, (index.ntotal, index.d)
            at = max(0, file.stat().st_size - 4 * math.prod(shape))  # a flat index ends with its vectors
            vectors = np.memmap(file, np.float32, "r", at, shape) if kind == "IndexFlatIP" else np.empty(shape)
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        why = _reason(error) or error
        raise CorpusError(f"{file} is no whole FAISS index or .npy ({why}); fetch it again") from None
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != number:
        raise CorpusError(
            f"{file} is an {kind} of {len(vectors):,} vectors; an IndexFlatIP, or an array of float32, of "
            f"{number:,} is needed, one for each passage of the corpus"
        )
    return vectors


def check_agreement(vectors: np.ndarray, passages: Sequence[Passage], encode: Callable) -> None:
    """Raise CorpusError where the first passages have other vectors than `encode` gives them, or some have none."""
    few = passages[:4]
    again, stored = encode(few), vectors[: len(few)]
    if len(vectors) != len(passages) or again.shape != stored.shape or (again * stored).sum(axis=1).min() < SAME:
        raise CorpusError(
            f"passages {[passage.id for passage in few]} have other vectors than the encoder gives them: these are of "
            "another encoder, or not in the corpus's order"
        )


@dataclass(frozen=True)
class DenseRetriever:
    passages: Sequence[Passage]
    encoder: Encoder
    index: faiss.Index

    @classmethod
    def build(cls, passages: Sequence[Passage], encoder: Encoder, kind: str = "flat") -> "DenseRetriever":
        """In memory: encode and index every passage; raises CorpusError where there is none."""
        if not passages:
            raise CorpusError("nothing to index: no passages")
        return cls(passages, encoder, make_index(kind, [encode(passages, encoder)]))

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The `k` passages nearest to each query (all, where the corpus is smaller), best first.

        A blank query finds nothing, and where an approximate index looks at fewer than `k` passages there are fewer.
        Equal scores come in corpus order. A score may differ in its last digits with the size of the batch.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        hits: list[list[Hit]] = [[] for _ in queries]
        asked = [i for i, query in enumerate(queries) if query.strip()]
        if not asked:
            return hits
        names = [f"query {queries[i][:80]!r}" for i in asked]
        vectors = checked(self.encoder.encode_queries([queries[i] for i in asked]), names, self.encoder, self.index.d)
        scores, positions = self.nearest(vectors, min(k, len(self.passages)))
        for i, row_scores, row in zip(asked, scores, positions, strict=True):
            order = [j for j in np.lexsort((row, -row_scores)) if row[j] >= 0]  # FAISS fills up with -1
            hits[i] = [Hit(self.passages[row[j]], float(row_scores[j])) for j in order]
        return hits

    def nearest(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions, (queries, k), of the passages nearest to the vectors; -1 where there are none."""
        with blas_from(16, self.index.d):
            return self.index.search(vectors, k)
