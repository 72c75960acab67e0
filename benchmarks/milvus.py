"""Milvus embedded (milvus-lite) beside our own indexes: the same passages found, and what 200,000 of them take.

    python benchmarks/milvus.py --corpus C --questions Q --out data/results/benchmarks/milvus.json

Real passages with MiniLM: share of flat's first ten that HNSW in Milvus finds, and of bm25s' first ten that its BM25
finds. Synthetic ones, of random words and vectors of 384 numbers made from a checksum: seconds to
load and to search, and the peak of resident memory of the process that does it all. A Milvus server was not measured.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any
from zlib import crc32

import numpy as np

from searchr1_lite.config import resolve_path
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval import milvus
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.retrieval.corpus import corpus_checksum, load_corpus
from searchr1_lite.retrieval.dense import DenseRetriever
from searchr1_lite.retrieval.encoders import Encoder, load_encoder
from searchr1_lite.tasks.questions import read_questions
from searchr1_lite.types import Retriever

K, DIMENSION, BATCH = 10, 384, 1000
LIBRARIES = ["milvus-lite", "pymilvus", "faiss-cpu", "bm25s"]


class Checksums:
    """Unit vectors from a text's checksum: a cluster's centre by its first word, and something of its own."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.centres, self.own = rng.normal(size=(500, DIMENSION)), rng.normal(size=(1 << 15, DIMENSION))

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        clusters = [crc32(text.split()[0].strip('"').encode()) % 500 for text in texts]
        vectors = self.centres[clusters] + 0.7 * self.own[[crc32(text.encode()) % (1 << 15) for text in texts]]
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_document = encode_query


def overlap(ours: Retriever, theirs: Retriever, questions: list[str]) -> float:
    """Mean share of the first K that ours finds which theirs finds among its first K."""
    pairs = zip(ours.search(questions, K), theirs.search(questions, K), strict=True)
    found = [({hit.passage.id for hit in a}, {hit.passage.id for hit in b}) for a, b in pairs]
    return round(fmean(len(a & b) / len(a) for a, b in found if a), 4)


def real(corpus: Path, questions: Path, folder: Path) -> dict[str, Any]:
    passages, asked = load_corpus(str(corpus)), [one.question for one in read_questions(questions)]
    began = time.perf_counter()
    milvus.load_corpus_into(corpus, address := f"milvus:{folder}/real.db", "minilm", BATCH)
    seconds, checksum = time.perf_counter() - began, corpus_checksum(passages)
    flat, words = DenseRetriever.build(passages, load_encoder("minilm")), BM25Retriever.build(passages)
    dense = milvus.MilvusRetriever(f"{address}?search=dense", "minilm", checksum)
    bm25 = milvus.MilvusRetriever(f"{address}?search=bm25", "minilm", checksum)
    return {
        "passages": len(passages),
        "checksum": checksum,
        "questions": len(asked),
        "seconds_to_encode_and_load": round(seconds, 1),
        f"dense_share_of_flat@{K}": overlap(flat, dense, asked),
        f"bm25_share_of_bm25s@{K}": overlap(words, bm25, asked),
    }


def synthetic(number: int, folder: Path) -> dict[str, Any]:
    """Run in a process of its own, whose peak of memory is of nothing else."""
    rng = random.Random(0)
    corpus = folder / "synthetic.jsonl"
    with corpus.open("w") as file:
        for i in range(number):
            words = " ".join(f"w{min(int(rng.paretovariate(0.9)), 50_000)}" for _ in range(60))
            file.write(json.dumps({"id": str(i), "contents": f'"c{i % 500} {i}"\n{words}'}) + "\n")
    milvus.load_encoder = lambda name: Encoder("checksums", "seed 0", Checksums())
    before, began = _peak(), time.perf_counter()
    milvus.load_corpus_into(corpus, address := f"milvus:{folder}/synthetic.db", "checksums", BATCH)
    loaded, peak = time.perf_counter() - began, _peak()
    checksum = corpus_checksum(milvus._read(corpus))
    queries = [f"c{i % 500} w{i} w{7 * i}" for i in range(200)]
    rates = {}
    for search in ("dense", "bm25", "fused"):
        retriever = milvus.MilvusRetriever(f"{address}?search={search}", "checksums", checksum)
        retriever.search(queries[:10], 3)
        began = time.perf_counter()
        assert all(retriever.search(queries, 3))
        rates[search] = round(len(queries) / (time.perf_counter() - began), 1)
    memory = {"before": before, "loading": peak, "searching": _peak()}
    return {
        "passages": number,
        "dimension": DIMENSION,
        "seconds_to_load": round(loaded, 1),
        "queries_a_second": rates,
        "peak_resident_bytes": memory,
        "disk_bytes": sum(path.stat().st_size for path in (folder / "synthetic.db").rglob("*") if path.is_file()),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=resolve_path, help="real passages; without them only synthetic ones")
    parser.add_argument("--questions", type=resolve_path)
    parser.add_argument("--synthetic", type=int, default=200_000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    record = provenance(LIBRARIES) | {"command": f"python benchmarks/milvus.py, {args.synthetic:,} synthetic passages"}
    with tempfile.TemporaryDirectory() as folder:
        if args.corpus:
            record["real"] = real(args.corpus, args.questions, Path(folder))
            write_json(args.out, record)
        command = [sys.executable, __file__, "_synthetic", str(args.synthetic), folder]
        subprocess.run(command, check=True)
        record["synthetic"] = json.loads((Path(folder) / "synthetic.json").read_text())
    write_json(args.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["_synthetic"]:
        write_json(Path(sys.argv[3]) / "synthetic.json", synthetic(int(sys.argv[2]), Path(sys.argv[3])))
    else:
        main()
