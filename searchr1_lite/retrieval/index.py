"""Index folders, and the retriever that a profile names: BM25 or vectors over one corpus, built once and mapped.

A folder has the passages (Arrow), the index in its library's own file or files, and manifest.json: kind, corpus and
encoder, versions, and the SHA-256 of every file. It is made beside its place and put there when it is whole. Vectors
are encoded and saved shard by shard, so that a build that was killed resumes. Left out: adding passages to an index,
and corpora whose index does not fit into memory while it is made, which are for Milvus (docs/scale.md).
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from searchr1_lite.config import PLUGIN, ROOT, ConfigError, Profile, resolve_path, retriever_parts
from searchr1_lite.errors import UserError
from searchr1_lite.files import write_json
from searchr1_lite.plugins import make_retriever
from searchr1_lite.retrieval import bm25
from searchr1_lite.retrieval.controls import Empty, Oracle, Random
from searchr1_lite.retrieval.corpus import CorpusError, corpus_checksum, in_shards, load_corpus, read_corpus
from searchr1_lite.types import Passage, Retriever

FORMAT = 3
INDEX, MANIFEST, PASSAGES = "index.faiss", "manifest.json", "passages.arrow"
SHARD = 50_000  # passages encoded and saved at once
AGAIN = "delete the folder and build the index again, or name another folder"
SCHEMA = pa.schema([(name, pa.large_utf8()) for name in ("id", "title", "text")] + [("quoted", pa.bool_())])


class IndexMismatchError(UserError):
    """An index that is not of this corpus, encoder or kind, is not whole, or cannot be built; the message says why."""


class Passages(Sequence[Passage]):
    """The passages of an Arrow file, mapped into memory; it stands wherever a list of passages does."""

    def __init__(self, file: Path) -> None:
        self.table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, position: int | slice) -> Passage | list[Passage]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"passage {position} of {len(self)}")
        return Passage(*(column[int(position)].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[Passage]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from map(Passage, *(column.to_pylist() for column in batch.columns))


def write_passages(passages: Iterable[Passage], file: Path) -> None:
    """One Arrow file, written as the passages come; CorpusError where there are none or an id comes twice."""
    seen: set[str] = set()
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, SCHEMA) as writer:
        for rows in in_shards(passages, 10_000):
            for row in rows:
                if row.id in seen:
                    raise CorpusError(f"passage {len(seen) + 1:,} of the corpus has the id {row.id!r}, used before")
                seen.add(row.id)
            columns = [[getattr(row, name) for row in rows] for name in SCHEMA.names]
            writer.write(pa.record_batch(columns, schema=SCHEMA))
    if not seen:
        raise CorpusError("nothing to index: no passages")


def build_index(
    passages: Iterable[Passage],
    folder: str | Path,
    kind: str,
    encoder: Any = None,
    shard: int = SHARD,
    vectors: str | Path | None = None,
) -> None:
    """Make the index folder of passages; the same call resumes a build that was killed.

    `kind`: "bm25", "flat", "hnsw", "ivf-sq8", "ivf-pq" or "faiss:<factory string>"; all but the first need an encoder.
    `vectors`: a flat FAISS index or .npy file with those of all passages, in order, to take over; of each shard a few
    passages are encoded to see that they agree. Memory holds one shard and the index.
    Raises IndexMismatchError, CorpusError, EncoderError.
    """
    folder = Path(folder)
    work = folder.with_name(f"{folder.name}.building")
    if (folder / MANIFEST).is_file() and work.is_dir():  # killed between its last two steps
        return shutil.rmtree(work)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise IndexMismatchError(f"{folder} is there already; delete it, or name another folder")
    made = work / "index"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            shutil.rmtree(made, ignore_errors=True)  # of a killed build; what took long is beside it
            made.mkdir()
            write_passages(passages, made / PASSAGES)
            stored = Passages(made / PASSAGES)
            plan = {"kind": kind, "corpus_checksum": corpus_checksum(stored), "passages": len(stored)}
            if kind == "bm25":
                bm25.BM25Retriever.build(stored).index.save(made, show_progress=False)
                plan, libraries = plan | bm25.SETTINGS, bm25.LIBRARIES
            else:
                plan, libraries = _build_dense(stored, work, plan, encoder, shard, vectors and Path(vectors))
            _write_manifest(made, plan, [*libraries, "pyarrow"])
            os.replace(made, folder)
        shutil.rmtree(work)
    except Timeout:
        raise IndexMismatchError(f"{work}: another process builds this index; wait for it, or end it") from None


def _build_dense(
    passages: Passages, work: Path, plan: dict[str, Any], encoder: Any, shard: int, taken: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Encode what is missing, shard by shard, and write the index; what the manifest says of it, and the libraries."""
    import numpy as np
    from tqdm import tqdm

    from searchr1_lite.retrieval import dense

    if encoder is None:
        raise IndexMismatchError(f"an index of kind {plan['kind']!r} needs an encoder")
    dimension = dense.checked(encoder.encode_queries(["dimension"]), ["a query"], encoder, None).shape[1]
    dense.new_index(plan["kind"], dimension, len(passages))  # one that cannot be made is refused before the long work
    plan |= {"encoder": encoder.identity(), "dimension": dimension, "shard": shard}
    plan |= {"vectors_taken_from": taken.name} if taken else {}
    _check_resumes(work / "plan.json", plan)
    stored, parts = taken and dense.stored_vectors(taken, len(passages)), []
    for start in tqdm(range(0, len(passages), shard), unit=" shards", disable=len(passages) <= shard):
        rows = passages[start : start + shard]
        file = work / f"vectors-{start:010}.npy"
        if stored is not None:
            dense.check_agreement(stored[start : start + shard], rows, lambda few: dense.encode(few, encoder))
            parts.append(stored[start : start + shard])
            continue
        if not file.is_file():
            with file.with_suffix(".new").open("w+b") as out:  # for writing alone, np.save would not notice a full disk
                np.save(out, dense.encode(rows, encoder, dimension))
            os.replace(file.with_suffix(".new"), file)
        parts.append(np.load(file, mmap_mode="r"))
    index = dense.make_index(plan["kind"], parts)
    dense.write_index(index, work / "index" / INDEX)
    factory = dense.factory_of(plan["kind"], dimension, len(passages))
    return plan | {"factory": factory, "metric": "inner product", "lists": "IVF" in factory}, dense.LIBRARIES


def _check_resumes(file: Path, plan: dict[str, Any]) -> None:
    begun = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else plan
    for key in plan.keys() | begun.keys():
        if begun.get(key) != plan.get(key):
            raise IndexMismatchError(
                f"{file.parent} holds an unfinished index whose {key} is {begun.get(key)!r}, and now it is "
                f"{plan.get(key)!r}; resume with that, or delete the folder"
            )
    write_json(file, plan)


def build_index_folder(corpus: Path, out: Path, kind: str, encoder: str, shard: int, vectors: Path | None) -> None:
    """`build_index` from names: `searchr1 index build`."""
    model = None
    if kind != "bm25":
        from searchr1_lite.retrieval.encoders import load_encoder

        model = load_encoder(encoder)
    build_index(read_corpus(resolve_path(str(corpus))), out, kind, model, shard, vectors)


def _write_manifest(folder: Path, manifest: dict[str, Any], libraries: list[str]) -> None:
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT} | manifest | {"files": files, "versions": {name: version(name) for name in libraries}}
    write_json(folder / MANIFEST, manifest | {"manifest_sha256": _digest(manifest)})


def check_index(folder: Path, expected: dict[str, Any] | None = None, verify: bool = True) -> dict[str, Any]:
    """The manifest of an index folder, after checking it and its files.

    `expected` is what the manifest must say; of a dict (the encoder) what is expected, not more. Without `verify` the
    files' sizes are checked and not their SHA-256, which takes as long as reading them. Raises IndexMismatchError that
    names the first difference.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise IndexMismatchError(f"no index in {folder}: {MANIFEST} is missing; build one and save it there")
    try:
        manifest = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise IndexMismatchError(f"{file} is not a JSON object ({error}); {AGAIN}") from None
    for key, value in _flat({"format": FORMAT} | (expected or {})).items():
        if (stated := _flat(manifest).get(key)) != value:
            words = f"its {key} is {stated!r}, but {value!r} is needed"
            raise IndexMismatchError(f"the index in {folder} does not belong here: {words}; {AGAIN}")
    if manifest.pop("manifest_sha256", None) != _digest(manifest):
        raise IndexMismatchError(f"{file} was altered since it was written; {AGAIN}")
    for name, stated in manifest["files"].items():
        path = Path(folder) / name
        size = path.stat().st_size if path.is_file() else None
        if size != stated["bytes"] or (verify and _sha256(path) != stated["sha256"]):
            state = "missing" if size is None else f"{size} bytes instead of {stated['bytes']}"
            state = state if size != stated["bytes"] else "altered: its sha256 is not the one of when it was written"
            raise IndexMismatchError(f"the index in {folder} is not whole: {name} is {state}; {AGAIN}")
    return manifest


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"encoder name": ...} of {"encoder": {"name": ...}}."""
    inner = [(f"{key} {name}", v) for key, d in values.items() if isinstance(d, dict) for name, v in d.items()]
    return dict(inner) | {key: value for key, value in values.items() if not isinstance(value, dict)}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_index(
    folder: str | Path, encoder: Any = None, verify: bool = True, expected: dict[str, Any] | None = None
) -> Retriever:
    """The BM25Retriever or DenseRetriever of an index folder; its files are mapped into memory rather than read.

    Without an `encoder` the one that the manifest names is loaded. `expected`: what the manifest must say, such as
    {"kind": "flat", "corpus_checksum": corpus_checksum(passages)}. `verify` reads every file once, to compare its
    SHA-256. Raises IndexMismatchError, also for another encoder, and EncoderError.
    """
    folder = Path(folder)
    manifest = check_index(folder, expected, verify)
    passages = Passages(folder / PASSAGES)
    if manifest["kind"] == "bm25":
        return bm25.BM25Retriever.open(folder, passages)
    from searchr1_lite.retrieval import dense, encoders

    encoder = encoder or encoders.load_encoder(manifest["encoder"]["name"])
    identity = {key: value for key, value in encoder.identity().items() if key != "name"}  # a folder can be renamed
    check_index(folder, {"encoder": identity}, verify=False)
    return dense.DenseRetriever(passages, encoder, dense.read_index(folder / INDEX, manifest["lists"]))


def load_retriever(
    profile: Profile, passages: Sequence[Passage] | None = None, cache_dir: str | Path | None = None
) -> Retriever:
    """The retriever that `profile.retriever` names (config.py has the grammar), reranked if `profile.reranker` says so.

    `passages` are those of `profile.corpus`, read here if they are needed and not given. An index that has to be built
    goes into `cache_dir`, or data/cache/indexes/<kind>-<first 12 digits of the corpus checksum>; each print says
    which. One that is there and belongs to another corpus or encoder raises IndexMismatchError: it is never used, and
    never overwritten unasked.
    """
    retriever = _named(profile, passages, cache_dir)
    if profile.reranker:
        with _optional("dev"):
            from searchr1_lite.retrieval.rerank import Reranked, load_reranker

            retriever = Reranked(retriever, load_reranker(profile.reranker, _device(profile)))
    return retriever


@contextmanager
def _optional(extra: str) -> Iterator[None]:
    """What a setting asks for and is not installed is a ConfigError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'searchr1_lite[{extra}]'") from error


def _named(profile: Profile, passages: Sequence[Passage] | None, cache_dir: str | Path | None) -> Retriever:
    name = profile.retriever
    if name == "empty":
        return Empty()
    if name.startswith("http"):
        with _optional("service"):
            from searchr1_lite.retrieval.remote import TOKEN, RemoteRetriever

            return RemoteRetriever(name, token=os.environ.get(TOKEN))
    parts = retriever_parts(name)
    if passages is None and not all(part.startswith("index:") or PLUGIN.fullmatch(part) for part in parts):
        passages = load_corpus(profile.corpus)
    if name.startswith("milvus:"):
        with _optional("milvus"):
            from searchr1_lite.retrieval.milvus import MilvusRetriever

            return MilvusRetriever(name, profile.encoder, corpus_checksum(passages))
    if name == "random":
        return Random(passages, profile.seed)
    if name == "oracle":
        return Oracle(_index(profile, "bm25", passages, cache_dir), passages)
    if len(parts) == 1:
        return _index(profile, name, passages, cache_dir)
    from searchr1_lite.retrieval.rerank import Hybrid

    folders = [cache_dir and Path(cache_dir) / _as_name(part) for part in parts]
    return Hybrid([_index(profile, part, passages, folder) for part, folder in zip(parts, folders, strict=True)])


def _index(profile: Profile, kind: str, passages: Sequence[Passage] | None, cache_dir: str | Path | None) -> Retriever:
    """Opened from its folder, after having been built there if need be; one process builds, others wait for it."""
    if PLUGIN.fullmatch(kind):
        return make_retriever(kind, profile)
    began, verb = time.perf_counter(), "opened"
    if kind.startswith("index:"):
        folder = resolve_path(kind.removeprefix("index:"))
        retriever = open_index(folder)
    else:
        encoder = None
        if kind != "bm25":
            from searchr1_lite.retrieval.encoders import load_encoder

            encoder = load_encoder(profile.encoder, _device(profile))
        folder = (
            Path(cache_dir) if cache_dir else default_folder(profile.model_copy(update={"retriever": kind}), passages)
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        expected = {"kind": kind, "corpus_checksum": corpus_checksum(passages)}
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / MANIFEST).is_file():
                verb = "built"
                build_index(passages, folder, kind, encoder)
        # the passages are in memory already, where reading them is faster than from the index's file
        retriever = replace(open_index(folder, encoder, expected=expected), passages=passages)
    where = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder
    seconds = time.perf_counter() - began
    print(f"{kind} index of {len(retriever.passages):,} passages {verb} in {seconds:.1f} s: {where}")
    return retriever


def default_folder(profile: Profile, passages: Sequence[Passage]) -> Path:
    """Where the index that a profile names by its kind is kept."""
    kind = profile.retriever
    names = [kind, *([profile.encoder] if kind != "bm25" else []), corpus_checksum(passages)[:12], f"format{FORMAT}"]
    return ROOT / "data/cache/indexes" / "-".join(map(_as_name, names))


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _device(profile: Profile) -> str | None:
    return None if profile.device == "auto" else profile.device
