"""Search engines and rewards of a user's own, from a folder outside the package."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from serving import serving

from searchr1_lite.config import ROOT, ConfigError, load_profile
from searchr1_lite.plugins import PluginError, is_plugin, load_plugin, load_search
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.retrieval.online import SerpAPI
from searchr1_lite.training.rewards import trajectory_reward
from searchr1_lite.types import RetrievalError

MINE = """
from searchr1_lite.types import Hit, Passage

class MySearch:
    def search(self, queries, k):
        return [[Hit(Passage("1", "Mine", f"about {query}"), 1.0)][:k] for query in queries]

class NoSearch:
    pass

class Fails:
    def __init__(self):
        raise RuntimeError("no key")

def my_reward(trajectory):
    return 0.25 * len(trajectory.turns)

def no_number(trajectory):
    return "much"

CONSTANT = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    (tmp_path / "broken_module.py").write_text("1 / 0")
    (tmp_path / "needs_more.py").write_text("import not_there_either")
    monkeypatch.chdir(tmp_path)
    return name


def test_names_of_plugins_are_no_other_settings():
    assert is_plugin("my_module:MySearch") and is_plugin("a.b.c:d")
    others = ("index:folder", "faiss:Flat", "milvus:file", "http:x", "bm25", "a:", ":a", "a b:c", "bm25+flat", "a:b:c")
    assert not any(map(is_plugin, others))


def test_a_search_engine_of_your_own(here):
    retriever = load_retriever(load_profile("tiny", retriever=f"{here}:MySearch"))
    assert [hit.passage.text for hit in retriever.search(["foxes"], 3)[0]] == ["about foxes"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:X", "there is no module 'no_such_module', neither installed nor in "),
        ("needs_more:X", "there is no module 'not_there_either'"),
        ("broken_module:X", r"broken_module cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("HERE:Nothing", "has no 'Nothing'"),
        ("HERE:NoSearch", r"it has no method search\(queries, k\)"),
        ("HERE:CONSTANT", "it has no method search"),
        ("HERE:Fails", r"Fails\(\) failed \(RuntimeError: no key\)"),
    ],
)
def test_what_cannot_search_is_one_clear_error(here, name, message):
    with pytest.raises(PluginError, match=message):
        load_search(name.replace("HERE", here))


def test_a_reward_of_your_own(here):
    trajectory = SimpleNamespace(turns=[1, 2, 3])
    assert trajectory_reward(trajectory, f"{here}:my_reward") == 0.75
    for name, message in (("no_number", "a reward is a number, got 'much'"), ("CONSTANT", "no function")):
        with pytest.raises(PluginError, match=message):
            trajectory_reward(trajectory, f"{here}:{name}")
    assert load_plugin(f"{here}:CONSTANT") == 3
    with pytest.raises(ConfigError, match="no reward 'exact'; there are exact_match, f1"):
        load_profile("tiny", reward="exact")


def test_both_train_from_a_folder_outside_the_package(here, tmp_path):
    settings = ["steps=1", "questions_per_step=2", "group_size=2", "updates_per_rollout=1", "eval_questions=2"]
    names = [f"retriever={here}:MySearch", f"reward={here}:my_reward", "save_trajectories_every=1"]
    command = [sys.executable, "-m", "searchr1_lite", "train", "--out", "run", *settings, *names]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [metrics] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics["reward"] >= 0.25  # a quarter a turn, whatever it says
    wrong = subprocess.run(
        [*command[:5], "other", "reward=nowhere:at_all"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 1 and "error: nowhere:at_all: there is no module" in wrong.stderr
    assert not (tmp_path / "other/metrics.jsonl").exists()


# The example


@pytest.fixture
def web(monkeypatch):
    """A stand-in for SerpAPI; what it was asked."""
    from fastapi import FastAPI, Response

    asked, app = [], FastAPI()

    @app.get("/search")
    def search(q: str, num: int, api_key: str, engine: str):
        asked.append((q, num, api_key, engine))
        if q == "nothing":
            return {"error": "Google hasn't returned any results for this query."}
        if q == "wrong key":
            return Response('{"error": "Invalid API key: s3cret"}', 401, media_type="application/json")
        if q == "no JSON":
            return Response("<html>")
        results = [{"link": f"http://x/{n}", "title": f"T{n}", "snippet": f"{q} {n}"} for n in range(5)]
        return {"organic_results": [*results, {"link": "http://bare"}]}

    monkeypatch.setenv("SERPAPI_API_KEY", "s3cret")
    with serving(app) as url:
        yield url, asked


def test_serpapi_answers_in_order_and_never_shows_its_key(web, caplog):
    url, asked = web
    caplog.set_level(logging.DEBUG)
    retriever = SerpAPI(f"{url}/search")
    first, nothing, blank = retriever.search(["fox", "nothing", " "], 2)
    assert [(hit.passage.id, hit.passage.title, hit.passage.text, hit.score) for hit in first] == [
        ("http://x/0", "T0", "fox 0", 1.0),
        ("http://x/1", "T1", "fox 1", 0.5),
    ]
    assert nothing == blank == [] and sorted(asked)[0] == ("fox", 2, "s3cret", "google") and len(asked) == 2
    for query, message in (("wrong key", "status 401.*is SERPAPI_API_KEY right"), ("no JSON", "no usable answer")):
        with pytest.raises(RetrievalError, match=message) as raised:
            retriever.search([query], 2)
        assert "s3cret" not in str(raised.value)
    assert "s3cret" not in caplog.text


def test_serpapi_tries_again_and_gives_up(monkeypatch):
    monkeypatch.setenv("SERPAPI_API_KEY", "s3cret")
    retriever, tries = SerpAPI("http://127.0.0.1:1/search"), []
    monkeypatch.setattr(SerpAPI._fetch.retry, "sleep", lambda seconds: tries.append(seconds))
    with pytest.raises(RetrievalError, match=r"no usable answer for 'fox' \(status 0\)"):
        retriever.search(["fox"], 1)
    assert len(tries) == 4
    assert isinstance(retriever.client, httpx.Client)


def test_serpapi_needs_a_key(monkeypatch):
    monkeypatch.delenv("SERPAPI_API_KEY", raising=False)
    with pytest.raises(PluginError, match="SerpAPI needs a key: set the environment variable SERPAPI_API_KEY"):
        load_search("searchr1_lite.retrieval.online:SerpAPI")
