"""Every kind of index on real passages: speed, memory, disk, recall; and what that comes to for all of wiki-18.

    python benchmarks/retrieval.py --corpus corpus.jsonl.gz --questions questions.jsonl.gz [--vectors passages.npy]

First two comparisons with a ratio for each round: flat search by matrix product against FAISS's own choice, and our
BM25 against rank_bm25 and bm25s. Then each kind is built, and searched in a process of its own (memory) and in rounds
that take turns (speed). Last, sizes and times are projected by projection.py, and drawn. Nothing of the corpus is
written. The file is written again after each part. Left out: encoding queries, which is timed apart.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import faiss
import numpy as np
import torch
from footprint import BATCH, Known, apart, in_batches, open_retriever, write_queries
from projection import draw, project
from scipy.stats import bootstrap

from searchr1_lite.config import ROOT
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval.bm25 import K1, B, BM25Retriever, tokenize
from searchr1_lite.retrieval.corpus import corpus_checksum, load_corpus
from searchr1_lite.retrieval.dense import DenseRetriever, blas_from
from searchr1_lite.retrieval.encoders import Encoder, load_encoder
from searchr1_lite.retrieval.index import build_index, check_index
from searchr1_lite.retrieval.measure import check_supporting, read_judged, recall, supporting_ids
from searchr1_lite.tasks.questions import read_questions
from searchr1_lite.types import Hit, Passage, Question, Retriever

SIZES = (1, 4, 16, 32, 64, 128)  # queries a call
KINDS = ("bm25", "flat", "hnsw", "ivf-sq8", "ivf-pq", "faiss:HNSW32,SQ8", "bm25+flat")
LIBRARIES = ["faiss-cpu", "bm25s", "rank-bm25", "sentence-transformers", "torch", "numpy", "pyarrow"]
ASKED = 10  # passages that a search is asked for where recall is counted; 3 where time is
FLAT_TARGET, BM25_TARGET = 5, 100  # times as fast: by matrix product for 16 to 128 queries; as rank_bm25
TIE = 1e-6  # of scores near 1: sums of float32 in another order
AGREE = 1e-4  # of a number of a vector, encoded again
OUT = ROOT / "data/results/benchmarks/retrieval.json"


# Rounds and ratios


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, what: str) -> dict[str, list[float]]:
    """Seconds of each run in each round, in which all take turns, every other round backwards; one more warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else reversed(runs):
            start = time.perf_counter()
            runs[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
        left = (time.perf_counter() - begun) / (number + 1) * (rounds - number)
        print(f"{what}: round {number} of {rounds}, about {left:.0f} s left", flush=True)
    return seconds


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times longer `slow` took than `fast`, within each round."""
    each = [one / other for one, other in zip(slow, fast, strict=True)]
    return {"each": each, "median": median(each), "least": min(each), "most": max(each)}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over questions, and the 95 % percentile interval of 5,000 bootstrap samples of them."""
    drawn = bootstrap((np.asarray(values),), np.mean, method="percentile", n_resamples=5000, batch=500, rng=0)
    low, high = drawn.confidence_interval
    return {"mean": round(fmean(values), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


# The comparisons


def flat_batches(vectors: np.ndarray, queries: np.ndarray, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """The same queries in calls of each size, three passages each: as DenseRetriever has it, by FAISS's choice, and by
    FAISS told to multiply matrices earlier.

    Raises RuntimeError where ours finds other ids than FAISS, unless these have the same scores.
    """
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    retriever = DenseRetriever([], None, index)
    whole = len(queries) // max(sizes) * max(sizes) or len(queries)

    def search(size: int, nearest: Callable = index.search) -> list[np.ndarray]:
        found = [nearest(queries[i : min(i + size, whole)], 3) for i in range(0, whole, size)]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def ours(size: int) -> list[np.ndarray]:
        return search(size, retriever.nearest)

    def multiplying(size: int) -> list[np.ndarray]:
        with blas_from(4, index.d):
            return search(size)

    ways, ties = {"default": search, "multiplying": multiplying, "ours": ours}, 0
    for size in sizes:
        (scores, ids), (our_scores, our_ids) = search(size), ours(size)
        if wrong := int(((ids != our_ids) & (np.abs(scores - our_scores) > TIE)).any(axis=1).sum()):
            raise RuntimeError(f"{size} queries a call: {wrong} of {whole} find other ids than FAISS does")
        ties += int((ids != our_ids).any(axis=1).sum())
    runs = {f"{way} {size}": lambda f=f, size=size: f(size) for size in sizes for way, f in ways.items()}
    seconds = interleaved(runs, rounds, f"flat search, {len(vectors):,} vectors of {index.d}")
    result = {"vectors": len(vectors), "dimension": index.d, "queries": whole, "same_ids": not ties, "ties": ties}
    result |= {"target_from_16_queries_on": FLAT_TARGET, "sizes": {}}
    for size in sizes:
        slow, middle, fast = (seconds[f"{way} {size}"] for way in ways)
        rates = {way: whole / median(seconds[f"{way} {size}"]) for way in ways}
        result["sizes"][str(size)] = {
            "queries_a_second": rates,
            "ratio": ratios(slow, fast),
            "ratio_multiplying": ratios(slow, middle),
        }
        print(f"  {size:4} queries a call: {ratios(slow, fast)['median']:.2f} times as fast as the default")
    return result


def beyond_cache(number: int, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """The same with random vectors as long as e5's, too many for the processor's cache."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((number, 768), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return flat_batches(vectors, rng.standard_normal((max(sizes), 768), dtype=np.float32), sizes, rounds)


def bm25_peers(passages: list[Passage], texts: list[str], rounds: int) -> dict[str, Any]:
    """Ours, rank_bm25 and bm25s' own `retrieve` on the same words, from the question's text to three positions."""
    import bm25s
    from rank_bm25 import BM25Okapi

    words = tokenize([f"{passage.title}\n{passage.text}" for passage in passages])
    retriever, okapi = BM25Retriever.build(passages), BM25Okapi(words, k1=K1, b=B)
    peer = bm25s.BM25(k1=K1, b=B, method="lucene")
    peer.index(words, show_progress=False)

    def ours() -> list[list[str]]:
        return [[hit.passage.id for hit in hits] for hits in retriever.search(texts, 3)]

    def rank_bm25() -> list[list[str]]:
        best = [np.argsort(-okapi.get_scores(asked), kind="stable")[:3] for asked in tokenize(texts)]
        return [[passages[i].id for i in row] for row in best]

    def retrieve() -> list[list[str]]:
        best = peer.retrieve(tokenize(texts), k=min(3, len(passages)), show_progress=False).documents
        return [[passages[i].id for i in row] for row in best]

    runs = {"ours": ours, "ours, one by one": lambda: in_batches(retriever, texts, 3, 1)}
    runs |= {"rank_bm25": rank_bm25, "bm25s.retrieve": retrieve}
    seconds = interleaved(runs, rounds, "BM25")
    found = {"ours": ours(), "rank_bm25": rank_bm25(), "bm25s.retrieve": retrieve()}
    same = {
        name: fmean(len(set(a) & set(b)) / max(1, len(b)) for a, b in zip(rows, found["ours"], strict=True))
        for name, rows in found.items()
    }
    result = {
        "queries": len(texts),
        "queries_a_second": {name: len(texts) / median(taken) for name, taken in seconds.items()},
        "target_for_rank_bm25": BM25_TARGET,
        "ratio": {name: ratios(taken, seconds["ours"]) for name, taken in seconds.items() if name != "ours"},
        "same_of_our_first_three": {name: round(share, 4) for name, share in same.items() if name != "ours"},
    }
    for name, ratio in result["ratio"].items():
        print(f"  {name}: takes {ratio['median']:.1f} times as long as ours")
    return result


# The kinds


def encoded(passages: list[Passage], encoder: Encoder, file: Path | None) -> tuple[np.ndarray, dict[str, Any]]:
    """The passages' vectors, from a file that is checked on 20 of them, or encoded now."""
    if file is None:
        start = time.perf_counter()
        vectors = encoder.encode_passages(passages)
        seconds = time.perf_counter() - start
        return vectors, {"seconds": seconds, "passages_a_second": len(passages) / seconds}
    vectors = np.load(file)
    if vectors.shape[0] != len(passages) or vectors.dtype != np.float32:
        raise ValueError(
            f"{file}: {vectors.dtype} {vectors.shape}; float32 rows for {len(passages)} passages are needed"
        )
    chosen = np.random.default_rng(0).permutation(len(passages))[:20]
    start = time.perf_counter()
    again = encoder.encode_passages([passages[i] for i in chosen])
    seconds = time.perf_counter() - start
    if vectors.shape[1] != again.shape[1] or (largest := float(np.abs(vectors[chosen] - again).max())) > AGREE:
        raise ValueError(f"{file}: is not what {encoder.name} makes of these passages; encode them again")
    checked = {"passages": len(chosen), "largest_difference": largest, "passages_a_second": len(chosen) / seconds}
    return vectors, {"seconds": "taken from a file", "checked": checked}


def build(kind: str, passages: list[Passage], vectors: np.ndarray, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Build one index; time without what stands in for encoding, and bytes on disk."""
    row = {passage.id: i for i, passage in enumerate(passages)}
    anything = defaultdict(lambda: vectors[0])  # asked once, for the dimension
    known = Known(encoder.identity(), anything, lambda some: vectors[[row[passage.id] for passage in some]])
    start = time.perf_counter()
    build_index(passages, folder, kind, known)
    seconds = time.perf_counter() - start - known.seconds
    manifest = check_index(folder)
    sizes = {name: its["bytes"] for name, its in manifest["files"].items()}
    texts = sum(size for name, size in sizes.items() if name.startswith("passages"))
    disk = {"index": sum(sizes.values()) - texts, "passages": texts}
    return {"factory": manifest.get("factory"), "indexing_seconds": seconds, "disk_bytes": disk}


def speeds(retrievers: dict[str, Retriever], texts: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Queries a second by kind, one by one and in batches; three passages a query."""
    ways = {"one_by_one": 1, f"batches_of_{BATCH}": BATCH}
    runs = {
        f"{kind} {way}": lambda it=it, size=size: in_batches(it, texts, 3, size)
        for kind, it in retrievers.items()
        for way, size in ways.items()
    }
    seconds = interleaved(runs, rounds, "kinds")
    return {
        kind: {
            way: {"median": len(texts) / median(taken), "each": [len(texts) / one for one in taken]}
            for way in ways
            if (taken := seconds[f"{kind} {way}"])
        }
        for kind in retrievers
    }


def recalls(found: dict[str, list[list[str]]], questions: list[Question]) -> dict[str, dict[str, Any]]:
    """By kind: of flat's first three the share that is among its own, and recall of what the questions need."""
    needed = [supporting_ids(question) for question in questions]
    result: dict[str, dict[str, Any]] = {}
    for kind, rows in found.items():
        result[kind] = {
            f"recall@{k}": interval([recall(row, need, k) for row, need in zip(rows, needed, strict=True)])
            for k in (3, 10)
        }
        if "flat" in found:
            shares = [recall(row, flat[:3], 3) for row, flat in zip(rows, found["flat"], strict=True)]
            result[kind]["recall@3_against_flat"] = interval(shares)
    return result


def measure_kinds(
    kinds: Sequence[str],
    passages: list[Passage],
    vectors: np.ndarray,
    questions: list[Question],
    asked: np.ndarray,
    encoder: Encoder,
    rounds: int,
    reranker: str | None,
) -> dict[str, dict[str, Any]]:
    """By kind: build time, disk, memory, speed and recall. Joined kinds ("bm25+flat") share what is built."""
    texts = [question.question for question in questions]
    known = dict(zip(texts, asked, strict=True))
    result: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {kind: Path(place) / kind.replace(":", "-").replace(",", "-") for kind in kinds if "+" not in kind}
        queries = write_queries(Path(place) / "queries.npz", texts, asked)
        for kind in kinds:
            print(f"{kind}: building and measuring memory", flush=True)
            parts = [folders[part] for part in kind.split("+")]
            if len(parts) > 1:
                result[kind] = together([result[part] for part in kind.split("+")])
            else:
                result[kind] = build(kind, passages, vectors, encoder, folders[kind])
            memory = apart(parts, queries, ASKED)
            result[kind]["memory"] = {key: memory[key] for key in memory if key.startswith(("bytes", "most"))}
            result[kind]["open_seconds"] = memory["seconds"]["open"]
        retrievers = {kind: open_retriever([folders[part] for part in kind.split("+")], known) for kind in kinds}
        if reranker:
            from searchr1_lite.retrieval.rerank import Reranked, load_reranker

            name = f"{kinds[0]}, reranked by {Path(reranker).name}"
            retrievers[name] = Reranked(retrievers[kinds[0]], load_reranker(reranker))
            result[name] = {}
        for kind, rates in speeds(retrievers, texts, rounds).items():
            result[kind]["queries_a_second"] = rates
        found = {kind: ids(in_batches(it, texts, ASKED, BATCH)) for kind, it in retrievers.items()}
        for kind, shares in recalls(found, questions).items():
            result[kind] |= shares
    if not reranker:
        result["reranker"] = {"not_measured": "no cross-encoder on this machine; --reranker names one"}
    return result


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Build time and disk of indexes that are searched together; passages lie in each folder."""
    disk = {key: sum(part["disk_bytes"][key] for part in parts) for key in ("index", "passages")}
    return {"factory": None, "indexing_seconds": sum(part["indexing_seconds"] for part in parts), "disk_bytes": disk}


def ids(found: list[list[Hit]]) -> list[list[str]]:
    return [[hit.passage.id for hit in hits] for hits in found]


# What the projection needs besides


def encoding_rates(passages: list[Passage], texts: list[str], encoder: Encoder, quick: bool) -> dict[str, Any]:
    """Queries a second of this encoder; and passages a second of one of e5-base-v2's shape.

    Its weights are random, since speed does not depend on them; it reads 256 tokens at most.
    """
    rates = {}
    for way, size in (("one_by_one", 1), (f"batches_of_{BATCH}", BATCH)):
        some = texts[: 16 if size == 1 else 4 * BATCH]
        start = time.perf_counter()
        for i in range(0, len(some), size):
            encoder.encode_queries(some[i : i + size])
        rates[way] = len(some) / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as place:
        stand_in = load_encoder(str(random_e5(Path(place) / "e5-base-shape", encoder, quick)))
    some = [passages[i] for i in np.random.default_rng(0).permutation(len(passages))[: 8 if quick else 2 * BATCH]]
    stand_in.encode_passages(some[:4])
    start = time.perf_counter()
    stand_in.encode_passages(some)
    return {
        f"queries_a_second, {encoder.name}": rates,
        "passages_a_second, shape of e5-base-v2 with random weights": len(some) / (time.perf_counter() - start),
    }


def random_e5(folder: Path, encoder: Encoder, quick: bool) -> Path:
    """A BertModel of the base size, random, with the tokenizer of `encoder` (BERT's uncased vocabulary, as e5 has)."""
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**(small if quick else {}))).save_pretrained(folder)
    encoder.model.tokenizer.save_pretrained(folder)
    return folder


def words_of(passages: list[Passage]) -> dict[str, float]:
    """Words a passage, and how the number of different ones grows with the passages (Heaps's law)."""
    words = tokenize([f"{passage.title}\n{passage.text}" for passage in passages])
    few, many = (len({word for text in some for word in text}) for some in (words[: len(words) // 4], words))
    quarter = len(words) // 4
    return {
        "words_a_passage": fmean(len(passage.text.split()) for passage in passages),
        "postings_a_passage": fmean(len(set(text)) for text in words),
        "different_words": many,
        "growth_of_different_words": float(np.log(many / few) / np.log(len(words) / quarter)),
    }


def read_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help='.jsonl(.gz) of passages, or "toy"')
    parser.add_argument("--questions", required=True, help=".jsonl(.gz) of questions with supporting passages")
    parser.add_argument("--qrels", help="BEIR judgements (.tsv); --questions then holds BEIR queries")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--vectors", type=Path, help="a .npy file of the passages' vectors, in place of encoding")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="a joined kind comes after its parts")
    parser.add_argument("--reranker", help="a cross-encoder: folder or hub name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=100_000, help="random vectors beyond the cache; 0 for none")
    parser.add_argument("--peer-queries", type=int, default=200, help="questions that the BM25s are asked")
    parser.add_argument("--million", type=Path, default=OUT.with_name("million.json"), help="what million.py wrote")
    parser.add_argument("--quick", action="store_true", help="small batches, few questions, two rounds: a dry run")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    if given.quick:
        given.rounds, given.large, given.peer_queries = 2, min(given.large, 2000), 20
    return given


def measure_all(given: argparse.Namespace) -> dict[str, Any]:
    passages = load_corpus(given.corpus)
    questions = read_judged(given.questions, given.qrels) if given.qrels else read_questions(given.questions)
    questions = questions[:40] if given.quick else questions
    check_supporting(questions, passages)
    texts = [question.question for question in questions]
    encoder = load_encoder(given.encoder)
    vectors, encoding = encoded(passages, encoder, given.vectors)
    asked, rounds = encoder.encode_queries(texts), given.rounds
    sizes = (1, 4, 16) if given.quick else SIZES
    result = provenance(LIBRARIES) | {
        "corpus": {"passages": len(passages), "checksum": corpus_checksum(passages)} | words_of(passages),
        "questions": len(questions),
        "encoder": {"name": encoder.name, "dimension": vectors.shape[1], "encoding_passages": encoding},
        "threads": {"faiss": faiss.omp_get_max_threads(), "torch": torch.get_num_threads(), "bm25": 1},
        "faiss_default_threshold": faiss.cvar.distance_compute_blas_threshold,
    }

    def part(name: str, value: Any) -> None:
        result[name] = value
        write_json(given.out, result)

    part("flat_search", flat_batches(vectors, asked, sizes, rounds))
    if given.large:
        part("flat_search_beyond_cache", beyond_cache(given.large, sizes, min(rounds, 3)))  # it is slow
    part("bm25", bm25_peers(passages, texts[: given.peer_queries], rounds))
    some = (given.kinds, passages, vectors, questions, asked, encoder, rounds, given.reranker)
    part("kinds", measure_kinds(*some))
    part("encoding", encoding_rates(passages, texts, encoder, given.quick))
    part("projection", project(result, given.million))
    draw(result, given.out.with_suffix(".png"))
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = read_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    try:
        return measure_all(given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
