"""From a setting to the retriever that it names."""

import threading
from pathlib import Path

import pytest
from conftest import OverlapRetriever

from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.retrieval import load
from searchr1_lite.retrieval.build import build_index
from searchr1_lite.retrieval.controls import Empty, Oracle, Random
from searchr1_lite.retrieval.hybrid import Hybrid
from searchr1_lite.retrieval.load import load_retriever
from searchr1_lite.retrieval.manifest import IndexMismatchError
from searchr1_lite.retrieval.remote import RemoteRetriever
from searchr1_lite.retrieval.sparse import BM25Retriever
from searchr1_lite.types import Passage

PASSAGES = [Passage(str(n), f"T{n}", f"word{n} shared") for n in range(20)]
EXPECTED = BM25Retriever.build(PASSAGES)


def loaded(retriever: str, cache_dir: Path | None = None, passages=PASSAGES, **settings):
    return load_retriever(load_profile("tiny", retriever=retriever, **settings), passages, cache_dir)


def test_an_index_is_built_once_then_opened(tmp_path, capsys):
    for did in ("built", "opened"):
        assert loaded("bm25", tmp_path / "index").search(["word3"], 2) == EXPECTED.search(["word3"], 2)
        assert f"bm25 index of 20 passages {did} in" in capsys.readouterr().out
    with pytest.raises(IndexMismatchError, match="corpus_checksum"):
        loaded("bm25", tmp_path / "index", PASSAGES[:5])


def test_processes_that_want_the_same_index_build_it_once(tmp_path, monkeypatch, capsys):
    calls, build = [], build_index
    monkeypatch.setattr(load, "build_index", lambda *given, **more: calls.append(1) or build(*given, **more))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(loaded("bm25", tmp_path / "i").search(["word7"], 1)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1] and found == [EXPECTED.search(["word7"], 1)] * 4


def test_a_folder_needs_no_corpus(tmp_path):
    build_index(PASSAGES, tmp_path / "index", "bm25", progress=str)
    profile = load_profile("tiny", retriever=f"index:{tmp_path / 'index'}", corpus="there/is/none.jsonl")
    assert load_retriever(profile).search(["word4"], 1) == EXPECTED.search(["word4"], 1)


def test_joined_by_plus_they_are_fused(tmp_path):
    build_index(PASSAGES[::-1], tmp_path / "other", "bm25", progress=str)
    retriever = loaded(f"bm25+index:{tmp_path / 'other'}", tmp_path / "cache")
    assert isinstance(retriever, Hybrid) and len(retriever.retrievers) == 2
    assert [hit.passage.id for hit in retriever.search(["word4"], 3)[0]] == ["4"]


def test_controls(tmp_path):
    assert isinstance(loaded("empty"), Empty)
    random = loaded("random", seed=7)
    assert isinstance(random, Random) and random.seed == 7
    oracle = loaded("oracle", tmp_path / "cache")
    assert isinstance(oracle, Oracle) and oracle.search(["word3"], 1) == EXPECTED.search(["word3"], 1)


def test_a_service_gets_the_token_of_the_environment(monkeypatch):
    monkeypatch.setenv("SEARCHR1_TOKEN", "secret")
    remote = loaded("http://127.0.0.1:1/retrieve")
    assert isinstance(remote, RemoteRetriever) and remote.client.headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever": "http://"}, None),
        ({"retriever": "http://:80"}, "is no address"),
        ({"retriever": "http://x:port"}, "is no address"),
        ({"retriever": "empty", "reranker": "nowhere/to-be-found"}, "reranker 'nowhere/to-be-found'"),
    ],
)
def test_what_cannot_be_had_is_one_error(settings, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=message):
        loaded(**settings)


def test_an_extra_that_is_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "searchr1_lite.retrieval.remote", None)
    with pytest.raises(ConfigError, match=r"pip install 'searchr1_lite\[service\]'"):
        loaded("http://127.0.0.1:1")


def test_reranking_is_put_on_top(monkeypatch, tmp_path):
    class Backwards:
        def predict(self, pairs, **_):
            import numpy as np

            return np.arange(len(pairs), dtype=np.float32)

    from searchr1_lite.retrieval import rerank

    monkeypatch.setattr(rerank, "load_reranker", lambda name, device: Backwards())
    found = loaded("bm25", tmp_path / "i", reranker="any").search(["shared"], 20)[0]
    assert [hit.passage for hit in found] == [hit.passage for hit in EXPECTED.search(["shared"], 20)[0]][::-1]
    assert len(found) == len(OverlapRetriever(PASSAGES).search(["shared"], 20)[0])
