"""Reading, summing up and drawing run folders: values worked out by hand, and every way a folder can be broken."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from scipy.stats import t as student
from synthetic_runs import trajectory_row, write_run

matplotlib.use("Agg")

from conftest import searchr1

from searchr1_lite.analysis import figures, summary, viewer
from searchr1_lite.analysis.runs import RunError, before_and_after, by_mask, load_run, load_runs


@pytest.fixture
def runs(tmp_path):
    """Three masked runs and two unmasked ones."""
    for masked, seeds in ((True, 3), (False, 2)):
        for seed in range(seeds):
            write_run(tmp_path / "runs" / f"{'masked' if masked else 'unmasked'}-{seed}", masked=masked, seed=seed)
    return load_runs(tmp_path / "runs")


def test_a_run_is_read_as_written(tmp_path):
    run = load_run(write_run(tmp_path / "one", seed=2, steps=4))
    assert (run.name, run.masked, run.profile["seed"], run.hops) == ("one", True, 2, ["1", "2"])
    assert run.metrics["reward"].tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6])
    assert run.metrics.index.tolist() == [1, 2, 3, 4]
    assert run.metrics.loc[3, "exact_match_by_hops.2"] == pytest.approx(0.25)
    assert run.evaluation["closed_book"] == 0.02
    assert [row["phase"] for row in run.trajectories()] == ["before", "before", "after", "after"]
    assert len(list(run.trajectories("after"))) == 2


def test_reading_and_drawing_runs_needs_no_torch(tmp_path):
    folder = write_run(tmp_path / "one")
    code = (
        "import sys, searchr1_lite.analysis.summary, searchr1_lite.analysis.viewer as v\n"
        "from searchr1_lite.analysis.runs import load_run, by_mask\n"
        "from searchr1_lite.analysis.figures import learning_curves\n"
        f"run = load_run({str(folder)!r}); learning_curves(by_mask([run])); list(run.trajectories())\n"
        "print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    )
    environment = {"MPLBACKEND": "Agg", "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "one")
    (folder / name).unlink()
    with pytest.raises(RunError, match=rf"{name}: is missing"):
        load_run(folder)


def test_a_missing_folder_and_a_folder_without_runs_are_errors(tmp_path):
    with pytest.raises(RunError, match="no such run folder"):
        load_run(tmp_path / "none")
    with pytest.raises(RunError, match="no run is here"):
        load_runs(tmp_path)


def test_a_run_without_evaluation_is_unfinished_and_not_summed_up(tmp_path):
    folder = write_run(tmp_path / "one")
    (folder / "evaluation.json").unlink()
    run = load_run(folder)
    assert run.evaluation is None
    with pytest.raises(RunError, match="not finished"):
        summary.run_entry(run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "a: [", "config.yaml: cannot be read"),
        ("config.yaml", "- a", "config.yaml: holds a list"),
        ("config.yaml", "seed: 1", "'masked' is missing"),
        ("environment.json", '{"date": ', "environment.json: cannot be read"),
        ("evaluation.json", '{"before": {}}', "evaluation.json: lacks after, closed_book"),
        ("metrics.jsonl", "", "metrics.jsonl: holds no step"),
        ("metrics.jsonl", '{"step": 1}\n{"step\n{"step": 3}\n', "metrics.jsonl:2: "),
        ("metrics.jsonl", '{"step": 1}\n{"step\n', "metrics.jsonl:2: "),
        ("metrics.jsonl", '{"step": 1}\n[2]\n', "metrics.jsonl:2: not a mapping"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 1}\n', "metrics.jsonl:2: step 1 follows step 1"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name, text, message):
    folder = write_run(tmp_path / "one")
    (folder / name).write_text(text)
    with pytest.raises(RunError, match=message):
        load_run(folder)


def test_a_last_line_cut_off_in_writing_is_left_out_with_a_warning(tmp_path):
    folder = write_run(tmp_path / "one", steps=3)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match=r"metrics.jsonl:3: the last line was cut off"):
        assert load_run(folder).metrics.index.tolist() == [1, 2]


def test_cut_off_trajectories_are_an_error_that_names_the_file(tmp_path):
    folder = write_run(tmp_path / "one")
    path = folder / "trajectories.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"trajectories.jsonl.gz:\d+: "):
        list(load_run(folder).trajectories())


def test_runs_are_grouped_by_mask_and_those_that_differ_otherwise_are_refused(runs, tmp_path):
    groups = by_mask(runs)
    assert {label: [run.name for run in members] for label, members in groups.items()} == {
        "masked": ["masked-0", "masked-1", "masked-2"],
        "unmasked": ["unmasked-0", "unmasked-1"],
    }
    other = write_run(tmp_path / "other")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.003", "learning_rate: 0.1"))
    with pytest.raises(RunError, match="differ in learning_rate"):
        by_mask([*runs, load_run(other)])


def test_mean_and_interval_over_seeds(runs):
    curve = figures.over_seeds(by_mask(runs)["masked"], "reward")
    # Step 2: rewards 0.2, 0.3, 0.4; standard error 0.1 / sqrt(3); t with 2 degrees of freedom.
    half = student.ppf(0.975, 2) * 0.1 / 3**0.5
    assert curve.loc[2].tolist() == pytest.approx([0.3, 0.3 - half, 0.3 + half])


def test_steps_that_not_every_run_reached_are_left_out_of_the_mean(tmp_path):
    runs = [load_run(write_run(tmp_path / str(steps), steps=steps, seed=steps % 3)) for steps in (3, 5)]
    assert figures.over_seeds(runs, "reward").index.tolist() == [1, 2, 3]


def test_a_single_run_has_no_interval_and_an_unknown_column_is_an_error(tmp_path):
    run = load_run(write_run(tmp_path / "one"))
    curve = figures.over_seeds([run], "reward")
    assert curve["mean"].tolist() == run.metrics["reward"].tolist()
    assert curve["low"].isna().all()
    with pytest.raises(RunError, match="no 'rewards'"):
        figures.over_seeds([run], "rewards")


def test_the_picture_draws_every_run_and_the_mean(runs):
    axes = figures.learning_curves(by_mask(runs)).axes[0]
    drawn = [line.get_ydata().tolist() for line in axes.lines]
    for run in runs:
        assert any(values == pytest.approx(run.metrics["reward"].tolist()) for values in drawn)
    assert len(drawn) == len(runs) + 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["masked (3 seeds)", "unmasked (2 seeds)"]
    assert axes.get_xlabel() and axes.get_ylabel()
    styles = {(line.get_linestyle(), line.get_marker()) for line in axes.lines if line.get_linewidth() > 1}
    assert styles == {("-", "o"), ("--", "s")}


def test_a_panel_for_each_hop_count_with_the_ideal_or_one_for_all_where_hops_are_unknown(runs, tmp_path):
    figure = figures.curves_by_hops(by_mask(runs), "searches", "searches", ideal=True)
    assert [axes.get_title() for axes in figure.axes] == ["1-hop questions", "2-hop questions"]
    ideals = [next(line for line in axes.lines if line.get_label() == "ideal").get_ydata()[0] for axes in figure.axes]
    assert ideals == [1, 2]
    without = load_run(write_run(tmp_path / "without", hops=()))
    figure = figures.curves_by_hops(by_mask([without]), "searches", "searches", ideal=True)
    assert [axes.get_title() for axes in figure.axes] == ["all questions"]


def test_every_point_lies_inside_its_panel(runs):
    groups = by_mask(runs)
    drawn = [figures.learning_curves(groups), figures.single_curve(groups, "response_length", "tokens")]
    drawn += [figures.curves_by_hops(groups, "searches", "searches", ideal=True)]
    for axes in (axes for figure in drawn for axes in figure.axes):
        low, high = axes.get_ylim()
        assert low == 0
        assert max(max(line.get_ydata()) for line in axes.lines) <= high


def test_the_command_makes_the_same_files_twice(runs, tmp_path, capsys):
    for name in ("a", "b"):
        searchr1("report", "runs", *(run.folder for run in runs), "--out", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    said = capsys.readouterr().out
    assert "b.json" in said and "| exact match | 0.10 ± 0.00 | 0.70 ± 0.25 | 0.15 ± 0.64 |" in said


def test_the_summary_holds_what_is_quoted(runs, tmp_path):
    out = tmp_path / "summary.json"
    searchr1("report", "runs", *(run.folder for run in runs), "--out", out.with_suffix(""))
    written = json.loads(out.read_text())
    assert {"date", "machine", "versions", "command", "runs"} <= set(written)
    assert written["date"] == "2026-01-03T00:00:00+00:00"
    first = written["runs"][0]
    assert (first["run"], first["profile"], first["seed"], first["masked"]) == ("masked-0", "tiny", 0, True)
    assert (first["steps"], first["seconds"], first["closed_book"]) == (6, 17.0, 0.02)
    assert first["before"]["exact_match"] == 0.1
    assert first["after"]["exact_match_by_hops"]["2"] == pytest.approx(0.6)
    assert first["after"]["mean_searches_by_hops"] == {"1": 1.0, "2": 2.0}
    assert [run["masked"] for run in written["runs"]] == [True, True, True, False, False]
    assert list(tmp_path.glob("*.unfinished")) == []


def test_a_summary_that_cannot_be_made_leaves_the_old_one(runs, tmp_path):
    out = tmp_path / "summary.json"
    out.write_text("old")
    (runs[1].folder / "evaluation.json").unlink()
    with pytest.raises(SystemExit, match="not finished"):
        searchr1("report", "runs", *(run.folder for run in runs), "--out", out.with_suffix(""))
    assert out.read_text() == "old"


def test_telling_pairs_come_first(tmp_path):
    folder = write_run(tmp_path / "one")
    rows = [
        trajectory_row(phase, number, hops)
        for number, hops in ((0, 1), (1, 3), (2, 2))
        for phase in ("before", "after")
    ]
    rows += [trajectory_row("after", 9, 3)]  # answered after training only
    rows[2]["exact_match"] = 1.0  # the three-hop question was right before, too
    with gzip.open(folder / "trajectories.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pairs = before_and_after(load_run(folder))
    assert [before["question"]["id"] for before, _ in pairs] == ["q2", "q0", "q1"]
    assert all((before["phase"], after["phase"]) == ("before", "after") for before, after in pairs)


def test_what_passages_say_is_shown_and_never_rendered():
    before, after = trajectory_row("before", 0, 1), trajectory_row("after", 0, 1)
    page = viewer.side_by_side(before, after)
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>Ola</b>" not in page and "&lt;search&gt; Ola" in page
    assert page.count("<td") == page.count("</td>") == 2
    text = viewer.trajectory_text(after)
    assert '  | <information>Doc 1(Title: "Ola") <script>alert(1)</script>' in text.splitlines()
    assert "[right, 1 search, 12 tokens written]" in text


def test_two_questions_are_not_set_side_by_side():
    with pytest.raises(ValueError, match="'q0' and 'q1'"):
        viewer.side_by_side(trajectory_row("before", 0, 1), trajectory_row("after", 1, 1))


def test_the_committed_summary_is_that_of_the_committed_runs():
    results = Path(__file__).parent.parent / "data" / "results"
    folders = sorted((results / "runs").glob("*/config.yaml"))
    if not folders:
        pytest.skip("no run is committed yet")
    written = json.loads((results / "summary.json").read_text())
    made = summary.summarise_runs([load_run(path.parent) for path in folders], written["command"])
    assert made == written
