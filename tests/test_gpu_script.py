"""The script for a GPU, dry-run on the CPU: every part runs and the results have the form that is read. No figures."""

import json
import sys

import pytest

from searchr1_lite.config import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu

PARTS = ["step of 5 x 8", "decoding", "memory of qwen2.5-3b-4bit", "memory of qwen2.5-3b-4bit-24gb"]
PARTS += ["memory of qwen2.5-0.5b", "memory of qwen2.5-7b-4bit"]


def test_a_dry_run_goes_through_every_part(tmp_path):
    out = tmp_path / "gpu.json"
    gpu.main(["--dry-run", "--out", str(out), "--minutes", "60"])
    text = out.read_text(encoding="utf-8")
    result = json.loads(text)
    assert "_error" not in text and result["left_out"] == []
    assert result["dry_run"] is True and result["gpu"] is None
    assert {"date", "machine", "versions", "command", "bandwidth_gb_per_second", "published", *PARTS} <= set(result)
    for part in PARTS:
        for one in result["decoding"] if part == "decoding" else result[part]:
            assert all(value is not None for value in one.values())
    # 16 x 3 written, 2 x 40 observed, the rest is the prompt: every row as long as the context allows
    steps = result["step of 5 x 8"]
    assert [one["micro_batch_tokens"] for one in steps] == [400, 800]
    assert all(390 <= one["trajectory_tokens"][0] <= one["trajectory_tokens"][1] <= 400 for one in steps)
    for one in steps:
        assert one["step_seconds"] == pytest.approx(one["rollout_seconds"] + one["training_seconds"])
        hours = 1005 * 512 * 5 / 4 * one["step_seconds"] / 3600  # a dry step has 2 x 2 trajectories
        assert one["projected_hours_of_the_paper's_run"] == pytest.approx(hours)
    assert [one["weights"] for one in result["decoding"]] == ["quantized", "dequantized"]
    for one in result["decoding"]:
        assert one["graph_over_floor"] == pytest.approx(one["graph_ms"] / one["floor_ms"])
    assert result["decoding"][0]["floor_ms"] < result["decoding"][1]["floor_ms"]


def test_what_there_is_no_time_for_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "training", lambda *_: pytest.fail("no time for it"))
    saved = []
    result = gpu.measure(gpu.DRY, gpu.torch.device("cpu"), 0.0, "", saved.append)
    assert result["left_out"] == PARTS and saved == []
    assert gpu.measure(gpu.DRY, gpu.torch.device("cpu"), 0.0, "7b", saved.append)["left_out"] == PARTS[-1:]
    assert "left out, the 0 minutes are over" in capsys.readouterr().out


def test_a_part_that_fails_leaves_its_error():
    result = {}

    def fails():
        raise gpu.torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore")

    assert gpu.attempt(result, "graph", fails) is None
    assert result == {"graph_error": "CUDA out of memory. Tried to"}


@pytest.mark.parametrize(("measured", "within"), [(11.4e9, True), (8.6e9, True), (11.6e9, False), (8.4e9, False)])
def test_the_plan_holds_within_15_percent(measured, within):
    found = gpu._beside(10e9, {"allocated": measured, "reserved": 2e9})
    assert found["within_15_percent"] is within
    assert (found["predicted_gb"], found["reserved_gb"], found["ratio"]) == (10, 2, pytest.approx(measured / 10e9))


def test_figures_come_from_a_gpu_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "gpu.json")])
    assert "no CUDA GPU is visible" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run"])
    assert "a dry run measures nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
