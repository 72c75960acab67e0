"""Trajectories read closely: turns found again, every trajectory in one outcome, counts by hand, and no text kept."""

import gzip
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import write_run

from searchr1_lite.analysis.recorded import (
    OUTCOMES,
    main,
    measure,
    outcome,
    query_kind,
    read_trajectories,
    split_turns,
    summarise,
)
from searchr1_lite.analysis.runs import RunError
from searchr1_lite.config import ROOT
from searchr1_lite.rollout.protocol import INVALID_ACTION, render_observation
from searchr1_lite.types import Hit, Passage

RECORDED = Path(ROOT).parent / "shared/data/wiki18/trajectories.jsonl.gz"
COMMITTED = ROOT / "data/results/recorded_trajectories.json"
NOTEBOOK = ROOT / "notebooks/05_the_real_thing.ipynb"
needs_recorded = pytest.mark.skipif(not RECORDED.exists(), reason="the recorded trajectories are not here")

BELMAR = render_observation([Hit(Passage("1", "Rovana", "Its capital is Belmar."), 1.0)])
TOLFORD = render_observation([Hit(Passage("2", "Tolford", "A town of glass."), 1.0)])
SEARCH = "<think> Let me see. </think> <search> capital Rovana </search>"


def row(response: str, golden: tuple[str, ...] = ("Belmar",), run: str = "one", key: str = "1") -> dict:
    question = {"id": key, "question": "What is the capital of Rovana?", "golden_answers": list(golden)}
    return {"dataset": "toy", "run": run, "question": question, "turns": split_turns(response)}


def recorded_line(response: str, prompt: str = "Answer", **extra) -> dict:
    question = row("")["question"]
    return {"dataset": "toy", "run": "v9", "prompt": prompt, "response": response} | question | extra


def write_lines(path: Path, rows: list[dict]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_a_response_is_cut_where_the_environment_wrote():
    turns = split_turns("Hm." + INVALID_ACTION + SEARCH + BELMAR + "<answer> Belmar </answer>")
    assert [turn["text"] for turn in turns] == ["Hm.", SEARCH, "<answer> Belmar </answer>"]
    assert [turn["observation"] for turn in turns] == [INVALID_ACTION, BELMAR, ""]
    assert [turn["action"] for turn in turns] == ["invalid", "search", "answer"]
    assert [turn["query"] for turn in turns] == [None, "capital Rovana", None]


def test_information_that_the_model_made_up_stays_its_own_and_a_last_search_was_not_made():
    made_up = "<information>Doc 1 Belmar</information> so: <search> Belmar </search>"
    (turn,) = split_turns(made_up)
    assert turn == {"text": made_up, "action": "search", "query": None, "observation": ""}


ENVIRONMENT = st.sampled_from([INVALID_ACTION, BELMAR, TOLFORD])
MODEL = st.text("ab <>/\n", max_size=12) | st.sampled_from([SEARCH, "<information>Doc", "</information>", "<answer> x"])


@given(st.lists(st.tuples(MODEL.map(str.strip), ENVIRONMENT), max_size=5), MODEL.map(str.strip))
def test_turns_are_found_again_whatever_the_model_wrote(pairs, last):
    turns = split_turns("".join(text + observation for text, observation in pairs) + last)
    assert [(turn["text"], turn["observation"]) for turn in turns] == [*pairs, (last, "")]


@pytest.mark.parametrize(
    ("response", "golden", "expected"),
    [
        ("<answer> belmar. </answer>", ("Tolford", "Belmar"), "right"),
        (SEARCH + TOLFORD + "<answer> The Belmar </answer>", ("Belmar",), "right"),
        (SEARCH + BELMAR + "Belmar, I think.", ("Belmar",), "no answer"),
        (SEARCH + BELMAR + SEARCH, ("Belmar",), "no answer"),
        ("<information> Belmar </information>", ("Belmar",), "no answer"),
        ("<answer> Belmar on the far northern sea </answer>", ("Belmar",), "near miss"),  # F1 = 1 / 3
        ("<answer> Ola Belmar </answer>", ("Belmar City of Glass and Ola",), "near miss"),  # 2 of 2 and of 6: F1 = 0.5
        ("<answer> Ola Belmar </answer>", ("Belmar City of Glass and x Ola",), "not found"),  # F1 = 4 / 9
        (SEARCH + BELMAR + "<answer> Tolford </answer>", ("Belmar",), "misread"),
        (SEARCH + BELMAR + SEARCH + TOLFORD + "<answer> Ola </answer>", ("Belmar",), "misread"),
        (SEARCH + TOLFORD + "<answer> Ola </answer>", ("Belmar",), "not found"),
        ("<information>Belmar</information><answer> Ola </answer>", ("Belmar",), "not found"),
        (SEARCH + TOLFORD + "<answer> Ola </answer>", ("---",), "not found"),
        ("x" + INVALID_ACTION + "<answer> Ola </answer>", ("My previous action",), "not found"),
        ("", ("Belmar",), "no answer"),
    ],
)
def test_outcomes_by_hand(response, golden, expected):
    assert outcome(row(response, golden)) == expected


ANSWERS = {"Belmar": ("exact", "part"), "Belmar on sea": ("part",), "Ola": (), "": ()}
BY_RULES = {
    (ended, how, seen): "right"
    if how == "exact"
    else "no answer"
    if not ended
    else "near miss"
    if how == "part"
    else "misread"
    if seen
    else "not found"
    for ended, how, seen in product((True, False), ("exact", "part", "none"), (True, False))
}


@given(
    st.lists(st.tuples(st.sampled_from([*ANSWERS, None]), st.lists(ENVIRONMENT, max_size=3)), min_size=1, max_size=12)
)
def test_every_trajectory_has_the_one_outcome_that_the_rules_give(cases):
    rows, expected = [], []
    for key, (answer, observations) in enumerate(cases):
        parts = ["x" if one == INVALID_ACTION else SEARCH for one in observations]
        last = SEARCH if answer is None else f"<answer> {answer} </answer>"
        rows.append(row("".join(a + b for a, b in zip(parts, observations, strict=True)) + last, key=str(key)))
        how = (ANSWERS.get(answer, ()) or ("none",))[0]
        expected.append(BY_RULES[answer is not None, how, BELMAR in observations])
    assert [outcome(one) for one in rows] == expected
    (run,) = summarise(rows)["runs"]
    assert run["outcomes"] == {name: expected.count(name) for name in OUTCOMES}
    assert sum(run["outcomes"].values()) == run["trajectories"] == len(cases)


def test_kinds_of_query_by_hand():
    question = "Who founded the city of Belmar?"
    assert query_kind(question, "who founded city of belmar") == "copied"
    assert query_kind(question, "founded Belmar") == query_kind(question, "Belmar, city of") == "shortened"
    assert query_kind(question, "Belmar city: who founded of") == "shortened"
    assert query_kind(question, "founder of Belmar") == "reworded"


def test_measures_of_one_trajectory_by_hand():
    second = "Not sure yet. <search> capital Rovana </search>"
    found = measure(row(SEARCH + TOLFORD + second + TOLFORD + "<think> So </think><answer> Ola B </answer>"))
    assert found["words_before_search"] == [3, 3] and found["words_before_answer"] == [1]
    assert (found["searches"], found["repeated_queries"], found["invalid_actions"]) == (2, 1, 0)
    assert found["queries"] == ["shortened", "shortened"]
    assert found["words_kept"] == [2 / 5, 2 / 5]  # of what, is, capital, of, rovana: "the" is not counted
    assert not found["found"] and not found["made_up"] and found["answered"]


def test_counts_of_runs_and_the_moves_between_them_by_hand():
    right, wrong = "<answer> Belmar </answer>", SEARCH + TOLFORD + "<answer> Ola </answer>"
    lost, lucky = "<information>Doc 1 Belmar", "<information>Doc 1 Belmar" + right
    first = {"1": wrong, "2": lost, "3": lucky, "4": lost}
    rows = [row(text, run="a", key=key) for key, text in first.items()] + [row(lost, run="between", key="1")]
    rows += [row(text, run="b", key=key) for key, text in {"3": wrong, "1": right, "2": wrong, "9": right}.items()]
    rows += [row(wrong, run="twice", key="1"), row(wrong, run="twice", key="1")]  # no pairs with these
    summary = summarise(rows)
    assert [run["run"] for run in summary["runs"]] == ["a", "between", "b", "twice"] and summary["trajectories"] == 11
    first = summary["runs"][0]
    assert first["outcomes"] == {"right": 1, "near miss": 0, "misread": 0, "not found": 1, "no answer": 2}
    assert (first["answered"], first["made_up"], first["made_up_unanswered"], first["f1"]) == (2, 3, 2, 1.0)
    assert first["invalid_actions"] == 2
    assert first["by_searches"] == {"0": 3, "1": 1} and first["words_before_search"] == [3.0] * 5
    assert summary["runs"][3]["by_searches"] == {"0": 0, "1": 2}
    (comparison,) = summary["comparisons"]
    assert (comparison["first"], comparison["last"]) == ("a", "b")
    moved = {(a, b): n for a, to in comparison["moves"].items() for b, n in to.items() if n}
    assert moved == {("not found", "right"): 1, ("no answer", "not found"): 1, ("right", "not found"): 1}


def test_one_run_is_compared_with_nothing():
    assert summarise([row(SEARCH)])["comparisons"] == []


def test_a_run_folder_and_its_file_are_read_as_phases(tmp_path):
    folder = write_run(tmp_path / "mine")
    rows = read_trajectories(folder)
    assert rows == read_trajectories(folder / "trajectories.jsonl.gz")
    assert [(one["dataset"], one["run"]) for one in rows] == [("mine", "before")] * 2 + [("mine", "after")] * 2
    summary = summarise(rows)
    assert summary["comparisons"][0]["moves"] == {"not found": {"right": 2}}
    assert [run["searches"] for run in summary["runs"]] == [0, 2]


def test_a_recorded_run_is_named_after_its_prompt(tmp_path):
    lines = [recorded_line(SEARCH + BELMAR + "<answer> x </answer>", prompt) for prompt in ("Ask", "<|im_start|>user")]
    rows = read_trajectories(write_lines(tmp_path / "t.jsonl.gz", lines))
    assert [one["run"] for one in rows] == ["no template", "chat template"]
    assert rows[0]["question"]["golden_answers"] == ["Belmar"] and len(rows[0]["turns"]) == 2


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"response": None}, "TypeError"),
        ({"golden_answers": []}, "at least one golden answer"),
        ({"golden_answers": [3]}, ""),
        ({"question": 3}, ""),
        ({"prompt": 3}, "AttributeError"),
    ],
)
def test_a_row_that_is_no_trajectory_is_named(tmp_path, bad, says):
    good = recorded_line("<answer> x </answer>")
    path = write_lines(tmp_path / "t.jsonl.gz", [good, good | bad])
    with pytest.raises(RunError, match=rf"t\.jsonl\.gz:2: this is no trajectory .*{says}"):
        read_trajectories(path)


@pytest.mark.parametrize("missing", ["dataset", "id", "question", "golden_answers", "prompt"])
def test_a_missing_field_is_named(tmp_path, missing):
    line = recorded_line("<answer> x </answer>")
    del line[missing]
    with pytest.raises(RunError, match=rf":1: this is no trajectory .*'{missing}'"):
        read_trajectories(write_lines(tmp_path / "t.jsonl.gz", [line]))


def test_a_row_without_turns_is_named(tmp_path):
    with pytest.raises(RunError, match=":1: this is no trajectory"):
        read_trajectories(write_lines(tmp_path / "t.jsonl.gz", [row("x") | {"turns": []}]))


def test_the_command_keeps_counts_with_where_they_are_from_and_no_text(tmp_path, capsys):
    source = write_lines(tmp_path / "t.jsonl.gz", [recorded_line(SEARCH + BELMAR + "<answer> Zwickau </answer>")])
    main(["--source", str(source), "--out", str(tmp_path / "out.json")])
    assert capsys.readouterr().out == f"{tmp_path / 'out.json'}: 1 trajectories, 1 runs\n"
    text = (tmp_path / "out.json").read_text()
    assert {"date", "machine", "versions", "command", "trajectories"} <= set(json.loads(text))
    assert not [word for word in ("Rovana", "Belmar", "Zwickau", "capital") if word in text]


def test_the_command_ends_in_one_line_when_there_is_nothing_to_read(tmp_path):
    with pytest.raises(SystemExit, match="error: no trajectories file at"):
        main(["--source", str(tmp_path / "none.gz"), "--out", str(tmp_path / "out.json")])
    assert list(tmp_path.iterdir()) == []


def test_reading_trajectories_needs_no_torch():
    code = "import sys, searchr1_lite.analysis.recorded; print({'torch', 'transformers', 'trl'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def real() -> list[dict]:
    return read_trajectories(RECORDED)


@needs_recorded
def test_the_committed_counts_are_those_of_the_recorded_trajectories(real):
    committed = json.loads(COMMITTED.read_text())
    assert {name: committed[name] for name in ("trajectories", "runs", "comparisons")} == summarise(real)
    assert committed["trajectories"] == 2250


@needs_recorded
def test_right_and_found_are_what_the_recorder_says(real):
    measured = [measure(one) for one in real]
    scores = [one["question"]["metric_score"] for one in real]
    assert [one["outcome"] == "right" for one in measured] == [score["em"] == 1 for score in scores]
    assert [one["f1"] for one in measured] == pytest.approx([score["f1"] for score in scores])
    seen = [one["question"]["answer_in_retrieved"] for one in real]  # before an observation is cut, it seems
    assert sum(one["found"] != other for one, other in zip(measured, seen, strict=True)) <= 15


@needs_recorded
def test_what_notebook_05_says_of_the_recording_holds(real):
    unanswered = [one for one in real if outcome(one) == "no answer"]
    assert len(unanswered) == 141
    assert all(len(one["turns"]) == 1 and one["turns"][0]["action"] == "invalid" for one in unanswered)
    answers: dict[tuple, set] = {}
    asked: dict[tuple, dict] = {}
    for one in real:
        turn = next((turn for turn in one["turns"] if turn["query"] is not None), None)
        if turn is not None:
            key = one["dataset"], one["question"]["id"]
            asked.setdefault(key, {})[one["run"]] = turn["query"]
            answers.setdefault((*key, turn["query"]), set()).add(turn["observation"])
    twice = [queries for queries in asked.values() if len(queries) == 2 and len(set(queries.values())) == 1]
    assert len(twice) == 461  # the same query with and without the template: the same passages
    assert all(len(observations) == 1 for observations in answers.values())


def runs_of_words(text: str, count: int = 7) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return set(zip(*(words[start:] for start in range(count)), strict=False))


@needs_recorded
def test_no_text_of_the_recording_is_committed(real):
    notebook = json.loads(NOTEBOOK.read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    shown = ["".join(output.get("text", "")) for output in outputs]
    shown += [
        "".join(text) for output in outputs for kind, text in output.get("data", {}).items() if "image" not in kind
    ]
    shown += ["".join(cell["source"]) for cell in notebook["cells"]] + [COMMITTED.read_text()]
    text = "\n".join(shown)
    assert "<information>Doc 1(" not in text
    assert [one["question"]["id"] for one in real if one["question"]["question"].lower() in text.lower()] == []
    ours = runs_of_words(text)
    for one in real:
        written = "\n".join(turn["text"] + turn["observation"].replace(INVALID_ACTION, "") for turn in one["turns"])
        assert not ours & runs_of_words(written), one["question"]["id"]
