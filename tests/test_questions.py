"""tasks/questions.py: strict rows, splits that neither overlap nor move, joined sources that cannot collide."""

import json
from pathlib import Path

import pytest

from searchr1_lite.config import ROOT
from searchr1_lite.tasks.questions import QuestionError, hash_split, load_questions, read_questions

SHARED = Path(ROOT).parent / "shared/data"


def row(key: str, **more) -> dict:
    return {"id": key, "question": f"Who is {key}?", "golden_answers": ["A", "B"], "metadata": {}} | more


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


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
        (row("b", golden_answers=["A", " "]), "non-empty strings"),
        (row("b", golden_answers=["A", 3]), "non-empty strings"),
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
    with pytest.raises(QuestionError, match="name each source once"):
        load_questions(f"{first}+{first}", "train")
    with pytest.raises(QuestionError, match="empty source"):
        load_questions(f"{first}+", "train")


@pytest.fixture
def hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of the hub's form: datasets reads a folder of split files as it reads a repository."""
    import datasets

    folder = tmp_path / "set"
    write(folder / "train.jsonl", [row("1", metadata={"type": "bridge"}), row("2", metadata={"type": "comparison"})])
    write(folder / "dev.jsonl", [row("3", metadata={"type": "bridge"})])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "dev")}
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config: real("json", data_files=files, cache_dir=str(tmp_path / "cache")),
    )
    return "owner/sets:nq"


def test_a_hub_set(hub_set: str, tmp_path: Path) -> None:
    train = load_questions(hub_set, "train")
    assert [(q.id, q.golden_answers) for q in train] == [("1", ("A", "B")), ("2", ("A", "B"))]
    assert [q.id for q in load_questions(hub_set, "test")] == ["3"]  # its dev: the original's rule
    with pytest.raises(QuestionError, match="no split 'validation'; there are train, dev"):
        load_questions(hub_set, "validation")
    both = load_questions(f"{hub_set}+owner/sets:hotpotqa", "train")
    assert [q.id for q in both] == ["nq/1", "nq/2", "hotpotqa/1", "hotpotqa/2"]


def test_a_hub_set_that_cannot_be_had_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/sets' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(QuestionError, match=r"'owner/sets:nq': neither a file .*load_dataset\('owner/sets', 'nq'\)"):
        load_questions("owner/sets:nq", "train")


def test_a_missing_file_is_no_hub_name() -> None:
    with pytest.raises(QuestionError, match=r"no questions file at .*nowhere\.jsonl"):
        load_questions("some/nowhere.jsonl", "train")


def test_toy_questions() -> None:
    train, test = load_questions("toy", "train"), load_questions("toy", "test")
    assert {q.metadata["hops"] for q in train} == {1, 2, 3} == {q.metadata["hops"] for q in test}
    assert not {q.id for q in train} & {q.id for q in test}


def test_real_questions() -> None:
    if not SHARED.is_dir():
        pytest.skip("no real data beside the project (../shared/data)")
    for name, count in {"hotpotqa": 685, "nq": 3610, "bamboogle": 125}.items():
        path = str(SHARED / name / "questions.jsonl.gz")
        assert len(read_questions(path)) == count
        assert len(load_questions(path, "train")) + len(load_questions(path, "test")) == count
