"""The arms of an experiment, summed up into one file."""

import json

import pytest
import yaml
from synthetic_runs import summary, write_run

from searchr1_lite.analysis import arms


def write_arms(folder, **changes):
    """Two arms of two seeds; `random` has another retriever. `changes` are made to the settings of its last run."""
    for arm in ("bm25", "random"):
        for seed in (0, 1):
            config = write_run(folder / f"{arm}-seed{seed}", masked=arm == "bm25", seed=seed) / "config.yaml"
            settings = yaml.safe_load(config.read_text()) | {"masked": True, "retriever": arm}
            settings |= changes if (arm, seed) == ("random", 1) else {}
            config.write_text(yaml.safe_dump({key: x for key, x in settings.items() if key != "noise_end"}))
    return sorted(map(str, folder.iterdir()))


def test_what_is_kept_is_what_the_runs_hold(tmp_path, capsys):
    runs = write_arms(tmp_path / "runs")
    again = tmp_path / "again/random-seed1/evaluation.json"
    again.parent.mkdir(parents=True)
    again.write_text(json.dumps({"greedy": summary(0.75, ()) | {"by_data_set": {"toy": {}}}, "date": "x"}))
    arms.main([*runs, "--again", str(tmp_path / "again"), "--out", str(tmp_path / "out.json")])
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["seeds"] == [0, 1] and record["date"].startswith("2026-01-02")
    assert record["settings"] == {"bm25": {"retriever": "bm25"}, "random": {"retriever": "random"}}
    last = record["arms"]["random"][1]
    assert last["again"] == summary(0.75, ()) and "again" not in record["arms"]["random"][0]
    assert (last["seed"], last["closed_book"]) == (1, 0.02)
    assert last["after"]["exact_match"] == 0.2
    assert record["arms"]["bm25"][0]["curves"]["exact_match"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert record["arms"]["bm25"][0]["curves"]["step"] == [1, 2, 3, 4, 5, 6]
    assert "bm25         exact match 0.600, 0.700; searches 1.00, 1.00" in capsys.readouterr().out


def refused(folders, tmp_path, *more) -> str:
    with pytest.raises(SystemExit) as stopped:
        arms.main([*folders, *more, "--out", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()
    return str(stopped.value)


def test_arms_that_cannot_be_compared_are_refused(tmp_path):
    runs = write_arms(tmp_path / "runs")
    assert "not the same seeds: {'bm25': [0, 1], 'random': [0]}" in refused(runs[:-1], tmp_path)
    (tmp_path / "runs/random-seed1/evaluation.json").unlink()
    assert "random-seed1: evaluation.json is missing" in refused(runs, tmp_path)
    other = write_run(tmp_path / "nameless")
    assert "named <arm>-seed<number>" in refused([str(other)], tmp_path)


def test_other_versions_are_refused(tmp_path):
    runs = write_arms(tmp_path / "runs")
    file = tmp_path / "runs/random-seed0/environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"versions": {"torch": "1.0"}}))
    assert "different versions" in refused(runs, tmp_path)


def test_an_arm_is_one_setting(tmp_path):
    runs = write_arms(tmp_path / "runs", learning_rate=1.0)
    assert "the runs of random differ in learning_rate" in refused(runs, tmp_path)


def test_an_evaluation_that_is_not_greedy_is_refused(tmp_path):
    runs = write_arms(tmp_path / "runs")
    again = tmp_path / "again/bm25-seed0/evaluation.json"
    again.parent.mkdir(parents=True)
    again.write_text("{}")
    assert "no greedy evaluation" in refused(runs, tmp_path, "--again", str(tmp_path / "again"))
