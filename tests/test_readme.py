"""README quotes what files hold, and leads to files that exist."""

import json
import re

from searchr1_lite.analysis.summary import markdown_table
from searchr1_lite.config import ROOT
from searchr1_lite.pretraining.transcripts import HABITS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_to_a_file_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_is_that_of_the_summary():
    summary = json.loads((ROOT / "data/results/summary.json").read_text(encoding="utf-8"))
    assert markdown_table(summary) in README


def test_the_recall_quoted_is_that_of_the_record():
    record = json.loads((ROOT / "data/results/retrieval/hotpotqa.json").read_text(encoding="utf-8"))
    for row in record["results"]:
        quoted = " | ".join(f"{row[f'recall@{k}']:.2f}" for k in (1, 3, 5, 10))
        assert quoted in README, row["retriever"]


def test_the_habits_quoted_are_those_pretrained_on():
    for habit, words in {
        "hop by hop": "{} % search properly",
        "guess": "{} % guess",
        "one search": "{} % search once",
        "useless query": "{} % search for something useless",
        "malformed": "{} % break their tags",
    }.items():
        assert words.format(round(100 * HABITS[habit])) in README, habit
