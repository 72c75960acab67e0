"""The service's benchmark as a dry run on toy passages, and its arithmetic by hand. Never a time."""

import asyncio
import json
import os
import sys

import pytest
from serving import serving

from searchr1_lite.config import ROOT
from searchr1_lite.retrieval import server
from searchr1_lite.types import Hit, Passage

sys.path.insert(0, str(ROOT / "benchmarks"))
import service


def answer(*hits: tuple[str, float], contents: str = "x") -> bytes:
    return json.dumps(
        {"result": [[{"document": {"id": i, "contents": contents}, "score": s} for i, s in hits]]}
    ).encode()


def test_which_answers_are_right():
    expected = [("a", 0.9), ("b", 0.8), ("c", 0.7), ("d", 0.7), ("e", 0.1)]
    assert service.is_right(answer(("a", 0.9), ("b", 0.80001), ("c", 0.7)), expected)
    assert service.is_right(answer(("a", 0.9), ("b", 0.8), ("d", 0.7)), expected)  # as good as c
    assert not service.is_right(answer(("b", 0.8), ("a", 0.9), ("c", 0.7)), expected)
    assert not service.is_right(answer(("a", 0.9), ("b", 0.8)), expected)
    assert not service.is_right(answer(("a", 0.9), ("b", 0.8), ("e", 0.7)), expected)
    assert not service.is_right(answer(("a", 0.9), ("b", 0.8), ("x", 0.7)), expected)
    assert not service.is_right(answer(("a", 0.9), ("b", 0.8), ("c", 0.7), contents=""), expected)
    assert service.is_right(answer(("a", 0.9)), [("a", 0.9)])  # a corpus of one passage


def turn(seconds: list[float], wall: float = 2.0, **failed: list[str]) -> dict:
    kinds = {"errors": [], "wrong": [], "lost": []} | failed
    seen = {"sent": len(seconds) + sum(map(len, kinds.values())), "seconds": seconds, "wall_seconds": wall}
    return service.summarise(seen | kinds, cpu=1.0)


def test_counts_rates_and_percentiles():
    one = turn([n / 100 for n in range(200, 0, -1)], wrong=["q"], lost=["gone"])
    assert (one["requests"], one["right"], one["errors"], one["wrong"], one["lost"]) == (202, 200, 0, 1, 1)
    assert one["per_second"] == 100 and one["server_cpu_seconds_per_answer"] == 1 / 200
    assert (one["p50_seconds"], one["p99_seconds"], one["longest_seconds"]) == (1.01, 1.99, 2.0)
    assert one["examples"] == ["q", "gone"]
    none = turn([], errors=["HTTP 500"])
    assert none["per_second"] == 0 and none["p50_seconds"] is None and none["errors"] == 1


def test_targets_hold_only_where_every_round_meets_them():
    fast, slow, spread = turn([0.1] * 100), turn([0.1] * 25), turn([0.1] * 98 + [1.0] * 2)
    good = service.report([{"ours": fast, "theirs": slow}] * 2)
    assert good["times_their_throughput"] == {"median": 4, "least": 4, "most": 4}
    assert all(good["holds"].values()) and good["failed_requests"] == 0 and good["p99_over_p50"] == 1
    worse = service.report([{"ours": fast, "theirs": slow}, {"ours": spread, "theirs": turn([0.1] * 50)}])
    assert worse["times_their_throughput"] == {"median": 3, "least": 2, "most": 4}
    assert worse["holds"] == {"failed_requests": True, "p99_over_p50": False, "times_their_throughput": False}
    lost = service.report([{"ours": turn([0.1], lost=["x"])}])
    assert not lost["holds"]["failed_requests"] and "times_their_throughput" not in lost


class Mixed:
    """Right, crossed, failing, or with nothing to say, as the query asks."""

    def search(self, queries, k):
        if "fails" in queries:
            raise OSError("gone")
        return [[Hit(Passage("other" if q == "crossed" else q, q, q), 1.0)] for q in queries]


def test_the_load_counts_every_request_once():
    with serving(server.make_app(Mixed())) as url:
        expected = {query: [(query, 1.0)] for query in ("right", "crossed", "fails")}
        one = service.summarise(asyncio.run(service.load(url, expected, clients=1, seconds=0.5)), cpu=1.0)
        assert one["right"] > 0 and one["wrong"] > 0 and one["errors"] > 0 and one["lost"] == 0
    gone = service.summarise(asyncio.run(service.load(url, expected, clients=2, seconds=0.2)), cpu=1.0)
    assert gone["lost"] == gone["requests"] > 0


def test_a_dry_run(tmp_path):
    corpus, questions, out = (tmp_path / name for name in ("corpus.jsonl", "questions.jsonl", "service.json"))
    towns = [f"Town{n}" for n in range(40)]
    rows = [{"id": str(n), "contents": f'"{town}"\n{town} has {n} bridges.'} for n, town in enumerate(towns)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [
        {"id": str(n), "question": f"How many bridges has {t}?", "golden_answers": [str(n)]}
        for n, t in enumerate(towns)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    arguments = ["--corpus", str(corpus), "--questions", str(questions), "--clients", "8", "--seconds", "0.5"]
    if checkout := os.environ.get("SEARCH_R1"):
        arguments += ["--search-r1", checkout]
    service.main([*arguments, "--rounds", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert (result["passages"], result["queries"], result["clients"], result["failed_requests"]) == (40, 40, 8, 0)
    assert str(checkout) not in result["command"]
    (one,) = result["rounds"]
    assert set(one) == ({"ours", "theirs"} if checkout else {"ours"})
    for name in one:
        assert one[name]["right"] == one[name]["requests"] > 0, name
    assert one["ours"]["per_second"] == pytest.approx(one["ours"]["right"] / one["ours"]["wall_seconds"])
    assert 1 <= result["queries_in_our_searches"] <= 8
