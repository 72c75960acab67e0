"""Is what a question needs found by one search with its words? Recall of supporting passages, and nDCG.

`searchr1 index measure CORPUS QUESTIONS --out FILE` measures BM25 and a dense encoder and records the figures;
`--qrels T` takes the supporting passages from a table of judgements, in BEIR's form. Graded judgements are left out: a
passage is needed or it is not.
"""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from searchr1_lite.config import load_profile
from searchr1_lite.files import read_rows, text_field, write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval.corpus import corpus_checksum, load_corpus
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.tasks.questions import QuestionError, read_questions, supporting_ids
from searchr1_lite.types import Passage, Question, Retriever

KS = (1, 3, 5, 10)
LIBRARIES = ["bm25s", "PyStemmer", "faiss-cpu", "sentence-transformers", "transformers", "torch", "ir-measures"]


def read_judged(queries: str | Path, qrels: str | Path) -> list[Question]:
    """Questions with the passages judged relevant as `supporting_ids`; queries without one are left out.

    The form is BEIR's: `{"_id", "text"}` lines, and a table with a header of query-id, corpus-id and score (0 or 1,
    tab-separated). Raises QuestionError with file and line.
    """
    relevant = defaultdict(list)
    with open(qrels, encoding="utf-8", errors="replace", newline="") as file:
        for line, row in enumerate(csv.DictReader(file, delimiter="\t"), 2):
            if not (row.get("query-id") and row.get("corpus-id") and row.get("score") in ("0", "1")):
                raise QuestionError(f"{qrels}:{line}: query-id, corpus-id and a score of 0 or 1 are needed, got {row}")
            if row["score"] == "1":
                relevant[row["query-id"]].append(row["corpus-id"])
    rows = read_rows(queries, QuestionError, "queries")
    texts = {text_field(row, "_id", at, QuestionError): text_field(row, "text", at, QuestionError) for at, row in rows}
    if missing := [key for key in relevant if key not in texts]:
        raise QuestionError(f"{qrels}: judges queries that {queries} lacks: {', '.join(missing[:5])}")
    return [Question(key, texts[key], (), {"supporting_ids": ids}) for key, ids in relevant.items()]


def recall(found: list[str], needed: list[str], k: int) -> float:
    """The share of the `needed` passages that are among the first `k` of those `found`."""
    return len(set(needed) & set(found[:k])) / len(set(needed))


def search_ids(retriever: Retriever, questions: list[Question], k: int) -> list[list[str]]:
    """Ids of the first `k` passages for each question's own words; raises QuestionError if there are no questions."""
    if not questions:
        raise QuestionError("no questions to measure retrieval on")
    results = retriever.search([question.question for question in questions], k)
    return [[hit.passage.id for hit in hits] for hits in results]


def recall_per_question(
    retriever: Retriever, questions: list[Question], ks: Sequence[int] = KS
) -> dict[int, list[float]]:
    """For each k, each question's recall, in question order."""
    pairs = list(zip(search_ids(retriever, questions, max(ks)), map(supporting_ids, questions), strict=True))
    return {k: [recall(found, needed, k) for found, needed in pairs] for k in ks}


def ndcg_at_10(retriever: Retriever, questions: list[Question]) -> float:
    """Mean nDCG@10 (ir-measures, which asks trec_eval); a question that finds nothing counts as 0."""
    import ir_measures  # needed to measure and nowhere else, so it comes with the dev extra

    results = search_ids(retriever, questions, 10)
    judged = {question.id: dict.fromkeys(supporting_ids(question), 1) for question in questions}
    # trec_eval would order equal scores by id; ranks as scores keep the retriever's order
    ranked = {key: {hit: -rank for rank, hit in enumerate(ids)} for key, ids in zip(judged, results, strict=True)}
    return ir_measures.calc_aggregate([ir_measures.nDCG @ 10], judged, ranked)[ir_measures.nDCG @ 10]


def check_supporting(questions: list[Question], passages: list[Passage]) -> None:
    """Raise QuestionError for a supporting passage that the corpus lacks: its recall would count as a miss."""
    ids = {passage.id for passage in passages}
    for question in questions:
        if missing := [key for key in supporting_ids(question) if key not in ids]:
            raise QuestionError(f"question {question.id!r} needs passages that the corpus lacks: {', '.join(missing)}")


def measure(name: str, retriever: Retriever, questions: list[Question], ks: Sequence[int] = KS) -> dict:
    """recall@k: mean share of the supporting passages found; all@k: share of questions with every one of them found."""
    shares = recall_per_question(retriever, questions, ks)
    figures = {f"recall@{k}": fmean(values) for k, values in shares.items()}
    figures |= {f"all@{k}": fmean(value == 1 for value in values) for k, values in shares.items()}
    figures["nDCG@10"] = ndcg_at_10(retriever, questions)
    return {"retriever": name} | {key: round(value, 4) for key, value in figures.items()}


def measure_corpus(
    corpus: Path, questions: Path, out: Path, qrels: Path | None = None, ks: Sequence[int] = KS, encoder: str = "minilm"
) -> None:
    """Measure BM25 and exact search by vectors, print the figures and write them to the JSON file `out`.

    Raises CorpusError, QuestionError.
    """
    if not ks or min(ks) < 1:
        raise QuestionError(f"recall is measured at 1 passage or more, not at {list(ks)}")
    passages = load_corpus(str(corpus))
    asked = read_judged(questions, qrels) if qrels else read_questions(questions)
    check_supporting(asked, passages)
    record = provenance(LIBRARIES) | {
        "corpus": {"passages": len(passages), "checksum": corpus_checksum(passages)},
        "questions": len(asked),
        "results": [],
    }
    for kind, name in (("bm25", "bm25"), ("flat", f"flat, {encoder}")):
        retriever = load_retriever(load_profile("tiny", retriever=kind, encoder=encoder), passages)
        record["results"].append(measure(name, retriever, asked, ks))
        print(record["results"][-1])
        write_json(out, record)  # after each, since encoding takes long
