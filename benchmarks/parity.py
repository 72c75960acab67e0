"""Does our e5 rank passages as Search-R1's does? Its recorded top three for each query, against ours.

`python benchmarks/parity.py --corpus C --recorded R --out FILE`, where R holds lines of
`{"query", "top3", "run"}`, top3 being passage ids, best first. Without the encoder on this machine it says so, writes
nothing and counts as skipped; nothing is downloaded.

Ours follows search_r1/search/index_builder.py and retrieval_server.py: "query: " and "passage: " before the text, a
passage being `"title"\\ntext`, 256 tokens at most for either, the mean over all tokens, length 1, inner product.
Two things differ. The original computes and normalises in half precision (use_fp16) and, searching on a GPU, stores the
vectors so; here everything is float32, so passages of nearly equal score may change places. And its server may search
an approximate index (HNSW); here the search is exact, and so were the recorded runs whose name starts with EXACT.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from searchr1_lite.config import resolve_path
from searchr1_lite.files import read_rows, text_field, write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval.corpus import corpus_checksum, load_corpus
from searchr1_lite.retrieval.dense import LIBRARIES, DenseRetriever
from searchr1_lite.retrieval.encoders import load_encoder

EXACT = "v1"
TIE = 1e-3  # half precision keeps about three digits of a score near 1


def why_missing(encoder: str) -> str | None:
    """None where the encoder is a folder here or in the hub's local cache; else the reason, and how to get it."""
    if resolve_path(encoder).is_dir() or isinstance(try_to_load_from_cache(encoder, "model.safetensors"), str):
        return None
    return f"the encoder {encoder} is not on this machine; `hf download {encoder}` fetches it from the model hub"


def read_recorded(path: str | Path, ids: set[str]) -> list[dict[str, Any]]:
    """Recorded rankings; raises ValueError with file and line, also for a passage that is not among `ids`."""
    recorded = []
    for where, row in read_rows(path, ValueError, "recorded rankings"):
        top = row.get("top3")
        if not isinstance(top, list) or len(top) != 3 or any(key not in ids for key in map(str, top)):
            raise ValueError(f"{where}: 'top3' must be the ids of three passages of the corpus, got {top!r}")
        texts = {key: text_field(row, key, where, ValueError) for key in ("query", "run")}
        recorded.append({"line": len(recorded) + 1, **texts, "recorded": [*map(str, top)]})
    return recorded


def compare(retriever: DenseRetriever, recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each recorded query: line, run, the rankings `recorded` and `found`, their `gap` and verdict.

    The gap is the largest difference, over the three ranks, between our scores of the passage found there and of the
    passage recorded there: 0 for equal rankings, and below TIE where half precision can have swapped them.
    """
    queries = [row["query"] for row in recorded]
    position = {passage.id: i for i, passage in enumerate(retriever.passages)}
    found = zip(recorded, retriever.search(queries, 3), retriever.encoder.encode_queries(queries), strict=True)
    rows = []
    for row, hits, vector in found:
        scores = [float(vector @ retriever.index.reconstruct(position[key])) for key in row["recorded"]]
        gap = max(abs(hit.score - score) for hit, score in zip(hits, scores, strict=True))
        ids = [hit.passage.id for hit in hits]
        judged = {"found": ids, "gap": round(gap, 6), "verdict": verdict(row["recorded"], ids, gap)}
        rows.append({key: row[key] for key in ("line", "run", "recorded")} | judged)
    return rows


def verdict(recorded: list[str], found: list[str], gap: float) -> str:
    """A tie is never equal: the passages at one rank differ, with scores too near for half precision to tell."""
    if recorded == found:
        return "equal"
    if gap < TIE:
        return "tie"
    return "other order" if set(recorded) == set(found) else "other passages"


def main() -> None:
    """Exits with 0 if every ranking from an exact index is equal or a tie, or the encoder is missing; else with 1."""
    parser = argparse.ArgumentParser(description="Compare e5's ranking with Search-R1's recorded one.")
    parser.add_argument("--corpus", required=True, help=".jsonl(.gz) of passages")
    parser.add_argument("--recorded", required=True, help=".jsonl(.gz) of queries with the ids of their first three")
    parser.add_argument("--encoder", default="intfloat/e5-base-v2", help="hub name or folder, 'e5' in its name")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    args = parser.parse_args()
    if missing := why_missing(args.encoder):
        print(f"skipped: {missing}")
        return
    try:
        passages = load_corpus(args.corpus)
        recorded = read_recorded(args.recorded, {passage.id for passage in passages})
        retriever = DenseRetriever.build(passages, load_encoder(args.encoder))
        rows = compare(retriever, recorded)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    exact = [row for row in rows if row["run"].startswith(EXACT)]
    record = provenance([*LIBRARIES, "transformers", "torch"]) | {
        "encoder": retriever.encoder.identity(),
        "corpus": {"passages": len(passages), "checksum": corpus_checksum(passages)},
        "queries": {"all": len(rows), "exact index": len(exact)},
        "all": Counter(row["verdict"] for row in rows),
        "exact index": Counter(row["verdict"] for row in exact),
        "not equal": [row for row in rows if row["verdict"] != "equal"],
    }
    write_json(Path(args.out), record)
    for name, number in record["queries"].items():
        print(f"{name}: {number:,} queries,", ", ".join(f"{n:,} {what}" for what, n in record[name].items()))
    sys.exit(int(any(row["verdict"].startswith("other") for row in exact)))


if __name__ == "__main__":
    main()
