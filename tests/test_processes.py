"""Two processes of `accelerate launch` make the run that one makes, each with half of the questions."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import searchr1
from safetensors.torch import load_file

from searchr1_lite.config import ROOT, ConfigError, load_profile
from searchr1_lite.preflight import check_processes
from searchr1_lite.runfolder import read_json

SETTINGS = {"reward": "format", "micro_batch_tokens": 700}  # noise earns something; unlike parts in the processes
SETTINGS |= {"quantization": "none", "steps": 2, "questions_per_step": 4, "group_size": 4, "max_turns": 1}
SETTINGS |= {"max_response_tokens": 24, "eval_questions": 5, "save_every": 1, "save_trajectories_every": 1}


def start(processes, folder, algorithm):
    """The training command, started by `accelerate launch` as on a machine with several GPUs, on a free port."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--main_process_port", "0"]
    arguments = ["-m", "searchr1_lite", "train", "--out", str(folder), *settings(algorithm)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*launch, *arguments], cwd=ROOT, env=environment, **pipes)


def settings(algorithm):
    return [f"{name}={value}" for name, value in (SETTINGS | {"algorithm": algorithm}).items()]


def close(value):
    """Without times; figures equal within rounding."""
    if isinstance(value, dict):
        return {key: close(x) for key, x in value.items() if not key.startswith("seconds")}
    if isinstance(value, list):
        return [close(x) for x in value]
    return pytest.approx(value, rel=1e-3, abs=1e-7) if isinstance(value, float) else value


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_two_processes_make_the_run_of_one(tmp_path, capsys, algorithm):
    one, two = tmp_path / "one", tmp_path / "two"
    launched = start(2, two, algorithm)
    searchr1("train", "--out", one, *settings(algorithm))
    said, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, said
    assert said.count("after 2 steps") == 1  # one process speaks for both
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")] for run in (one, two)]
    assert [row["step"] for row in metrics[1]] == [1, 2] and metrics[1][1]["kl"] > 0
    assert all(row["reward"] > 0 and row["grad_norm"] > 1e-2 for row in metrics[1])
    assert algorithm != "ppo" or all(row["value_loss"] > 1e-4 for row in metrics[1])
    assert close(metrics[0]) == [{k: x for k, x in row.items() if not k.startswith("seconds")} for row in metrics[1]]
    evaluation = read_json(two / "evaluation.json")
    for part in ("before", "after"):
        evaluation[part].pop("seconds")
    assert close(read_json(one / "evaluation.json")) == evaluation
    assert read_json(two / "environment.json")["processes"] == 2

    texts = [gzip.decompress((run / "trajectories.jsonl.gz").read_bytes()).decode("utf-8") for run in (one, two)]
    trajectories = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert close(trajectories[0]) == trajectories[1]
    asked = Counter((row["step"], row["question"]["id"]) for row in trajectories[1] if row["phase"] == "train")
    assert len(asked) == 8 and set(asked.values()) == {4}

    weights, others = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, two))
    moved = sum(x.square().sum() for name, x in weights.items() if "lora_B" in name).sqrt()  # it begins at zero
    apart = sum((weights[name] - others[name]).square().sum() for name in weights).sqrt()
    assert moved > 1e-3 and apart < 3e-4 * moved


@pytest.mark.parametrize(
    ("changed", "processes", "says"),
    [
        ({}, 3, "questions_per_step = 4 must be a multiple of the 3 processes; change the setting"),
        ({"updates_per_rollout": 8}, 4, "group_size = 16 must be a multiple of updates_per_rollout x processes = 32"),
        ({"eval_questions": 1}, 2, "eval_questions: 1 held-out questions are too few for 2 processes"),
    ],
)
def test_work_that_does_not_divide_is_refused(changed, processes, says):
    profile = load_profile("tiny", **(SETTINGS | changed))
    with pytest.raises(ConfigError, match=says):
        check_processes(profile, profile.eval_questions, processes)
