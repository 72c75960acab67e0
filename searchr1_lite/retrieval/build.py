"""Index folders: built from a corpus that does not fit in memory, gone on with after a kill, and opened.

`python -m searchr1_lite.retrieval.build --corpus C --kind K --encoder E --out FOLDER` reads the corpus in shards and
writes each one's passages and vectors to `FOLDER.building`; a shard that is there is not made again. At the end the
index is assembled, and becomes FOLDER by being renamed. Such a folder holds everything but the encoder, and is never
changed: adding passages is left out.
"""

import gzip
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, partial
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from searchr1_lite.config import resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.files import read_rows, write_json
from searchr1_lite.retrieval import encoders
from searchr1_lite.retrieval.corpus import CorpusError, corpus_checksum, passage_of
from searchr1_lite.retrieval.encoders import Encoder
from searchr1_lite.retrieval.manifest import MANIFEST, IndexMismatchError, check_index, write_manifest
from searchr1_lite.retrieval.passages import Passages, write_passages
from searchr1_lite.types import Passage

if TYPE_CHECKING:  # the two kinds are imported where they are used: BM25 needs neither torch nor faiss
    from searchr1_lite.retrieval import dense
    from searchr1_lite.retrieval.dense import DenseRetriever
    from searchr1_lite.retrieval.sparse import BM25Retriever

Say = Callable[[str], Any]
SHARD = 50_000  # passages
INDEX = "index.faiss"


class BuildError(UserError):
    """An index that cannot be built, or not gone on with; the message says why and what to do."""


class CorpusFile:
    """The passages of a .jsonl(.gz) file, read again each time; unlike `read_corpus` it remembers none of them."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = resolve_path(str(path))

    def __iter__(self) -> Iterator[Passage]:
        return (passage_of(row, where) for where, row in read_rows(self.path, CorpusError, "corpus"))

    def __len__(self) -> int:
        return self.lines_and_bytes[0]

    @cached_property
    def lines_and_bytes(self) -> tuple[int, int]:
        """Of the file unpacked; counted, which takes a few seconds a gigabyte."""
        lines, size, last = 0, 0, b"\n"
        try:
            with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file:
                while block := file.read(1 << 22):
                    lines, size, last = lines + block.count(b"\n"), size + len(block), block[-1:]
        except (OSError, EOFError, zlib.error) as error:
            raise CorpusError(f"the corpus {self.path} cannot be read: {error}") from None
        return lines + (last != b"\n"), size


def build_index(
    passages: Iterable[Passage],
    folder: str | Path,
    kind: str,
    encoder: Encoder | None = None,
    shard: int = SHARD,
    progress: Say = print,
    vectors: str | Path | None = None,
) -> None:
    """Make the index folder of a list of passages, a CorpusFile, or anything that gives passages in the same order.

    `kind`: "bm25", "flat", "hnsw", "ivf-sq8", "ivf-pq" or "faiss:<factory string>"; all but the first need an encoder.
    `vectors`: a flat FAISS index or .npy file with those of all passages, in order, to take over; of each shard a few
    passages are encoded to see that they agree. The same call goes on where a killed one stopped, and refuses a corpus
    that has changed since. Memory holds one shard and, for "hnsw" and what FAISS cannot fill from disk, the index.
    Raises BuildError, CorpusError, EncoderError.
    """
    folder = Path(folder)
    work = folder.with_name(f"{folder.name}.building")
    made = work / "index"
    if (folder / MANIFEST).is_file() and work.is_dir() and not made.exists():
        shutil.rmtree(work)  # killed after the renaming
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BuildError(f"{folder} is there already; delete it, or name another folder")
    with _writing(folder):
        made.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            _make(passages, work, kind, encoder, shard, progress, vectors and Path(vectors))
            with _writing(folder):
                os.replace(made, folder)
            shutil.rmtree(work)
    except Timeout:
        raise BuildError(f"{work}: another process is building this index; wait for it, or end it") from None


def _make(
    passages: Iterable[Passage],
    work: Path,
    kind: str,
    encoder: Encoder | None,
    shard: int,
    say: Say,
    vectors: Path | None,
) -> None:
    """The folder `work`/index, whole."""
    plan, encode, taken = {"kind": kind, "shard": shard}, None, None
    total = len(passages) if hasattr(passages, "__len__") else None
    if kind == "bm25":
        from searchr1_lite.retrieval import sparse
    else:
        from searchr1_lite.retrieval import dense

        if encoder is None:
            raise BuildError(f"an index of kind {kind!r} needs an encoder")
        dimension = dense.checked(encoder.encode_queries(["dimension"]), ["a query"], encoder, None).shape[1]
        dense.new_index(kind, dimension, total or 10**6)  # one that cannot be made is refused before the long work
        plan |= {"encoder": encoder.identity(), "dimension": dimension}
        encode = partial(dense.encode, encoder=encoder, dimension=dimension)
        if vectors:
            plan |= {"vectors_taken_from": vectors.name}
            taken = dense.stored_vectors(vectors, total)
    _check_goes_on(work, plan)
    if total:
        _check_room(passages, total, plan, work, say)
    shards = _write_shards(passages, total, work, encode, taken, shard, say)
    files = [work / f"index/passages-{i:05}.arrow" for i in range(shards)]
    for left in set((work / "index").iterdir()) - set(files):  # by a killed call
        left.unlink()
    stored = Passages(files)
    plan |= {"corpus_checksum": corpus_checksum(stored), "passages": len(stored)}
    _check_goes_on(work, plan)
    if kind == "bm25":
        with _writing(work):
            plan |= sparse.write_bm25(stored, work, work / "index", shard, say)
    else:
        parts = [work / f"vectors-{i:05}.npy" for i in range(shards)] if taken is None else [taken]
        plan |= _assemble(kind, dense.Vectors(parts), work, say)
    corpus = getattr(passages, "path", None)
    plan |= {"corpus": {"file": corpus.name, "bytes": corpus.stat().st_size} if corpus else None}
    with _writing(work):
        write_manifest(work / "index", plan, [*(dense if encode else sparse).LIBRARIES, "pyarrow"])


def open_index(
    folder: str | Path, encoder: Encoder | None = None, verify: bool = True, expected: dict[str, Any] | None = None
) -> "BM25Retriever | DenseRetriever":
    """The retriever of an index folder; its files are mapped into memory rather than read, as far as FAISS can.

    Without an `encoder` the one that the manifest names is loaded. `expected`: what the manifest must say, such as
    {"kind": "flat", "corpus_checksum": corpus_checksum(passages)}. `verify` reads every file once, to compare its
    SHA-256. Raises IndexMismatchError, also for another encoder, and EncoderError.
    """
    folder = Path(folder)
    manifest = check_index(folder, expected, verify)
    passages = Passages([folder / name for name in manifest["files"] if name.endswith(".arrow")])
    if manifest["kind"] == "bm25":
        from searchr1_lite.retrieval.sparse import BM25Retriever

        return BM25Retriever.open(folder, passages)
    from searchr1_lite.retrieval.dense import DenseRetriever, read_index

    encoder = encoder or encoders.load_encoder(manifest["encoder"]["name"])
    identity = {key: value for key, value in encoder.identity().items() if key != "name"}  # a folder can be renamed
    check_index(folder, {"encoder": identity}, verify=False)
    index = read_index(folder / INDEX, manifest["lists"])
    _check_vectors(folder, index, len(passages), manifest["dimension"])
    return DenseRetriever(passages, encoder, index)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full disk, or a folder that may not be written, becomes one clear error."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the second is FAISS's
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        raise BuildError(
            f"{folder} could not be written ({str(error).strip()}); {_gb(shutil.disk_usage(there).free)} are "
            "free there. Make room or name another folder; the same call goes on from where it was"
        ) from error


def _put(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, in the work folder, and put it there when it is whole."""
    work = next(path for path in file.parents if path.suffix == ".building")
    fresh = work / f"new-{file.name}"
    with _writing(work):
        write(fresh)
        os.replace(fresh, file)


def _check_goes_on(work: Path, plan: dict[str, Any]) -> None:
    """Raise BuildError where what is in the work folder was begun with another plan."""
    file = work / "plan.json"
    begun = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key, value in plan.items():
        if begun.get(key, value) != value:
            raise BuildError(
                f"{work} holds an unfinished index whose {key} is {begun[key]!r}, and now it is {value!r}; go on with "
                "that, or delete the folder"
            )
    with _writing(work):
        write_json(file, begun | plan)


def _check_room(passages: Iterable[Passage], total: int, plan: dict[str, Any], work: Path, say: Say) -> None:
    """Raise BuildError where the disk cannot hold what will be written."""
    text = passages.lines_and_bytes[1] if isinstance(passages, CorpusFile) else 0
    needed = 3 * text  # BM25's postings take about as much as the text, twice while it is built
    if plan["kind"] != "bm25":
        from searchr1_lite.retrieval.dense import disk_bytes

        needed = text + disk_bytes(plan["kind"], plan["dimension"], total)
        needed -= total * 4 * plan["dimension"] if "vectors_taken_from" in plan else 0
    needed -= sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    free = shutil.disk_usage(work).free
    say(f"{total:,} passages; about {_gb(max(0, needed))} of disk needed while at work, {_gb(free)} are free")
    if needed > free:
        raise BuildError(f"the index does not fit in {work.parent}; make room, or name another folder")


def _write_shards(
    passages: Iterable[Passage],
    total: int | None,
    work: Path,
    encode: Callable | None,
    taken: np.ndarray | None,
    shard: int,
    say: Say,
) -> int:
    """Write each shard's passages, vectors and, when both are whole, its mark: the passages' checksum; how many.

    Vectors that are `taken` over stay where they are.
    """
    source, done, new, begun = iter(passages), 0, 0, time.perf_counter()
    seen, marks = np.empty(0, np.uint64), set(work.glob("shard-*.json"))
    for i in count():
        if not (rows := list(islice(source, shard))):
            break
        seen = _check_ids(rows, done, seen)
        mark, its = work / f"shard-{i:05}.json", {"passages": len(rows), "checksum": corpus_checksum(rows)}
        if mark not in marks:
            if encode:
                from searchr1_lite.retrieval.dense import check_agreement, write_vectors

                if taken is None:
                    _put(work / f"vectors-{i:05}.npy", partial(write_vectors, encode(rows)))
                else:
                    check_agreement(taken[done : done + len(rows)], rows, encode)
            _put(work / f"index/passages-{i:05}.arrow", partial(write_passages, rows))
            with _writing(work):
                write_json(mark, its)
            new += len(rows)
        elif json.loads(mark.read_text(encoding="utf-8")) != its:
            raise _changed(work, f"passages {done + 1:,} to {done + len(rows):,} are others now")
        marks.discard(mark)
        done += len(rows)
        rate = new / (time.perf_counter() - begun)
        left = (
            f", {rate:,.0f} a second, {timedelta(seconds=round((total - done) / rate))} left" if total and rate else ""
        )
        say(f"passages: {done:,}" + (f" of {total:,}" if total else "") + left)
    if marks:
        raise _changed(work, f"it ends after {done:,} passages now")
    if not done:
        raise CorpusError("nothing to index: no passages")
    return i


def _changed(work: Path, how: str) -> BuildError:
    return BuildError(f"the corpus has changed since {work} was begun: {how}; delete that folder to begin again")


def _check_ids(rows: list[Passage], before: int, seen: np.ndarray) -> np.ndarray:
    """`seen` with 64 bits of each id: 8 bytes a passage; that two of 21 million are the same by chance is 1 in 80,000.

    Raises CorpusError for an id that is there twice.
    """
    keys = np.array([int.from_bytes(blake2b(row.id.encode(), digest_size=8).digest()) for row in rows], np.uint64)
    known = np.sort(np.concatenate([seen, keys]), kind="stable")
    twice = known[:-1][known[:-1] == known[1:]]
    if len(twice):
        at = int(np.flatnonzero(keys == twice[0])[-1])
        raise CorpusError(
            f"passage {before + at + 1:,} of the corpus has the id {rows[at].id!r}, which one before it has"
        )
    return known


def _assemble(kind: str, vectors: "dense.Vectors", work: Path, say: Say) -> dict[str, Any]:
    """Write the index of all vectors to `work`/index; what the manifest says of it."""
    import faiss

    from searchr1_lite.retrieval import dense

    number, made, trained = len(vectors), work / "index" / INDEX, work / "trained.faiss"
    factory = dense.factory_of(kind, vectors.dimension, number)
    index = dense.new_index(kind, vectors.dimension, number)
    if not index.is_trained:
        if not trained.is_file():
            say(f"learning {factory} from a sample")
            dense.train(index, vectors, factory)
            _put(trained, partial(dense.write_faiss, index))
        index = faiss.read_index(str(trained))
    lists = dense.has_lists(index)
    if isinstance(index, faiss.IndexFlat):
        _put(made, partial(dense.write_flat, index, vectors))
    elif lists:
        parts = []
        for i, block in enumerate(vectors.blocks()):
            parts.append(work / f"lists-{i:05}.faiss")
            if not parts[-1].is_file():
                part, start = faiss.read_index(str(trained)), i * dense.BLOCK
                part.add_with_ids(block, np.arange(start, start + len(block)))
                _put(parts[-1], partial(dense.write_faiss, part))
                say(f"{start + len(block):,} of {number:,} vectors in their lists")
        _put(made, partial(dense.write_lists, index, parts, number))
    else:
        say(f"adding {number:,} vectors")
        dense.add(index, vectors)
        _put(made, partial(dense.write_faiss, index))
    _check_vectors(work, dense.read_index(made, lists), number, vectors.dimension)
    return {"factory": factory, "metric": "inner product", "lists": lists, "search": dense.settings_of(index)}


def _check_vectors(folder: Path, index: Any, number: int, dimension: int) -> None:
    if (index.ntotal, index.d) != (number, dimension):
        raise IndexMismatchError(
            f"{folder}: {index.ntotal} vectors of {index.d} numbers, but {number} passages and {dimension} numbers; "
            "build the index again"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
