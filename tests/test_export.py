"""training/export.py: the parquet that Search-R1 trains from, column for column, and back again without a loss."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from conftest import searchr1
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from searchr1_lite.config import ROOT
from searchr1_lite.tasks.questions import load_questions, read_questions
from searchr1_lite.training import export as module
from searchr1_lite.training.export import export, training_table
from searchr1_lite.types import Question

SHARED = Path(ROOT).parent / "shared/data"
# written out from Search-R1's scripts/data_process/qa_search_train_merge.py
TARGET = pa.struct([("target", pa.list_(pa.string()))])
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("golden_answers", pa.list_(pa.string())),
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", TARGET)])),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64())])),
    ]
)
REWARDED = ["nq", "hotpotqa"]  # among others: verl/trainer/main_ppo.py, _select_rm_score_fn
PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as "
    "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: "
)


def sets(folder: Path) -> str:
    """Two sets with the same ids, each a folder."""
    for name, question in (("nq", " who sang it first\t"), ("hotpotqa", "Which of them?")):
        metadata = {"metadata": {"type": "bridge"}} if name == "hotpotqa" else {}
        rows = [{"id": f"train_{i}", "question": question, "golden_answers": ["A", "B"]} | metadata for i in range(2)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"{folder / 'nq'}+{folder / 'hotpotqa'}"


def test_columns_types_and_contents(tmp_path: Path) -> None:
    out = tmp_path / "made/here/train.parquet"
    export(sets(tmp_path), "train", out)
    schema = parquet.read_schema(out).remove_metadata()
    assert schema.remove(8).equals(COLUMNS)
    assert schema.field(8).equals(pa.field("metadata", pa.struct([("type", pa.string())])))
    first, _, _, last = parquet.read_table(out).to_pylist()
    assert first == {
        "id": "train_0",
        "question": "who sang it first?",
        "golden_answers": ["A", "B"],
        "data_source": "nq",
        "prompt": [{"role": "user", "content": PROMPT + "who sang it first?\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["A", "B"]}},
        "extra_info": {"split": "train", "index": 0},
        "metadata": None,
    }
    assert (last["question"], last["data_source"]) == ("Which of them?", "hotpotqa")
    assert last["metadata"] == {"type": "bridge"}
    assert last["prompt"][0]["content"] == PROMPT + "Which of them?\n"
    assert last["extra_info"] == {"split": "train", "index": 3}  # the original has 1, as the second NQ question


def test_what_the_trainer_reads(tmp_path: Path) -> None:
    """As verl/utils/dataset/rl_dataset.py, ray_trainer.py and main_ppo.py read a row."""
    out = tmp_path / "train.parquet"
    export(sets(tmp_path), "train", out)
    rows = [row for _, row in pd.read_parquet(out).iterrows()]
    groups = [row["extra_info"]["index"] for row in rows]
    assert len(set(groups)) == len(rows)  # no two questions share a GRPO group
    for row in rows:
        assert row["data_source"] in REWARDED
        assert [message["role"] for message in row["prompt"].tolist()] == ["user"]
        assert list(row["reward_model"]["ground_truth"]["target"]) == ["A", "B"]


def test_what_was_exported_loads_as_before(tmp_path: Path) -> None:
    out = tmp_path / "train.parquet"
    for source in (sets(tmp_path), str(tmp_path / "hotpotqa"), "toy"):
        export(source, "train", out)
        before, after = load_questions(source, "train"), load_questions(str(out), "train")
        assert [(q.id, q.golden_answers) for q in after] == [(q.id, q.golden_answers) for q in before]
        assert [q.question for q in after] == [q.question.strip().removesuffix("?") + "?" for q in before]
        assert [q.metadata for q in after] == [{"split": "train"} | q.metadata for q in before]
        again = tmp_path / "again.parquet"
        export(str(out), "train", again)
        same = [name for name in COLUMNS.names]  # metadata now has the split
        assert parquet.read_table(again, columns=same).equals(parquet.read_table(out, columns=same))


words = st.text(min_size=1, max_size=8).filter(str.strip)
rows = st.tuples(
    st.sampled_from(["nq", "hotpotqa"]), st.builds(Question, words, words, st.lists(words, min_size=1).map(tuple))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=1, max_size=6, unique_by=lambda row: (row[0], row[1].id)))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, pairs: list) -> None:
    out = tmp_path_factory.getbasetemp() / "any.parquet"
    parquet.write_table(training_table(pairs, "train"), out)
    several = len({name for name, _ in pairs}) > 1
    found = read_questions(out)
    assert [q.id for q in found] == [f"{name}/{q.id}" if several else q.id for name, q in pairs]
    assert [q.golden_answers for q in found] == [q.golden_answers for _, q in pairs]
    for was, now in zip((q for _, q in pairs), found, strict=True):
        text = was.question.strip()
        assert now.question == (text if text[-1] == "?" else text + "?")


def test_metadata_of_no_one_type_is_left_out_aloud(capsys: pytest.CaptureFixture) -> None:
    """PopQA's was: a title that is a number in one row (FlashRAG issue 132)."""
    pairs = [("popqa", Question(str(i), "Q?", ("A",), {"title": title})) for i, title in enumerate(["x", 1984])]
    table = training_table(pairs, "test")
    assert table.schema.equals(COLUMNS) and table.num_rows == 2
    assert "note: without metadata, whose values are of more than one type" in capsys.readouterr().out


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "train.parquet"
    searchr1("export", sets(tmp_path), "--split", "train", "--out", out)
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 4 questions, id, question, golden_answers, data_source") and "note" not in said
    searchr1("export", "toy", "--split", "test", "--out", out)
    assert "note: Search-R1 stops at the data_source toy; it knows nq, triviaqa" in capsys.readouterr().out
    source = sets(tmp_path)
    searchr1("export", source, "--split", "train", "--out", out, "--data-source", "musique")
    assert "note" not in capsys.readouterr().out
    assert set(parquet.read_table(out)["data_source"].to_pylist()) == {"musique"}
    assert [q.id for q in read_questions(out)] == ["nq/train_0", "nq/train_1", "hotpotqa/train_0", "hotpotqa/train_1"]


def test_a_failed_command_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "train.parquet"
    export("toy", "train", out)
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=r"error: .*no questions in split 'dev'; there are test, train"):
        searchr1("export", "toy", "--split", "dev", "--out", out)

    def full_disk(table, path):
        Path(path).write_bytes(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.parquet, "write_table", full_disk)
    with pytest.raises(SystemExit, match=r"error: .*No space left on device"):
        searchr1("export", "toy", "--split", "test", "--out", out)
    assert out.read_bytes() == before


def test_real_questions(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("no real data beside the project (../shared/data)")
    for name, count in {"nq": 3610, "bamboogle": 125}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl.gz").symlink_to(SHARED / name / "questions.jsonl.gz")
        out = tmp_path / f"{name}.parquet"
        assert export(str(tmp_path / name), "test", out).schema.equals(COLUMNS)
        before, after = load_questions(str(tmp_path / name), "test"), load_questions(str(out), "test")
        assert len(after) == count
        assert [(q.id, q.golden_answers) for q in after] == [(q.id, q.golden_answers) for q in before]
    both = export(f"{tmp_path / 'nq'}+{tmp_path / 'bamboogle'}", "test", tmp_path / "test.parquet")
    assert [info["index"] for info in both["extra_info"].to_pylist()] == list(range(3735))
    assert set(both["data_source"].to_pylist()) == {"nq", "bamboogle"}
