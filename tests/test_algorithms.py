"""PPO, REINFORCE and LLDS against hand-computed values, an independent reference, and training that learns."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.training.algorithms import (
    VALUE_CLIP,
    ValueHead,
    generalised_advantages,
    likelihood_loss,
    token_rewards,
    value_loss,
    whitened,
)

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
