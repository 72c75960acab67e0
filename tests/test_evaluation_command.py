"""The evaluation command, end to end on the tiny base: figures from the written rows, cuts, refusals."""

import gzip
import json
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import searchr1

from searchr1_lite.cli import parse_settings
from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.evaluation import evaluate as command
from searchr1_lite.evaluation.evaluate import evaluate
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.retrieval.corpus import load_corpus
from searchr1_lite.rollouts.policy import load_policy, with_adapter
from searchr1_lite.rollouts.rows import trajectory_to_row
from searchr1_lite.tasks.questions import held_out, load_questions

RUN = ROOT / "data/results/runs/tiny-masked-seed0"
MADE_ANEW = {"date", "machine", "versions", "command"}


@pytest.fixture(scope="module", autouse=True)
def every_answer_at_once():
    """Rows are written, and said, one by one, so that files can be compared byte by byte."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SECONDS_BETWEEN_WRITES", 0)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files of toy questions that share their ids, as sets of the hub may: 2 with one hop, 2 with two."""
    folder = tmp_path_factory.mktemp("questions")
    toy = load_questions("toy", "test")
    for name, hops, count in (("near", 1, 2), ("far", 2, 2)):
        chosen = [question for question in toy if question.metadata["hops"] == hops][:count]
        rows = [
            {"id": f"{number}", "question": one.question, "golden_answers": [*one.golden_answers]}
            | {"metadata": {"hops": hops, "split": "test"}}
            for number, one in enumerate(chosen)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"{folder}/near.jsonl+{folder}/far.jsonl"


def settings(sources):
    """Batches of 3 and 1; unquantised, which is faster on a CPU; hot, so that samples differ from greedy answers."""
    return ["quantization=none", "temperature=1.6", f"questions={sources}", "rollout_rows=3", "eval_questions=100"]


def rows_of(folder):
    with gzip.open(folder / "trajectories.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def said(folder):
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """The trained tiny model, evaluated without a cut, greedily and sampled."""
    out = tmp_path_factory.mktemp("evaluations") / "whole"
    searchr1("evaluate", "--out", str(out), "--adapter", str(RUN), *settings(sources))
    return out


def test_every_question_is_answered_and_scored_once_a_decoding(finished, sources):
    asked = [question.id for question in load_questions(sources, "test")]
    rows = rows_of(finished)
    assert Counter((row["decoding"], row["question"]["id"]) for row in rows) == Counter(
        (decoding, key) for decoding in ("greedy", "sampled") for key in asked
    )
    for row in rows:
        written = "".join(turn["text"] for turn in row["turns"])
        answer = written.rpartition("<answer>")[2].partition("</answer>")[0].strip().lower()
        golden = [one.lower() for one in row["question"]["golden_answers"]]
        assert row["exact_match"] == float(answer in golden)
        assert row["substring_match"] == float(any(one in answer for one in golden))
        assert 0 <= row["exact_match"] <= row["f1"] <= 1


def test_figures_are_those_of_the_written_rows(finished):
    rows, result = rows_of(finished), said(finished)
    for decoding in ("greedy", "sampled"):
        mine = [row for row in rows if row["decoding"] == decoding]
        groups = {"": mine}
        for row in mine:
            groups.setdefault(row["question"]["id"].partition("/")[0], []).append(row)
        assert sorted(len(group) for group in groups.values()) == [2, 2, 4]
        assert set(result[decoding]["by_data_set"]) == set(groups) - {""}
        for name, group in groups.items():
            summary = result[decoding]["by_data_set"][name] if name else result[decoding]
            assert summary["questions"] == len(group)
            for key, of in (
                ("exact_match", lambda row: row["exact_match"]),
                ("f1", lambda row: row["f1"]),
                ("substring_match", lambda row: row["substring_match"]),
                ("mean_searches", lambda row: sum(turn["query"] is not None for turn in row["turns"])),
                ("invalid_actions", lambda row: sum(turn["action"] == "invalid" for turn in row["turns"])),
                ("answer_rate", lambda row: row["turns"][-1]["action"] == "answer"),
                ("response_length", lambda row: row["response_length"]),
            ):
                assert summary[key] == pytest.approx(sum(map(of, group)) / len(group)), (decoding, name, key)
            low, high = summary["exact_match_interval"]
            assert low <= summary["exact_match"] <= high
        sets = result[decoding]["by_data_set"].values()
        assert result[decoding]["macro_average"] == pytest.approx(sum(one["exact_match"] for one in sets) / 2)
        low, high = result[decoding]["macro_average_interval"]
        assert low <= result[decoding]["macro_average"] <= high


def test_the_command_answers_as_the_function_does(finished, sources):
    chosen = parse_settings(settings(sources))
    profile = load_profile(RUN / "config.yaml", **chosen)
    policy = with_adapter(load_policy(profile), RUN / "adapter")
    retriever = BM25Retriever.build(load_corpus("toy"))
    summary, trajectories = evaluate(policy, held_out(profile), retriever, profile, greedy=False, seed=profile.seed)
    written = [row for row in rows_of(finished) if row["decoding"] == "sampled"]
    assert [trajectory_to_row(one)["turns"] for one in trajectories] == [row["turns"] for row in written]
    shared = set(summary) - {"seconds", "greedy", "retriever_calls"}
    assert {key: summary[key] for key in shared} == {key: said(finished)["sampled"][key] for key in shared}


def test_the_trained_model_searches_and_the_base_does_not(finished, sources, tmp_path, capsys):
    """Committed: exact match 1.0 after training, a search a hop; the base answers at once, nearly always wrong."""
    began = time.monotonic()
    searchr1("evaluate", "--out", str(tmp_path / "base"), "--decoding", "greedy", *settings(sources))
    assert 0 < said(tmp_path / "base")["greedy"]["seconds"] < time.monotonic() - began
    base, trained = said(tmp_path / "base"), said(finished)
    assert trained["greedy"]["exact_match"] >= 0.9
    assert trained["greedy"]["mean_searches_by_hops"]["2"] == 2.0
    assert 1.0 <= trained["greedy"]["mean_searches_by_hops"]["1"] <= 1.5  # it looks one of two up twice
    assert (base["greedy"]["exact_match"], base["greedy"]["mean_searches"]) == (0.0, 0.0)
    assert "sampled" not in base
    assert (base["adapter"], trained["adapter"]) == (None, str(RUN / "adapter"))
    assert (trained["quantization"], trained["seed"], trained["model"]) == ("none", 0, "data/tiny-base")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3].startswith("greedy, all: 4 questions, exact match 0.000 [0.000, 0.490]")


class Dies:
    """The retriever, until it has been asked `calls` times."""

    def __init__(self, retriever, calls):
        self.retriever, self.calls = retriever, calls

    def search(self, queries, k):
        self.calls -= 1
        if self.calls < 0:
            raise OSError("the server went away")
        return self.retriever.search(queries, k)


@pytest.mark.parametrize("calls", [0, 5])
def test_after_a_cut_it_goes_on_to_the_same_result(finished, sources, tmp_path, monkeypatch, capsys, calls):
    out = tmp_path / "cut"
    typed = ["--out", str(out), "--adapter", str(RUN), *settings(sources)]
    load = command.load_retriever
    with monkeypatch.context() as broken:
        broken.setattr(command, "load_retriever", lambda *given: Dies(load(*given), calls))
        with pytest.raises(SystemExit, match=r"^error: (the retriever failed|question .* its search failed)"):
            searchr1("evaluate", *typed)
    assert not (out / "evaluation.json").exists()
    answered = len(rows_of(out))
    assert answered == 0 if calls == 0 else 0 < answered < 8  # which, depends on what shared a call
    with (out / "trajectories.jsonl.gz").open("ab") as file:
        file.write(gzip.compress(b'{"half": "a ba')[:17])
    capsys.readouterr()
    searchr1("evaluate", *typed)
    assert (out / "trajectories.jsonl.gz").read_bytes() == (finished / "trajectories.jsonl.gz").read_bytes()
    again, whole = said(out), said(finished)
    for decoding in ("greedy", "sampled"):
        assert again[decoding].pop("seconds") > 0 and whole[decoding].pop("seconds") > 0
        assert again[decoding].pop("retriever_calls") >= whole[decoding].pop("retriever_calls") > 0  # asked twice
    assert {key: again[key] for key in set(again) - MADE_ANEW} == {key: whole[key] for key in set(whole) - MADE_ANEW}
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in finished.iterdir())


def test_finished_is_finished(finished, sources, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    searchr1("evaluate", "--out", str(finished), "--adapter", str(RUN), *settings(sources))
    assert "finished already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "adapter", "said"),
    [
        (["seed=1"], RUN, "seed: 0 there, 1 asked for"),
        (["--decoding", "sampled"], RUN, "decoding: 'both' there, 'sampled' asked for"),
        ([], None, "contents of adapter"),
        ([], RUN.with_name("tiny-masked-seed1"), "contents of adapter"),
        (["eval_questions=3"], RUN, "eval_questions: 100 there, 3 asked for"),
    ],
)
def test_another_evaluation_in_the_folder_is_refused(finished, sources, monkeypatch, more, adapter, said):
    monkeypatch.setattr(command, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    chosen = ["--adapter", str(adapter)] if adapter else []
    with pytest.raises(SystemExit, match=rf"^error: .*whole holds another run \(.*{said}"):
        searchr1("evaluate", "--out", str(finished), *chosen, "--profile", "tiny", *settings(sources), *more)


def test_questions_that_were_changed_since_are_noticed(finished, sources):
    near = Path(sources.partition("+")[0])
    before = near.read_bytes()
    near.write_bytes(before.replace(b'"golden_answers": ["', b'"golden_answers": ["not ', 1))
    with pytest.raises(SystemExit, match=r"^error: .*contents of questions"):
        searchr1("evaluate", "--out", str(finished), "--adapter", str(RUN), *settings(sources))
    near.write_bytes(before)


def test_a_training_run_is_not_evaluated_into(tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"^error: .*holds another run"):
        searchr1("evaluate", "--out", str(tmp_path / "run"), "--adapter", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: (out / "trajectories.jsonl.gz").write_bytes(b""), "trajectories.jsonl.gz was changed since"),
        (
            lambda out: command.write_json(out / "environment.json", said(out) | {"quantization": "nf4"}),
            "was begun with quantization nf4, which does not work here",
        ),
    ],
    ids=["rows lost", "4 bits there, none here"],
)
def test_what_was_begun_otherwise_is_not_gone_on_with(finished, sources, tmp_path, change, said):
    out = tmp_path / "cut"
    shutil.copytree(finished, out)
    command.write_json(out / "progress.json", {"answered": 4, "bytes": 99})
    change(out)
    (out / "evaluation.json").unlink()
    with pytest.raises(SystemExit, match=rf"^error: .*{said}"):
        searchr1("evaluate", "--out", str(out), "--adapter", str(RUN), *settings(sources))


def test_a_run_brings_its_profile_and_a_named_one_wins(tmp_path, monkeypatch):
    given = {}

    def note(out, profile, decoding, adapter):
        given.update(profile=profile, decoding=decoding, adapter=adapter)
        raise command.ConfigError("nothing is evaluated here")

    monkeypatch.setattr(command, "evaluate_into", note)
    shutil.copytree(RUN, tmp_path / "run")
    config = yaml.safe_load((RUN / "config.yaml").read_text(encoding="utf-8")) | {"topk": 5, "max_turns": 2}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for arguments, topk, max_turns in (
        (["--adapter", str(tmp_path / "run")], 5, 2),
        (["max_turns=1", "--adapter", str(tmp_path / "run"), "seed=4"], 5, 1),
        (["--adapter", str(tmp_path / "run"), "--profile", "tiny"], 3, 4),
        (["--adapter", str(tmp_path / "run/adapter")], 3, 4),
    ):
        with pytest.raises(SystemExit, match="error: nothing is evaluated here"):
            searchr1("evaluate", "--out", str(tmp_path / "out"), *arguments)
        assert (given["profile"].topk, given["profile"].max_turns) == (topk, max_turns)
        assert given["adapter"] == tmp_path / "run/adapter"
        assert given["decoding"] == "both"


def test_an_adapter_of_another_base_is_refused(tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(RUN, copied)
    described = json.loads((copied / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    described["base_model_name_or_path"] = "Qwen/Qwen2.5-3B"
    (copied / "adapter/adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    for folder in (copied, copied / "adapter"):
        with pytest.raises(SystemExit, match=r"was trained on Qwen/Qwen2.5-3B, but the model in use is data/tiny-base"):
            searchr1("evaluate", "--out", str(tmp_path / "out"), "--adapter", str(folder))
    absolute = load_profile("tiny", model=str(ROOT / "data/tiny-base")).model
    command.check_base(RUN / "adapter", absolute)  # another way to write the same folder


@pytest.mark.parametrize("folder", ["nothing", "run"])
def test_a_folder_without_an_adapter(tmp_path, folder):
    (tmp_path / "run").mkdir()
    shutil.copy(RUN / "config.yaml", tmp_path / "run")
    with pytest.raises(SystemExit, match=r"^error: .*no adapter_config.json is there; a run has its adapter once"):
        searchr1("evaluate", "--out", str(tmp_path / "out"), "--adapter", str(tmp_path / folder))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("data/no-such-model", "there is no model folder"),
        ("PeterJinGo/no-such-model", "hf download PeterJinGo/no-such"),
    ],
)
def test_a_model_that_does_not_exist_is_one_line(tmp_path, monkeypatch, model, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        searchr1("evaluate", "--out", str(tmp_path / "out"), f"model={model}")
    assert stop.value.code.startswith("error: ") and said in stop.value.code
    assert "\n" not in stop.value.code
    assert not (tmp_path / "out").exists()


def test_settings_and_words_are_checked_as_for_training(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)^error: .*did you mean topk"):
        searchr1("evaluate", "--out", str(tmp_path), "topkk=3")
    with pytest.raises(SystemExit, match=r"^error: .*no profile 'huge'"):
        searchr1("evaluate", "--out", str(tmp_path), "--profile", "huge")
    with pytest.raises(SystemExit, match="'greedy' is not of the form name=value"):
        searchr1("evaluate", "--out", str(tmp_path), "greedy")
    with pytest.raises(SystemExit, match="no decoding 'slow'; there are greedy, sampled, both"):
        searchr1("evaluate", "--out", str(tmp_path), "--decoding", "slow")
