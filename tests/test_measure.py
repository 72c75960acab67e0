"""retrieval/measure.py: recall and nDCG by hand, BEIR's judgements, and the recorded figures on real passages."""

import csv
import gzip
import json
import math
from collections import defaultdict
from pathlib import Path

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.cli import main
from searchr1_lite.config import ROOT
from searchr1_lite.retrieval import measure as module
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.retrieval.corpus import corpus_checksum, load_corpus
from searchr1_lite.retrieval.measure import (
    check_supporting,
    measure,
    ndcg_at_10,
    read_judged,
    recall_per_question,
)
from searchr1_lite.tasks.questions import QuestionError, read_questions
from searchr1_lite.types import Hit, Passage, Question

SHARED = Path(ROOT).parent / "shared/data"
RECORDS = ROOT / "data/results/retrieval"


class Fixed:
    """Finds passages "p0", "p1", ... in the order written in the question, all with the same score."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return [[Hit(Passage(key, "", ""), 0.0) for key in query.split()[:k]] for query in queries]


QUESTIONS = [
    Question("a", "p1 p9 p2 p8", ("x",), {"supporting_ids": ["p1", "p2"]}),
    Question("b", "p5", ("x",), {"gold_ids": ["p4", "p5", "p6"]}),
    Question("c", "", ("x",), {"gold_ids": ["p7"]}),
]


def test_recall_and_all_found_by_hand() -> None:
    assert recall_per_question(Fixed(), QUESTIONS, (1, 3)) == {1: [0.5, 1 / 3, 0], 3: [1.0, 1 / 3, 0]}
    figures = measure("fixed", Fixed(), QUESTIONS, (1, 3))
    assert (figures["recall@1"], figures["recall@3"]) == (round((1 / 2 + 1 / 3) / 3, 4), round((1 + 1 / 3) / 3, 4))
    assert (figures["all@1"], figures["all@3"]) == (0, 0.3333)  # only "a", and only from 3 passages on


def test_ndcg_by_hand_keeps_the_retrievers_order() -> None:
    best_of_3 = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    a = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert ndcg_at_10(Fixed(), QUESTIONS) == pytest.approx((a + 1 / best_of_3 + 0) / 3)
    for order, value in (("p1 p2", 1), ("p2 p1", 1 / math.log2(3))):  # equal scores, one order of ids or the other
        question = Question("t", order, (), {"gold_ids": ["p1"]})
        assert ndcg_at_10(Fixed(), [question]) == pytest.approx(value)
    eleventh = Question("t", " ".join(f"p{i}" for i in range(11)), (), {"gold_ids": ["p10"]})
    assert ndcg_at_10(Fixed(), [eleventh]) == 0


RANKINGS = st.permutations([f"p{i}" for i in range(8)])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(RANKINGS, st.sets(st.sampled_from([f"p{i}" for i in range(9)]), min_size=1)), min_size=1))
def test_recall_is_that_of_ir_measures(rows: list[tuple[list[str], set[str]]]) -> None:
    questions = [Question(str(i), " ".join(row), (), {"gold_ids": [*needed]}) for i, (row, needed) in enumerate(rows)]
    judged = {str(i): dict.fromkeys(needed, 1) for i, (_, needed) in enumerate(rows)}
    ranked = {str(i): {key: -rank for rank, key in enumerate(row)} for i, (row, _) in enumerate(rows)}
    for k, ours in recall_per_question(Fixed(), questions).items():
        theirs = {row.query_id: row.value for row in ir_measures.iter_calc([ir_measures.R @ k], judged, ranked)}
        assert ours == pytest.approx([theirs[question.id] for question in questions])


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="'d' names no supporting passages"):
        recall_per_question(Fixed(), [Question("d", "p1", ("x",))])
    for one in (recall_per_question, ndcg_at_10):
        with pytest.raises(ValueError, match="no questions"):
            one(Fixed(), [])
    with pytest.raises(ValueError, match="'b' needs passages that the corpus lacks: p4, p6"):
        check_supporting(QUESTIONS, [Passage(key, "", "t") for key in ("p1", "p2", "p5")])


def beir(folder: Path, *judgements: str, header: str = "query-id\tcorpus-id\tscore") -> tuple[Path, Path]:
    queries, qrels = folder / "queries.jsonl", folder / "test.tsv"
    queries.write_text("".join(json.dumps({"_id": key, "text": f"p1 of {key}"}) + "\n" for key in ("q1", "q2", "q3")))
    qrels.write_text("\n".join([header, *judgements]) + "\n")
    return queries, qrels


def test_beir_judgements_become_supporting_passages(tmp_path: Path) -> None:
    questions = read_judged(*beir(tmp_path, "q2\tp1\t1", "q1\tp3\t1", "q2\tp9\t0", "q2\tp4\t1", "q3\tp1\t0"))
    assert [(q.id, q.question, q.metadata["supporting_ids"]) for q in questions] == [
        ("q2", "p1 of q2", ["p1", "p4"]),
        ("q1", "p1 of q1", ["p3"]),
    ]


@pytest.mark.parametrize(
    ("judgement", "header", "message"),
    [
        ("q1\tp1\t2", None, r"test\.tsv:3: .*a score of 0 or 1"),
        ("q1\tp1", None, r"test\.tsv:3: .*a score of 0 or 1"),
        ("q1\t\t1", None, r"test\.tsv:3: query-id, corpus-id and a score"),
        ("q1\tp1\t1", "query\tcorpus-id\tscore", r"test\.tsv:2: query-id, corpus-id"),
        ("q9\tp1\t1", None, r"test\.tsv: judges queries that .*queries\.jsonl lacks: q9"),
    ],
)
def test_bad_judgements_are_named(tmp_path: Path, judgement: str, header: str | None, message: str) -> None:
    paths = beir(tmp_path, "q1\tp1\t1", judgement, header=header or "query-id\tcorpus-id\tscore")
    with pytest.raises(QuestionError, match=message):
        read_judged(*paths)


def test_the_command_records_and_names_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, qrels = beir(tmp_path, "q1\tp1\t1", "q2\tp2\t1")
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out/figures.json"
    corpus.write_text('{"id": "p1", "title": "A", "text": "a"}\n{"id": "p2", "title": "B", "text": "b"}\n')
    monkeypatch.setattr(module, "load_retriever", lambda profile, passages: Fixed())

    def run(*options: object) -> object:
        with pytest.raises(SystemExit) as end:
            main(["index", "measure", str(corpus), str(queries), "--out", str(out), *map(str, options)])
        return end.value.code

    assert run("--qrels", qrels, "--ks", "1,2") == 0
    record = json.loads(out.read_text())
    assert record["corpus"] == {"passages": 2, "checksum": corpus_checksum(load_corpus(str(corpus)))}
    wanted = {"recall@1": 0.5, "recall@2": 0.5, "all@1": 0.5, "all@2": 0.5, "nDCG@10": 0.5}
    assert record["results"] == [{"retriever": name} | wanted for name in ("bm25", "flat, minilm")]
    assert record["questions"] == 2 and "no-such.tsv" in run("--qrels", tmp_path / "no-such.tsv")
    assert "1 passage or more" in run("--qrels", qrels, "--ks", "0,3") and "whole numbers" in run("--ks", "x")
    qrels.write_text("query-id\tcorpus-id\tscore\nq1\tp7\t1\n")
    assert run("--qrels", qrels) == "error: question 'q1' needs passages that the corpus lacks: p7"


def real(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no real data beside the project (../shared/data/{name})")
    return SHARED / name


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = defaultdict(dict)
    with path.open(newline="") as file:
        for line in csv.DictReader(file, delimiter="\t"):
            judged[line["query-id"]][line["corpus-id"]] = int(line["score"])
    return judged


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa"])
def test_recorded_recall_by_another_path(name: str) -> None:
    """Judgements from the qrels file instead of the questions' metadata, counted passage by passage."""
    folder = real(name)
    questions, passages = read_questions(folder / "questions.jsonl.gz"), load_corpus(str(folder / "corpus.jsonl.gz"))
    judged = read_qrels(folder / "qrels/test.tsv")
    assert set(judged) == {question.id for question in questions}
    rows = BM25Retriever.build(passages).search([question.question for question in questions], 10)
    record = json.loads((RECORDS / f"{name}.json").read_text())
    assert record["corpus"] == {"passages": len(passages), "checksum": corpus_checksum(passages)}
    assert record["questions"] == len(questions)
    bm25, dense = record["results"]
    assert (bm25["retriever"], dense["retriever"]) == ("bm25", "dense, minilm")
    for k in (1, 3, 5, 10):
        shares = []
        for question, row in zip(questions, rows, strict=True):
            found = sum(judged[question.id].get(hit.passage.id, 0) > 0 for hit in row[:k])
            shares.append(found / len(judged[question.id]))
        assert bm25[f"recall@{k}"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)
        assert bm25[f"all@{k}"] == pytest.approx(shares.count(1) / len(shares), abs=1e-4)
        assert dense[f"all@{k}"] <= dense[f"recall@{k}"]


def test_scifact_agrees_with_the_published_bm25() -> None:
    """Anserini's BM25 (flat) has nDCG@10 0.6789 and recall@100 0.9253 there; nDCG here by hand."""
    folder = real("scifact")
    judged = read_qrels(folder / "qrels/test.tsv")
    with gzip.open(folder / "queries.jsonl.gz", "rt", encoding="utf-8") as file:
        queries = {row["_id"]: row["text"] for row in map(json.loads, file)}
    keys = sorted(judged)
    retriever = BM25Retriever.build(load_corpus(str(folder / "corpus.jsonl.gz")))
    rows = retriever.search([queries[key] for key in keys], 100)
    gains, recalls = [], []
    for key, row in zip(keys, rows, strict=True):
        relevant = {i for i, score in judged[key].items() if score > 0}
        best = sum(1 / math.log2(rank + 2) for rank in range(min(10, len(relevant))))
        hits = [hit.passage.id in relevant for hit in row]
        gains.append(sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits[:10])) / best)
        recalls.append(sum(hits) / len(relevant))
    ndcg, recall = sum(gains) / len(gains), sum(recalls) / len(recalls)
    assert ndcg == pytest.approx(0.6789, abs=0.01) and recall == pytest.approx(0.9253, abs=0.015)
    questions = read_judged(folder / "queries.jsonl.gz", folder / "qrels/test.tsv")
    assert ndcg_at_10(retriever, questions) == pytest.approx(ndcg)
    bm25 = json.loads((RECORDS / "scifact.json").read_text())["results"][0]
    assert (bm25["nDCG@10"], bm25["recall@100"]) == pytest.approx((ndcg, recall), abs=1e-4)
