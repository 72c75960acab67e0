"""A million vectors built, saved, mapped and searched in bounded memory: the quantised kinds through the real build.

    python benchmarks/million.py [--vectors 1000000] [--dimension 768] [--kinds ivf-sq8 ivf-pq]

Vectors are synthetic: clusters on the unit sphere, each spread along 32 directions and a little along all others. They
are made again wherever they are needed, block by block from the seed, and never all in memory. What is found is
compared with the exact ten nearest, which says that the index works; what it finds on text, retrieval.py measures. Each
kind is built in one process and searched in another, so that every peak is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from footprint import BATCH, Known, Watch, apart, memory, write_queries

from searchr1_lite.config import ROOT
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval.index import build_index, check_index
from searchr1_lite.types import Passage

BLOCK = 5000  # vectors made together
CLUSTERS, SPREAD_ALONG = 1000, 32
SPREAD, NOISE = 0.9, 0.25  # lengths of the two parts beside a centre of length 1
QUERIES, K = 256, 10
LIMIT = 6e9  # bytes
LIBRARIES = ["faiss-cpu", "numpy", "pyarrow"]
OUT = ROOT / "data/results/benchmarks/million.json"


# The vectors


class Synthetic:
    """Row i is the same whenever it is made; rows from `number` on are not indexed, and serve as queries."""

    def __init__(self, dimension: int, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, 0])
        self.dimension, self.seed, self.made = dimension, seed, (-1, np.empty((0, dimension), np.float32))
        self.centres = _unit(rng.standard_normal((CLUSTERS, dimension), dtype=np.float32))
        along = rng.standard_normal((SPREAD_ALONG, dimension), dtype=np.float32)
        self.along = along / np.sqrt(dimension * SPREAD_ALONG) * SPREAD

    def block(self, number: int) -> np.ndarray:
        """(BLOCK, dimension) float32, each row of length 1."""
        if self.made[0] != number:
            rng = np.random.default_rng([self.seed, 1, number])
            rows = self.centres[rng.integers(CLUSTERS, size=BLOCK)]
            rows += rng.standard_normal((BLOCK, SPREAD_ALONG), dtype=np.float32) @ self.along
            rows += rng.standard_normal(rows.shape, dtype=np.float32) * np.float32(NOISE / np.sqrt(self.dimension))
            self.made = number, _unit(rows)
        return self.made[1]

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The vectors of these rows, which are in order."""
        edges = np.searchsorted(numbers, np.arange(numbers[0] // BLOCK, numbers[-1] // BLOCK + 2) * BLOCK)
        parts = [numbers[start:stop] for start, stop in pairwise(edges) if stop > start]
        return np.concatenate([self.block(part[0] // BLOCK)[part % BLOCK] for part in parts])

    def encode(self, passages: list[Passage]) -> np.ndarray:
        return self.rows(np.array([int(passage.id) for passage in passages]))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Corpus:
    """Passages whose ids are the numbers of their rows, made as they are read."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __iter__(self):
        return (Passage(str(i), f"Passage {i}", f"The synthetic text of passage {i}.") for i in range(self.number))


def exact(vectors: Synthetic, number: int, queries: np.ndarray, k: int) -> np.ndarray:
    """(queries, k) numbers of the rows with the largest inner products, best first, a block of rows at a time."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, number, BLOCK):
        block = vectors.block(start // BLOCK)[: number - start]
        scores = np.concatenate([scores, queries @ block.T], axis=1)
        rows = np.concatenate(
            [rows, np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))], 1
        )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return rows


# Building and searching, each in a process of its own


def build(kind: str, number: int, dimension: int, folder: Path) -> dict[str, Any]:
    """Seconds, and the memory of this process."""
    vectors, before = Synthetic(dimension), memory()
    begun = time.perf_counter()
    anything = defaultdict(lambda: vectors.centres[0])  # asked once, for the dimension
    known = Known({"name": "synthetic", "weights_sha256": f"seed {vectors.seed}"}, anything, vectors.encode)
    with Watch() as watch:
        build_index(Corpus(number), folder, kind, known)
    seconds = time.perf_counter() - begun
    return {
        "seconds": {"all": seconds, "making vectors": known.seconds, "indexing": seconds - known.seconds},
        "bytes_before": before["resident"],
        "most_bytes": watch.most,
    }


def build_apart(kind: str, number: int, dimension: int, folder: Path) -> dict[str, Any]:
    answer = folder.with_suffix(".json")
    command = [sys.executable, __file__, "--build", kind, str(number), str(dimension), str(folder), str(answer)]
    subprocess.run(command, check=True)
    return json.loads(answer.read_text(encoding="utf-8"))


def measure(kind: str, number: int, dimension: int, place: Path, queries: Path, nearest: np.ndarray) -> dict[str, Any]:
    folder = place / kind.replace(":", "-").replace(",", "-")
    built = build_apart(kind, number, dimension, folder)
    manifest = check_index(folder, verify=False)
    sizes = {name: its["bytes"] for name, its in manifest["files"].items()}
    texts = sum(size for name, size in sizes.items() if name.startswith("passages"))
    print(f"{kind}: searching", flush=True)
    searched = apart([folder], queries, K)
    found = [[int(key) for key in row] for row in searched.pop("ids")]
    seconds = searched["seconds"]
    peaks = {"building": built["most_bytes"]["peak"], "searching": searched["most_bytes_of_the_process"]["peak"]}
    return {
        "factory": manifest["factory"],
        "build": built,
        "indexing_seconds": built["seconds"]["indexing"],
        "disk_bytes": {"index": sum(sizes.values()) - texts, "passages": texts},
        "search": searched,
        "queries_a_second": {
            "one_by_one": len(found) / seconds["one by one"],
            f"batches_of_{BATCH}": len(found) / seconds[f"batches of {BATCH}"],
        },
        f"recall@{K}_against_exact": fmean(
            len(set(row) & set(true)) / K for row, true in zip(found, nearest.tolist(), strict=True)
        ),
        "peak_bytes": peaks,
        "within_limit": max(peaks.values()) < LIMIT,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--kinds", nargs="+", default=["ivf-sq8", "ivf-pq"])
    parser.add_argument("--place", help="a folder on the disk to be measured; default the system's for temporary files")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--build", nargs=5, help=argparse.SUPPRESS)  # what the process of a build is told
    given = parser.parse_args(arguments)
    if given.build:
        kind, number, dimension, folder, answer = given.build
        write_json(Path(answer), build(kind, int(number), int(dimension), Path(folder)))
        return {}
    vectors = Synthetic(given.dimension)
    first = -(-given.vectors // BLOCK) * BLOCK
    queries = vectors.rows(np.arange(first, first + QUERIES))
    begun = time.perf_counter()
    nearest = exact(vectors, given.vectors, queries, K)
    print(f"exact search of {given.vectors:,} vectors: {time.perf_counter() - begun:.0f} s", flush=True)
    result = provenance(LIBRARIES) | {
        "what": "synthetic vectors, so recall is no figure for text",
        "vectors": given.vectors,
        "dimension": given.dimension,
        "queries": QUERIES,
        "limit_bytes": LIMIT,
        "exact_seconds": time.perf_counter() - begun,
        "kinds": {},
    }
    with tempfile.TemporaryDirectory(dir=given.place) as place:
        asked = write_queries(Path(place) / "queries.npz", [f"query {i}" for i in range(QUERIES)], queries)
        for kind in given.kinds:
            print(f"{kind}: building", flush=True)
            its = measure(kind, given.vectors, given.dimension, Path(place), asked, nearest)
            result["kinds"][kind] = its
            write_json(given.out, result)
            peaks = ", ".join(f"{size / 1e9:.2f} GB {what}" for what, size in its["peak_bytes"].items())
            print(f"{kind}: built in {its['build']['seconds']['all']:.0f} s, at most {peaks}; recall@{K} "
                  f"{its[f'recall@{K}_against_exact']:.3f}", flush=True)  # fmt: skip
    return result


if __name__ == "__main__":
    main()
