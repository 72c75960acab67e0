"""retrieval/wiki18.py on a stand-in for the hub: damage, full disks, and work that was cut off."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest

from searchr1_lite.cli import main
from searchr1_lite.retrieval import wiki18

PASSAGES = 300
FILES = ["wiki-18.jsonl.gz", "part_aa", "part_ab"]


def corpus_bytes() -> bytes:
    rows = [{"id": str(i), "contents": f'"Title {i}"\ntext of passage {i}, naïve'} for i in range(PASSAGES)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def index_bytes() -> bytes:
    index = faiss.IndexFlatIP(8)
    index.add(np.random.default_rng(0).normal(size=(PASSAGES, 8)).astype(np.float32))
    return faiss.serialize_index(index).tobytes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The hub's files; the corpus in two gzip members, the index cut in the middle of a number."""
    folder = tmp_path / "source"
    folder.mkdir()
    corpus, index = corpus_bytes(), index_bytes()
    (folder / "wiki-18.jsonl.gz").write_bytes(gzip.compress(corpus[:999]) + gzip.compress(corpus[999:]))
    (folder / "part_aa").write_bytes(index[:5002])
    (folder / "part_ab").write_bytes(index[5002:])
    return folder


@pytest.fixture
def command(tmp_path: Path, capsys):
    """Run the command on tmp_path/wiki; what it printed, or the message it stopped with."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["index", "wiki18", "--out", str(tmp_path / "wiki"), *arguments])
        return str(stop.value.code) if stop.value.code else capsys.readouterr().out

    return run


class Hub:
    """In the place of the hub client: files from a folder, one of which may break off or arrive altered, once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched, self.cut, self.altered = folder, [], None, None

    def get_paths_info(self, repo: str, names: list[str], repo_type: str) -> list[SimpleNamespace]:
        assert repo_type == "dataset" and repo.startswith("PeterJinGo/wiki-18-")
        contents = {name: (self.folder / name).read_bytes() for name in reversed(names)}
        hashes = {name: SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
        return [SimpleNamespace(path=name, size=len(data), lfs=hashes[name]) for name, data in contents.items()]

    def download(self, repo: str, name: str, repo_type: str, local_dir: Path) -> str:
        self.fetched.append(name)
        data = (self.folder / name).read_bytes()
        assert not [
            other for other in FILES if other != name and (local_dir / other).exists()
        ]  # the plan counts one download at a time
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        (local_dir / ".cache/notes").write_text("the client's own", encoding="utf-8")
        if name == self.cut:
            self.cut = None
            (local_dir / f"{name}.incomplete").write_bytes(data[:1000])
            raise ConnectionError("the line went dead")
        (local_dir / f"{name}.incomplete").unlink(missing_ok=True)
        if name == self.altered:
            self.altered = None
            data = data[:500] + bytes([data[500] ^ 1]) + data[501:]
        (local_dir / name).write_bytes(data)
        return str(local_dir / name)


@pytest.fixture
def hub(monkeypatch, source: Path) -> Hub:
    hub = Hub(source)
    monkeypatch.setattr(wiki18, "HfApi", lambda: hub)
    monkeypatch.setattr(wiki18, "hf_hub_download", hub.download)
    return hub


def assert_whole(out: Path) -> None:
    assert (out / "wiki-18.jsonl").read_bytes() == corpus_bytes()
    assert (out / "e5_Flat.index").read_bytes() == index_bytes()
    left = {path.name for path in out.rglob("*") if path.is_file()}
    assert left == {"wiki-18.jsonl", "e5_Flat.index"}


def disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_the_corpus_alone_then_the_index_then_nothing(command, hub, tmp_path) -> None:
    command("--no-index")
    assert hub.fetched == ["wiki-18.jsonl.gz"]
    assert not (tmp_path / "wiki/e5_Flat.index").exists()
    for _ in range(2):
        command()
        assert hub.fetched == FILES
        assert_whole(tmp_path / "wiki")


def test_the_plan_is_printed_and_nothing_done(command, hub, tmp_path) -> None:
    plan = command("--plan")
    assert "PeterJinGo/wiki-18-e5-index/part_aa: 0.00 GB -> e5_Flat.index" in plan
    assert "needs about" in plan and "are free" in plan
    assert not (tmp_path / "wiki").exists() and not hub.fetched


def test_the_disk_must_hold_the_worst_moment(command, hub, source, tmp_path, monkeypatch) -> None:
    """By hand: what is made, and the one part that is being joined, lying beside it."""
    corpus, first, second = ((source / name).stat().st_size for name in FILES)
    unpacked = int(3.5 * corpus)
    most = max(corpus + unpacked, unpacked + 2 * first, unpacked + first + 2 * second)
    disk(monkeypatch, most - 1)
    assert f"error: it does not fit in {tmp_path / 'wiki'}" in command()
    assert not (tmp_path / "wiki").exists()
    disk(monkeypatch, most)
    assert "error" not in command()


def test_a_download_that_breaks_off_goes_on(command, hub, tmp_path, source, monkeypatch) -> None:
    hub.cut = "part_ab"
    message = command()
    assert "could not be had from the hub (ConnectionError: the line went dead); the same command goes on" in message
    second = (source / "part_ab").stat().st_size
    disk(monkeypatch, 2 * second - 1000)  # part_aa is joined, and 1,000 bytes of part_ab are there
    hub.fetched.clear()
    assert "error" not in command()
    assert hub.fetched == ["part_ab"]
    assert_whole(tmp_path / "wiki")


@pytest.mark.parametrize("name", FILES)
def test_an_altered_download_is_removed_and_fetched_again(command, hub, tmp_path, name) -> None:
    hub.altered = name
    assert f"error: {name} is cut off or altered" in command()
    assert not (tmp_path / "wiki/downloads" / name).exists()
    assert "error" not in command()
    assert hub.fetched.count(name) == 2 and len(hub.fetched) == 4
    assert_whole(tmp_path / "wiki")


@pytest.mark.parametrize("left", [b"more", b"\0" * 9_999])
def test_what_lies_behind_the_joined_parts_is_cut_off(command, hub, tmp_path, left) -> None:
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki/e5_Flat.index.new").write_bytes(index_bytes() + left)
    (tmp_path / "wiki/wiki-18.jsonl.new").write_bytes(left)
    command()
    assert_whole(tmp_path / "wiki")


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_an_interruption_leaves_nothing_that_passes_for_whole(command, hub, tmp_path, monkeypatch, stop_at) -> None:
    """The stop_at-th file is half unpacked or joined when Ctrl-C comes."""
    real, calls = shutil.copyfileobj, []

    def stops(read, write, size) -> None:
        calls.append(1)
        if len(calls) == stop_at:
            write.write(read.read(9000 if stop_at == 1 else 1234))  # of the corpus, more than its .gz file has
            raise KeyboardInterrupt
        real(read, write, size)

    monkeypatch.setattr(shutil, "copyfileobj", stops)
    assert command() == "130"
    assert not (tmp_path / "wiki/e5_Flat.index").exists()
    assert (tmp_path / "wiki/wiki-18.jsonl").exists() == (stop_at > 1)
    hub.fetched.clear()
    command()
    assert hub.fetched == FILES[stop_at - 1 :]
    assert_whole(tmp_path / "wiki")


def test_offline_there_is_one_error_that_says_what_to_do(command, monkeypatch, tmp_path) -> None:
    """The real client, as it is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = command()
    assert "error: wiki-18 could not be had from the hub" in message and "\n" not in message
    assert not (tmp_path / "wiki").exists()
