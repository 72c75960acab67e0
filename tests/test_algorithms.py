"""PPO, REINFORCE and LLDS against hand-computed values and independent references."""
# ruff: noqa: F811 (a fixture of another file is imported, and asked for by its name)

import sys

import numpy as np
import pytest
import torch
from conftest import original
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import QUESTIONS, an_update, forge, gradient, move, tiny  # noqa: F401

from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.training import trainer as trainer_module
from searchr1_lite.training.algorithms import (
    VALUE_CLIP,
    ValueHead,
    generalised_advantages,
    likelihood_loss,
    token_rewards,
    value_loss,
    whitened,
)
from searchr1_lite.training.objective import token_entropies, token_logprobs

close = torch.testing.assert_close


def test_gae_by_hand():
    # three own tokens, the third after two retrieved ones; gamma 1/2, lambda 1/2
    mask = torch.tensor([[1, 1, 0, 0, 1]])
    values = torch.tensor([[0.5, 0.25, 9.0, 9.0, 0.5]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]])
    # the last: 1 - 0.5 = 0.5; the second: 0.5 x 0.5 - 0.25 + 0.25 x 0.5 = 0.125;
    # the first: 0.5 x 0.25 - 0.5 + 0.25 x 0.125 = -0.34375
    advantages, returns = generalised_advantages(rewards, values, mask, 0.5, 0.5)
    close(advantages, torch.tensor([[-0.34375, 0.125, 0.0, 0.0, 0.5]]))
    close(returns, torch.tensor([[0.15625, 0.375, 0.0, 0.0, 1.0]]))


def test_gae_over_all_tokens_is_the_originals_and_another():
    """Unmasked, values of retrieved tokens enter: what the switch `unmasked_values` brings back."""
    values = torch.tensor([[0.5, 0.25, 9.0, 9.0, 0.5]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]])
    advantages, _ = generalised_advantages(rewards, values, torch.ones(1, 5), 0.5, 0.5)
    # 0.5; 0.25 - 9 + 0.125 = -8.625; 4.5 - 9 - 2.15625 = -6.65625; 4.5 - 0.25 - 1.6640625; 0.125 - 0.5 + 0.646484375
    close(advantages, torch.tensor([[0.271484375, 2.5859375, -6.65625, -8.625, 0.5]]))


def reference_gae(rewards, values, gamma, gae_lambda):
    """From the definition, (15) of arXiv 1506.02438: a discounted sum of errors, each summed anew."""
    steps = len(values)
    following = np.append(values[1:], 0.0)
    errors = rewards + gamma * following - values
    return [sum((gamma * gae_lambda) ** (u - t) * errors[u] for u in range(t, steps)) for t in range(steps)]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_gae_is_the_definitions_on_the_own_tokens_alone(data):
    tokens = data.draw(st.integers(1, 12))
    mask = np.array(data.draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens)))
    number = st.floats(-2, 2, width=32)
    draw = lambda: np.array(data.draw(st.lists(number, min_size=tokens, max_size=tokens)))  # noqa: E731
    rewards, values = draw() * mask, draw()
    gamma, gae_lambda = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    as_tensor = lambda x: torch.tensor(x, dtype=torch.float64).unsqueeze(0)  # noqa: E731
    found, returns = generalised_advantages(*map(as_tensor, (rewards, values, mask)), gamma, gae_lambda)
    own = mask.astype(bool)
    expected = np.zeros(tokens)
    expected[own] = reference_gae(rewards[own], values[own], gamma, gae_lambda)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(returns[0].numpy(), (expected + values) * mask, atol=1e-9)


def test_lambda_1_is_the_reward_less_the_value_and_lambda_0_the_next_error():
    mask, values = torch.ones(1, 3), torch.tensor([[0.2, 0.4, 0.7]])
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    close(generalised_advantages(rewards, values, mask)[0], 1 - values)
    close(generalised_advantages(rewards, values, mask, 1.0, 0.0)[0], torch.tensor([[0.2, 0.3, 0.3]]))


def test_the_reward_is_at_the_last_own_token_and_the_kl_at_each():
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])
    logprobs, reference = torch.full((2, 4), -1.0), torch.full((2, 4), -3.0)
    found = token_rewards(torch.tensor([1.0, 0.5]), mask, logprobs, reference, beta=0.1)
    close(found, torch.tensor([[-0.2, 0.0, 0.8, 0.0], [-0.2, 0.3, 0.0, 0.0]]))


def test_whitening_is_over_own_tokens():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    found = whitened(torch.tensor([[1.0, 2.0, 50.0], [3.0, 7.0, 7.0]]), mask)
    close(found, torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))  # mean 2, unbiased variance 1
    assert torch.isfinite(whitened(torch.ones(1, 1), torch.ones(1, 1))).all()


def test_value_loss_by_hand():
    mask = torch.tensor([[1, 1, 0]])
    values, old = torch.tensor([[0.9, 0.1, 5.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns = torch.tensor([[1.0, 0.0, 1.0]])
    # 0.9 is clipped to 0.5: the larger error (0.5)^2 counts; 0.1 is within: (0.1)^2. Half their mean.
    close(value_loss(values, old, returns, mask), torch.tensor((0.25 + 0.01) / 4))
    assert VALUE_CLIP == 0.5


def test_value_head_begins_at_0_and_stops_gradients():
    head, hidden = ValueHead(6), torch.randn(2, 3, 6, requires_grad=True)
    values = head(hidden)
    assert values.shape == (2, 3) and not values.any()
    (values - 1).square().mean().backward()
    assert hidden.grad is None and head.linear.bias.grad.item() == pytest.approx(-2)


def test_llds_by_hand():
    # two actions in the first row (retrieved text between them), one in the second, which is worse than its group
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]])
    old = torch.zeros(2, 5)
    now = torch.tensor([[-0.4, 0.1, -9.0, 0.5, -0.2], [-1.0, -1.0, -1.0, 0.0, 0.0]], requires_grad=True)
    loss = likelihood_loss(now, old, torch.tensor([1.0, -1.0]), mask)
    # the first action lost 0.3 in sum: its first token counts, 0.4; the second action gained: its last does not count
    close(loss, torch.tensor(0.4 / 7))
    loss.backward()
    close(now.grad, torch.tensor([[-1 / 7, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]))
    assert likelihood_loss(old, old, torch.tensor([1.0, -1.0]), mask) == 0  # at the first update


def seen_by(trainer, trajectory, profile):
    """Log-probabilities of the own tokens by policy and base, and their values, one full forward at a time."""
    whole = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
    before = slice(len(trajectory.prompt_ids) - 1, -1)
    own = torch.tensor(trajectory.loss_mask).bool()
    ids = torch.tensor(trajectory.completion_ids)
    out = trainer.model(whole, output_hidden_states=True)
    with torch.no_grad(), trainer.model.disable_adapter():
        base = trainer.model(whole).logits[0, before] / profile.temperature
    logits = out.logits[0, before] / profile.temperature
    values = trainer.value_head(out.hidden_states[-1][0, before])
    return logits, token_logprobs(logits, ids)[own], token_logprobs(base, ids)[own], values, own


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("defects", [[], ["unmasked_values"]])
def test_ppo_in_the_trainer_is_the_one_by_hand(policy, tmp_path, forge, updates, defects):
    options = {"algorithm": "ppo", "updates_per_rollout": updates, "beta": 0.05, "entropy_coef": 0.01}
    profile = tiny(**options, gamma=0.9, gae_lambda=0.8, temperature=0.8, defects=defects)
    trainer = trainer_module.build_trainer(profile, tmp_path, policy, QUESTIONS[:2], None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    move(trainer, 0)
    torch.manual_seed(0)
    torch.nn.init.normal_(trainer.value_head.linear.weight, std=0.1)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    expected = {}  # of each trajectory: advantages, returns and old values at the tokens that have a value
    for one in forge:
        _, own_now, own_base, values, own = seen_by(trainer, one, profile)
        rewards = np.zeros(len(own))
        rewards[own.numpy()] = -0.05 * (own_now - own_base).detach().numpy()
        rewards[np.flatnonzero(own)[-1]] += float("<answer>a" in one.policy_text)
        counted = np.ones(len(own), bool) if defects else own.numpy()
        values = values.detach().numpy()[counted]
        if defects:  # the end token, which nobody wrote, has a value as well
            ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
            hidden = trainer.model(ids, output_hidden_states=True).hidden_states[-1][0, -1:]
            values, rewards = np.append(values, trainer.value_head(hidden).detach().numpy()), np.append(rewards, 0.0)
            counted = np.append(counted, True)
        gained = np.array(reference_gae(rewards[counted], values, 0.9, 0.8))
        expected[one.completion_ids] = counted, gained, gained + values, values
    everything = np.concatenate([gained for _, gained, *_ in expected.values()])
    rows = [
        tuple(ids[: int(n) - 1])
        for ids, n in zip(inputs["completion_ids"].tolist(), inputs["completion_mask"].sum(1), strict=True)
    ]
    assert len(rows) == 8 // updates
    for row, ids in enumerate(rows):
        counted, gained, returns, values = expected[ids]
        places = np.flatnonzero(counted)
        white = (gained - everything.mean()) / everything.std(ddof=1)
        np.testing.assert_allclose(inputs["advantages"][row, places], white, atol=1e-4)
        np.testing.assert_allclose(inputs["returns"][row, places], returns, atol=1e-5)
        np.testing.assert_allclose(inputs["old_values"][row, places], values, atol=1e-5)

    move(trainer, 1)  # as an update would
    torch.nn.init.normal_(trainer.value_head.linear.weight, std=0.1)
    loss = trainer.compute_loss(trainer.model, inputs)
    policy_terms, entropies, errors = [], [], []
    for row, one in enumerate(next(t for t in forge if t.completion_ids == ids) for ids in rows):
        logits, now, _, values, own = seen_by(trainer, one, profile)
        counted, _, returns, old_values = expected[one.completion_ids]
        size = len(own)
        old = inputs["old_per_token_logps"][row, :size][own] if updates == 2 else now.detach()
        ratio, gain = (now - old).exp(), inputs["advantages"][row, :size][own]
        policy_terms.append(-torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain))
        entropies.append(token_entropies(logits)[own])
        if defects:
            whole = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
            hidden = trainer.model(whole, output_hidden_states=True).hidden_states[-1][0, -1:]
            values = torch.cat([values, trainer.value_head(hidden)])
        moved, old_values = values[torch.tensor(counted)], torch.tensor(old_values)
        near = old_values + (moved - old_values).clamp(-0.5, 0.5)
        errors.append(torch.max((moved - torch.tensor(returns)) ** 2, (near - torch.tensor(returns)) ** 2))
    by_hand = torch.cat(policy_terms).mean() - 0.01 * torch.cat(entropies).mean() + torch.cat(errors).mean() / 2
    close(loss, by_hand.float(), atol=2e-5, rtol=1e-4)
    close(gradient(loss, trainer), gradient(by_hand, trainer), atol=2e-5, rtol=1e-3)


def test_an_update_has_the_value_heads_own_gradient_alone(policy, tmp_path, forge):
    """The Trainer clears its model's gradients between updates, and the head is no part of that."""
    profile = tiny(algorithm="ppo", updates_per_rollout=2, beta=0.05, micro_batch_tokens=64)
    trainer = trainer_module.build_trainer(profile, tmp_path, policy, QUESTIONS[:2], None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer._prepare_inputs = lambda _: inputs
    found = []
    for _ in range(2):
        trainer.training_step(trainer.model, inputs)
        found.append(trainer.value_head.linear.weight.grad.clone())
    assert found[0].abs().max() > 1e-3
    close(found[1], found[0])


@pytest.mark.parametrize(("algorithm", "less"), [("reinforce", 0.0), ("reinforce_baseline", "mean")])
def test_reinforce_learns_from_the_reward_itself(policy, tmp_path, forge, algorithm, less):
    profile = tiny(algorithm=algorithm, group_size=1, questions_per_step=4)
    trainer = trainer_module.build_trainer(profile, tmp_path, policy, QUESTIONS, None)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    rewards = {one.completion_ids: float("<answer>a" in one.policy_text) for one in forge}
    assert len({one.question.id for one in forge}) == len(forge) == 4  # each question once
    mean = sum(rewards.values()) / 4
    assert 0 < mean < 1
    for ids, length, advantage in zip(
        inputs["completion_ids"].tolist(), inputs["completion_mask"].sum(1), inputs["advantages"], strict=True
    ):
        assert advantage.item() == pytest.approx(rewards[tuple(ids[: int(length) - 1])] - (mean if less else 0))


def test_llds_is_added_to_the_loss(policy, tmp_path, forge):
    profile = tiny(updates_per_rollout=2, llds_coef=0.5)
    trainer, inputs = an_update(policy, tmp_path, profile)
    first = trainer.compute_loss(trainer.model, inputs)
    trainer.settings = tiny(updates_per_rollout=2)
    close(trainer.compute_loss(trainer.model, inputs), first)  # nothing has become less likely yet
    move(trainer, 1)
    without = trainer.compute_loss(trainer.model, inputs)
    trainer.settings = profile
    loss = trainer.compute_loss(trainer.model, inputs)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    now = trainer.scored[-1][0]
    expected = likelihood_loss(now, inputs["old_per_token_logps"], inputs["advantages"], mask)
    assert expected > 1e-3
    close(loss - without, 0.5 * expected, atol=1e-6, rtol=1e-4)


def test_full_fine_tuning_moves_all_weights_of_a_copy(policy, tmp_path, forge):
    profile = tiny(quantization="none", lora_r=0, beta=0.04)
    trainer = trainer_module.build_trainer(profile, tmp_path, policy, QUESTIONS[:2], None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    move(trainer, 1)
    before = trainer.compute_loss(trainer.model, inputs)
    before.backward()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
    assert not any(parameter.grad is not None for parameter in policy.model.parameters())
    assert trainer._metrics["train"]["kl"][-1] > 1e-3  # to the caller's model, which has not moved
    trainer.beta = 0.0
    assert trainer.compute_loss(trainer.model, inputs) < before


@pytest.mark.parametrize("updates", [1, 2])
def test_ppo_without_an_adapter_has_the_values_of_the_policy(policy, tmp_path, forge, updates):
    """The KL's reference is then a model of its own, and its rows are not all as long as each other."""
    profile = tiny(
        algorithm="ppo", quantization="none", lora_r=0, beta=0.04, updates_per_rollout=updates, micro_batch_tokens=64
    )
    trainer = trainer_module.build_trainer(profile, tmp_path, policy, QUESTIONS[:2], None)
    torch.nn.init.normal_(trainer.value_head.linear.weight, std=0.1)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ids = tuple(inputs["completion_ids"][0, : int(inputs["completion_mask"][0].sum()) - 1].tolist())
    one = next(one for one in forge if one.completion_ids == ids)
    with torch.no_grad():
        read = trainer.model(torch.tensor([[*one.prompt_ids, *ids]]), output_hidden_states=True)
        values = trainer.value_head(read.hidden_states[-1][0, len(one.prompt_ids) - 1 : -1])
    close(inputs["old_values"][0, : len(ids)], values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"group_size": 1}, "group_size = 1 has no group"),
        ({"lora_r": 0}, "quantization = none"),
        ({"algorithm": "a2c"}, "algorithm"),
        ({"algorithm": "sft", "stop_early": True}, "sft makes none"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        load_profile("tiny", **settings)


def test_gae_and_value_loss_are_those_of_the_original_itself(monkeypatch):
    """Its functions, run beside ours where nothing was retrieved, so that its missing mask makes no difference."""
    helpers = original("verl/utils/torch_functional.py")
    monkeypatch.setitem(sys.modules, "verl.utils.torch_functional", helpers)
    theirs = original("verl/trainer/ppo/core_algos.py")
    monkeypatch.setattr(theirs, "verl_F", helpers)
    torch.manual_seed(0)
    mask = torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3, [1.0] + [0.0] * 6])
    rewards, values, later = (torch.randn(3, 7) * mask for _ in range(3))
    for gamma, gae_lambda in ((1.0, 1.0), (0.9, 0.7)):
        advantages, returns = generalised_advantages(rewards, values, mask, gamma, gae_lambda)
        gained, their_returns = theirs.compute_gae_advantage_return(rewards, values, mask, gamma, gae_lambda)
        close(whitened(advantages, mask), gained * mask, atol=1e-5, rtol=1e-4)
        close(returns, their_returns * mask)
        error, _ = theirs.compute_value_loss(later, returns, values, mask, VALUE_CLIP)
        close(value_loss(later, values, returns, mask), error)
