"""Dense search: passages whose normalised vectors have the largest inner product with the query's, found by FAISS.

The kinds and their figures on 15,011 real passages: data/results/benchmarks/retrieval.json. GPU search is left out.
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
import torch

from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.encoders import Encoder, EncoderError
from searchr1_lite.types import Hit, Passage

LIBRARIES = ["faiss-cpu", "sentence-transformers", "numpy"]
KINDS = ("flat", "hnsw", "ivf-sq8", "ivf-pq")  # and "faiss:<factory string>"
BLOCK = 65_536  # vectors added to an index at once
EF_CONSTRUCTION, EF_SEARCH = 100, 64  # recall@3 0.995 of flat's on 15,011 passages of HotpotQA with MiniLM's vectors
NPROBE = 64  # lists looked into
MAX_LISTS = 16_384
FEW = 16  # passages; of more, comparing again takes longer than comparing all at once
LEAST_ROUNDED = 1 << 12  # passages; fewer take FAISS no time
MOST_ROUNDED = 1 << 29  # numbers of a flat index of which a copy in bfloat16 is kept: 1 GB
FEW_QUERIES = 32  # what oneDNN lays the copy out for
SAME = 0.95  # cosine of a passage with itself, encoded in fp16 and in fp32, is above; that of two passages is below
EMPTY_LISTS = 32  # bytes at the end of FAISS's file: "ilar", lists, bytes a code, and "sprs" with none


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


@contextmanager
def _one_thread(needed: bool) -> Iterator[None]:
    """HNSW's graph depends on the order in which threads put vectors in; with one thread it is always the same."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if needed else before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class Vectors:
    """Rows of float32 in .npy files (or arrays), one after the other; read as they are asked for."""

    def __init__(self, parts: Sequence[Path | np.ndarray]) -> None:
        self.parts = parts
        shapes = [part.shape for part in self.each()]
        self.starts = np.cumsum([0, *(rows for rows, _ in shapes)])
        self.dimension = shapes[0][1]

    def each(self) -> Iterator[np.ndarray]:
        """The parts; a file is mapped, and let go of with the next."""
        return (np.load(part, mmap_mode="r") if isinstance(part, Path) else part for part in self.parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows, BLOCK at a time however the parts are cut: what is added in one call matters to HNSW."""
        held = np.empty((0, self.dimension), np.float32)
        for part in self.each():
            while len(held) + len(part) >= BLOCK:
                taken = BLOCK - len(held)
                yield np.concatenate([held, part[:taken]])
                held, part = held[:0], part[taken:]
            held = np.concatenate([held, part])
        if len(held):
            yield held

    def sample(self, number: int) -> np.ndarray:
        """So many rows (all, where there are fewer), each as likely as any other, always the same."""
        chosen = np.sort(np.random.default_rng(0).choice(len(self), min(number, len(self)), replace=False))
        rows = np.split(chosen, np.searchsorted(chosen, self.starts[1:-1]))
        return np.concatenate(
            [part[its - start] for part, its, start in zip(self.each(), rows, self.starts[:-1], strict=True)]
        )


def checked(vectors: np.ndarray, names: Sequence[str], encoder: Encoder, dimension: int | None) -> np.ndarray:
    """The vectors, if there is a finite one of `dimension` numbers for each name; raises EncoderError otherwise."""
    wanted = (len(names), dimension or vectors.shape[-1])
    if vectors.shape != wanted or vectors.dtype != np.float32:
        raise EncoderError(
            f"the encoder {encoder.name!r} gives {vectors.dtype} of shape {vectors.shape} for {names[0]} and on, "
            f"float32 of {wanted} is needed"
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
        raise ValueError(f"there is no index of kind {kind!r}; there are {', '.join(KINDS)} and faiss:<factory string>")
    return kinds.get(kind) or kind.removeprefix("faiss:")


def new_index(kind: str, dimension: int, number: int) -> faiss.Index:
    """An empty index, for so many vectors; what a search looks at is set in it, and kept in its file."""
    factory = factory_of(kind, dimension, number)
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS makes no index {factory!r} of {dimension} numbers: {reason(error)}") from None
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction, index.hnsw.efSearch = EF_CONSTRUCTION, EF_SEARCH
    if ivf := faiss.try_extract_index_ivf(index):
        ivf.nprobe = min(NPROBE, ivf.nlist)
        graph = faiss.downcast_index(ivf.quantizer)
        if isinstance(graph, faiss.IndexHNSW):
            graph.hnsw.efConstruction, graph.hnsw.efSearch = EF_CONSTRUCTION, EF_SEARCH
        if isinstance(index, faiss.IndexIVFPQ):
            index.pq.cp.min_points_per_centroid = 1  # FAISS warns once for each byte of the code
    return index


def reason(error: Exception) -> str:
    """FAISS's messages name its source files first."""
    return str(error).strip().partition("\n")[0].rpartition("Error: ")[2]


def train(index: faiss.Index, vectors: Vectors, factory: str) -> None:
    """Learn lists and codes from a sample: 40 vectors a list, at least 100,000."""
    if index.is_trained:
        return
    ivf = faiss.try_extract_index_ivf(index)
    sample = vectors.sample(max(100_000, 40 * ivf.nlist if ivf else 0))
    # k-means over the short vectors of PQ is where the scan costs most: 129 s instead of 9
    with blas_from_four_queries(1), _one_thread("HNSW" in factory):
        try:
            index.train(sample)
        except RuntimeError as error:
            raise CorpusError(f"{len(sample)} passages are not enough for {factory}: {reason(error)}") from None


def settings_of(index: faiss.Index) -> dict[str, int]:
    """How far a search looks."""
    ivf = faiss.try_extract_index_ivf(index)
    return {"nprobe": ivf.nprobe} if ivf else {"efSearch": index.hnsw.efSearch} if hasattr(index, "hnsw") else {}


def disk_bytes(kind: str, dimension: int, number: int) -> int:
    """About what vectors and index take while they are made: of lists of codes there are two at the end."""
    index = new_index(kind, dimension, number)
    each = 2 * (faiss.extract_index_ivf(index).code_size + 8) if has_lists(index) else 4 * dimension + 300
    return number * (4 * dimension + each)


def add(index: faiss.Index, vectors: Vectors) -> None:
    with _one_thread(isinstance(index, faiss.IndexHNSW)):
        for block in vectors.blocks():
            index.add(block)


def has_lists(index: faiss.Index) -> bool:
    """Whether the index is lists of codes, which `write_lists` writes and FAISS maps into memory."""
    outer = isinstance(index, (faiss.IndexIVF, faiss.IndexPreTransform))
    return outer and _empty_file(index)[-EMPTY_LISTS:].startswith(b"ilar")


def _empty_file(index: faiss.Index) -> bytes:
    """The file of an index that nothing was added to."""
    return faiss.serialize_index(index).tobytes()


def write_vectors(vectors: np.ndarray, file: Path) -> None:
    """A .npy file. Opened for writing alone, `np.save` (2.4) would not notice that the disk is full at its end."""
    with file.open("w+b") as out:
        np.save(out, vectors)


def stored_vectors(file: Path, number: int | None) -> np.ndarray:
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
        raise CorpusError(
            f"{file} is no whole FAISS index or .npy ({reason(error) or error}); fetch it again"
        ) from None
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != (number or len(vectors)):
        raise CorpusError(
            f"{file} is an {kind} of {len(vectors):,} vectors; an IndexFlatIP, or an array of float32, of "
            f"{number or len(vectors):,} is needed, one for each passage of the corpus"
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


def write_flat(index: faiss.Index, vectors: Vectors, file: Path) -> None:
    """FAISS's file of a flat index, without having it in memory: a header, the number of floats, and the floats."""
    head = bytearray(_empty_file(index))
    struct.pack_into("<q", head, 8, len(vectors))
    struct.pack_into("<q", head, len(head) - 8, len(vectors) * vectors.dimension)
    with file.open("wb") as out:
        out.write(head)
        for part in vectors.each():
            out.write(np.ascontiguousarray(part).data)


def write_lists(index: faiss.Index, parts: Sequence[Path], number: int, file: Path) -> None:
    """FAISS's file of the trained `index` with the lists of all `parts` (which hold `number` vectors), list by list.

    FAISS's merge_ondisk would write into mapped memory, where a full disk kills the process without a word.
    """
    filled = [faiss.read_index(str(part), faiss.IO_FLAG_MMAP) for part in parts]
    lists = [faiss.extract_index_ivf(part).invlists for part in filled]
    ivf = faiss.extract_index_ivf(index)
    index.ntotal = ivf.ntotal = number
    sizes = [sum(its.list_size(i) for its in lists) for i in range(ivf.nlist)]
    with file.open("wb") as out:
        out.write(_empty_file(index)[:-12] + b"full" + struct.pack(f"<{1 + ivf.nlist}Q", ivf.nlist, *sizes))
        for i in range(ivf.nlist):
            there = [(its, its.list_size(i)) for its in lists if its.list_size(i)]
            for its, size in there:
                out.write(faiss.rev_swig_ptr(its.get_codes(i), size * ivf.code_size).data)
            for its, size in there:
                out.write(faiss.rev_swig_ptr(its.get_ids(i), size).data)


def write_faiss(index: faiss.Index, file: Path) -> None:
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


class RoughThenExact:
    """Exact search of a flat index for several queries at once, where the processor multiplies bfloat16.

    Scores of vectors rounded to bfloat16 are off by at most ERROR times both lengths: of products whose two factors
    are rounded by 2^-9, of sums in float32 (Cauchy-Schwarz), and of a result that is rounded once more. What is not
    within twice that of the k-th best cannot be among the best `k`; the few others are compared again in float32.
    """

    ERROR = 3.2 * 2**-9  # three roundings, and room for the sum's
    GROUPS = 128  # of passages; the best of each are a quick lower bound of the k-th best
    MANY = 256  # candidates a query; with more, as random vectors have, FAISS is as fast

    def __init__(self, index: faiss.IndexFlat) -> None:
        self.index = index
        self.vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
        self.longest = float(np.sqrt(np.einsum("ij,ij->i", self.vectors, self.vectors).max()))
        # laid out once for few rows times a large matrix (oneDNN): twice as fast again
        rounded = torch.from_numpy(self.vectors).bfloat16()
        self.rounded = torch.ops.mkldnn._reorder_linear_weight(rounded, FEW_QUERIES)

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (queries, k) as FAISS gives them, k <= GROUPS; equal scores in corpus order."""
        asked = torch.from_numpy(queries).bfloat16()
        rough = torch.ops.mkldnn._linear_pointwise(asked, self.rounded, None, "none", [], "")
        rough = rough.view(torch.int16).numpy()  # bits of positive floats are in the order of the floats
        least = self._least(rough, queries, k)
        near = np.flatnonzero(rough >= least[:, None])
        if len(near) > self.MANY * len(queries) or (least <= 0).any():
            with blas_from_four_queries(self.index.d):
                return self.index.search(queries, k)
        query, position = np.divmod(near, self.index.ntotal)
        scores = np.einsum("ij,ij->i", self.vectors[position], queries[query])
        order = np.lexsort((position, -scores, query))
        order = order[np.searchsorted(query, np.arange(len(queries)))[:, None] + np.arange(k)]
        return scores[order], position[order]

    def _least(self, rough: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
        """(queries,) bits of the rough score that a passage among the best `k` has at least."""
        whole = rough.shape[1] // self.GROUPS * self.GROUPS
        best = rough[:, :whole].reshape(len(rough), -1, self.GROUPS).max(axis=1)
        kth = np.partition(best, self.GROUPS - k, axis=1)[:, self.GROUPS - k].astype(np.int32) << 16
        lengths = np.sqrt(np.einsum("ij,ij->i", queries, queries))
        least = kth.view(np.float32) - np.float32(2 * self.ERROR * self.longest) * lengths
        return (least.view(np.int32) >> 16).astype(np.int16)  # rounded down, where it is positive


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
        vectors = Vectors([encode(passages, encoder)])
        index = new_index(kind, vectors.dimension, len(vectors))
        factory = factory_of(kind, vectors.dimension, len(vectors))
        train(index, vectors, factory)
        add(index, vectors)
        return cls(passages, encoder, index)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The `k` passages nearest to each query (all, where the corpus is smaller), best first.

        A blank query finds nothing, and where an approximate index looks at fewer than `k` passages there are fewer.
        Equal scores come in corpus order. A score may differ in its last digits with the size of the batch.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        asked = [i for i, query in enumerate(queries) if query.strip()]
        found: list[list[Hit]] = [[] for _ in queries]
        if not asked:
            return found
        texts = [queries[i] for i in asked]
        vectors = checked(
            self.encoder.encode_queries(texts), [f"query {text[:80]!r}" for text in texts], self.encoder, self.index.d
        )
        scores, positions = self.nearest(vectors, min(k, len(self.passages)))
        for i, row_scores, row in zip(asked, scores, positions, strict=True):
            order = [j for j in np.lexsort((row, -row_scores)) if row[j] >= 0]  # FAISS fills up with -1
            found[i] = [Hit(self.passages[row[j]], float(row_scores[j])) for j in order]
        return found

    def nearest(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions, (queries, k), of the passages nearest to the queries' vectors; -1 where there are none.

        By the fastest of three ways: for one to three queries FAISS's scan, for more bfloat16 or a matrix product.
        """
        if len(vectors) >= 4 and k <= FEW and self._rough:
            return self._rough(vectors, k)
        with blas_from_four_queries(self.index.d):
            return self.index.search(vectors, k)

    @cached_property
    def _rough(self) -> RoughThenExact | None:
        flat = isinstance(self.index, faiss.IndexFlat) and self.index.metric_type == faiss.METRIC_INNER_PRODUCT
        fits = self.index.ntotal >= LEAST_ROUNDED and self.index.ntotal * self.index.d <= MOST_ROUNDED
        return RoughThenExact(self.index) if flat and fits and torch.cpu._is_avx512_bf16_supported() else None
