"""The benchmarks as a dry run: every peer comes to our ids and masks, and the results have the form that is read.

Never a time: a machine that is busy with other work would fail it.
"""

import json
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from searchr1_lite.config import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers
import rollout as rollout_benchmark
import scaling
import training_step
import workload

SEARCH_R1 = os.environ.get("SEARCH_R1")
QUICK = {"questions": 2, "group_size": 2, "lengths": workload.QUICK_LENGTHS, "max_response_tokens": 40}


@pytest.fixture(scope="module")
def work() -> workload.Work:
    return workload.make_work(workload.make_policy({}, seed=0), **QUICK)


def test_every_peer_writes_our_ids_and_masks(tmp_path):
    out = tmp_path / "rollout.json"
    rollout_benchmark.main(["--quick", "--out", str(out)])
    result = json.loads(out.read_text())
    assert set(result["engines"]) == {
        "ours",
        "trl_tools",
        "generate_loop",
        "continuous_batching",
        "continuous_batching, no sharing",
    }
    assert "--search-r1" in result["skipped"]["search_r1"]
    assert result["workload"]["rows"] == 4
    for engine in result["engines"].values():
        assert engine["same_ids_and_masks"] and len(engine["seconds"]) == 1
        assert engine["trajectories_per_second"] == pytest.approx(4 / engine["median_seconds"])


@pytest.mark.skipif(not SEARCH_R1, reason="set SEARCH_R1 to a checkout of PeterGriffinJin/Search-R1")
@pytest.mark.parametrize("stop_at_tag", [False, True])
def test_search_r1s_own_loop_writes_our_ids_and_masks(work, stop_at_tag):
    expected = workload.learn_histories(work, workload.ours(work))
    assert peers.search_r1(work, Path(SEARCH_R1), stop_at_tag) == expected


def test_a_row_has_its_script_between_observations_and_the_mask_says_which(work):
    for (ids, mask), script in zip(workload.learn_histories(work, workload.ours(work)), work.scripts, strict=True):
        assert [i for i, own in zip(ids, mask, strict=True) if own] == [i for turn in script for i in turn]
        assert sum(a != b for a, b in pairwise(mask)) == 4  # turn, hits, turn, hits, turn
        assert mask[0] == mask[-1] == 1


def test_a_peer_that_reads_something_else_is_found_out(work, monkeypatch):
    workload.learn_histories(work, workload.ours(work))
    observe = peers.observe
    monkeypatch.setattr(peers, "observe", lambda *arguments: [ids[:-1] for ids in observe(*arguments)])
    with pytest.raises(RuntimeError, match="has read something that ours has not"), torch.no_grad():
        peers.generate_loop(work)


def test_other_ids_or_masks_end_the_benchmark(work):
    def wrong():
        written = [(list(t.completion_ids), list(t.loss_mask)) for t in workload.ours(work)]
        written[1][1][-1] = 0
        return written

    with pytest.raises(RuntimeError, match="wrong: row 1 has other ids or another mask"):
        rollout_benchmark.measure(work, {"wrong": wrong}, 1)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is no checkout of Search-R1"):
        rollout_benchmark.main(["--quick", "--search-r1", str(tmp_path)])


def test_scripts_differ_by_row_and_turn_and_keep_to_their_lengths(work):
    turns = [tuple(turn) for script in work.scripts for turn in script]
    assert len(set(turns)) == len(turns) == 12
    assert all(20 <= len(turn) <= 40 for turn in turns)


def test_scaling_writes_points_and_a_picture(tmp_path):
    out = tmp_path / "scaling.json"
    scaling.main(["--quick", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [point["rows"] for point in result["rows"]] == [4, 8]
    assert [point["turns"] for point in result["turns"]] == [1, 2]
    assert result["context"][0]["context"] < result["context"][1]["context"]
    assert result["rows"][0]["ours"]["relative"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert "generate_loop" in result["turns"][1]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_three_ways_of_a_training_step_come_to_the_same_gradient(tmp_path):
    out = tmp_path / "training_step.json"
    training_step.main(["--quick", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["target"] == {"workload": "tiny", "loop / 0.6.0": 0.6}
    assert list(result["workloads"]) == ["tiny", "wide"]
    for found in result["workloads"].values():
        assert list(found["seconds"]) == ["loop", "0.6.0", "TRL"]
        assert max(found["largest_gradient_difference"].values()) < 1e-3
        ratio = found["ratio"]["loop / 0.6.0"]
        assert ratio["median"] == pytest.approx(found["seconds"]["loop"][0] / found["seconds"]["0.6.0"][0])


def test_a_training_step_with_another_gradient_ends_the_benchmark(monkeypatch):
    work = training_step.wide_workload(quick=True)

    def other_rewards(work, folder):
        work = replace(work, rewards=[1.0 - reward for reward in work.rewards])
        return training_step.trl_step(work, folder)

    monkeypatch.setattr(training_step, "WAYS", {"loop": training_step.loop_step, "wrong": other_rewards})
    with pytest.raises(AssertionError, match="wide: the gradient of wrong is not the loop's"):
        training_step.measure("wide", work, 1)
