"""Code of a user's own folder as retriever and reward: found by name, used in training, every fault one error."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.cli import main
from searchr1_lite.config import PLUGIN, ConfigError, load_profile
from searchr1_lite.files import read_rows
from searchr1_lite.plugins import PluginError, load_plugin, make_retriever
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.retrieval.rerank import Hybrid
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.training.rewards import trajectory_reward
from searchr1_lite.types import Passage, Question

MODULE = """
from searchr1_lite.types import Hit, Passage

class MySearch:
    def __init__(self, profile=None):
        self.seed = profile.seed if profile else None

    def search(self, queries, k):
        return [[Hit(Passage("mine", "Mine", f"about {query}"), 1.0)][:k] for query in queries]

def make():
    return MySearch()

def my_reward(trajectory, question):
    return len(question.golden_answers) + 0.25

def two(trajectory, question):
    return "2"

def endless(trajectory, question):
    return float("inf")

def fails():
    raise ValueError("no network")

class NoSearch:
    pass

number = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of a user's, in which the process runs; what is imported from it is forgotten afterwards."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").touch()
    (tmp_path / "own/tools.py").write_text(MODULE)
    (tmp_path / "own/broken.py").write_text("import json\njson.no_such")
    (tmp_path / "own/lacking.py").write_text("import no_such_library")
    (tmp_path / "own/leaving.py").write_text("raise SystemExit(3)")
    (tmp_path / "own/wrong.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "own"]:
        del sys.modules[name]


@pytest.mark.parametrize(("name", "seed"), [("MySearch", 5), ("make", None)])
def test_a_class_or_a_function_makes_the_retriever(folder, name, seed):
    retriever = load_retriever(load_profile("tiny", retriever=f"own.tools:{name}", seed=5, corpus="no/such.jsonl"))
    assert retriever.seed == seed
    assert [hit.passage.text for hit in retriever.search(["moon"], 1)[0]] == ["about moon"]


def test_it_is_fused_with_others(folder):
    profile = load_profile("tiny", retriever="bm25+own.tools:MySearch")
    retriever = load_retriever(profile, [Passage("1", "Moon", "far")], folder / "cache")
    assert isinstance(retriever, Hybrid)
    assert {hit.passage.id for hit in retriever.search(["moon"], 2)[0]} == {"1", "mine"}


def test_a_reward_is_given_trajectory_and_question(folder):
    trajectory = Trajectory(Question("q", "?", ("a", "b")), (), (), (), (), (), True, "answer")
    assert trajectory_reward(trajectory, "own.tools:my_reward") == 2.25
    for name, says in (
        ("own.tools:two", "own.tools:two gave question 'q' no reward, but TypeError"),
        ("own.tools:endless", "a reward must be a finite number, got inf for 'q'"),
        ("own.tools:fails", "own.tools:fails gave question 'q' no reward, but TypeError: .*positional"),
    ):
        with pytest.raises(PluginError, match=says):
            trajectory_reward(trajectory, name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:x", "there is no module 'no_such_module' in .* or installed"),
        ("own.nothing:x", "there is no module 'own.nothing'"),
        ("own.tools.deeper:x", "there is no module 'own.tools.deeper'|not a package"),
        ("own.lacking:x", "importing own.lacking failed with ModuleNotFoundError: .*no_such_library"),
        ("own.broken:x", "importing own.broken failed with AttributeError: .*no_such"),
        ("own.wrong:f", "importing own.wrong failed with SyntaxError"),
        ("own.leaving:x", "importing own.leaving failed with SystemExit: 3"),
        ("own.tools:MySerch", r"tools\.py has no 'MySerch'"),
        ("own.tools:number", "number is not callable but of type int"),
        ("own.tools:NoSearch", r"it made a NoSearch, which has no method search\(queries, k\)"),
        ("own.tools:my_reward", "called without arguments, or with profile=..., and failed: TypeError"),
        ("own.tools:fails", "failed: ValueError: no network"),
        ("builtins:dict", "ValueError: no signature found"),
    ],
)
def test_each_fault_is_one_clear_error(folder, name, says):
    with pytest.raises(PluginError, match=says):
        make_retriever(name, load_profile("tiny"))


NAMES = st.sampled_from(["own", "os", "json", "path", "x", "é", "", "1", "index", "http", "faiss", "bm25"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.sampled_from([":", ".", "+", "/", "", "\n", " "])), max_size=5) | st.text(max_size=8)
)
def test_odd_names_are_user_errors(pieces):
    text = pieces if isinstance(pieces, str) else "".join(map("".join, pieces))
    for setting in ("retriever", "reward"):
        try:
            value = getattr(load_profile("tiny", **{setting: text}), setting)
        except ConfigError:
            continue
        if PLUGIN.fullmatch(value):
            try:
                assert callable(load_plugin(value))
            except PluginError as error:
                assert value in str(error)


def test_training_with_both_from_the_users_folder(folder, capsys):
    """One step of a base that searches; what it reads and what it earns are the plug-ins'."""
    small = ["steps=1", "questions_per_step=2", "group_size=2", "updates_per_rollout=1", "eval_questions=2"]
    small += ["max_turns=1", "max_response_tokens=24", "save_every=1", "save_trajectories_every=1", "rollout_rows=4"]
    with pytest.raises(SystemExit) as end:
        main(["train", "--out", "run", "retriever=own.tools:MySearch", "reward=own.tools:my_reward", *small])
    assert end.value.code == 0
    rows = [row for _, row in read_rows("run/trajectories.jsonl.gz", ValueError, "trajectories")]
    assert [row["phase"] for row in rows].count("train") == 4 and {row["reward"] for row in rows} == {1.25}
    assert "about " in json.dumps(rows)
    for wrong in ("retriever=own.tools:MySerch", "reward=own.tools:my_rewrd"):
        with pytest.raises(SystemExit, match=r"^error: own\.tools:my.* has no"):
            main(["train", "--out", "other", wrong.replace("MySerch", "my_serch"), *small])
