"""tasks/questions.py: strict rows, splits that neither overlap nor move, whole sets by name, ids that cannot collide.

No hub is reached: its datasets are folders of its shape, which the `datasets` library reads as it reads a repository.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.tasks import questions as module
from searchr1_lite.tasks.questions import QuestionError, hash_split, load_questions, read_questions

SHARED = Path(ROOT).parent / "shared/data"


def row(key: str, **more) -> dict:
    return {"id": key, "question": f"Who is {key}?", "golden_answers": ["A", "B"], "metadata": {}} | more


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict], **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [r | {"metadata": r["metadata"] or None} if "metadata" in r else r for r in rows]  # {} has no parquet type
    parquet.write_table(pa.table(pa.Table.from_pylist(rows).to_pydict() | columns), path)
    return path


def merged(source: str, index: int, split: str = "train", **more) -> dict:
    """A row as PeterJinGo/nq_hotpotqa_train has it: ids and indices start again with each source."""
    return row(f"{split}_{index}", metadata={"type": "bridge", "context": {"title": ["T"]}}) | {
        "data_source": source,
        "prompt": [{"role": "user", "content": "Answer ..."}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["A", "B"]}},
        "extra_info": {"split": split, "index": index},
        **more,
    }


def test_a_row_becomes_a_question(tmp_path: Path) -> None:
    [one, two] = read_questions(write(tmp_path / "q.jsonl", [row("a", metadata={"hops": 2}), row("b", metadata=None)]))
    assert (one.id, one.question, one.golden_answers, one.metadata) == ("a", "Who is a?", ("A", "B"), {"hops": 2})
    assert two.metadata == {}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row("b", golden_answers=[]), "list of at least one answer"),
        (row("b", golden_answers="A"), "list of at least one answer"),
        (row("b", golden_answers=None), "list of at least one answer"),
        (row("b", golden_answers=[" ", ""]), "one of them not blank"),
        (row("b", golden_answers=["A", 3]), "must be strings"),
        (row("b", question="  "), "question 'b' is empty"),
        ({"id": "b", "golden_answers": ["A"]}, "'question' is missing"),
        (row("b", metadata="x"), "'metadata' of question 'b' must be an object"),
        (row("a"), "'a' is used twice"),
        ("text", "expected a JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad, says: str) -> None:
    path = write(tmp_path / "q.jsonl", [row("a"), bad])
    with pytest.raises(QuestionError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value)


def test_a_file_that_names_splits_is_divided_by_them(tmp_path: Path) -> None:
    rows = [row(str(i), metadata={"split": "dev" if i % 3 else "train"}) for i in range(9)]
    path = write(tmp_path / "q.jsonl", rows)
    assert [q.id for q in load_questions(str(path), "train")] == ["0", "3", "6"]
    assert [q.id for q in load_questions(str(path), "all")] == [str(i) for i in range(9)]
    with pytest.raises(QuestionError, match="no questions in split 'test'; there are dev, train"):
        load_questions(str(path), "test")
    half = write(tmp_path / "half.jsonl", [*rows, row("x")])
    with pytest.raises(QuestionError, match=r"9 of 10 rows have metadata\.split"):
        load_questions(str(half), "train")


def test_a_file_without_splits_is_divided_by_id(tmp_path: Path) -> None:
    rows = [row(f"q{i}") for i in range(2000)]
    path = str(write(tmp_path / "q.jsonl", rows))
    train, test = ([q.id for q in load_questions(path, split)] for split in ("train", "test"))
    assert sorted(train + test) == sorted(r["id"] for r in rows)
    assert [q.id for q in load_questions(path, "all")] == [r["id"] for r in rows]
    assert 0.76 < len(train) / 2000 < 0.84
    some = str(write(tmp_path / "some.jsonl", rows[500:900]))
    assert set(q.id for q in load_questions(some, "test")) == set(test) & {r["id"] for r in rows[500:900]}
    # by hand: the first 8 bytes of sha256("a") are ca978112ca1bbdca (0.791 of 2**64), of sha256("c") 2e7d2c03a9507ae2,
    # of sha256("g") cd0aa9856147b6c5 (0.801)
    assert [hash_split(key) for key in "acg"] == ["train", "train", "test"]
    with pytest.raises(QuestionError, match="no questions in split 'dev'; there are test, train"):
        load_questions(path, "dev")


def test_joined_sources_keep_their_ids_apart(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name / "q.jsonl", [row("same", metadata={"split": "train"})]) for name in "ab")
    questions = load_questions(f"{first}+{second}", "train")
    assert [q.id for q in questions] == ["a-q/same", "b-q/same"]
    with pytest.raises(QuestionError, match="share the id 'same'; name each source once"):
        load_questions(f"{first}+{first}", "train")
    with pytest.raises(QuestionError, match="empty source"):
        load_questions(f"{first}+", "train")


def test_sources_that_share_ids(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name / "q.jsonl", [row("1", data_source="nq")]) for name in "ab")
    with pytest.raises(QuestionError, match="two of the joined sources share the id '1'"):
        load_questions(f"{first}+{second}", "train")
    # "a" + "b/1" and "a/b" + "1" would both be "a/b/1"
    sly = write(tmp_path / "sly.jsonl", [row("b/1", data_source="a"), row("1", data_source="a/b")])
    with pytest.raises(QuestionError, match="share the id 'a/b/1'"):
        read_questions(sly)


def test_a_merged_parquet_keeps_its_sources_apart(tmp_path: Path) -> None:
    rows = [merged("nq", 0, metadata=None), merged("nq", 1, metadata=None), merged("hotpotqa", 0)]
    path = write_parquet(tmp_path / "train.parquet", [*rows, merged("popqa", 0, "test")])
    train = load_questions(str(path), "train")
    assert [q.id for q in train] == ["nq/train_0", "nq/train_1", "hotpotqa/train_0"]
    assert (train[2].question, train[2].golden_answers) == ("Who is train_0?", ("A", "B"))
    assert train[0].metadata == {"split": "train", "data_source": "nq"}
    assert train[2].metadata == {"split": "train", "type": "bridge", "data_source": "hotpotqa"}
    assert [q.id for q in load_questions(str(path), "test")] == ["test_0"]  # of one set: nothing to keep apart
    assert [q.id for q in read_questions(path)][3] == "popqa/test_0"


def test_a_parquet_is_read_by_columns(tmp_path: Path) -> None:
    """Prompts and HotpotQA's paragraphs are most of the training mix: they are not even decoded."""
    path = write_parquet(tmp_path / "train.parquet", [merged("nq", 0)])
    columns = {*module.COLUMNS, "data_source", "metadata.type", "extra_info.split", "extra_info.index"}
    assert set(module._wanted(parquet.read_schema(path), path)) == columns


@pytest.mark.parametrize("name", ["id", "question", "golden_answers"])
def test_a_parquet_without_a_column(tmp_path: Path, name: str) -> None:
    rows = [{key: value for key, value in merged("nq", 0).items() if key != name}]
    with pytest.raises(QuestionError, match=rf"train\.parquet: no column '{name}' .*; there are .*data_source, prompt"):
        read_questions(write_parquet(tmp_path / "train.parquet", rows))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"golden_answers": [["A"], None]}, "list of at least one answer"),
        ({"golden_answers": [["A"], ["A", None]]}, "must be strings"),
        ({"id": ["a", "a"]}, "the id 'a' is used twice in 'nq'"),
        ({"id": ["a", None]}, "'id' must be a string"),
        ({"question": ["Who?", ""]}, "question 'b' is empty"),
        ({"metadata": [{"hops": 1}, {"hops": 2}], "extra_info": [None, "x"]}, "'extra_info' of question 'b' must be"),
    ],
)
def test_a_bad_row_of_a_parquet_is_named(tmp_path: Path, columns: dict, says: str) -> None:
    rows = [merged("nq", 0, id="a"), merged("nq", 1, id="b")]
    path = write_parquet(tmp_path / "train.parquet", rows, **columns)
    with pytest.raises(QuestionError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:row 2: ") and says in str(caught.value)


def test_answers_that_are_no_list(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [row("a"), row("b")], golden_answers=["A", "B"])
    with pytest.raises(QuestionError, match=r"train\.parquet:row 1: question 'a' needs 'golden_answers', a list"):
        read_questions(path)


def test_broken_utf8(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 7)))
    words = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"Who?\xffy?")])
    table = pa.table({"id": ["a", "b"], "question": words, "golden_answers": [["A"], ["B"]]})
    parquet.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(QuestionError, match=r"q\.parquet: the parquet file is cut off or damaged \(.*0xff"):
        read_questions(tmp_path / "q.parquet")
    path = write(tmp_path / "q.jsonl", [row("a"), row("b")])
    path.write_bytes(path.read_bytes().replace(b"Who is b?", b"Who is \xff?"))
    with pytest.raises(QuestionError, match=r"q\.jsonl:2: not UTF-8 \(.*0xff"):
        read_questions(path)


def test_a_download_that_was_cut_off(tmp_path: Path) -> None:
    rows = [merged("nq", index) for index in range(500)]
    path = write_parquet(tmp_path / "train.parquet", rows)
    whole = path.read_bytes()
    hole = len(whole) // 4  # the footer is there, and a part of the data is not
    for damaged in (whole[: len(whole) // 2], whole[:3], b"", whole[:4] + bytes(hole) + whole[4 + hole :]):
        path.write_bytes(damaged)
        with pytest.raises(QuestionError, match=r"train\.parquet: the parquet file is cut off .*fetch it again"):
            read_questions(path)
    packed = tmp_path / "q.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(row(str(i))) + "\n" for i in range(500)).encode())[:-200])
    with pytest.raises(QuestionError, match=r"q\.jsonl\.gz:\d+: the gzip file is cut off or damaged"):
        read_questions(packed)


def test_an_empty_or_missing_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "q.parquet", [row("a")], id=[], question=[], golden_answers=[], metadata=[])
    with pytest.raises(QuestionError, match=r"q\.parquet: the file is empty, it holds no questions"):
        read_questions(path)
    for ending in ("parquet", "jsonl"):  # which is no hub name
        with pytest.raises(QuestionError, match=rf"no questions file at .*nowhere\.{ending}"):
            load_questions(f"some/nowhere.{ending}", "train")
    with pytest.raises(QuestionError, match=r"no questions called 'hotpot', .*there are toy, paper, nq, .*, nq_"):
        load_questions("hotpot", "train")


def test_a_folder_is_split_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "nq"
    write(folder / "train.jsonl", [row("1"), row("2", metadata={"split": "elsewhere"})])  # the file's name counts
    write_parquet(folder / "dev.parquet", [row("3")])
    assert [q.id for q in load_questions(str(folder), "train")] == ["1", "2"]
    assert [q.id for q in load_questions(str(folder), "test")] == ["3"]  # its dev: the original's rule
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps(row("4")).encode() + b"\n"))
    assert [q.id for q in load_questions(str(folder), "test")] == ["4"]
    assert [q.id for q in load_questions(f"{folder}/+toy", "test")][:2] == ["nq/4", "toy/test-0"]
    says = r"nq: no validation\.jsonl or .*; there is dev\.parquet, test\.jsonl\.gz, train"
    with pytest.raises(QuestionError, match=says):
        load_questions(str(folder), "validation")
    write(folder / "test.jsonl", [row("5")])
    with pytest.raises(QuestionError, match=r"both test\.jsonl and test\.jsonl\.gz; keep one"):
        load_questions(str(folder), "test")
    (folder / "test.jsonl").unlink(), (folder / "test.jsonl.gz").unlink(), (folder / "dev.parquet").unlink()
    with pytest.raises(QuestionError, match="no test"):  # the original would test on train
        load_questions(str(folder), "test")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with nothing in data/cache."""
    monkeypatch.setattr(module, "ROOT", tmp_path / "project")
    return tmp_path / "project"


def test_the_papers_sets_are_whole(root: Path) -> None:
    sizes = {"nq": 3610, "triviaqa": 11313, "popqa": 14267, "hotpotqa": 7405, "2wikimultihopqa": 12576}
    sizes |= {"musique": 2417, "bamboogle": 125}
    for name, size in sizes.items():
        split = "test" if name in ("nq", "triviaqa", "popqa", "bamboogle") else "dev"
        lines = [row(f"{split}_{i}") for i in range(size)]
        write(root / "data/cache/FlashRAG_datasets" / name / f"{split}.jsonl", lines)
    everything = load_questions("paper", "test")
    assert len(everything) == 51713
    assert Counter(q.id.partition("/")[0] for q in everything) == sizes
    assert everything[0].id == "nq/test_0" and everything[-1].id == "bamboogle/test_124"
    assert [q.id for q in load_questions("musique", "test")] == [f"dev_{i}" for i in range(2417)]
    for changed in (lines[:-1], [*lines, row("more")]):
        write(root / "data/cache/FlashRAG_datasets/bamboogle/test.jsonl", changed)
        says = rf"bamboogle: {len(changed)} questions, but .* has 125; .*'RUC-NLPIR/FlashRAG_datasets:bamboogle'"
        with pytest.raises(QuestionError, match=says):
            load_questions("bamboogle", "test")
        assert len(load_questions("RUC-NLPIR/FlashRAG_datasets:bamboogle", "test")) == len(changed)


def test_the_training_mix_is_whole(root: Path) -> None:
    folder = root / "data/cache/nq_hotpotqa_train"
    write_parquet(folder / "train.parquet", [merged("nq", 0), merged("hotpotqa", 0)])
    with pytest.raises(QuestionError, match=r"nq_hotpotqa_train: 2 questions, but the train set .* has 169,615"):
        load_questions("nq_hotpotqa_train", "train")
    assert [q.id for q in load_questions(str(folder), "train")] == ["nq/train_0", "hotpotqa/train_0"]


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """The two hub datasets as small folders of the same files; what was asked of the library is noted."""
    import datasets

    flashrag = tmp_path / "hub/FlashRAG_datasets"
    files = {"nq": ["train", "test"], "popqa": ["test"], "hotpotqa": ["train", "dev"]}
    card = [f"  - split: {split}\n    path: {name}/{split}.jsonl" for name in files for split in files[name]]
    head = "- config_name: {}\n  data_files:"
    lines = [line for name in files for line in [head.format(name), *(c for c in card if f" {name}/" in c)]]
    for name, splits in files.items():
        for split in splits:
            rows = [row(f"{split}_{i}", metadata={"title": "x" if i else 7, "context": ["..."]}) for i in range(3)]
            if name == "nq":  # it has no such column
                rows = [{key: value for key, value in r.items() if key != "metadata"} for r in rows]
            write(flashrag / name / f"{split}.jsonl", rows)
    (flashrag / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    for split in ("train", "test"):
        rows = [merged(name, i, split, metadata=None) for name in ("nq", "hotpotqa") for i in range(2)]
        rows[3]["metadata"] = {"type": "bridge", "context": ["..."]}
        write_parquet(tmp_path / f"hub/nq_hotpotqa_train/{split}.parquet", rows)
    asked, real = [], datasets.load_dataset

    def load(repository: str, config: str | None = None, **options):
        asked.append((repository, config, options))
        folder = tmp_path / "hub" / repository.partition("/")[2]
        return real(str(folder), config, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_set_from_the_hub(hub: list, monkeypatch: pytest.MonkeyPatch) -> None:
    train = load_questions("nq", "train")
    assert [(q.id, q.golden_answers, q.metadata) for q in train][:2] == [(f"train_{i}", ("A", "B"), {}) for i in (0, 1)]
    assert hub == [("RUC-NLPIR/FlashRAG_datasets", "nq", {})]
    with pytest.raises(QuestionError, match="popqa: 3 questions, but the test set of the paper has 14,267"):
        load_questions("popqa", "test")
    monkeypatch.setitem(module.ROWS, ("popqa", "test"), 3)
    assert [q.metadata for q in load_questions("popqa", "test")] == [{"title": 7}, {"title": "x"}, {"title": "x"}]
    assert load_questions("RUC-NLPIR/FlashRAG_datasets:hotpotqa", "test")[0].id == "dev_0"
    both = load_questions("nq+hotpotqa", "train")
    assert [q.id for q in both][2:4] == ["nq/train_2", "hotpotqa/train_0"]
    with pytest.raises(QuestionError, match=r"FlashRAG_datasets:popqa: no split 'train'; there are test"):
        load_questions("popqa", "train")


def test_the_training_mix_from_the_hub(hub: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.ROWS, ("nq_hotpotqa_train", "train"), 4)
    profile = load_profile("qwen2.5-3b-4bit")
    train = load_questions(profile.questions, profile.train_split)
    assert [q.id for q in train] == ["nq/train_0", "nq/train_1", "hotpotqa/train_0", "hotpotqa/train_1"]
    assert (train[3].golden_answers, train[3].metadata) == (("A", "B"), {"type": "bridge", "data_source": "hotpotqa"})
    [(repository, config, options)] = hub
    assert (repository, config) == ("PeterJinGo/nq_hotpotqa_train", None)
    assert set(options["columns"]) == {"id", "question", "golden_answers", "data_source", "metadata"}  # not the prompts
    with pytest.raises(QuestionError, match="4 questions, but the test set of the paper has 51,713"):
        load_questions(profile.questions, profile.test_split)


def command_in(error: BaseException) -> str:
    [line] = [line for line in str(error).splitlines() if line.startswith("  hf download ")]
    return line.strip()


def test_a_missing_set_says_how_to_get_it(root: Path) -> None:
    """HF_HUB_OFFLINE is set for all tests, so this is what the library itself says."""
    flashrag = "hf download RUC-NLPIR/FlashRAG_datasets --repo-type dataset"
    with pytest.raises(QuestionError, match="data/cache/FlashRAG_datasets/nq can be given as questions") as caught:
        load_questions("nq", "test")
    assert command_in(caught.value) == f"{flashrag} --include 'nq/*' --local-dir data/cache/FlashRAG_datasets"
    with pytest.raises(QuestionError) as caught:  # one command for all that is asked for
        load_questions("paper", "test")
    assert command_in(caught.value).count("--include") == 7 and "'musique/*'" in str(caught.value)
    with pytest.raises(QuestionError) as caught:
        load_questions("nq_hotpotqa_train", "train")
    mix = "hf download PeterJinGo/nq_hotpotqa_train --repo-type dataset --local-dir data/cache/nq_hotpotqa_train"
    assert command_in(caught.value) == mix
    with pytest.raises(QuestionError, match=r"'owner/sets:own': neither a file .* \(ConnectionError: ") as caught:
        load_questions("owner/sets:own", "train")
    own = "hf download owner/sets --repo-type dataset --include 'own/*' --local-dir data/cache/sets"
    assert command_in(caught.value) == own
    write(root / "data/cache/sets/own/train.jsonl", [row("1")])  # what the command leaves is found
    assert [q.id for q in load_questions("owner/sets:own", "train")] == ["1"]


def test_real_questions(root: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("no real data beside the project (../shared/data)")
    for name, count in {"hotpotqa": 685, "nq": 3610, "bamboogle": 125}.items():
        path = str(SHARED / name / "questions.jsonl.gz")
        assert len(read_questions(path)) == count
        assert len(load_questions(path, "train")) + len(load_questions(path, "test")) == count
        folder = root / "data/cache/FlashRAG_datasets" / name
        folder.mkdir(parents=True)
        (folder / "test.jsonl.gz").symlink_to(path)
    both = load_questions("nq+bamboogle", "test")  # these two are the whole evaluation splits
    assert Counter(q.id.partition("/")[0] for q in both) == {"nq": 3610, "bamboogle": 125}
    with pytest.raises(QuestionError, match="hotpotqa: 685 questions, but the test set of the paper has 7,405"):
        load_questions("hotpotqa", "test")
