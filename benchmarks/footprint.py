"""What an index folder takes of memory when it is opened and searched, and how fast it is, in a process of its own.

Run by retrieval.py and million.py, as `python benchmarks/footprint.py QUERIES.npz K FOLDER [FOLDER ...]`; several
folders are searched together (hybrid). Encoders are left out of it: the queries come as texts with their vectors.

Anonymous memory is what the process must have. File-backed memory is pages of mapped files that it has touched; they
are also the system's page cache, and are dropped first when memory is short.
"""

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from searchr1_lite.types import Passage, Retriever

BATCH = 64  # queries
STATUS = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file_backed"}


class Known:
    """An encoder that looks up what another has encoded, so that what is timed is the index alone."""

    def __init__(
        self,
        identity: dict[str, Any],
        queries: dict[str, np.ndarray],
        passages: Callable[[list[Passage]], np.ndarray] | None = None,
    ) -> None:
        self._identity, self.queries, self.passages = identity, queries, passages
        self.name, self.seconds = identity.get("name"), 0.0

    def identity(self) -> dict[str, Any]:
        return self._identity

    def encode_queries(self, queries: list[str]) -> np.ndarray:
        return np.stack([self.queries[query] for query in queries])

    def encode_passages(self, passages: list[Passage]) -> np.ndarray:
        """Rows for these passages; the seconds that this takes are added up in `seconds`."""
        start = time.perf_counter()
        vectors = np.ascontiguousarray(self.passages(passages), dtype=np.float32)
        self.seconds += time.perf_counter() - start
        return vectors


def memory() -> dict[str, int]:
    """Bytes of this process: its peak so far, and what is resident now, anonymous and file-backed."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return {name: 1024 * int(re.search(rf"^{key}:\s+(\d+) kB$", text, re.M)[1]) for key, name in STATUS.items()}


class Watch:
    """The most memory that the process had while the `with` block ran, looked at every 20 ms.

    `ru_maxrss` is noted too; it begins with what the process that started this one had.
    """

    def __enter__(self) -> "Watch":
        self.most, self.done = memory(), threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self._note()
        self.most["ru_maxrss"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _look(self) -> None:
        while not self.done.wait(0.02):
            self._note()

    def _note(self) -> None:
        self.most = {name: max(size, self.most[name]) for name, size in memory().items()}


def in_batches(retriever: Retriever, texts: Sequence[str], k: int, size: int) -> list:
    return [hits for i in range(0, len(texts), size) for hits in retriever.search(list(texts[i : i + size]), k)]


def encoder_of(folder: Path, queries: dict[str, np.ndarray]) -> Known:
    """What stands in for the encoder that the index in `folder` was built with."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return Known(manifest.get("encoder") or {}, queries)


def open_retriever(folders: Sequence[Path], queries: dict[str, np.ndarray]) -> Retriever:
    """The index of one folder; of several, their hybrid."""
    from searchr1_lite.retrieval.index import open_index
    from searchr1_lite.retrieval.rerank import Hybrid

    opened = [open_index(folder, encoder_of(folder, queries)) for folder in folders]
    return opened[0] if len(opened) == 1 else Hybrid(opened)


def measure(folders: Sequence[Path], texts: list[str], vectors: np.ndarray, k: int) -> dict[str, Any]:
    """Memory before, opened and searched, seconds, and the ids of what was found."""
    _warm_up(vectors)
    queries = dict(zip(texts, vectors, strict=True))
    before, times = memory(), [time.perf_counter()]
    with Watch() as watch:
        retriever = open_retriever(folders, queries)
        opened = memory()
        times.append(time.perf_counter())
        found = in_batches(retriever, texts, k, BATCH)
        times.append(time.perf_counter())
        in_batches(retriever, texts, k, 1)
        times.append(time.perf_counter())
        searched = memory()
    seconds = np.diff(times).tolist()
    kinds = ("resident", "anonymous", "file_backed")
    return {
        "bytes": {kind: searched[kind] - before[kind] for kind in kinds},
        "bytes_opened": {kind: opened[kind] - before[kind] for kind in kinds},
        "bytes_before": before["resident"],
        "most_bytes_of_the_process": watch.most,
        "seconds": dict(zip(("open", f"batches of {BATCH}", "one by one"), seconds, strict=True)),
        "queries": len(texts),
        "ids": [[hit.passage.id for hit in hits] for hits in found],
    }


def _warm_up(vectors: np.ndarray) -> None:
    """Libraries load, and take their buffers, before memory is first looked at."""
    import faiss

    from searchr1_lite.retrieval import bm25, dense, index, rerank  # noqa: F401

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors[:BATCH])
    with dense.blas_from(4, flat.d):
        flat.search(np.repeat(vectors[:1], BATCH, axis=0), 1)
    bm25.tokenize(["warm up"])


def apart(folders: Sequence[Path], queries: Path, k: int) -> dict[str, Any]:
    """`measure` in a fresh process, whose memory is that of this index and of nothing that came before."""
    command = [sys.executable, __file__, str(queries), str(k), *map(str, folders)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def write_queries(path: Path, texts: list[str], vectors: np.ndarray) -> Path:
    np.savez(path, texts=np.array(texts), vectors=vectors)
    return path


if __name__ == "__main__":
    asked = np.load(sys.argv[1])
    paths = [Path(name) for name in sys.argv[3:]]
    print(json.dumps(measure(paths, asked["texts"].tolist(), asked["vectors"], int(sys.argv[2]))))
