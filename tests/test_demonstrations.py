"""What is learned from demonstrations, and how rejection sampling comes by them."""

import copy
import dataclasses
import gzip
import json
import random

import pandas as pd
import pytest
import torch
from conftest import make_model
from test_loop import LOSS, QUESTIONS, a_learner, after_update, forged, gradient, move, tiny

from searchr1_lite.analysis.runs import load_run
from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.runfolder import RunFolderError
from searchr1_lite.tasks.questions import QuestionError
from searchr1_lite.training import demonstrations, loop
from searchr1_lite.training.score import collate
from searchr1_lite.training.steps import Rollouts
from searchr1_lite.types import Hit, Passage, Question

RIGHT = "<answer>a</answer>"


def a_batch(learner, made):
    batch = collate(made, [1.0] * len(made), True)
    learner.look_back(batch)
    batch.advantages = learner.advantages(batch, learner.profile)
    return batch


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("algorithm", ["sft", "rejection_sampling"])
def test_an_update_is_the_mean_cross_entropy_of_the_learned_tokens(policy, algorithm, updates):
    """Written out with torch's own, whatever the sampling's temperature, KL, entropy bonus and split of memory are."""
    generator = random.Random(2)
    made = [forged(QUESTIONS[n % 4], generator) for n in range(8)]
    learner = a_learner(policy, tiny(algorithm=algorithm, updates_per_rollout=updates, **LOSS))
    batch, made = a_batch(learner, made).rows(range(8 // updates)), made[: 8 // updates]
    move(learner, 1)  # as before the second of two updates: there is no ratio
    logits, targets = [], []
    for one in made:
        whole = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        own = torch.tensor(one.loss_mask).bool()
        assert own.any() and not own.all()
        logits.append(learner.model(whole).logits[0, len(one.prompt_ids) - 1 : -1][own])
        targets.append(torch.tensor(one.completion_ids)[own])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))
    wanted, state = gradient(expected, learner), copy.deepcopy(learner.state())
    assert wanted.abs().max() > 1e-3
    for tokens in (100_000, 100, 1):
        learner.profile = learner.profile.model_copy(update={"micro_batch_tokens": tokens})
        learner.load_state(copy.deepcopy(state))
        ours, said, _ = after_update(learner, batch)
        assert said["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert said["kl"] is said["clip_ratio"] is said["ratio_max"] is None
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-4)


def test_it_is_the_policy_loss_where_every_advantage_is_one(policy):
    """REINFORCE with rewards of 1: the same gradient."""
    made, found = [forged(QUESTIONS[n % 4], random.Random(n)) for n in range(8)], []
    for algorithm in ("sft", "reinforce"):
        plain = Policy(make_model(544), policy.tokenizer, policy.device)
        learner = a_learner(plain, tiny(algorithm=algorithm, beta=0.0, entropy_coef=0.0, max_grad_norm=1e9))
        found.append(after_update(learner, a_batch(learner, made))[0])
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-4)


def test_steps_take_the_demonstrations_in_turn(policy, tmp_path):
    made = [forged(QUESTIONS[n % 4], random.Random(n)) for n in range(16)]
    rollouts = Rollouts(tiny(algorithm="sft", steps=2), policy, QUESTIONS, None, made, tmp_path)
    assert [rollouts(step, policy.model) for step in (0, 1)] == [made[:8], made[8:]]


def test_passes_hold_everything_once_each():
    profile = tiny(steps=5)  # 8 a step
    order = demonstrations.in_passes(range(12), profile)
    assert len(order) == 40
    passes = [tuple(order[start : start + 12]) for start in (0, 12, 24)]
    assert [sorted(one) for one in passes] == [list(range(12))] * 3 and len(set(passes)) == 3
    assert order == demonstrations.in_passes(range(12), profile)
    assert order != demonstrations.in_passes(range(12), tiny(steps=5, seed=1))
    assert demonstrations.in_passes(["only"], profile) == ["only"] * 40


@pytest.mark.parametrize("strategy", ["search_r1", "r1", "direct"])
def test_golden_answers_look_as_rollouts_do(policy, retriever, strategy):
    profile = tiny(algorithm="sft", strategy=strategy, chat_template=True)
    asked = [Question("x", "Which country", ("Rovana", "The Rovana")), QUESTIONS[0]]
    made = demonstrations.golden_answers(policy, asked, profile)
    for one, rolled in zip(made, rollout(policy, asked, retriever, profile), strict=True):
        assert one.prompt_ids == rolled.prompt_ids and one.question == rolled.question
        assert set(one.loss_mask) == {1} and one.finished and one.searches == 0
        text = f"<answer> {one.question.golden_answers[0]} </answer>"
        assert one.policy_text == policy.tokenizer.decode(one.completion_ids) == text  # and no end token


@pytest.mark.parametrize(
    ("golden", "settings"),
    [("a </answer> b", {}), ("a", {"max_response_tokens": 3}), ("a", {"max_prompt_tokens": 9})],
)
def test_a_golden_answer_that_cannot_be_learned_is_named(policy, golden, settings):
    with pytest.raises(QuestionError, match=r"question q7: '<answer> a.*max_response_tokens = "):
        demonstrations.golden_answers(policy, [Question("q7", "Who?", (golden,))], tiny(**settings))


@pytest.fixture
def answers(monkeypatch):
    """Candidates are made up, right or wrong by chance; what was asked, and how, is in the list."""
    calls = []

    def made_up(policy, questions, retriever, profile, *, group_size, seed, sampler):
        calls.append([[question.id for question in questions], group_size, seed])
        found = tuple(Hit(Passage(str(n), "T", "x"), 1.0) for n in range(2))
        made = []
        for question in questions:
            for attempt in range(group_size):
                one = forged(question, random.Random(f"{question.id} {attempt} {seed}"))
                searched = dataclasses.replace(one.turns[0], text="<search>q</search>", hits=found, observation=" é ")
                made.append(dataclasses.replace(one, turns=(searched, one.turns[1])))
        turns = (made[1].turns[0], dataclasses.replace(made[1].turns[1], text=RIGHT))
        made[1] = dataclasses.replace(made[1], turns=turns, stop_reason="search failed", finished=False)
        calls[-1].append(made)
        return made

    monkeypatch.setattr(demonstrations, "rollout", made_up)
    return calls


def sampled(policy, retriever, folder, said=None, questions=QUESTIONS, **settings):
    profile = tiny(algorithm="rejection_sampling", save_every=1, seed=2, **settings)  # parts of two questions
    (folder / "checkpoints").mkdir(exist_ok=True)
    progress = (said if said is not None else []).append
    return demonstrations.right_answers(policy, questions, retriever, profile, folder, progress)


def test_right_answers_are_kept_as_they_were_sampled_once(policy, retriever, tmp_path, answers):
    said = []
    kept = sampled(policy, retriever, tmp_path, said)
    assert [call[:3] for call in answers] == [[["0", "1"], 4, 2_000_006], [["2", "3"], 4, 2_000_006]]
    tried = [one for call in answers for one in call[3]]
    right = [one for one in tried if RIGHT in one.policy_text and not one.search_failed]
    assert 3 < len(right) < 12
    for one, before in zip(kept, right, strict=True):
        for name in ("question", "prompt_ids", "completion_ids", "loss_mask", "logprobs", "finished", "stop_reason"):
            assert getattr(one, name) == getattr(before, name)
        assert one.question.metadata == before.question.metadata
        assert one.policy_text == before.policy_text and one.response == before.response
        assert [hit.passage.id for hit in one.turns[0].hits] == ["0", "1"]
    assert "candidates for 2 of 4 questions" in said[0] and "candidates for 4 of 4 questions" in said[1]
    assert said[2].endswith(f": {len(right)} of 16 candidates are right ({len(right)} with 1 searches)")
    (tmp_path / "checkpoints/right-0.jsonl.gz").unlink()
    assert sampled(policy, retriever, tmp_path) == kept and len(answers) == 2


def test_sampling_that_was_cut_off_goes_on(policy, retriever, tmp_path, answers):
    def cut_off(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demonstrations.right_answers(policy, QUESTIONS, retriever, *cut_here(tmp_path), cut_off)
    assert not (tmp_path / "demonstrations.jsonl.gz").exists()
    kept = sampled(policy, retriever, tmp_path)
    assert [call[0] for call in answers] == [["0", "1"], ["2", "3"]]
    straight = tmp_path / "straight"
    straight.mkdir()
    assert sampled(policy, retriever, straight) == kept
    one, other = ((folder / "demonstrations.jsonl.gz").read_bytes() for folder in (tmp_path, straight))
    assert one == other


def cut_here(folder):
    (folder / "checkpoints").mkdir()
    return tiny(algorithm="rejection_sampling", save_every=1, seed=2), folder


def test_no_right_answer_is_an_error_that_says_so(policy, retriever, tmp_path, answers, monkeypatch):
    monkeypatch.setattr(demonstrations, "exact_match", lambda *_: 0.0)
    for _ in range(2):
        with pytest.raises(ConfigError, match="none of group_size = 4 answers to each of 4 questions was right"):
            sampled(policy, retriever, tmp_path)
    assert len(answers) == 2


def test_damaged_demonstrations_are_refused(policy, retriever, tmp_path, answers):
    sampled(policy, retriever, tmp_path)
    path = tmp_path / "demonstrations.jsonl.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]):
        path.write_bytes(damaged)
        with pytest.raises(RunFolderError, match="cut off or damaged"):
            sampled(policy, retriever, tmp_path)


@pytest.mark.parametrize("algorithm", ["sft", "rejection_sampling"])
def test_a_run_learns_them_and_leaves_a_folder_like_any_other(policy, retriever, tmp_path, answers, algorithm):
    said = []
    profile = tiny(algorithm=algorithm, steps=6, learning_rate=0.01, save_trajectories_every=6)
    options = {"questions": QUESTIONS, "eval_questions": QUESTIONS[:2], "retriever": retriever, "policy": policy}
    run = load_run(loop.train(profile, tmp_path / "run", progress=said.append, **options))
    losses = run.metrics["loss"]
    assert losses.iloc[-1] < 0.85 * losses.iloc[0] and (losses > 0).all()
    assert (run.metrics["reward"] == 1).all() and (run.metrics["exact_match"] == 1).all()
    assert run.metrics["kl"].isna().all() and run.metrics["clip_ratio"].isna().all()
    pd.to_numeric(run.metrics.iloc[0].drop(labels=[c for c in run.metrics if c.startswith("seconds")]))  # notebook 04
    assert any(f"step 6/6  loss {losses.iloc[-1]:.3f}" in line for line in said)
    assert run.evaluation["after"]["questions"] == 2 and (tmp_path / "run/adapter").is_dir()
    rows = list(run.trajectories("train"))
    assert len(rows) == 16 and all("calls" in row for row in run.trajectories("after"))
    if algorithm == "sft":
        assert not any("calls" in row for row in rows)
    else:
        with gzip.open(tmp_path / "run/demonstrations.jsonl.gz") as file:
            kept = [json.loads(line) for line in file]
        shown = {policy.tokenizer.decode(row["completion_ids"]) for row in kept}
        assert {"".join(row["calls"][0]["pieces"]) for row in rows} <= shown
        assert [call[1] for call in answers] == [4] and len(kept) < 16


def test_noise_is_refused_where_nothing_is_rolled_out():
    for algorithm in ("sft", "rejection_sampling"):
        with pytest.raises(ConfigError, match=f"{algorithm} makes none"):
            load_profile("tiny", algorithm=algorithm, noise_start=0.1)
