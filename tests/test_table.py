"""The table of a comparison: every cell from saved answers, refusals that name the place, text that stays text."""

import csv
import gzip
import io
import json
import re

import matplotlib.pyplot as plt
import pytest
import yaml
from conftest import searchr1
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from searchr1_lite.analysis import table
from searchr1_lite.analysis.runs import RunError
from searchr1_lite.evaluation.metrics import bootstrap_interval

VERSIONS = {"python": "3.11", "torch": "2.13.0"}
HOSTILE = ["=1+1 | `x`", "<script>alert(1)</script>", "a & b \\\\ %\n$x$ {\x1b[31m", "-- | --\r\n| [x](javascript:1)"]


def answers(right: str) -> list[str]:
    """One letter a question: R right, P partly, W wrong, N none."""
    said = {"R": "<answer>blue Nile</answer>", "P": "<answer>Nile</answer>", "W": "<answer>Po</answer>", "N": "hm"}
    return [said[letter] for letter in right]


def write_way(
    folder, right, *, model="base", data_set=None, hops=True, version=VERSIONS, config=None, decodings=("greedy",)
):
    """An evaluation folder with a question a letter; questions alternate between one hop and two."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"retriever": "bm25", "topk": 3} | (config or {})))
    summary = {
        "seconds": 0.5 * len(right),
        "retriever_calls": 3 * len(right),
        "exact_match": right.count("R") / len(right),
    }
    about = {"date": "2026-01-01T00:00:00+00:00", "machine": {"cpu": "a processor"}, "versions": version}
    about |= {"command": "evaluate", "model": model, "strategy": "x"} | dict.fromkeys(decodings, summary)
    (folder / "evaluation.json").write_text(json.dumps(about))
    rows = []
    for decoding in decodings:
        for number, text in enumerate(answers(right)):
            metadata = {"hops": 1 + number % 2} if hops else {}
            metadata |= {"data_source": data_set(number)} if data_set else {}
            question = {"id": f"q{number}", "question": "Which river?", "golden_answers": ["blue Nile"]}
            answered = "<answer>" in text
            turn = {"text": text, "action": "answer", "query": None, "observation": "", "hit_ids": []}
            row = {"phase": "evaluation", "decoding": decoding, "question": question | {"metadata": metadata}}
            row |= {"searches": number, "finished": answered, "stop_reason": "answer" if answered else "turns"}
            row |= {
                "response_length": 10,
                "retrieved_tokens": 30,
                "turns": [turn],
                "exact_match": float(right[number] == "R"),
            }
            rows.append(row)
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows):
    with gzip.open(folder / "trajectories.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(folder):
    with gzip.open(folder / "trajectories.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def comparison(tmp_path):
    """Three ways, two seeds; Search-R1 is trained and has two models."""
    for seed, best in enumerate(("RRRRRRPW", "RRRRRRRN")):
        write_way(tmp_path / f"c/seed{seed}/direct", "WWWWWWWR", decodings=("greedy", "sampled"))
        write_way(tmp_path / f"c/seed{seed}/rag", "RRWWWPWN", decodings=("greedy", "sampled"))
        write_way(tmp_path / f"c/seed{seed}/search_r1_base", best, decodings=("greedy", "sampled"))
        (tmp_path / f"c/seed{seed}/search_r1_base-training").mkdir()
    return tmp_path / "c"


def test_cells_by_hand(comparison):
    record = table.make_record([comparison], "the command")
    assert list(record["ways"]) == ["direct", "rag", "search_r1_base"] and record["seeds"] == [0, 1]
    assert [entry["trained"] for entry in record["ways"].values()] == [False, False, True]
    frame = table.table_frame(record).set_index("way")
    assert list(frame.index) == ["Direct answer", "RAG", "Search-R1 base"]
    best = frame.loc["Search-R1 base"]
    assert best["exact match"] == 13 / 16
    assert (best["1 hop"], best["2 hop"]) == (7 / 8, 6 / 8)
    assert best["F1"] == pytest.approx((13 + 2 / 3) / 16, abs=1e-6)
    assert (best["substring"], best["answered"]) == (13 / 16, 15 / 16)
    assert (best["searches"], best["tokens written"], best["tokens retrieved"], best["seconds"]) == (3.5, 10, 30, 0.5)
    assert best["retriever calls"] == 3
    assert (best["paper 3B"], best["paper 7B"]) == (0.303, 0.431)
    assert record["statistics"]["cells"]["greedy"]["search_r1_base"]["by_seed"] == [6 / 8, 7 / 8]
    scores = [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]]
    assert (best["low"], best["high"]) == pytest.approx(bootstrap_interval(scores, trained=True), abs=1e-6)
    direct = [[0] * 7 + [1]] * 2
    assert list(frame.loc["Direct answer", ["low", "high"]]) == pytest.approx(bootstrap_interval(direct), abs=1e-6)
    _, pair, other = record["statistics"]["pairs"]["greedy"]
    assert (pair["first"], pair["second"], pair["difference"]) == ("direct", "search_r1_base", -11 / 16)
    # Search-R1 above direct by 2 in six questions, 1 in one, -2 in one: of 256 ways to sign them 18 sum to 11 or more.
    # Above RAG by 2 in four and 1 in one: 2 of 32.
    assert (pair["p"], other["p"]) == pytest.approx((18 / 256, 2 / 32))
    assert (pair["holm"], other["holm"]) == pytest.approx((3 * 2 / 32, 3 * 2 / 32))


def test_every_cell_comes_again_from_the_file_alone(comparison, tmp_path):
    searchr1("report", "table", comparison, "--out", tmp_path / "results/ten")
    record = json.loads((tmp_path / "results/ten.json").read_text())
    assert table.statistics(record) == record["statistics"]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        f"ten.{kind}" for kind in ("csv", "json", "md", "png", "tex")
    ]
    assert "Direct answer" in (tmp_path / "results/ten.md").read_text()
    packed = record["ways"]["rag"]["scores"]["sampled"]
    assert packed["exact_match"] == ["1 1 0 0 0 0 0 0"] * 2 and packed["f1"][0] == "1 1 0 0 0 0.666667 0 0"


def test_the_order_against_the_papers_is_computed(comparison):
    record = table.make_record([comparison], "")
    assert record["statistics"]["orders"]["3B"] == {"tau": 1.0, "ways": 3, "swapped": []}
    record["paper"]["average"]["3B"] = {"direct": 0.3, "rag": 0.2, "search_r1_base": 0.25}
    order = table.statistics(record)["orders"]["3B"]
    # Of three pairs the paper has two the other way round: direct above both.
    assert order["tau"] == pytest.approx(-1 / 3, abs=1e-6)
    swapped = [(pair["better_here"], pair["better_in_paper"]) for pair in order["swapped"]]
    assert swapped == [("rag", "direct"), ("search_r1_base", "direct")]
    record["statistics"] = table.statistics(record)
    said = " ".join(table.notes(record))
    assert "The other way round here (* p < 0.05): RAG above Direct answer, Search-R1 base above Direct answer" in said


def refusal(*folders):
    with pytest.raises(RunError) as caught:
        table.make_record(list(folders), "")
    return str(caught.value)


def test_what_is_not_there_is_named(comparison, tmp_path):
    assert "no comparison is here" in refusal(tmp_path / "nowhere")
    (comparison / "seed1/rag/evaluation.json").write_text('{"date": "x", "greedy": {}}')
    assert "seed1/rag: evaluation.json lacks machine, versions, model" in refusal(comparison)
    (comparison / "seed1/rag/evaluation.json").unlink()
    assert re.search(r"seed1/rag: evaluation.json is missing; the evaluation is not finished", refusal(comparison))
    for path in (comparison / "seed1/rag").iterdir():
        path.unlink()
    assert re.search(r"seed1: the way 'rag' is missing", refusal(comparison))


def test_an_answer_that_does_not_get_its_score_is_named(comparison):
    folder = comparison / "seed0/rag"
    rows = read_rows(folder)
    rows[2]["exact_match"] = 1.0
    write_rows(folder, rows)
    assert re.search(
        r"rag/trajectories.jsonl.gz:3: question 'q2': exact_match is 1.0 in the file, but .* gets 0.0",
        refusal(comparison),
    )
    rows[2]["exact_match"] = float("nan")
    write_rows(folder, rows)
    assert "exact_match is nan in the file" in refusal(comparison)
    rows[2]["exact_match"] = 0.0
    rows[0]["turns"][0]["text"], rows[0]["exact_match"] = "<answer>Po</answer>", 0.0
    write_rows(folder, rows)
    assert "greedy exact_match is 0.25 in evaluation.json, 0.125 by its rows" in refusal(comparison)
    write_rows(folder, rows[1:])
    assert "rag: 7 of 8 questions were answered greedy" in refusal(comparison)
    write_rows(folder, [rows[0], *rows])
    assert "trajectories.jsonl.gz:2: question 'q0' is there twice" in refusal(comparison)
    write_rows(folder, [{"decoding": "greedy"}])
    assert "trajectories.jsonl.gz:1: this is no evaluated answer (KeyError: 'question')" in refusal(comparison)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": {"torch": "1"}}, "different versions"),
        ({"config": {"topk": 5}}, "different settings of topk"),
        ({"model": "other"}, "different models"),
        ({"decodings": ("greedy",)}, "different decodings"),
        ({"hops": False}, "different questions"),
    ],
)
def test_what_cannot_be_compared_is_refused(comparison, changes, message):
    write_way(comparison / "seed0/zzz", "RRRRRRRR", decodings=("greedy", "sampled"))
    write_way(comparison / "seed1/zzz", "RRRRRRRR", **({"decodings": ("greedy", "sampled")} | changes))
    assert message in refusal(comparison)


def test_one_seed_one_way_data_sets_and_a_way_that_the_paper_has_not(tmp_path):
    write_way(tmp_path / "a/seed3/inter", "RW", hops=False, data_set=lambda n: ("nq", "popqa")[n])
    record = table.make_record([tmp_path / "a"], "")
    frame = table.table_frame(record)
    assert list(record["groups"]) == ["on nq", "on popqa"] and frame.loc[0, "on nq"] == 1.0
    assert frame.loc[0, "way"] == "InteR" and frame["paper 3B"].isna().all()
    assert record["statistics"]["orders"] == {"3B": None, "7B": None}
    assert "show no difference in" in " ".join(table.notes(record))
    for make in (table.to_markdown, table.to_csv, table.to_latex):
        assert "InteR" in make(record)
    plt.close(table.picture(record))
    write_way(tmp_path / "b/seed3/inter", "RW")
    assert "are the same way and seed" in refusal(tmp_path / "a", tmp_path / "b")


def test_folders_are_joined_and_a_search_that_was_refused_leaves_every_way(comparison, tmp_path):
    for seed in (0, 1):
        folder = write_way(tmp_path / f"more/seed{seed}/other", "RRRRRRRN", decodings=("greedy", "sampled"))
    rows = read_rows(folder)
    rows[7]["stop_reason"] = "search refused"
    write_rows(folder, rows)
    about = json.loads((folder / "evaluation.json").read_text())
    about["greedy"] = about["greedy"] | {"exact_match": 1.0}
    (folder / "evaluation.json").write_text(json.dumps(about))
    record = table.make_record([comparison, tmp_path / "more"], "")
    assert record["left_out"] == ["q7"] and list(record["ways"])[-1] == "other"
    assert record["statistics"]["cells"]["greedy"]["direct"]["exact_match"] == 0.0
    assert any("Left out of every way" in note for note in table.notes(record))


def test_rows_of_older_files_lack_counts(tmp_path):
    folder = write_way(tmp_path / "a/seed0/direct", "RW")
    rows = [{key: row[key] for key in row if key != "retrieved_tokens"} for row in read_rows(folder)]
    write_rows(folder, rows)
    record = table.make_record([tmp_path / "a"], "")
    assert record["ways"]["direct"]["scores"]["greedy"]["retrieved_tokens"] is None
    assert "| - |" in table.to_markdown(record)


texts = st.text(max_size=30) | st.sampled_from(HOSTILE)


def hostile_record(way, model, group):
    """A record of two ways of which everything that comes from a file is any text."""
    columns = {name: ["1 0 1"] for name in (*table.SCORES, *table.COUNTS)}
    entry = {"model": model, "strategy": way, "trained": True, "commands": [way]}
    entry |= {"seconds": {"greedy": [0.1]}, "calls": {"greedy": None}, "scores": {"greedy": columns}}
    record = {"date": "2026", "machines": [{}], "versions": {}, "command": model, "seeds": [0], "decodings": ["greedy"]}
    record |= {"questions": ["a", "b", "c"], "left_out": [], "groups": {f"on {group}": "0 1 2"}}
    record |= {"ways": {way: entry, way + "2": entry}}
    record["paper"] = {
        "source": "x",
        "notes": ["y"],
        "names": {way: way, way + "2": way},
        "average": {"3B": {}, "7B": {}},
    }
    return record | {"statistics": table.statistics(record)}


@settings(deadline=None, max_examples=40)
@given(texts, texts, texts)
def test_no_text_leaves_its_cell(way, model, group):
    record = hostile_record(way, model, group)
    columns = len(table._text_rows(record, "greedy")[0])
    text = table.to_markdown(record)
    tables = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert [len(rows) for rows in tables] == [4, 3]
    assert {row.count("|") for row in tables[0]} == {columns + 1} and {row.count("|") for row in tables[1]} == {7}
    assert not re.search(r"[<`\\]|\]\(", "".join(row for rows in tables for row in rows))
    html = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert html.count("<td") == 2 * columns + 6 and "<script" not in html and "<a " not in html
    shown = re.findall(r"<td>(.*?)</td>", html)[0]
    assert MarkdownIt("commonmark").renderInline("x" + table.markdown(way)) in ("x" + shown, "x" + shown.strip())

    rows = list(csv.reader(io.StringIO(table.to_csv(record), newline="")))
    assert [len(row) for row in rows] == [columns + 3] * 3
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)

    lines = table.to_latex(record).split("\n")
    body = [line for line in lines if line.endswith(r" \\")]
    assert len(body) == 3 and len(lines) == 12
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == columns - 1 and line.count(r"\\") == 1
        assert not re.search(r"(?<!\\)[%$#_]", line) and not line.startswith(("[", "*"))


def test_text_is_shown_as_it_is():
    for text in HOSTILE:
        plain = " ".join(text.replace("\x1b", "␛").replace("\r", "␍").split())
        assert (
            MarkdownIt("commonmark")
            .renderInline(table.markdown(text))
            .replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&quot;", '"')
            .replace("&amp;", "&")
            == plain
        )
    assert table.markdown("__main__ https://x.y/z") == "&#95;&#95;main&#95;&#95; https&#58;//x.y/z"  # bold; a link
    assert table.latex(r"a_b & 50% \\ {x} ~^$#|<>[*") == (
        r"a\_b \& 50\% \textbackslash{}\textbackslash{} \{x\} \textasciitilde{}\textasciicircum{}\$\#"
        r"\textbar{}\textless{}\textgreater{}{[}{*}"
    )
    assert [table.spreadsheet(text) for text in ("=1", " @x", "a=1")] == ["'=1", "'@x", "a=1"]


def test_the_picture_has_what_the_table_has(comparison):
    record = table.make_record([comparison], "")
    record["paper"]["names"]["rag"] = "$R_{A$ <b>"
    figure = table.picture(record)
    here, paper = figure.axes
    assert [label.get_text() for label in here.get_yticklabels()] == ["Direct answer", "$R_{A$ <b>", "Search-R1 base"]
    greedy = here.containers[0].lines[0]
    assert list(greedy.get_xdata()) == [1 / 8, 2 / 8, 13 / 16]
    assert [list(line.get_xdata()) for line in paper.get_lines()] == [[0.134, 0.27, 0.303], [0.181, 0.304, 0.431]]
    assert here.get_xlabel() and paper.get_xlabel() and here.yaxis_inverted()
    figure.canvas.draw()
    plt.close(figure)


def test_the_papers_averages_are_those_of_its_rows():
    paper = json.loads(table.PAPER.read_text())
    for size, rows in paper["exact_match"].items():
        assert len(rows) == 14 and "inter" not in rows
        for way, row in rows.items():
            sets = [value for name, value in row.items() if name != "average"]
            assert len(sets) == 7
            if (size, way) == ("7B", "ircot"):  # printed so; the file's notes say it
                assert round(sum(sets) / 7, 3) == 0.226 and row["average"] == 0.239
            else:
                assert abs(sum(sets) / 7 - row["average"]) < 0.0011


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*no comparison is here"):
        searchr1("report", "table", tmp_path, "--out", tmp_path / "x")
    assert not list(tmp_path.iterdir())
