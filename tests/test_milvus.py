"""retrieval/milvus.py on milvus-lite, for real: what is found, kills, and collections that are not this corpus's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import searchr1
from hash_encoder import QUERIES, hash_encoder, made_passages

from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.retrieval import encoders, milvus
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.retrieval.corpus import CorpusError, corpus_checksum, join_contents, load_corpus
from searchr1_lite.retrieval.dense import DenseRetriever
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.retrieval.milvus import MilvusError, MilvusRetriever, load_corpus_into, parse_address
from searchr1_lite.retrieval.rerank import Hybrid
from searchr1_lite.tasks.questions import read_questions
from searchr1_lite.types import Passage, RetrievalError

HOTPOT = ROOT.parent / "shared/data/hotpotqa"
PASSAGES = made_passages(300)
CHECKSUM = corpus_checksum(PASSAGES)


def write(path: Path, passages: list[Passage]) -> Path:
    rows = [{"id": one.id, "contents": join_contents(one)} for one in passages]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def hashed(monkeypatch):
    monkeypatch.setattr(milvus, "load_encoder", lambda name: hash_encoder(seed=int(name or 0)))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("milvus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(milvus, "load_encoder", lambda name: hash_encoder(seed=int(name or 0)))
        load_corpus_into(write(folder / "corpus.jsonl", PASSAGES), f"milvus:{folder}/a.db", "0", 64)
    return f"milvus:{folder}/a.db"


def ids(rows) -> list[list[str]]:
    return [[hit.passage.id for hit in row] for row in rows]


def test_it_finds_what_flat_and_bm25_find_with_whole_passages(loaded):
    flat, words = DenseRetriever.build(PASSAGES, hash_encoder()), BM25Retriever.build(PASSAGES)
    found = MilvusRetriever(f"{loaded}?search=dense", "0", CHECKSUM).search([*QUERIES[:20], " "], 5)
    exact = flat.search(QUERIES[:20], 5)
    assert sum(len(set(a) & set(b)) for a, b in zip(ids(found), ids(exact), strict=False)) >= 0.98 * 100
    assert found[-1] == [] and {hit.passage for row in found for hit in row} <= set(PASSAGES)
    assert [hit.score for hit in found[0]] == pytest.approx([hit.score for hit in exact[0]], abs=1e-5)
    texts = ["number 17", "numbers 29 topic3", "xylophone"]
    found = MilvusRetriever(f"{loaded}?search=bm25", "", CHECKSUM).search(texts, 1)
    assert ids(found) == ids(words.search(texts, 1)) == [["id17"], ["id29"], []]
    fused = MilvusRetriever(loaded, "0", CHECKSUM).search(["topic3 number 17"], 3)
    assert fused[0][0].passage in (PASSAGES[17], *PASSAGES[3::40])
    assert len(Hybrid([flat, words]).search(["topic3 number 17"], 3)[0]) == len(fused[0]) == 3


def test_a_profile_names_it(loaded, monkeypatch):
    profile = load_profile("tiny", retriever=f"{loaded}?search=bm25")
    assert ids(load_retriever(profile, PASSAGES).search(["number 17"], 1)) == [["id17"]]


KILLED = """
import sys, time
from pathlib import Path
from hash_encoder import hash_encoder
from searchr1_lite.retrieval import milvus
milvus.load_encoder = lambda name: hash_encoder()
load = milvus._load
milvus._load = lambda *given: (load(*given), print("batch", flush=True), time.sleep(0.3))
milvus.load_corpus_into(Path(sys.argv[1]), sys.argv[2], "0", 50)
"""


def test_killed_it_resumes(tmp_path, capsys, monkeypatch):
    corpus, address = write(tmp_path / "corpus.jsonl", PASSAGES), f"milvus:{tmp_path}/k.db"
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}
    command = [sys.executable, "-c", KILLED, str(corpus), address]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["batch\n"] * 2
        process.send_signal(signal.SIGKILL)
    with pytest.raises(MilvusError, match=r"is not loaded to its end; .* it resumes"):
        MilvusRetriever(address, "0", CHECKSUM)
    with pytest.raises(MilvusError, match="its batch is 50, but 60 is needed"):
        load_corpus_into(corpus, address, "0", 60)
    encoded = hash_encoder()
    monkeypatch.setattr(milvus, "load_encoder", lambda name: encoded)
    load_corpus_into(corpus, address, "0", 50)
    assert "whole, 300 passages" in capsys.readouterr().out
    assert len(encoded.model.texts) == 1 + 200  # the dimension, and what the killed one had not loaded
    assert ids(MilvusRetriever(f"{address}?search=bm25", "", CHECKSUM).search(["number 299"], 1)) == [["id299"]]


def test_what_is_not_this_collection_is_refused(loaded, tmp_path):
    other = write(tmp_path / "other.jsonl", PASSAGES[:-1])
    for call, message in (
        (lambda: MilvusRetriever(loaded, "0", "0" * 64), "its corpus is [0-9a-f]{64}, but 0{64} is needed"),
        (lambda: MilvusRetriever(loaded, "1", CHECKSUM), "its encoder is .*weights-32-0.*, but .*weights-32-1"),
        (lambda: load_corpus_into(other, loaded, "0", 64), "does not belong here: its corpus is"),
        (lambda: MilvusRetriever(f"milvus:{tmp_path}/none.db", "0", CHECKSUM), "none.db is not there; make one"),
    ):
        with pytest.raises(MilvusError, match=message):
            call()
    (tmp_path / "file.db").write_text("something else")
    with pytest.raises(MilvusError, match=r"file\.db is no database of milvus-lite"):
        MilvusRetriever(f"milvus:{tmp_path}/file.db", "0", CHECKSUM)


def test_killed_before_it_says_what_it_is_it_goes_on(tmp_path):
    client = milvus.connect(f"{tmp_path}/b.db", make=True)
    milvus._create(client, "passages", 32)
    client.close()
    load_corpus_into(write(tmp_path / "c.jsonl", PASSAGES[:9]), f"milvus:{tmp_path}/b.db", "0", 4)
    assert MilvusRetriever(f"milvus:{tmp_path}/b.db?search=bm25", "", corpus_checksum(PASSAGES[:9])).search(["7"], 1)


def test_what_milvus_raises_is_one_error(loaded, monkeypatch):
    def fails(*_, **__):
        raise milvus.MilvusException(message="the disk is full")

    retriever = MilvusRetriever(f"{loaded}?search=bm25", "", CHECKSUM)
    monkeypatch.setattr(milvus.MilvusClient, "search", fails)
    with pytest.raises(RetrievalError, match="the search failed: the disk is full"):
        retriever.search(["x"], 1)
    monkeypatch.setattr(milvus.MilvusClient, "has_collection", fails)
    with pytest.raises(MilvusError, match="the disk is full; once that is mended"):
        MilvusRetriever(loaded, "0", CHECKSUM)


def test_without_pymilvus_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "searchr1_lite.retrieval.milvus", None)
    monkeypatch.delitem(sys.modules, "searchr1_lite.retrieval.milvus")
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(SystemExit, match=r"^error: pymilvus is not installed; .*searchr1_lite\[milvus\]"):
        searchr1("index", "milvus", tmp_path / "c.jsonl", "--to", "milvus:a.db")


def test_another_dimension_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(milvus, "load_encoder", lambda name: hash_encoder(16))
    with pytest.raises(MilvusError, match="its dimension is 32, but 16 is needed"):
        MilvusRetriever(loaded, "0", CHECKSUM)


def test_a_missing_collection_is_refused(tmp_path):
    shutil.rmtree(tmp_path / "e.db", ignore_errors=True)
    milvus.connect(f"{tmp_path}/e.db", make=True).close()
    with pytest.raises(MilvusError, match="there is no such collection"):
        MilvusRetriever(f"milvus:{tmp_path}/e.db", "0", CHECKSUM)


def test_a_server_that_is_not_there_is_one_quick_error():
    began = time.monotonic()
    with pytest.raises(MilvusError, match=r"no Milvus at http://127\.0\.0\.1:1 within 10 s"):
        MilvusRetriever("milvus:http://127.0.0.1:1/wiki", "0", CHECKSUM)
    assert time.monotonic() - began < 20


def test_ids_used_twice_and_texts_too_long_are_refused(tmp_path):
    twice = write(tmp_path / "twice.jsonl", [*PASSAGES[:9], PASSAGES[3]])
    with pytest.raises(CorpusError, match=r"has 10 passages, but .* 9: some ids are used twice"):
        load_corpus_into(twice, f"milvus:{tmp_path}/t.db", "0", 4)
    long = write(tmp_path / "long.jsonl", [Passage("x", "t", "y" * 70_000)])
    with pytest.raises(CorpusError, match="passage 'x': its text has more than 65,535 bytes"):
        load_corpus_into(long, f"milvus:{tmp_path}/l.db", "0", 4)


@pytest.mark.parametrize("place", ["", "a.json", "http://h:1", "http://h/a/b", "a.db?x", "a.db?search=all"])
def test_addresses_that_are_none(place):
    with pytest.raises(MilvusError, match="is no address of a Milvus collection"):
        parse_address(f"milvus:{place}")


def test_addresses():
    assert parse_address("milvus:a/b.db") == ("a/b.db", "passages", "fused")
    assert parse_address("milvus:http://h:19530/wiki?search=bm25") == ("http://h:19530", "wiki", "bm25")


def test_the_command_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match="error: no corpus file at"):
        searchr1("index", "milvus", tmp_path / "none.jsonl", "--to", f"milvus:{tmp_path}/c.db", "--encoder", "0")


def test_recall_on_real_passages_is_near_that_of_flat(tmp_path, monkeypatch):
    """600 passages of HotpotQA with MiniLM; all 15,011 are in data/results/benchmarks/milvus.json."""
    if not HOTPOT.is_dir():
        pytest.skip("no real data beside the project (../shared/data/hotpotqa)")
    encoder = encoders.load_encoder("minilm")
    monkeypatch.setattr(milvus, "load_encoder", lambda name: encoder)
    passages = load_corpus(str(HOTPOT / "corpus.jsonl.gz"))[:600]
    questions = [one.question for one in read_questions(HOTPOT / "questions.jsonl.gz")[:60]]
    load_corpus_into(write(tmp_path / "c.jsonl", passages), f"milvus:{tmp_path}/h.db", "minilm", 200)
    for search, ours in (("dense", DenseRetriever.build(passages, encoder)), ("bm25", BM25Retriever.build(passages))):
        theirs = MilvusRetriever(f"milvus:{tmp_path}/h.db?search={search}", "minilm", corpus_checksum(passages))
        pairs = zip(ids(ours.search(questions, 10)), ids(theirs.search(questions, 10)), strict=True)
        overlap = [len(set(a) & set(b)) / len(a) for a, b in pairs if a]
        assert sum(overlap) / len(overlap) > (0.98 if search == "dense" else 0.9)
