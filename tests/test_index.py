"""retrieval/index.py: every kind against flat, kills, other corpora, damaged files, full disks; names of retrievers."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hash_encoder import QUERIES, hash_encoder, made_passages
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.cli import main
from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.errors import UserError
from searchr1_lite.retrieval import dense, index
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.retrieval.controls import Empty, Oracle, Random
from searchr1_lite.retrieval.corpus import CorpusError, corpus_checksum
from searchr1_lite.retrieval.dense import DenseRetriever
from searchr1_lite.retrieval.encoders import EncoderError
from searchr1_lite.retrieval.index import (
    IndexMismatchError,
    Passages,
    build_index,
    load_retriever,
    open_index,
    write_passages,
)
from searchr1_lite.retrieval.remote import RemoteRetriever
from searchr1_lite.retrieval.rerank import Hybrid
from searchr1_lite.types import Passage, Retriever

KINDS = ["flat", "hnsw", "ivf-sq8", "ivf-pq", "faiss:IVF20,PQ8x4fs", "faiss:PCA16,IVF20,SQ8", "faiss:SQ8", "bm25"]
NUMBER = 1200
PASSAGES = [Passage(str(n), f"T{n}", f"word{n} shared") for n in range(20)]
EXPECTED = BM25Retriever.build(PASSAGES)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
passage = st.builds(Passage, text, text, text, st.booleans())


def make(folder: Path, kind: str, passages=None, shard: int = 500, encoder=None) -> Path:
    encoder = None if kind == "bm25" else encoder or hash_encoder()
    build_index(made_passages(NUMBER) if passages is None else passages, folder, kind, encoder, shard)
    return folder


def found(retriever: Retriever, k: int = 5) -> list[list[tuple[str, float]]]:
    return [[(hit.passage.id, hit.score) for hit in row] for row in retriever.search(QUERIES, k)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.builds(Passage, text, text, text, st.booleans()), min_size=1, max_size=15, unique_by=lambda p: p.id),
    st.data(),
)
def test_passages_on_disk_are_the_list_that_was_written(tmp_path_factory, passages, data) -> None:
    file = tmp_path_factory.mktemp("passages") / "passages.arrow"
    write_passages(iter(passages), file)
    stored = Passages(file)
    assert len(stored) == len(passages) and list(stored) == passages == [stored[i] for i in range(len(passages))]
    cut = data.draw(st.slices(len(passages)))
    assert stored[cut] == passages[cut] and stored[-1] == passages[-1] and stored.index(passages[0]) == 0
    for i in (len(passages), -len(passages) - 1):
        with pytest.raises(IndexError):
            stored[i]


def test_only_passages_that_are_read_are_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "passages.arrow"
    write_passages((Passage(f"{i}", "t", "x" * 1000) for i in range(30_000)), file)
    before = pa.total_allocated_bytes()
    stored = Passages(file)
    assert (stored[0].id, stored[29_999].id, sum(len(p.text) for p in stored)) == ("0", "29999", 30_000_000)
    assert pa.total_allocated_bytes() - before < 1_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_what_flat_finds_and_the_same_in_memory(kind: str, tmp_path: Path) -> None:
    passages, folder = made_passages(NUMBER), make(tmp_path / "a" / "index", kind)
    opened = open_index(folder, None if kind == "bm25" else hash_encoder())
    assert list(opened.passages) == passages and [path.name for path in folder.parent.iterdir()] == ["index"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["passages"], manifest["format"]) == (kind, NUMBER, 3)
    assert manifest["corpus_checksum"] == corpus_checksum(passages)
    if kind == "bm25":
        return
    assert found(opened) == found(DenseRetriever.build(passages, hash_encoder(), kind))
    exact = found(DenseRetriever.build(passages, hash_encoder()), 3)
    same = [len({i for i, _ in a} & {i for i, _ in b}) / 3 for a, b in zip(found(opened, 3), exact, strict=True)]
    coarse = {"ivf-pq": 0.5, "faiss:IVF20,PQ8x4fs": 0.1, "faiss:PCA16,IVF20,SQ8": 0.2}  # by chance: 0.0025
    assert np.mean(same) >= coarse.get(kind, 0.96)


@settings(deadline=None, max_examples=10)
@given(st.integers(30, 900), st.integers(300, 800), st.sampled_from(["flat", "hnsw", "ivf-sq8", "ivf-pq"]))
def test_shards_of_any_size_give_the_same_index(tmp_path_factory, shard: int, number: int, kind: str) -> None:
    folder, passages = tmp_path_factory.mktemp("shards"), made_passages(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "BLOCK", 190)  # several of them
        a, b = make(folder / "a", kind, passages, shard), make(folder / "b", kind, passages, 10_000)
    assert (a / "index.faiss").read_bytes() == (b / "index.faiss").read_bytes()


KILLED = """
import sys, time
from pathlib import Path
from hash_encoder import hash_encoder, made_passages
from searchr1_lite.retrieval import dense
from searchr1_lite.retrieval.index import build_index
kind, folder, slow = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
encode = dense.encode
dense.encode = lambda *args: time.sleep(slow) or encode(*args)
print("ready", flush=True)
build_index(made_passages(1200), folder, kind, None if kind == "bm25" else hash_encoder(), 200)
"""


def kill_often(kind: str, folder: Path, times: int, draw: random.Random, slow: float) -> tuple[int, Path]:
    """Build in processes of which `times` are killed at random moments; how many really were at work."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    killed = 0
    command = [sys.executable, "-c", KILLED, kind, str(folder), str(slow)]
    while not folder.exists():
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.readline()
            if killed < times:
                time.sleep(draw.uniform(0, 7 * slow + 0.3))
                process.send_signal(signal.SIGKILL)
            error = process.communicate()[1].decode()
        killed += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), error
        if folder.exists():
            open_index(folder, None if kind == "bm25" else hash_encoder())
    return killed, folder


@pytest.mark.parametrize("kind", ["ivf-pq", "bm25"])
def test_killed_it_resumes_to_the_same_index(kind: str, tmp_path: Path) -> None:
    killed, folder = kill_often(kind, tmp_path / "killed", 2, random.Random(1), 0.1)
    if (tmp_path / "killed.building").exists():  # killed after the renaming
        make(folder, kind)
    make(tmp_path / "whole", kind, shard=200)
    assert killed
    if kind == "bm25":  # bm25s numbers words by a set's order, which is another in each process
        assert found(open_index(folder)) == found(open_index(tmp_path / "whole"))
    else:
        assert files_of(folder) == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


class StoppedError(Exception):
    pass


def stop_in_shard(encoder, number: int) -> None:
    """Let the encoder fail once, at the shard that begins with this passage."""
    encode = encoder.model.encode_document

    def failing(texts: list[str], **options):
        if f"number {number}" in texts[0]:
            encoder.model.encode_document = encode
            raise StoppedError
        return encode(texts, **options)

    encoder.model.encode_document = failing


def test_finished_shards_are_not_encoded_again(tmp_path: Path) -> None:
    encoder = hash_encoder()
    stop_in_shard(encoder, 1000)
    with pytest.raises(StoppedError):
        make(tmp_path / "index", "flat", encoder=encoder)
    assert not (tmp_path / "index").exists() and len(encoder.model.texts) == 1001  # with the query that asks dimension
    encoder.model.texts.clear()
    make(tmp_path / "index", "flat", encoder=encoder)
    assert len(encoder.model.texts) == 201
    assert files_of(make(tmp_path / "other", "flat")) == files_of(tmp_path / "index")


def test_an_unfinished_build_of_something_else_is_not_mixed_in(tmp_path: Path) -> None:
    encoder = hash_encoder()
    stop_in_shard(encoder, 500)
    with pytest.raises(StoppedError):
        make(tmp_path / "index", "flat", encoder=encoder)
    for kind, passages, shard, encoder, message in (
        ("hnsw", NUMBER, 500, None, "whose kind is 'flat', and now it is 'hnsw'"),
        ("flat", NUMBER, 400, None, "whose shard is 500"),
        ("flat", NUMBER, 500, hash_encoder(seed=1), "whose encoder is"),
        ("flat", NUMBER - 1, 500, None, "whose (corpus_checksum|passages) is"),
    ):
        with pytest.raises(IndexMismatchError, match=message):
            make(tmp_path / "index", kind, made_passages(passages), shard, encoder)
    assert len(open_index(make(tmp_path / "index", "flat"), hash_encoder()).passages) == NUMBER


def test_two_builds_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    def meanwhile():
        yield from made_passages(500)
        with pytest.raises(IndexMismatchError, match="another process builds this index"):
            make(tmp_path / "index", "flat")

    make(tmp_path / "index", "flat", meanwhile())
    assert len(open_index(tmp_path / "index", hash_encoder()).passages) == 500


@pytest.mark.parametrize("kind", ["flat", "ivf-pq", "bm25"])
def test_a_flipped_bit_or_a_cut_file_is_refused(kind: str, tmp_path: Path) -> None:
    folder, encoder, draw = make(tmp_path / "index", kind), hash_encoder(), random.Random(0)
    for name in files_of(folder):
        file = folder / name
        whole = file.read_bytes()
        for at in [0, len(whole) - 1, *draw.choices(range(len(whole)), k=5)]:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(IndexMismatchError):
                open_index(folder, encoder)
        for part in (whole[:-2], whole[: len(whole) // 2], b"", whole + b"\0"):
            file.write_bytes(part)
            with pytest.raises(IndexMismatchError):
                open_index(folder, encoder, verify=False)  # sizes are always looked at
        file.unlink()
        with pytest.raises(IndexMismatchError, match=f"{name} is missing"):
            open_index(folder, encoder, verify=False)
        file.write_bytes(whole)
    open_index(folder, encoder)


def test_other_corpora_encoders_kinds_and_formats_are_refused(tmp_path: Path) -> None:
    passages, folder = made_passages(NUMBER), make(tmp_path / "index", "flat")
    open_index(folder, hash_encoder(name="moved/elsewhere"))  # a name may change, weights and prefixes may not
    with pytest.raises(IndexMismatchError, match="its encoder weights_sha256 is 'weights-32-0', but 'weights-32-1'"):
        open_index(folder, hash_encoder(seed=1))
    other = hash_encoder()
    with pytest.raises(IndexMismatchError, match="its encoder query_prefix is '', but 'query: '"):
        open_index(folder, type(other)("hash", other.weights_sha256, other.model, "query: "))
    for expected in ({"corpus_checksum": corpus_checksum(passages[::-1])}, {"kind": "hnsw"}, {"passages": 3}):
        with pytest.raises(IndexMismatchError, match=f"its {next(iter(expected))} is "):
            open_index(folder, hash_encoder(), expected=expected)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(IndexMismatchError, match="its format is 1, but 3 is needed"):
        open_index(folder, hash_encoder())
    for text, message in (
        ("{", "is not a JSON"),
        ("[]", "its format is None"),
        ("3", "is not a JSON"),
        ("\udc80", "not a JSON"),
    ):
        (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(IndexMismatchError, match=message):
            open_index(folder, hash_encoder())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda rows: rows.__setitem__((7, 3), np.nan),
            r"gives passage 'id507' a vector that is not of finite numbers",
        ),
        (lambda rows: rows.__setitem__((0, 0), np.inf), r"gives passage 'id500' a vector that is not of finite"),
        (lambda rows: rows[:-1], r"float32 of shape \(499, 32\) for passage 'id500' and on, float32 of \(500, 32\)"),
        (lambda rows: rows[:, :-1], r"shape \(500, 31\) for passage 'id500' and on, float32 of \(500, 32\)"),
    ],
)
def test_vectors_that_cannot_be_are_refused_by_passage(break_it, message: str, tmp_path: Path) -> None:
    encoder = hash_encoder()
    encode = encoder.model.encode_document

    def broken(texts: list[str], **_) -> np.ndarray:
        rows = encode(texts)
        changed = break_it(rows) if "number 500" in texts[0] else None
        return rows if changed is None else changed

    encoder.model.encode_document = broken
    with pytest.raises(EncoderError, match=message):
        make(tmp_path / "index", "flat", encoder=encoder)
    assert not (tmp_path / "index").exists()
    del encoder.model.encode_document  # the encoder is mended
    assert len(open_index(make(tmp_path / "index", "flat", encoder=encoder), encoder).passages) == NUMBER


@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [
        ("flat", 0, "nothing to index"),
        ("bm25", 0, "nothing to index"),
        ("ivf-pq", 255, "ivf-pq learns its 256 codes from 256 passages or more, got 255"),
        ("faiss:IVF99,Flat", 50, "50 passages are not enough for IVF99,Flat"),
        ("dense", 9, "there is no index of kind 'dense'; there are flat, hnsw"),
        ("faiss:Nonsense7", 9, "FAISS makes no index 'Nonsense7' of 32 numbers"),
        ("faiss:PQ5", 9, "FAISS makes no index 'PQ5' of 32 numbers"),
    ],
)
def test_what_cannot_be_indexed_is_refused(kind: str, number: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "index", kind, made_passages(number))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("kind", ["flat", "ivf-sq8"])
@pytest.mark.parametrize("suffix", ["index", "npy"])
def test_vectors_that_are_there_are_taken_over(kind: str, suffix: str, tmp_path: Path) -> None:
    """The same index, without encoding more than a few passages of each shard."""
    passages, whole = made_passages(NUMBER), make(tmp_path / "whole", kind)
    file = tmp_path / f"vectors.{suffix}"
    vectors = hash_encoder().encode_passages(passages)
    if suffix == "npy":
        np.save(file, vectors)
    else:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        faiss.write_index(index, str(file))
    encoder = hash_encoder()
    build_index(passages, tmp_path / "taken", kind, encoder, 500, vectors=file)
    assert len(encoder.model.texts) == 1 + 3 * 4  # one for the dimension, four a shard
    same = {name: its for name, its in files_of(tmp_path / "taken").items() if name != "manifest.json"}
    assert same == {name: its for name, its in files_of(whole).items() if name != "manifest.json"}
    assert json.loads((tmp_path / "taken/manifest.json").read_text())["vectors_taken_from"] == file.name


def test_vectors_of_something_else_are_not_taken_over(tmp_path: Path) -> None:
    passages, file = made_passages(NUMBER), tmp_path / "vectors.npy"
    vectors = hash_encoder().encode_passages(passages)
    wrong = {
        "1,199 vectors": vectors[1:],
        "is an array of 1,200": vectors.astype(np.float64),
        r"\['id500', .* other vectors": np.concatenate([vectors[:500], vectors[501:], vectors[:1]]),
        "other vectors": hash_encoder(16).encode_passages(passages),
    }
    for number, (message, rows) in enumerate(wrong.items()):
        np.save(file, rows)
        with pytest.raises(CorpusError, match=message):
            build_index(passages, tmp_path / str(number), "flat", hash_encoder(), 500, vectors=file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CorpusError, match="no whole"):
        build_index(passages, tmp_path / "cut", "flat", hash_encoder(), 500, vectors=file)


def test_ids_are_used_once(tmp_path: Path) -> None:
    passages = made_passages(NUMBER)
    with pytest.raises(CorpusError, match="passage 1,101 of the corpus has the id 'id3', used before"):
        make(tmp_path / "index", "flat", [*passages[:1100], passages[3], *passages[1100:]])


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    for folder in (tmp_path / "notes", tmp_path / "notes/mine.txt"):
        with pytest.raises(IndexMismatchError, match="is there already"):
            make(folder, "flat")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "flat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "notes"]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-pq"])
def test_a_full_disk_is_an_error_and_the_build_resumes(kind: str, tmp_path: Path) -> None:
    """By a limit on the size of files, raised step by step, so that each kind of file fails in its turn."""
    passages, limits, failed = made_passages(300), resource.getrlimit(resource.RLIMIT_FSIZE), 0
    whole = make(tmp_path / "whole", kind, passages, 100)
    largest = max(path.stat().st_size for path in whole.iterdir())
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in [*range(500, largest, largest // 6), largest - 1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises((OSError, RuntimeError), match="File too large"):
                make(tmp_path / "index", kind, passages, 100)
            assert not (tmp_path / "index").exists()
            failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert failed > 5
    assert files_of(make(tmp_path / "index", kind, passages, 100)) == files_of(whole)


def test_killed_after_the_renaming_it_only_clears_up(tmp_path: Path) -> None:
    before = files_of(make(tmp_path / "index", "flat"))
    (tmp_path / "index.building").mkdir()
    (tmp_path / "index.building/plan.json").write_text("{}")
    assert files_of(make(tmp_path / "index", "flat")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "index"
    rows = [{"id": i, "contents": f'"Title {i}"\nsome words'} for i in range(30)]
    corpus.write_text("\n".join(map(json.dumps, rows)))

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["index", "build", *map(str, arguments)])
        return str(stop.value.code or 0) + capsys.readouterr().out

    assert run(corpus, "--out", out) == f"0{out}: whole\n"
    assert open_index(out).search(["title"], 1)[0][0].passage.id == "0"
    assert "is there already" in run(corpus, "--out", out)
    shutil.rmtree(out)
    corpus.write_text(corpus.read_text() + "\nnot JSON\n")
    assert "corpus.jsonl:31: not JSON" in run(corpus, "--out", out)
    assert run(tmp_path / "none.jsonl", "--out", tmp_path / "b").startswith("error: no corpus file at")


def test_flat_and_lists_are_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    """The files are FAISS's own: read as FAISS reads them, they hold the same."""
    for kind in ("flat", "ivf-sq8"):
        folder = make(tmp_path / kind, kind)
        opened, read = open_index(folder, hash_encoder()), faiss.read_index(str(folder / "index.faiss"))
        assert found(opened) == found(DenseRetriever(opened.passages, opened.encoder, read))
        with open("/proc/self/maps") as maps:
            assert str(folder / "index.faiss") in maps.read()


# From a setting to the retriever that it names


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
    monkeypatch.setattr(index, "build_index", lambda *given, **more: calls.append(1) or build(*given, **more))
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
    build_index(PASSAGES, tmp_path / "index", "bm25")
    profile = load_profile("tiny", retriever=f"index:{tmp_path / 'index'}", corpus="there/is/none.jsonl")
    assert load_retriever(profile).search(["word4"], 1) == EXPECTED.search(["word4"], 1)


def test_joined_by_plus_they_are_fused(tmp_path):
    build_index(PASSAGES[::-1], tmp_path / "other", "bm25")
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
        ({"retriever": "nowhere_at_all:Search"}, "there is no module 'nowhere_at_all' in"),
        ({"retriever": "empty", "reranker": "nowhere/to-be-found"}, "reranker 'nowhere/to-be-found'"),
    ],
)
def test_what_cannot_be_had_is_one_error(settings, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
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
