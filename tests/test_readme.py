"""README and docs/ quote what files hold, and lead to files that exist."""

import ast
import json
import re
from collections import Counter

import pytest
from transcripts import HABITS
from typer.main import get_command

from searchr1_lite import cli
from searchr1_lite.analysis.findings import with_interval
from searchr1_lite.analysis.summary import markdown_table
from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.experiments.plan import load_experiment

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
WORDS = " ".join(README.split())  # whatever the lines


def test_the_readme_is_short():
    assert len(FILES[0].read_bytes()) <= 13_000


def test_every_link_to_a_file_leads_somewhere():
    for file in FILES:
        links = re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8"))
        inside = [link for link in links if not link.startswith("http")]
        assert inside and [link for link in inside if not (file.parent / link).exists()] == [], file.name


def test_the_commands_shown_are_commands():
    verbs = get_command(cli.app).commands
    lines = re.findall(r"^(?:accelerate .* -m searchr1_lite|searchr1) (.*)$", README, re.MULTILINE)
    assert len(lines) > 15
    for line in lines:
        first, second = line.split()[:2]
        assert first in verbs and (first not in ("index", "report") or second in verbs[first].commands), line


def test_the_spine_is_as_long_as_it_says():
    names = re.findall(r"^\d\. \[`([\w/.]+)`\]\(searchr1_lite/\1\)", README, re.MULTILINE)
    [quoted] = re.findall(r"nine files, about ([\d,]+) lines of code", README)
    assert len(names) == 9
    lines = sum(code_lines(ROOT / "searchr1_lite" / name) for name in names)
    assert abs(lines - int(quoted.replace(",", ""))) <= 50


def code_lines(path):
    """Lines with code on them: no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    first = [node.body[0] for node in nodes if node.body]
    documented = {
        line
        for node in first
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented
        for number, line in enumerate(text.splitlines(), 1)
    )


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
    assert f"nDCG@10 {record['results'][0]['nDCG@10']:.4f};" in WORDS
    assert record["results"][0]["nDCG@10"] == pytest.approx(0.6789, abs=0.01)


def test_the_habits_quoted_are_those_pretrained_on():
    for habit, words in {
        "hop by hop": "{} % search properly",
        "guess": "{} % guess",
        "one search": "{} % search once",
        "useless query": "{} % search for something useless",
        "malformed": "{} % break their tags",
    }.items():
        assert words.format(round(100 * HABITS[habit])) in WORDS, habit


def test_the_claims_quoted_are_those_of_the_findings():
    findings = json.loads((ROOT / "data/results/findings.json").read_text(encoding="utf-8"))
    found = {one["claim"]: one for one in findings["claims"]}
    table = README.partition("| the claim | the paper |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) > 10
    for claim, paper, difference, seeds, verdict in rows:
        one = found[claim]
        assert (paper, seeds, verdict) == (one["paper"], str(len(one["seeds"])), one["verdict"])
        assert difference == with_interval(one["difference"], signed=True)
    counts = Counter(one["verdict"] for one in found.values())
    agree, disagree, unknown = (counts[verdict] for verdict in ("agrees", "disagrees", "not separated"))
    assert f"{agree} agree, {disagree} disagree and {unknown} cannot be told apart" in WORDS


def test_the_time_of_the_experiments_is_that_of_their_runs():
    records = [json.loads(path.read_text()) for path in (ROOT / "data/results/experiments").glob("*.json")]
    runs = {run["run"]: run["seconds"] for record in records for arm in record["arms"].values() for run in arm}
    assert len(records) == 13 and len(runs) == 177
    assert sum(runs.values()) / 2 < 4 * 3600 and "all together less than four hours" in WORDS  # two at a time
    minutes = [load_experiment(record["experiment"]).minutes for record in records]
    assert f"Each is expected to take {min(minutes):g} to {max(minutes):g} minutes" in WORDS


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


def test_the_retrieval_quoted_is_that_of_the_record():
    record, million = results("retrieval"), results("million")
    for kind, its in record["kinds"].items():
        if "queries_a_second" not in its:
            continue
        rates = [its["queries_a_second"][way]["median"] for way in ("one_by_one", "batches_of_64")]
        row = f"| `{kind}` | {its['disk_bytes']['index'] / 1e6:.1f} | {rates[0]:,.0f} | {rates[1]:,.0f} |"
        assert row in README and f"| {its['recall@3']['mean']:.2f} | {its['recall@10']['mean']:.2f} |" in README
        projected = record["projection"]["kinds"].get(kind, {})
        if "disk_bytes" in projected:
            seconds = projected["seconds_a_query"]["batches_of_64"]["result"]
            assert f"| {projected['disk_bytes']['result'] / 1e9:.1f} | {1000 * seconds:,.1f} |" in README
    for part in ("flat_search", "flat_search_beyond_cache"):
        ratios = [record[part]["sizes"][size]["ratio"]["median"] for size in ("16", "32", "64", "128")]
        assert f"{min(ratios):.1f} to {max(ratios):.1f} times" in WORDS
        ratios = [record[part]["sizes"][size]["ratio_multiplying"]["median"] for size in ("16", "32", "64", "128")]
        assert f"{min(ratios):.1f} to {max(ratios):.1f} times" in WORDS
    bm25s = record["bm25"]["ratio"]["bm25s.retrieve"]
    assert f"{bm25s['median']:.1f} times as long as 0.6.0's BM25 ({bm25s['least']:.1f} to {bm25s['most']:.1f})" in WORDS
    rank_bm25 = record["bm25"]["ratio"]["rank_bm25"]
    words = (
        f"{rank_bm25['median']:.0f} times as long as 0.6.0's BM25 ({rank_bm25['least']:.0f} to {rank_bm25['most']:.0f})"
    )
    assert words in WORDS
    peaks = [kind["peak_bytes"] for kind in million["kinds"].values()]
    assert f"at most {max(peak['building'] for peak in peaks) / 1e9:.1f} GB of resident memory" in WORDS
    assert f"searched in {max(peak['searching'] for peak in peaks) / 1e9:.1f}" in WORDS
    days = record["projection"]["encoding_seconds_on_this_cpu"]["result"] / 86400
    assert f"would take {days:.0f} days" in WORDS


def test_the_service_quoted_is_that_of_the_records():
    [long], [short] = (results(name)["rounds"] for name in ("service", "service_short"))
    ours, theirs = long["ours"], long["theirs"]
    assert (
        f"gave {ours['per_second']:.0f} answers a second" in WORDS and f"p99 {ours['p99_over_p50']:.1f} times" in WORDS
    )
    assert ours["wall_seconds"] >= 120 and ours["errors"] + ours["wrong"] + ours["lost"] == 0 < theirs["lost"]
    words = (
        f"gave {short['theirs']['per_second']:.0f} answers a second where ours gave {short['ours']['per_second']:.0f}"
    )
    assert words in WORDS and short["theirs"]["lost"] == 0


def test_the_speed_quoted_is_that_of_the_record():
    for name, engine in results("rollout")["engines"].items():
        if name != "ours":
            ratio = engine["times_as_long_as_ours"]
            assert f"{ratio['median']:.1f} ({ratio['least']:.1f} to {ratio['most']:.1f})" in README, name
    for workload in results("training_step")["workloads"].values():
        for ratio in workload["ratio"].values():
            assert f" {ratio['median']:.2f} " in WORDS.replace(";", " ")


def test_the_ways_quoted_are_those_of_the_record():
    record = json.loads((ROOT / "data/results/ten_ways.json").read_text(encoding="utf-8"))
    cells, paper = record["statistics"]["cells"]["greedy"], record["paper"]["average"]
    for way, its in cells.items():
        low, high = its["interval"]
        counts = f"{its['searches']:.1f} | {its['response_length']:.0f}"
        sizes = " | ".join(f"{paper[size][way]:.3f}" if way in paper[size] else "" for size in ("3B", "7B"))
        name = record["paper"]["names"][way]
        row = f"| {name} | {its['exact_match']:.2f} ({low:.2f} to {high:.2f}) | {counts} | {sizes} |"
        assert row in README
    searched = [cells["search_r1_base"], cells["search_r1_instruct"]]
    assert min(one["interval"][0] for one in searched) > cells["rag"]["interval"][1]
    assert cells["rag"]["interval"][0] > cells["direct"]["interval"][1]
    assert max(results("ten_ways")["minutes_a_seed"]) < 9 and "under nine minutes" in WORDS
    assert f"open in {results('page')['list_seconds']:.1f} seconds" in WORDS


def test_the_figures_of_milvus_are_those_of_the_record():
    record = results("milvus")
    real, made = record["real"], record["synthetic"]
    rates, memory = made["queries_a_second"], made["peak_resident_bytes"]
    assert f"finds {real['dense_share_of_flat@10']:.3f} of" in WORDS and real["dense_share_of_flat@10"] > 0.98
    assert f"BM25 {real['bm25_share_of_bm25s@10']:.3f} of" in WORDS
    assert f"{made['passages']:,} synthetic" in WORDS and f"loaded in {made['seconds_to_load']:.0f} seconds" in WORDS
    assert f"at {rates['dense']:.0f} (vectors), {rates['bm25']:.0f} (BM25) and {rates['fused']:.0f} (fused)" in WORDS
    assert f"peaked at {memory['loading'] / 1e9:.1f} GB while loading" in WORDS
