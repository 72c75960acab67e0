"""Recall of supporting passages: of the passages a question needs, how many does one search with its words find?

`python -m searchr1_lite.retrieval.recall --corpus C --questions Q --out FILE` measures BM25 and a dense encoder and
records the figures. Ranking measures with graded judgements are left out; ir-measures has them.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from searchr1_lite.jsonl import write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.types import Passage, Question, Retriever

KS = (1, 3, 5, 10)


def supporting_ids(question: Question) -> list[str]:
    """Ids of the passages that the question needs, from `supporting_ids` or `gold_ids`; raises ValueError if none."""
    ids = question.metadata.get("supporting_ids") or question.metadata.get("gold_ids")
    if not ids:
        raise ValueError(f"question {question.id!r} names no supporting passages (metadata supporting_ids or gold_ids)")
    return [str(key) for key in ids]


def recall(found: list[str], needed: list[str], k: int) -> float:
    """The share of the `needed` passages that are among the first `k` of those `found`."""
    return len(set(needed) & set(found[:k])) / len(set(needed))


def recall_per_question(
    retriever: Retriever, questions: list[Question], ks: Sequence[int] = KS
) -> dict[int, list[float]]:
    """For each k, each question's recall, in question order, searching once with the question's own words."""
    hits = retriever.search([question.question for question in questions], max(ks))
    found = [[hit.passage.id for hit in row] for row in hits]
    needed = [supporting_ids(question) for question in questions]
    return {k: [recall(f, n, k) for f, n in zip(found, needed, strict=True)] for k in ks}


def recall_at_k(retriever: Retriever, questions: list[Question], ks: Sequence[int] = KS) -> dict[int, float]:
    """For each k, the mean over questions of the share of its supporting passages that are found (0 to 1)."""
    if not questions:
        raise ValueError("no questions to measure recall on")
    return {k: sum(values) / len(values) for k, values in recall_per_question(retriever, questions, ks).items()}


def check_supporting(questions: list[Question], passages: list[Passage]) -> None:
    """Raise ValueError for a supporting passage that the corpus lacks: its recall would count as a miss."""
    there = {passage.id for passage in passages}
    for question in questions:
        missing = [key for key in supporting_ids(question) if key not in there]
        if missing:
            raise ValueError(f"question {question.id!r} needs passages that the corpus lacks: {', '.join(missing)}")


def measure(name: str, retriever: Retriever, questions: list[Question]) -> dict:
    figures = {f"recall@{k}": round(value, 4) for k, value in recall_at_k(retriever, questions).items()}
    print(name, figures)
    return {"retriever": name, **figures}


def _measure_all(passages: list[Passage], questions: list[Question], encoder_name: str) -> Iterator[dict]:
    from searchr1_lite.config import load_profile
    from searchr1_lite.retrieval.build import load_retriever

    for kind, name in (("bm25", "bm25"), ("dense", f"dense, {encoder_name}")):
        profile = load_profile("tiny", retriever=kind, encoder=encoder_name)
        yield measure(name, load_retriever(profile, passages), questions)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the recall of supporting passages, sparse and dense.")
    parser.add_argument("--corpus", required=True, help=".jsonl(.gz) of passages")
    parser.add_argument("--questions", required=True, help=".jsonl(.gz) of questions with supporting passages")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    args = parser.parse_args()
    from searchr1_lite.retrieval.corpus import corpus_checksum, load_corpus
    from searchr1_lite.tasks.questions import read_questions

    passages, questions = load_corpus(args.corpus), read_questions(args.questions)
    check_supporting(questions, passages)
    libraries = ["bm25s", "PyStemmer", "faiss-cpu", "sentence-transformers", "transformers", "torch", "numpy"]
    record = provenance(libraries) | {
        "corpus": {"passages": len(passages), "checksum": corpus_checksum(passages)},
        "questions": len(questions),
        "results": [],
    }
    out = Path(args.out)
    for row in _measure_all(passages, questions, args.encoder):  # encoding may take an hour: keep what is measured
        record["results"].append(row)
        write_json(out, record)


if __name__ == "__main__":
    main()
