"""retrieval/build.py, manifest.py: every kind against flat, kills, changed corpora, damaged files, full disks."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
from hash_encoder import QUERIES, hash_encoder, made_passages
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.retrieval import build, dense
from searchr1_lite.retrieval.index import BuildError, CorpusFile, build_index, open_index
from searchr1_lite.retrieval.corpus import CorpusError, corpus_checksum
from searchr1_lite.retrieval.dense import DenseRetriever
from searchr1_lite.retrieval.encoders import EncoderError
from searchr1_lite.retrieval.index import IndexMismatchError
from searchr1_lite.types import Passage, Retriever

KINDS = ["flat", "hnsw", "ivf-sq8", "ivf-pq", "faiss:IVF20,PQ8x4fs", "faiss:PCA16,IVF20,SQ8", "faiss:SQ8", "bm25"]
NUMBER = 1200


def quiet(_: str) -> None:
    pass


def make(folder: Path, kind: str, passages=None, shard: int = 500, encoder=None) -> Path:
    encoder = None if kind == "bm25" else encoder or hash_encoder()
    build_index(made_passages(NUMBER) if passages is None else passages, folder, kind, encoder, shard, quiet)
    return folder


def found(retriever: Retriever, k: int = 5) -> list[list[tuple[str, float]]]:
    return [[(hit.passage.id, hit.score) for hit in row] for row in retriever.search(QUERIES, k)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_what_flat_finds_and_the_same_in_memory(kind: str, tmp_path: Path) -> None:
    passages, folder = made_passages(NUMBER), make(tmp_path / "a" / "index", kind)
    opened = open_index(folder, None if kind == "bm25" else hash_encoder())
    assert list(opened.passages) == passages and [path.name for path in folder.parent.iterdir()] == ["index"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["passages"]) == (kind, NUMBER)
    assert manifest["corpus_checksum"] == corpus_checksum(passages)
    if kind == "bm25":
        return
    assert found(opened) == found(DenseRetriever.build(passages, hash_encoder(), kind))
    exact = found(DenseRetriever.build(passages, hash_encoder()), 3)
    same = [len({i for i, _ in a} & {i for i, _ in b}) / 3 for a, b in zip(found(opened, 3), exact, strict=True)]
    coarse = {"ivf-pq": 0.5, "faiss:IVF20,PQ8x4fs": 0.1, "faiss:PCA16,IVF20,SQ8": 0.2}  # by chance: 0.0025
    assert np.mean(same) >= coarse.get(kind, 0.96)
    assert manifest["search"] == dense.settings_of(opened.index)
    if kind.startswith("ivf"):
        assert manifest["search"] == {"nprobe": 30} and manifest["lists"]  # fewer lists than NPROBE


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 900), st.integers(300, 800), st.sampled_from(["flat", "hnsw", "ivf-sq8", "ivf-pq", "bm25"]))
def test_shards_of_any_size_give_the_same_index(tmp_path_factory, shard: int, number: int, kind: str) -> None:
    folder, passages = tmp_path_factory.mktemp("shards"), made_passages(number)
    shard = max(shard, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "BLOCK", 190)  # several of them
        a, b = make(folder / "a", kind, passages, shard), make(folder / "b", kind, passages, 10_000)
    a, b = files_of(a), files_of(b)
    for files in (a, b):
        for name in [name for name in files if name.endswith(".arrow") or name == "manifest.json"]:
            del files[name]
    assert a and a == b


KILLED = """
import sys, time
from pathlib import Path
from hash_encoder import hash_encoder, made_passages
from searchr1_lite.retrieval.index import build_index
kind, folder, slow = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
print("ready", flush=True)
build_index(made_passages(1200), folder, kind, None if kind == "bm25" else hash_encoder(), 200,
    lambda _: time.sleep(slow))
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
def test_killed_it_goes_on_to_the_same_index(kind: str, tmp_path: Path) -> None:
    killed, folder = kill_often(kind, tmp_path / "killed", 2, random.Random(1), 0.02)
    if (tmp_path / "killed.building").exists():  # killed after the renaming
        make(folder, kind)
    make(tmp_path / "whole", kind, shard=200)
    a, b = files_of(folder), files_of(tmp_path / "whole")
    assert killed and a == b
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


class StoppedError(Exception):
    pass


def stop_after(passages: list[Passage]):
    yield from passages
    raise StoppedError


def test_finished_shards_are_not_encoded_again(tmp_path: Path) -> None:
    passages, encoder = made_passages(NUMBER), hash_encoder()
    with pytest.raises(StoppedError):
        make(tmp_path / "index", "flat", stop_after(passages[:1100]), encoder=encoder)
    assert not (tmp_path / "index").exists() and len(encoder.model.texts) == 1001  # with the query that asks dimension
    encoder.model.texts.clear()
    said = []
    build_index(iter(passages), tmp_path / "index", "flat", encoder, 500, said.append)
    assert len(encoder.model.texts) == 201 and said[0].startswith("passages: 500")
    assert files_of(make(tmp_path / "other", "flat", passages)) == files_of(tmp_path / "index")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda ps: [Passage("id0", "Other", "text"), *ps[1:]], "passages 1 to 500 are others now"),
        (lambda ps: ps[:500], "it ends after 500 passages now"),
        (lambda ps: [*ps[:600], *ps[:600:-1]], None),  # behind what is finished, so nothing is lost
    ],
)
def test_a_corpus_that_changes_between_kill_and_resume_is_refused(changed, message, tmp_path: Path) -> None:
    passages = made_passages(NUMBER)
    with pytest.raises(StoppedError):
        make(tmp_path / "index", "flat", stop_after(passages[:1000]))
    if message is None:
        passages = passages[:1000] + changed(passages)[1000:]
        make(tmp_path / "index", "flat", made_passages(1000) + [Passage(f"new{i}", "New", "text") for i in range(7)])
        assert len(open_index(tmp_path / "index", hash_encoder()).passages) == 1007
        return
    with pytest.raises(BuildError, match=f"the corpus has changed .*{message}; delete that folder"):
        make(tmp_path / "index", "flat", changed(passages))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("kind", ["flat", "ivf-sq8", "bm25"])
def test_what_an_unfinished_shard_left_is_not_taken_for_one(kind: str, tmp_path: Path, monkeypatch) -> None:
    """Killed just before a shard's mark, or before the end; then the corpus has that shard no more, or one more."""
    real = build.write_json

    def killed(file: Path, value) -> None:
        if file.name == "shard-00002.json":
            raise KeyboardInterrupt
        real(file, value)

    monkeypatch.setattr(build, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "index", kind)
    assert (tmp_path / "index.building/index/passages-00002.arrow").exists()
    monkeypatch.undo()
    monkeypatch.setattr(build, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "index", kind, made_passages(1000))
    monkeypatch.undo()
    shutil.copytree(tmp_path / "index.building", tmp_path / "more.building")
    with pytest.raises(BuildError, match="whose corpus_checksum is"):
        make(tmp_path / "more", kind, made_passages(1500))
    make(tmp_path / "index", kind, made_passages(1000))
    assert len(open_index(tmp_path / "index", None if kind == "bm25" else hash_encoder()).passages) == 1000


def test_an_unfinished_build_of_something_else_is_not_mixed_in(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        make(tmp_path / "index", "flat", stop_after(made_passages(600)))
    for kind, shard, encoder, message in (
        ("hnsw", 500, None, "whose kind is 'flat', and now it is 'hnsw'"),
        ("flat", 400, None, "whose shard is 500"),
        ("flat", 500, hash_encoder(seed=1), "whose encoder is"),
    ):
        with pytest.raises(BuildError, match=message):
            make(tmp_path / "index", kind, shard=shard, encoder=encoder)


def test_two_builds_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    def meanwhile():
        yield from made_passages(500)
        with pytest.raises(BuildError, match="another process is building this index"):
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
    with pytest.raises(IndexMismatchError, match="its format is 1, but 2 is needed"):
        open_index(folder, hash_encoder())
    for text, message in (("{", "is not JSON"), ("[]", "its format is None"), ("\udc80", "not JSON")):
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
    build_index(passages, tmp_path / "taken", kind, encoder, 500, quiet, vectors=file)
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
            build_index(passages, tmp_path / str(number), "flat", hash_encoder(), 500, quiet, vectors=file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CorpusError, match="no whole"):
        build_index(passages, tmp_path / "cut", "flat", hash_encoder(), 500, quiet, vectors=file)


def test_ids_are_used_once(tmp_path: Path) -> None:
    passages = made_passages(NUMBER)
    with pytest.raises(CorpusError, match="passage 1,101 of the corpus has the id 'id3', which one before it has"):
        make(tmp_path / "index", "flat", [*passages[:1100], passages[3], *passages[1100:]])


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    for folder in (tmp_path / "notes", tmp_path / "notes/mine.txt"):
        with pytest.raises(BuildError, match="is there already"):
            make(folder, "flat")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "flat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "notes"]


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # nobody: root may write anywhere
        with pytest.raises(BuildError, match=r"could not be written \(.*Permission denied.*Make room or name another"):
            make(tmp_path / "locked/index", "flat", made_passages(9))
    finally:
        if root:
            os.seteuid(0)
    assert not any((tmp_path / "locked").iterdir())


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-pq", "bm25"])
def test_a_full_disk_is_one_clear_error_and_the_build_goes_on(kind: str, tmp_path: Path, monkeypatch) -> None:
    """By a limit on the size of files, raised step by step, so that each kind of file fails in its turn."""
    monkeypatch.setattr(build, "_check_room", lambda *_: None)
    passages, limits, failed = made_passages(300), resource.getrlimit(resource.RLIMIT_FSIZE), 0
    whole = make(tmp_path / "whole", kind, passages, 100)
    largest = max(path.stat().st_size for path in whole.iterdir())
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in [*range(500, largest, largest // 12), largest - 1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(BuildError, match=r"could not be written.*the same call goes on from where it was"):
                make(tmp_path / "index", kind, passages, 100)
            assert not (tmp_path / "index").exists()
            failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert failed > 10
    assert files_of(make(tmp_path / "index", kind, passages, 100)) == files_of(whole)


def test_a_disk_that_is_full_at_the_end_of_an_array_is_noticed(tmp_path: Path) -> None:
    """`np.save` loses the last bytes without a word, where it can write to the file by itself."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64_026, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            dense.write_vectors(np.zeros((500, 32), np.float32), tmp_path / "vectors.npy")  # 64,128 bytes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_killed_after_the_renaming_it_only_clears_up(tmp_path: Path) -> None:
    before = files_of(make(tmp_path / "index", "flat"))
    (tmp_path / "index.building").mkdir()
    (tmp_path / "index.building/plan.json").write_text("{}")
    assert files_of(make(tmp_path / "index", "flat")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.fixture
def small_disk(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_small_disk_is_refused_before_and_survived_in_the_middle(small_disk: Path, monkeypatch) -> None:
    with pytest.raises(BuildError, match="the index does not fit in"):
        make(small_disk / "index", "flat", made_passages(6000))
    monkeypatch.setattr(build, "_check_room", lambda *_: None)
    (small_disk / "filler").write_bytes(bytes(450_000))
    with pytest.raises(BuildError, match=r"No space left.*0\.00 GB are free"):
        make(small_disk / "index", "flat")
    assert not (small_disk / "index").exists()
    (small_disk / "filler").unlink()
    opened = open_index(make(small_disk / "index", "flat"), hash_encoder())
    assert found(opened) == found(DenseRetriever.build(made_passages(NUMBER), hash_encoder()))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "index"
    rows = [{"id": i, "contents": f'"Title {i}"\nsome words'} for i in range(30)]
    corpus.write_text("\n".join(map(json.dumps, rows)))

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["build", "--corpus", *map(str, arguments)])
        build.main()
        return capsys.readouterr().out

    assert len(CorpusFile(corpus)) == 30  # without a newline at the end
    said = run(corpus, "--kind", "bm25", "--out", out, "--shard", 8)
    assert "30 passages; about" in said and "passages: 24 of 30, " in said and f"{out}: whole" in said
    assert open_index(out).search(["title"], 1)[0][0].passage.id == "0"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["corpus"] == {"file": "corpus.jsonl", "bytes": corpus.stat().st_size}
    with pytest.raises(SystemExit, match=r"error: .*is there already"):
        run(corpus, "--kind", "bm25", "--out", out)
    shutil.rmtree(out)
    corpus.write_text(corpus.read_text() + "\nnot JSON\n")
    with pytest.raises(SystemExit, match=r"error: .*corpus\.jsonl:31: not JSON"):
        run(corpus, "--kind", "bm25", "--out", out, "--shard", 8)
    with pytest.raises(SystemExit, match=r"error: the corpus .* cannot be read"):
        run(tmp_path / "none.jsonl", "--kind", "bm25", "--out", tmp_path / "b")


def test_flat_and_lists_are_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    """The files are FAISS's own: read as FAISS reads them, they hold the same."""
    for kind in ("flat", "ivf-sq8"):
        folder = make(tmp_path / kind, kind)
        opened, read = open_index(folder, hash_encoder()), faiss.read_index(str(folder / "index.faiss"))
        assert found(opened) == found(DenseRetriever(opened.passages, opened.encoder, read))
        with open("/proc/self/maps") as maps:
            assert str(folder / "index.faiss") in maps.read()
