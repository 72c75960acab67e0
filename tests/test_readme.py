"""README quotes what files hold, and leads to files that exist."""

import json
import re

import pytest

from searchr1_lite.analysis.summary import markdown_table
from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.pretraining.transcripts import HABITS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_to_a_file_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_is_that_of_the_summary():
    summary = json.loads((ROOT / "data/results/summary.json").read_text(encoding="utf-8"))
    assert markdown_table(summary) in README


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa"])
def test_the_recall_quoted_is_that_of_the_record(name):
    record = json.loads((ROOT / f"data/results/retrieval/{name}.json").read_text(encoding="utf-8"))
    for row in record["results"]:
        keys = ("recall@1", "recall@3", "recall@5", "recall@10", "all@10")
        assert " | ".join(f"{row[key]:.2f}" for key in keys) in README, row["retriever"]


def test_the_ndcg_quoted_is_that_of_the_record_and_near_the_published_one():
    record = json.loads((ROOT / "data/results/retrieval/scifact.json").read_text(encoding="utf-8"))
    assert f"nDCG@10 {record['results'][0]['nDCG@10']:.4f};" in README
    assert record["results"][0]["nDCG@10"] == pytest.approx(0.6789, abs=0.01)


def test_the_habits_quoted_are_those_pretrained_on():
    for habit, words in {
        "hop by hop": "{} % search properly",
        "guess": "{} % guess",
        "one search": "{} % search once",
        "useless query": "{} % search for something useless",
        "malformed": "{} % break their tags",
    }.items():
        assert words.format(round(100 * HABITS[habit])) in README, habit


def results(name: str) -> dict:
    return json.loads((ROOT / f"data/results/benchmarks/{name}.json").read_text(encoding="utf-8"))


def test_the_memory_quoted_is_that_of_the_record_and_of_the_plan_today():
    for name, parts in results("memory")["profiles"].items():
        sums = [sum(parts[phase].values()) for phase in ("always", "rollout", "training")]
        figures = " | ".join(f"{value:.1f}" for value in [*sums, parts["peak"]])
        assert f"| `{name}` | {parts['card']} GB | {figures} |" in README
        assert parts["peak"] < parts["card"] - 0.5
        profile = load_profile(name)
        for setting in ("rollout_rows", "max_context_tokens", "micro_batch_tokens", "sampling_weights"):
            assert parts[setting] == getattr(profile, setting), "make memory.json again"


def test_the_speed_quoted_is_that_of_the_record():
    for name, engine in results("rollout")["engines"].items():
        if name != "ours":
            ratio = engine["times_as_long_as_ours"]
            assert f"{ratio['median']:.1f} ({ratio['least']:.1f} to {ratio['most']:.1f})" in README, name
    step = results("training_step")["ratio"]
    assert f"{1 / step['median']:.2f}" in README
