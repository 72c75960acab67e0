"""TRL's stock GRPOTrainer, fed by us, learns what our own loop learns: loss, gradient, and a run of six steps."""

import dataclasses
import random

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import without_seconds
from test_loop import LOSS, QUESTIONS, SMALL, forged, rows
from trl import GRPOTrainer

from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.rollouts.policy import load_policy
from searchr1_lite.training import loop, losses, trl_trainer
from searchr1_lite.training.record import Recorder
from searchr1_lite.training.rewards import group_rewards
from searchr1_lite.training.score import collate, score

SETTINGS = SMALL | LOSS | {"trainer": "trl", "max_grad_norm": 1.0, "warmup_steps": 10}
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


class Forged:
    """Rollouts that are made up, as `loop.Rollouts` would give them."""

    order, cache_hits = QUESTIONS[:2], None

    def __init__(self, profile, failed=()):
        generator = random.Random(1)
        made = [forged(question, generator) for question in QUESTIONS[:2] for _ in range(4)]
        made[1] = dataclasses.replace(made[1], finished=False, stop_reason="turns")
        for n in failed:
            made[n] = dataclasses.replace(made[n], finished=False, stop_reason="search failed")
        self.profile, self.made = profile, made

    def __call__(self, step, model):
        return self.made


def weights_of(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights_of(model):
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)


def gradient(loss, model):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights_of(model))])


def both(policy, folder, failed=(), **settings):
    """Loss and gradient of the first update: TRL's, ours, and ours with the other mask."""
    profile = load_profile("tiny", **(SETTINGS | settings))
    rollouts = Forged(profile, failed)
    model = loop.model_to_train(policy, profile)
    trainer = trl_trainer.make_trainer(model, policy, rollouts, Recorder(profile, folder))
    assert type(trainer) is GRPOTrainer  # nothing of it is overridden
    parts = trainer.args.gradient_accumulation_steps
    move(model, 0)
    model.train()
    inputs = [trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))]
    inputs += trainer._buffered_inputs[1:parts]
    ids = [row for part in inputs for row in part["completion_ids"].tolist()]
    completions = [t.completion_ids for t in rollouts.made]
    order = [next(n for n, t in enumerate(completions) if tuple(row[: len(t)]) == t) for row in ids]
    assert len(set(order)) == len(order) == 8 // profile.updates_per_rollout
    batches = {}
    for masked in (profile.masked, not profile.masked):
        batch = collate(rollouts.made, group_rewards(rollouts.made, profile), masked)
        loop.Learner(model, policy, profile).look_back(batch)
        batch.advantages = losses.group_advantages(batch.rewards, profile.group_size)
        batches[masked] = batch.rows(order)
    assert len(set(batch.advantages.tolist())) > 2
    move(model, 1)  # so that with old log-probabilities the ratio is not 1 and some tokens are clipped
    model.train()
    trainer.current_gradient_accumulation_steps = parts
    loss = sum(trainer.compute_loss(model, part) for part in inputs)
    found = [(loss, gradient(loss, model))]
    for batch in batches.values():
        logprobs, entropies, _ = score(model, batch, profile.temperature)
        each = losses.losses_from_rewards(logprobs, entropies, batch, profile)
        loss = (each * losses.loss_weights(batch.mask, profile.loss_mean, profile.max_context_tokens)).sum()
        found.append((loss, gradient(loss, model)))
    return found


def check(found):
    (loss, theirs), (own_loss, ours), (_, otherwise) = found
    assert ours.abs().max() > 1e-5
    torch.testing.assert_close(loss, own_loss, **CLOSE)
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-4)
    assert (otherwise - theirs).abs().max() > 0.1 * theirs.abs().max()  # the mask shows


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("updates", [1, 2])
def test_loss_and_gradient_are_ours(policy, tmp_path, masked, updates):
    check(both(policy, tmp_path, masked=masked, updates_per_rollout=updates))


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon_high": 0.6, "updates_per_rollout": 2},
        {"policy_loss": "gspo", "updates_per_rollout": 2, "epsilon": 0.01},
        {"policy_loss": "cispo"},
        {"policy_loss": "cispo", "epsilon_high": 0.6},
        {"loss_mean": "sequence", "entropy_coef": 0.0},
        {"loss_mean": "constant", "entropy_coef": 0.0},
        {"loss_mean": "sequence", "policy_loss": "gspo", "entropy_coef": 0.0, "updates_per_rollout": 2},
        {"loss_mean": "constant", "entropy_coef": 0.0, "updates_per_rollout": 2},
    ],
    ids=str,
)
def test_so_are_the_other_losses(policy, tmp_path, settings):
    check(both(policy, tmp_path, **settings))


@pytest.mark.parametrize("settings", [{}, {"policy_loss": "cispo"}, {"loss_mean": "sequence"}], ids=str)
def test_so_are_several_micro_batches_together(policy, tmp_path, settings):
    check(both(policy, tmp_path, micro_batch_tokens=5000, entropy_coef=0.0, **settings))


def test_a_failed_search_is_left_out(policy, tmp_path):
    check(both(policy, tmp_path, failed=[2]))


def test_columns_for_trl():
    t = forged(QUESTIONS[0], random.Random(0))
    cut, failed = (dataclasses.replace(t, finished=False, stop_reason=why) for why in ("turns", "search failed"))
    masked = trl_trainer.trl_columns([t, cut, failed], True, 7)
    unmasked = trl_trainer.trl_columns([t, cut, failed], False, 7)
    size = len(t.loss_mask)
    assert masked["completion_ids"] == [[*t.completion_ids, 7], list(t.completion_ids), list(t.completion_ids)]
    assert masked["env_mask"] == [[*t.loss_mask, 0], list(t.loss_mask), [0] * size]
    assert unmasked["env_mask"] == [[1] * size + [0], [1] * size, [0] * size]


# At a higher learning rate, rounding changes which token is sampled, within six steps.
RUN = {"questions_per_step": 2, "group_size": 4, "steps": 6, "warmup_steps": 2, "learning_rate": 0.001}
RUN |= {"quantization": "none", "reward": "format", "max_turns": 1, "max_response_tokens": 24, "eval_questions": 2}
RUN |= {"micro_batch_tokens": 20_000}


def run(folder, **settings):
    """The metrics and the weights of a run, and its weights at the start."""
    profile = load_profile("tiny", **(RUN | settings))
    loop.train(profile, folder, progress=str)
    model = loop.model_to_train(load_policy(profile), profile)
    start = {name.replace(".default", ""): x.detach() for name, x in model.named_parameters() if x.requires_grad}
    return rows(folder / "metrics.jsonl"), load_file(folder / "adapter/adapter_model.safetensors"), start


def distance(one, other):
    assert one.keys() == other.keys()
    return sum((one[name] - other[name]).square().sum() for name in one).sqrt().item()


# A warm-up, because Adam's first step divides each gradient by itself, however small: there, rounding alone (TRL pads
# prompts on the left, which shifts the positions) moves weights by 3e-4 of the movement.
@pytest.mark.parametrize(
    "settings", [{}, {"quantization": "nf4", "steps": 3}, {"masked": False, "beta": 0.0, "steps": 3}], ids=str
)
def test_six_steps_end_at_the_same_weights(tmp_path, settings):
    ours, weights, start = run(tmp_path / "loop", **settings)
    theirs, found, _ = run(tmp_path / "trl", trainer="trl", **settings)
    assert distance(weights, start) > 0.1 and any(row["zero_variance_groups"] < 1 for row in ours)
    assert distance(weights, found) < 1e-4 * distance(weights, start)
    same = ("step", "reward", "searches", "response_length", "learning_rate", "clip_ratio")
    figures = ("loss", "grad_norm", "kl", "entropy")
    for one, other in zip(ours, theirs, strict=True):
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
        for name in figures[: 4 if "masked" not in settings else 2]:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)
        assert one.keys() == other.keys() and other["ratio_max"] is other["value_loss"] is None
        assert "masked" not in settings or other["kl"] is other["entropy"] is None


def test_a_run_that_is_cut_off_goes_on(tmp_path):
    cut = {"steps": 4, "save_every": 2, "updates_per_rollout": 2, "trainer": "trl"}
    whole, weights, start = run(tmp_path / "whole", **cut)
    said = []

    def raise_at_3(line):
        said.append(line)
        if "step 3/" in line:
            raise KeyboardInterrupt

    profile = load_profile("tiny", **(RUN | cut))
    with pytest.raises(KeyboardInterrupt):
        loop.train(profile, tmp_path / "cut", progress=raise_at_3)
    assert len(rows(tmp_path / "cut/metrics.jsonl")) == 3
    loop.train(profile, tmp_path / "cut", progress=said.append)
    assert "cut: going on after step 2" in said
    metrics, found, _ = run(tmp_path / "cut", **cut)  # finished: nothing is done
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert [without_seconds(row) for row in metrics] == [without_seconds(row) for row in whole]
    assert distance(weights, found) < 1e-6 * distance(weights, start)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"algorithm": "ppo"}, "algorithm = ppo: TRL's GRPOTrainer has GRPO alone"),
        ({"sampler": "vllm"}, "sampler = vllm: TRL corrects for its own vLLM engines alone"),
        ({"lora_r": 0, "quantization": "none"}, "lora_r = 0: TRL would load the KL's reference from the hub"),
        ({"stop_early": True}, "this: stop_early. Change it"),
        ({"drop_equal_groups": True}, "this: drop_equal_groups. Change it"),
        ({"llds_coef": 0.1}, "this: llds_coef. Change it"),
        ({"loss_mean": "sequence"}, "entropy_coef: TRL's bonus is a mean over tokens"),
        ({"policy_loss": "cispo", "loss_mean": "sequence"}, "policy_loss = cispo: TRL's has no other mean"),
        ({"stop_early": True, "llds_coef": 0.1}, "this: stop_early; llds_coef. Change it, or take trainer = loop"),
    ],
)
def test_what_trl_cannot_do_is_refused_before_the_model_loads(settings, says, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_policy", lambda profile: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="trainer = trl cannot do this") as refused:
        loop.train(load_profile("tiny", trainer="trl", **settings), tmp_path / "run")
    assert says in str(refused.value)
    assert not (tmp_path / "run").exists()
