"""A run that is cut off goes on to the same result; a folder with another run is refused."""

import gzip
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from searchr1_lite.config import ROOT, Profile, load_profile
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.runfolder import RunFolderError
from searchr1_lite.training import loop, rewards
from searchr1_lite.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    mark_checkpoint,
    rewind,
    save_checkpoint,
)
from searchr1_lite.types import Question

QUESTIONS = [Question(str(n), f"What is {n}?", ("a",), {"hops": 1}) for n in range(6)]


class CutOffError(Exception):
    pass


def cut_off_at(step):
    def progress(line):
        if f"step {step}/" in line:
            raise CutOffError(line)

    return progress


def run(folder, tokenizer, retriever, progress=lambda line: None, **overrides):
    from conftest import make_model

    settings = {"steps": 4, "questions_per_step": 2, "group_size": 2, "micro_batch_tokens": 1000, "save_every": 2}
    settings |= {"updates_per_rollout": 2, "save_trajectories_every": 1, "max_turns": 1, "max_response_tokens": 6}
    settings |= {"max_prompt_tokens": 1000, "max_context_tokens": 2500, "chat_template": False, "lora_dropout": 0.1}
    settings |= {"warmup_steps": 3}  # past the checkpoint: the schedule must go on, too
    profile = load_profile("tiny", **(settings | overrides))
    policy = Policy(make_model(544), tokenizer, torch.device("cpu"))
    options = {"questions": QUESTIONS, "eval_questions": QUESTIONS[:2], "retriever": retriever, "policy": policy}
    return loop.train(profile, folder, progress=progress, **options)


@pytest.fixture(autouse=True)
def some_rollouts_are_better(monkeypatch):
    """Noise never answers right; here it earns something, so that there is a gradient to go wrong."""
    monkeypatch.setattr(rewards, "trajectory_reward", lambda trajectory, *kind: sum(trajectory.completion_ids) % 7 / 7)


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(x) for key, x in value.items() if not key.startswith(("seconds", "cache_hits"))}
    return value


def result(folder):
    with gzip.open(folder / "trajectories.jsonl.gz", "rt", encoding="utf-8") as file:
        trajectories = [json.loads(line) for line in file]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    evaluation = {name: without_seconds(value) for name, value in evaluation.items()}
    return [without_seconds(row) for row in metrics], trajectories, evaluation


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_was_cut_off_ends_the_same(tmp_path, tokenizer, retriever, step):
    straight = run(tmp_path / "straight", tokenizer, retriever)
    with pytest.raises(CutOffError):
        run(tmp_path / "cut", tokenizer, retriever, cut_off_at(step))
    with (tmp_path / "cut/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "rew')  # the power went in the middle of a line,
    with (tmp_path / "cut/trajectories.jsonl.gz").open("ab") as file:
        file.write(gzip.compress(b"x" * 99)[:15])  # of a batch
    (tmp_path / "cut/checkpoints/checkpoint-6").mkdir()  # and of a checkpoint
    said = []
    cut = run(tmp_path / "cut", tokenizer, retriever, said.append)
    assert said[0].endswith("going on after step 2") == (step == 3)
    for one, other in zip(result(straight), result(cut), strict=True):
        assert one == other
    metrics, trajectories, _ = result(cut)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert any(row["grad_norm"] > 1e-3 for row in metrics)
    assert [row["phase"] for row in trajectories] == ["before"] * 2 + ["train"] * 16 + ["after"] * 2
    assert any(row["reward"] for row in trajectories) and not any(row["exact_match"] for row in trajectories)  # noise
    weights, others = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (straight, cut))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()}
    assert run(cut, tokenizer, retriever) == cut  # finished: nothing is touched
    assert before == {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match=r"seed: 0 there, 5 asked for.*Give another run folder"):
        run(cut, tokenizer, retriever, seed=5)


def test_rewind_cuts_to_the_mark_and_ignores_unmarked_checkpoints(tmp_path):
    for step in (2, 4):
        (tmp_path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"one\n")
    mark_checkpoint(tmp_path, tmp_path / "checkpoints/checkpoint-2", 2)
    (tmp_path / "metrics.jsonl").write_bytes(b"one\ntwo\nthr")
    (tmp_path / "trajectories.jsonl.gz").write_bytes(b"later")
    checkpoint, step = latest_checkpoint(tmp_path)
    assert (checkpoint.name, step) == ("checkpoint-2", 2)
    rewind(tmp_path, checkpoint)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"one\n"
    assert (tmp_path / "trajectories.jsonl.gz").read_bytes() == b""
    assert not (tmp_path / "checkpoints/checkpoint-4").exists()


def test_a_file_that_was_changed_is_not_gone_on_with(tmp_path):
    (tmp_path / "checkpoints/checkpoint-2").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"one\n")
    mark_checkpoint(tmp_path, tmp_path / "checkpoints/checkpoint-2", 2)
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl is shorter"):
        rewind(tmp_path, latest_checkpoint(tmp_path)[0])


def test_the_later_of_two_checkpoints_counts(tmp_path):
    assert latest_checkpoint(tmp_path) == (None, 0)
    for step in (8, 10):  # 10 sorts before 8 as text
        (tmp_path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        mark_checkpoint(tmp_path, tmp_path / f"checkpoints/checkpoint-{step}", step)
    assert latest_checkpoint(tmp_path) == (tmp_path / "checkpoints/checkpoint-10", 10)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, step, {"weights": {"a": torch.full((2,), float(step))}})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-4"]
    found = load_checkpoint(tmp_path / "checkpoints/checkpoint-4", torch.device("cpu"))
    assert found["weights"]["a"].tolist() == [4.0, 4.0]


def test_a_checkpoint_of_an_older_version_is_refused_in_one_message(tmp_path, tokenizer, retriever):
    """It has Hugging Face's trainer's files, and its mark names no step."""
    with pytest.raises(CutOffError):
        run(tmp_path / "old", tokenizer, retriever, cut_off_at(3))
    checkpoint = tmp_path / "old/checkpoints/checkpoint-2"
    (checkpoint / "state.pt").rename(checkpoint / "optimizer.pt")
    mark = json.loads((checkpoint / "complete.json").read_text())
    (checkpoint / "complete.json").write_text(json.dumps({"bytes": mark["bytes"]}))
    metrics = (tmp_path / "old/metrics.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=r"checkpoint-2: an older version's.*; delete .*old$"):
        run(tmp_path / "old", tokenizer, retriever)
    assert (tmp_path / "old/metrics.jsonl").read_bytes() == metrics  # nothing was cut back


def test_a_committed_run_is_known_to_be_finished(tmp_path):
    """Made before some settings were there; it is neither refused nor made again."""
    shutil.copytree(ROOT / "data/results/runs/tiny-unmasked-seed1", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    settings = load_profile("tiny", masked=False, seed=1).model_dump()
    settings |= yaml.safe_load(config.read_text(encoding="utf-8"))
    del settings["reward_reads_prompt"]
    settings = {key: value for key, value in settings.items() if key in Profile.model_fields}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    said = []
    loop.train(load_profile("tiny", masked=False, seed=1), tmp_path / "run", progress=said.append)
    assert said == ["run: finished already, nothing to do"]
    with pytest.raises(RunFolderError, match="reward_reads_prompt: False there, True asked for"):
        loop.train(load_profile("tiny", masked=False, seed=1, reward_reads_prompt=True), tmp_path / "run")
    del settings["micro_batch_tokens"]  # a run from when rows were counted, not tokens
    config.write_text(yaml.safe_dump(settings | {"micro_batch_size": 4}), encoding="utf-8")
    gone = "micro_batch_size: 4 there, and no setting here; micro_batch_tokens: a setting that did not exist"
    with pytest.raises(RunFolderError, match=rf"holds another run \({gone}\)\. Give another run folder"):
        loop.train(load_profile("tiny", masked=False, seed=1), tmp_path / "run")
