"""Experiments: what their files may say, that runs are made once and in spite of others, and what is kept of them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest
import yaml
from conftest import searchr1
from synthetic_runs import metrics_row, summary

from searchr1_lite.analysis.runs import RunError, load_run
from searchr1_lite.analysis.summary import curve_measures, run_entry, sum_up, write_result
from searchr1_lite.config import Profile, load_profile, save_config
from searchr1_lite.experiments import plan
from searchr1_lite.experiments import run as command
from searchr1_lite.experiments.plan import BASE, FOLDER, SMOKE, ExperimentError, experiment_names, load_experiment, slug
from searchr1_lite.experiments.run import run_experiment
from searchr1_lite.lab.profile import load_broken

NAMES = [*experiment_names(), SMOKE]
STUB = "test_experiments"  # this module is the worker: `train_run` below stands for training
TWO = {"title": "T", "question": "Q?", "seeds": [0, 1], "minutes": 2, "arms": {"a": {}, "b": {"masked": False}}}


def train_run(profile: Profile, run_folder: Path, also: dict | None = None) -> None:
    """A run of four steps in no time. What is in `orders` next to the runs says what goes wrong."""
    orders = run_folder.parent / "orders"
    order = orders.read_text() if orders.exists() else ""
    print("made", run_folder.name, "with", profile.seed)
    if order == "fail" and not profile.masked:
        raise ValueError("no such luck")
    if order == "vanish" and not profile.masked:
        sys.stdout.flush()
        os._exit(0)
    if order == "die" and profile.seed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "sleep":
        (run_folder.parent / f"pid-{os.getpid()}").write_text("")
        time.sleep(900)  # longer than the test waits
    write_finished(run_folder, profile)


def write_finished(folder: Path, profile: Profile, curve=(0.2, 0.5, 0.8, 0.2), **environment) -> Path:
    folder.mkdir(parents=True)
    save_config(profile, folder / "config.yaml")
    made = {"date": f"2026-01-0{profile.seed + 1}", "machine": {"cores": 2}, "versions": {"torch": "2"}, "command": "x"}
    (folder / "environment.json").write_text(json.dumps(made | environment))
    rows = [metrics_row(step, value, (1, 2)) for step, value in enumerate(curve, 1)]
    rows[1]["kl"], rows[0]["searches"] = None, 1.23456
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = summary(0.625, (1, 2)) | {"mean_searches": 1.5, "response_length": 77.0, "answer_rate": 0.75}
    result = {"before": summary(0.1, (1, 2)), "after": after, "closed_book": 0.02}
    (folder / "evaluation.json").write_text(json.dumps(result))
    return folder


def written(folder: Path, **changes) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({key: x for key, x in (TWO | changes).items() if x is not None}))
    return str(file)


@pytest.mark.parametrize("name", NAMES)
def test_each_experiment_can_be_run(name):
    experiment = load_experiment(name)
    runs = experiment.runs()
    assert len(runs) == len(experiment.arms) * len(experiment.seeds)
    base = load_profile("tiny", **BASE)
    assert all(f"{slug(profile, base)}-seed{profile.seed}" == run for run, (_, profile) in runs.items())
    profiles = [profile for _, profile in runs.values()]
    seconds = sum(one.rollouts_per_step / 30 * (44 + 3.5 * one.updates_per_rollout) for one in profiles)
    if name != SMOKE:
        assert experiment.minutes == pytest.approx(seconds / 60, rel=0.5) and experiment.minutes <= 45
    seeds = 1 if name == SMOKE else 5 if name in ("mask", "algorithms", "group_size", "topk", "collapse") else 3
    assert len(experiment.seeds) == seeds


def test_the_eleven_of_the_findings_are_there():
    asked = "mask algorithms group_size topk start dynamics rewards retriever search precision bugs"
    assert set(experiment_names()) >= set(asked.split())


def test_a_run_is_named_by_what_it_changes():
    def named(load=load_profile, **settings):
        return slug(load("tiny", **BASE | settings), load_profile("tiny", **BASE))

    assert named() == named(seed=3) == named(group_size=5) == "base"
    assert named(masked=False) == "masked=False"
    assert named(model="data/tiny-instruct") == "model=data_tiny-instruct"
    assert named(noise_start=0.5, noise_end=0.5, topk=5) == "noise_end=0.5,noise_start=0.5,topk=5"
    assert named(load_broken, defects=["kl_sign", "colliding_ids"]) == "defects=[kl_sign,colliding_ids]"
    assert named(load_broken, defects=[]) == "base"
    assert (
        named(quantization="none", lora_r=0, learning_rate=0.0003) == "learning_rate=0.0003,lora_r=0,quantization=none"
    )


def test_the_same_run_of_two_experiments_has_one_folder():
    mask, start = load_experiment("mask", [0]), load_experiment("start", [0])
    assert mask.runs().keys() & start.runs().keys() == {"base-seed0"}


def test_seeds_come_before_arms(tmp_path):
    runs = load_experiment(written(tmp_path)).runs()
    assert list(runs) == ["base-seed0", "masked=False-seed0", "base-seed1", "masked=False-seed1"]
    assert list(load_experiment(written(tmp_path), [7]).runs()) == ["base-seed7", "masked=False-seed7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "titel: Extra inputs are not permitted"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": None}, "seeds: Field required"),
        ({"seeds": [0, 0]}, "the arms 'a' and 'a' have the same run, base-seed0"),
        ({"seeds": [-1]}, "seeds: 0: Input should be greater than or equal to 0"),
        ({"minutes": "long"}, "minutes: Input should be a valid number"),
        ({"arms": {}}, "arms: Dictionary should have at least 1 item"),
        ({"arms": {"a": None}}, "arms: a: Input should be a valid dictionary"),
        (
            {"arms": {"a": {"tpok": 1}}},
            "arm 'a': profile 'tiny' cannot be used:\n- tpok: there is no such setting",
        ),
        ({"arms": {"a": {"group_size": 1}}}, "arm 'a': profile 'tiny' cannot be used:\n- group_size = 1 has no group"),
        ({"arms": {"a": {"seed": 1}}}, "arm 'a': .*multiple values for keyword argument 'seed'"),
        ({"arms": {"a": {}, "b": {"topk": 3}}}, "the arms 'a' and 'b' have the same run, base-seed0"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ExperimentError, match=f"(?s)mine.yaml: .*{message}" if "arm" in message else message):
        load_experiment(written(tmp_path, **changes))


def test_a_name_that_does_not_exist_is_refused(tmp_path):
    for name in ("maks", "untestable", str(tmp_path / "none.yaml")):
        with pytest.raises(
            ExperimentError, match=r"no experiment .*there are algorithms, bugs, .*topk, smoke, or give"
        ):
            load_experiment(name)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RunError, match="holds a list where a mapping is expected"):
        load_experiment(str(tmp_path / "list.yaml"))


def test_runs_are_made_once_and_go_on(tmp_path, capsys):
    runs, experiment = tmp_path / "runs", load_experiment(written(tmp_path))
    there = write_finished(runs / "base-seed0", experiment.runs()["base-seed0"][1])
    before = there.stat().st_mtime_ns, list(there.iterdir())
    run_experiment(experiment, runs, worker=STUB)
    assert (there.stat().st_mtime_ns, list(there.iterdir())) == before
    assert "made base-seed1 with 1" in (runs / "logs/base-seed1.log").read_text()
    printed = capsys.readouterr().out
    assert "mine: 3 of 4 runs to make, 2 at a time" in printed
    assert "masked=False-seed1: finished; about 0 minutes left" in printed and "4 of 4" in printed
    sum_up(experiment, runs)
    run_experiment(experiment, runs, worker="a module that is not there")
    assert "0 of 4 runs to make" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_runs_go_at_a_time_than_were_asked_for(tmp_path, capsys, workers):
    run_experiment(load_experiment(written(tmp_path)), tmp_path / "runs", workers, worker=STUB)
    steps = [
        {"started": 1, "finished": -1}.get(line.split()[1].strip(",;")) for line in capsys.readouterr().out.splitlines()
    ]
    going = list(accumulate(step for step in steps if step))
    assert max(going) == workers and len(going) == 8 and going[-1] == 0


@pytest.mark.parametrize(
    ("order", "failing", "message"),
    [
        ("fail", "masked=False-seed{}", "ValueError: no such luck (exit status 1, "),
        ("die", "{}-seed0", "made {}-seed0 with 0 (exit status -9, "),
        ("vanish", "masked=False-seed{}", "made masked=False-seed{0} with {0} (exit status 0, "),
    ],
)
def test_a_failing_run_does_not_stop_the_others(tmp_path, order, failing, message):
    runs, experiment = tmp_path / "runs", load_experiment(written(tmp_path))
    runs.mkdir()
    (runs / "orders").write_text(order)
    with pytest.raises(ExperimentError) as failed:
        run_experiment(experiment, runs, worker=STUB)
    lines = str(failed.value).splitlines()
    assert lines[0] == "2 runs failed; the same command tries again" and len(lines) == 3
    for line, value in zip(sorted(lines[1:]), ("base", "masked=False") if order == "die" else (0, 1), strict=True):
        name = failing.format(value)
        assert line == f"{name} FAILED: {message.format(value)}{runs}/logs/{name}.log)"
    assert len(list(runs.glob("*/evaluation.json"))) == 2
    with pytest.raises(RunError, match=r"mine: 2 of 4 runs are missing: .*seed0.*--partial"):
        sum_up(experiment, runs)
    (runs / "orders").unlink()
    run_experiment(experiment, runs, worker=STUB)
    assert sum_up(experiment, runs)["seeds"] == [0, 1]


SCRIPT = """
import signal
import sys
from searchr1_lite.experiments.plan import load_experiment
from searchr1_lite.experiments.run import run_experiment
from pathlib import Path
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    sys.path.insert(0, sys.argv[2])
    run_experiment(load_experiment(sys.argv[1] + "/mine.yaml"), Path(sys.argv[1]) / "runs", worker="test_experiments")
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_nothing_goes_on_when_the_command_has_ended(tmp_path, stop):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "orders").write_text("sleep")
    written(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    started = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(list(runs.glob("pid-*"))) == 2)
        started.send_signal(stop)
        assert started.wait(240) != 0
    finally:
        started.kill()
    processes = [int(path.name.removeprefix("pid-")) for path in runs.glob("pid-*")]
    assert len(processes) == 2
    wait_for(lambda: not any(map(is_running, processes)))


def wait_for(condition, seconds=240):  # much more than it takes, for a machine that is busy
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_measures_by_hand():
    # means of three in a row: 0.3, 0.6, 0.7, 0.5
    assert curve_measures([0.0, 0.3, 0.6, 0.9, 0.6, 0.0]) == pytest.approx({"speed": 0.4, "peak": 0.7, "drop": 0.2})
    assert curve_measures([0.2, 0.4]) == pytest.approx({"speed": 0.3, "peak": 0.3, "drop": 0.0})


def test_what_is_kept_is_what_the_runs_hold(tmp_path):
    runs, experiment = tmp_path / "runs", load_experiment(written(tmp_path))
    for name, (_, profile) in experiment.runs().items():
        write_finished(runs / name, profile)
    record = sum_up(experiment, runs)
    assert record["command"] == f"searchr1 experiment {tmp_path}/mine.yaml --seeds 0,1"
    assert record["date"] == "2026-01-02" and record["settings"] == TWO["arms"] and "missing" not in record
    assert [entry["run"] for entry in record["arms"]["b"]] == ["masked=False-seed0", "masked=False-seed1"]
    assert [entry["seed"] for entry in record["arms"]["a"]] == [0, 1]
    entry = record["arms"]["a"][0]
    # means of three in a row: 0.5, 0.5; four steps of 2.5 s and two evaluations of 1 s
    expected = {
        "final": 0.625,
        "speed": 0.425,
        "peak": 0.5,
        "drop": 0,
        "searches": 1.5,
        "length": 77,
        "answer_rate": 0.75,
    }
    assert entry["measures"] == expected and entry["seconds"] == 12 and record["seconds"] == 48
    assert entry["before"]["exact_match"] == 0.1 and entry["closed_book"] == 0.02
    assert entry["curves"]["step"] == [1, 2, 3, 4] and entry["curves"]["exact_match"] == [0.2, 0.5, 0.8, 0.2]
    assert entry["curves"]["kl"] == [0.01, None, 0.03, 0.04] and entry["curves"]["searches"][0] == 1.235
    assert entry["curves"]["searches_by_hops.2"] == [0.3333, 0.6667, 1.0, 1.333]
    write_result(record, tmp_path / "results/mine.json")
    text = (tmp_path / "results/mine.json").read_text()
    assert json.loads(text) == record and '"step": [ 1, 2, 3, 4 ]' in text


def test_a_part_says_what_it_is(tmp_path):
    runs, experiment = tmp_path / "runs", load_experiment(written(tmp_path))
    with pytest.raises(RunError, match="4 of 4 runs are missing"):
        sum_up(experiment, runs, partial=True)
    for name in ("base-seed0", "base-seed1", "masked=False-seed1"):
        write_finished(runs / name, experiment.runs()[name][1])
    (runs / "masked=False-seed0").mkdir()  # begun
    record = sum_up(experiment, runs, partial=True)
    assert record["missing"] == ["masked=False-seed0"] and record["finished"] == {"a": 2, "b": 1}
    assert [len(entries) for entries in record["arms"].values()] == [2, 1]
    assert record["command"].endswith(" --partial")


def test_runs_made_otherwise_are_refused(tmp_path):
    runs, experiment = tmp_path / "runs", load_experiment(written(tmp_path, seeds=[0]))
    for name, (_, profile) in experiment.runs().items():
        write_finished(runs / name, profile)
    config = runs / "base-seed0/config.yaml"
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({key: x for key, x in settings.items() if key != "llds_coef"}))
    sum_up(experiment, runs)  # a setting younger than the run had its default there
    for key in ("topk", "seed"):  # of another seed: a folder that was copied and renamed
        config.write_text(yaml.safe_dump(settings | {key: 7}))
        with pytest.raises(RunError, match=rf"base-seed0: made with another {key}; delete it"):
            sum_up(experiment, runs)
    config.write_text(yaml.safe_dump(settings))
    file = runs / "masked=False-seed0/environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"date": "2025", "versions": {"torch": "1"}}))
    with pytest.raises(RunError, match=r"masked=False-seed0 and .* different versions"):
        sum_up(experiment, runs)


def test_the_command_runs_each_and_writes_its_result(tmp_path, monkeypatch, capsys):
    made = []

    def run(experiment, folder, workers):
        made.append((experiment.name, experiment.seeds, workers))
        if experiment.name == "mask":
            raise ExperimentError("2 runs failed")
        for name, (_, profile) in experiment.runs().items():
            write_finished(folder / name, profile)

    monkeypatch.setattr(command, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    monkeypatch.setattr(command, "run_experiment", run)
    with pytest.raises(SystemExit, match=r"^error: mask: 2 runs failed$"):
        searchr1("experiment", "mask", "topk", "--seeds", "3,4")
    assert made == [("mask", [3, 4], 2), ("topk", [3, 4], 2)]
    record = json.loads((tmp_path / "data/results/experiments/topk.json").read_text())
    assert record["seeds"] == [3, 4] and not (tmp_path / "data/results/experiments/mask.json").exists()
    made.clear()
    searchr1("experiment", "topk", "--seeds", "3,4,5", "--partial")
    record = json.loads((tmp_path / "data/results/experiments/topk.json").read_text())
    assert not made and len(record["missing"]) == len(record["settings"])  # nothing is trained, the third seed lacks
    with pytest.raises(SystemExit, match="error: ten_ways goes alone"):
        searchr1("experiment", "mask", "ten_ways")
    with pytest.raises(SystemExit, match="error: no experiment 'maks'"):
        searchr1("experiment", "topk", "maks")


def test_the_list_counts_runs_once(capsys):
    searchr1("experiment")
    printed = capsys.readouterr().out
    assert "mask: The retrieved-token mask (4 arms x 5 seeds = 20 runs, " in printed and "ten_ways: " in printed
    experiments = [load_experiment(name) for name in ("start", "dynamics")]
    minutes = sum(one.minutes for one in experiments)
    assert f"\n9 different runs; less than {minutes:g} minutes" in plan.overview(experiments)


def test_trained_models_are_asked_again_where_an_experiment_says_so(tmp_path, monkeypatch):
    from searchr1_lite.evaluation import evaluate
    from searchr1_lite.training import loop

    experiment, asked = load_experiment("retriever", [0]), []
    assert experiment.also_evaluate == {"retriever": "bm25", "noise_start": 0.0, "noise_end": 0.0}
    run, (_, profile) = next(iter(experiment.runs().items()))

    def evaluate_into(out, profile, decoding, adapter):
        asked.append((profile.retriever, decoding, adapter))
        out.mkdir()
        (out / "evaluation.json").write_text(json.dumps({"greedy": {"exact_match": 0.25}}))

    monkeypatch.setattr(loop, "train", lambda profile, folder, progress: write_finished(folder, profile))
    monkeypatch.setattr(evaluate, "evaluate_into", evaluate_into)
    (tmp_path / "logs").mkdir()
    command.train_run(profile, tmp_path / run, experiment.also_evaluate)
    assert asked == [("bm25", "greedy", tmp_path / run / "adapter")] and profile.retriever == "oracle"
    assert run_entry(load_run(tmp_path / run), True)["again"] == {"exact_match": 0.25}
    assert "again" not in run_entry(load_run(tmp_path / run))
    assert experiment.is_made(tmp_path / run) and load_experiment("mask").is_made(tmp_path / run)
    (tmp_path / run / "again/evaluation.json").unlink()  # another experiment trained it, or this one was killed there
    assert not experiment.is_made(tmp_path / run) and load_experiment("mask").is_made(tmp_path / run)


def test_smoke_leaves_no_result_among_the_findings():
    assert "runs" in load_experiment(SMOKE).result_file.parts and math.isclose(load_experiment(SMOKE).minutes, 1)
    assert load_experiment("mask").result_file == FOLDER.parent.parent / "data/results/experiments/mask.json"
