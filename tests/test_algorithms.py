"""PPO, REINFORCE, LLDS and full fine-tuning against hand-computed values and independent references."""

import random
import sys

import numpy as np
import pytest
import test_loop
import torch
from conftest import original
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.training.loop import Learner, model_to_train, shuffled
from searchr1_lite.training.losses import (
    VALUE_CLIP,
    generalised_advantages,
    likelihood_losses,
    loss_weights,
    token_rewards,
    value_losses,
    whitened,
)
from searchr1_lite.training.score import ValueHead, collate, score, token_entropies, token_logprobs

close = torch.testing.assert_close


def tiny(**overrides):
    """In several parts, whose rows are not all as long as each other."""
    return test_loop.tiny(**{"micro_batch_tokens": 64, "max_grad_norm": 1e9} | overrides)


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
    values, old = torch.tensor([[0.9, 0.1, -0.9]], requires_grad=True), torch.tensor([[0.0, 0.0, 0.0]])
    returns = torch.tensor([[1.0, 0.0, -0.5]])
    # 0.9 is clipped to 0.5: the larger error (0.5)^2 counts; 0.1 is within: (0.1)^2; -0.9 is off by more than -0.5
    losses = value_losses(values, old, returns)
    close(losses.detach(), torch.tensor([[0.125, 0.005, 0.08]]))
    losses.sum().backward()
    close(values.grad, torch.tensor([[0.0, 0.1, -0.4]]))
    assert VALUE_CLIP == 0.5


def test_value_head_begins_at_0_and_stops_gradients():
    head, hidden = ValueHead(6), torch.randn(2, 3, 6, requires_grad=True)
    values = head(hidden)
    assert values.shape == (2, 3) and not values.any()
    (values - 1).square().mean().backward()
    assert hidden.grad is None and head.linear.bias.grad.item() == pytest.approx(-2)


def test_llds_by_hand():
    # two actions in the first row (retrieved text between them), one in the second, which is worse than its group
    mask = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    old = torch.zeros(2, 5)
    now = torch.tensor([[-0.4, 0.1, -9.0, 0.5, -0.2], [-1.0, -1.0, -1.0, 0.0, 0.0]], requires_grad=True)
    losses = likelihood_losses(now, old, torch.tensor([1.0, -1.0]), mask)
    # the first action lost 0.3 in sum: its first token counts, 0.4; the second action gained: its last does not count
    close(losses.detach(), torch.tensor([[0.4, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]))
    losses.sum().backward()
    close(now.grad, torch.tensor([[-1.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]))
    by_token = torch.tensor([[-1.0, 0.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0, 0.0]])  # PPO's
    found = likelihood_losses(now.detach(), old, by_token, mask)
    close(found, torch.tensor([[0.0] * 5, [1.0, 0.0, 1.0, 0.0, 0.0]]))
    assert not likelihood_losses(old, old, torch.tensor([1.0, -1.0]), mask).any()  # at the first update


GENERATOR = random.Random(1)
MADE = [test_loop.forged(question, GENERATOR) for question in test_loop.QUESTIONS[:2] for _ in range(4)]
REWARDS = [1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.0]


def moved(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def trained(learner):
    return [weight for group in learner.optimizer.param_groups for weight in group["params"]]


def looked_back(policy, profile, rewards=REWARDS):
    """A learner that has moved away from the base, and the batch that it is to learn from."""
    learner = Learner(model_to_train(policy, profile), policy, profile)
    moved(trained(learner), 0)
    batch = collate(MADE[: len(rewards)], rewards, profile.masked)
    learner.look_back(batch)
    batch.advantages = learner.advantages(batch, profile)
    return learner, batch


def update(learner, batch):
    """An update's loss and gradient, by which nothing is moved in the end."""
    weights = trained(learner)
    before = [weight.detach().clone() for weight in weights]
    loss = learner.update(batch)["loss"]
    for weight, old in zip(weights, before, strict=True):
        weight.data.copy_(old)
    return loss, torch.cat([weight.grad.flatten() for weight in weights])


def seen_by(learner, trajectory):
    """Logits, log-probabilities by policy and base, and values of the own tokens, one full forward at a time."""
    whole = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
    before = slice(len(trajectory.prompt_ids) - 1, -1)
    own = torch.tensor(trajectory.loss_mask).bool()
    ids = torch.tensor(trajectory.completion_ids)
    out = learner.model(whole, output_hidden_states=True)
    with torch.no_grad(), learner.model.disable_adapter():
        base = learner.model(whole).logits[0, before] / learner.temperature
    logits = out.logits[0, before] / learner.temperature
    hidden = out.hidden_states[-1][0, before].detach()
    normal = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    values = normal @ learner.value_head.linear.weight[0] + learner.value_head.linear.bias
    return logits[own], token_logprobs(logits, ids)[own], token_logprobs(base, ids)[own], values[own], own


@pytest.mark.parametrize("updates", [1, 2])
def test_ppo_is_the_one_by_hand(policy, updates):
    options = {"algorithm": "ppo", "updates_per_rollout": updates, "beta": 0.05, "entropy_coef": 0.01}
    learner, batch = looked_back(policy, tiny(**options, gamma=0.9, gae_lambda=0.8, temperature=0.8))

    before = []  # of each trajectory, at its own tokens: advantages, returns, old values and log-probabilities
    for one, reward in zip(MADE, REWARDS, strict=True):
        _, now, base, values, _ = (x.detach() for x in seen_by(learner, one))
        rewards = -0.05 * (now - base).numpy()
        rewards[-1] += reward
        gained = torch.tensor(reference_gae(rewards, values.numpy(), 0.9, 0.8), dtype=torch.float32)
        before.append((gained, gained + values, values, now))
    everything = torch.cat([gained for gained, *_ in before])
    white = [(gained - everything.mean()) / everything.std() for gained, *_ in before]
    assert everything.std() > 0.1
    for row, (_, returns, values, now) in enumerate(before):
        own = batch.mask[row].bool()
        assert own.sum() == sum(MADE[row].loss_mask)
        close(batch.advantages[row, own], white[row], atol=1e-4, rtol=0)
        for found, expected in ((batch.returns, returns), (batch.old_values, values), (batch.old_logprobs, now)):
            close(found[row, own], expected, atol=1e-5, rtol=0)
    assert not batch.advantages[batch.mask == 0].any() and not batch.returns[batch.mask == 0].any()

    moved(trained(learner), 1)  # as an update would
    rows = shuffled(8, updates)[0]
    assert len(rows) == 8 // updates
    policy_terms, entropies, errors = [], [], []
    for row in rows:
        logits, now, _, values, _ = seen_by(learner, MADE[row])
        _, returns, old_values, old = before[row]
        ratio = (now - old).exp()
        policy_terms.append(-torch.min(ratio * white[row], ratio.clamp(0.8, 1.2) * white[row]))
        entropies.append(token_entropies(logits))
        near = old_values + (values - old_values).clamp(-0.5, 0.5)
        errors.append(torch.max((values - returns) ** 2, (near - returns) ** 2))
    by_hand = torch.cat(policy_terms).mean() - 0.01 * torch.cat(entropies).mean() + torch.cat(errors).mean() / 2
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(by_hand, trained(learner))])
    loss, gradient = update(learner, batch.rows(rows))
    assert loss == pytest.approx(by_hand.item(), abs=2e-5)
    assert wanted[-33:].abs().max() > 1e-2 and wanted[:-33].abs().max() > 1e-2  # value head, adapter
    close(gradient, wanted, atol=2e-5, rtol=1e-3)


def test_an_update_has_the_value_heads_own_gradient_alone(policy):
    learner, batch = looked_back(policy, tiny(algorithm="ppo", updates_per_rollout=2, beta=0.05))
    loss, found = update(learner, batch)
    again, repeated = update(learner, batch)
    assert found[-33:].abs().max() > 1e-3 and loss == again
    close(repeated, found)


@pytest.mark.parametrize(("algorithm", "less"), [("reinforce", 0.0), ("reinforce_baseline", 0.375)])
def test_reinforce_learns_from_the_reward_itself(policy, algorithm, less):
    profile = tiny(algorithm=algorithm, group_size=1, questions_per_step=4, beta=0.0, entropy_coef=0.0)
    learner, batch = looked_back(policy, profile, REWARDS[:4])
    close(batch.advantages, torch.tensor(REWARDS[:4]) - less)
    advantages = batch.advantages.unsqueeze(1)
    by_hand = -(score(learner.model, batch)[0] * advantages * batch.mask).sum() / batch.mask.sum()
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(by_hand, trained(learner))])
    close(update(learner, batch)[1], wanted, atol=1e-6, rtol=1e-4)


def test_llds_is_added_to_the_loss(policy):
    learner, batch = looked_back(policy, tiny(updates_per_rollout=2))
    with_llds = tiny(updates_per_rollout=2, llds_coef=0.5)
    first, _ = update(learner, batch)
    learner.profile = with_llds
    assert update(learner, batch)[0] == pytest.approx(first, abs=1e-5)  # nothing has become less likely yet
    moved(trained(learner), 1)
    loss, gradient = update(learner, batch)
    learner.profile = tiny(updates_per_rollout=2)
    without, other = update(learner, batch)
    now = score(learner.model, batch)[0]
    each = likelihood_losses(now, batch.old_logprobs, batch.advantages, batch.mask)
    expected = (each * batch.mask).sum() / batch.mask.sum()
    assert expected > 1e-3
    assert loss - without == pytest.approx(0.5 * expected.item(), abs=1e-5)
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(0.5 * expected, trained(learner))])
    close(gradient - other, wanted, atol=1e-5, rtol=1e-3)


def test_full_fine_tuning_moves_all_weights_of_a_copy(policy):
    kept = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    learner, batch = looked_back(policy, tiny(quantization="none", lora_r=0, beta=0.04, learning_rate=1e-4))
    moved(trained(learner), 1)
    before = {name: weight.clone() for name, weight in learner.model.named_parameters()}
    figures = learner.update(batch)
    assert figures["kl"] > 1e-3  # to the caller's model, which has not moved
    assert before.keys() == {name for name, _ in policy.model.named_parameters()}
    assert all((weight != before[name]).any() for name, weight in learner.model.named_parameters())
    assert all((weight == kept[name]).all() for name, weight in policy.model.state_dict().items())
    assert not any(weight.grad is not None for weight in policy.model.parameters())
    assert learner.update(batch)["loss"] < figures["loss"]


@pytest.mark.parametrize("updates", [1, 2])
def test_ppo_without_an_adapter_has_the_values_of_the_policy(policy, updates):
    """And the KL's reference is then a model of its own."""
    profile = tiny(algorithm="ppo", quantization="none", lora_r=0, beta=0.04, updates_per_rollout=updates)
    learner, batch = looked_back(policy, profile)
    for row, one in enumerate(MADE):
        whole, before = torch.tensor([[*one.prompt_ids, *one.completion_ids]]), slice(len(one.prompt_ids) - 1, -1)
        own, ids = torch.tensor(one.loss_mask).bool(), torch.tensor(one.completion_ids)
        with torch.no_grad():
            read = learner.model(whole, output_hidden_states=True)
            values = learner.value_head(read.hidden_states[-1][0, before])
            of_policy, of_base = (
                token_logprobs(model(whole).logits[0, before], ids) for model in (learner.model, policy.model)
            )
        place = batch.mask[row].bool()
        assert (of_policy - of_base).abs().max() > 0.1
        for found, expected in (
            (batch.old_values, values),
            (batch.old_logprobs, of_policy),
            (batch.reference_logprobs, of_base),
        ):
            close(found[row, place], expected[own], atol=2e-5, rtol=1e-4)


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
        close((value_losses(later, values, returns) * loss_weights(mask)).sum(), error)
