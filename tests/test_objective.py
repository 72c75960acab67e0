"""The hand-written loss: values worked out on paper, and the formula once more in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.training.objective import (
    clipped_policy_loss,
    group_advantages,
    grpo_loss,
    k3_kl,
    masked_mean,
    token_entropies,
    token_logprobs,
)


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.tensor(expected), atol=tolerance, rtol=0)


def test_group_advantages_by_hand():
    # (1, 0, 0, 0): mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4, deviation 1/2
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), 4)
    close(advantages, [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, 0.0, 0.0, 0.0, 0.0])


def test_group_advantages_of_a_broken_group():
    with pytest.raises(ValueError, match="5 rewards do not make whole groups of 4"):
        group_advantages(torch.zeros(5), 4)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.8, 1.0]), min_size=3, max_size=8))
def test_advantages_of_a_group_sum_to_nothing_and_keep_the_order(rewards):
    advantages = group_advantages(torch.tensor(rewards), len(rewards)).tolist()
    assert sum(advantages) == pytest.approx(0, abs=1e-2)
    for i, one in enumerate(rewards):
        for j, other in enumerate(rewards):
            assert one <= other or advantages[i] > advantages[j]


def test_token_logprobs_and_entropies_by_hand():
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])  # probabilities (3/4, 1/4) and (1/2, 1/2)
    close(token_logprobs(logits, torch.tensor([[0, 1]])), [[math.log(0.75), math.log(0.5)]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    close(token_entropies(logits), [[entropy, math.log(2)]])


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, 100.0], [4.0, 100.0, 100.0]])
    close(masked_mean(values, torch.tensor([[1, 1, 0], [1, 0, 0]])), 7 / 3)  # over tokens, not over rows
    close(masked_mean(values, torch.zeros(2, 3)), 0.0)


def test_k3_kl_by_hand():
    # the policy says 1/2, the reference 1/16: exp = 1/8, difference = -3 log 2
    close(k3_kl(torch.tensor([math.log(1 / 2), -1.0]), torch.tensor([math.log(1 / 16), -1.0])), [1.2044415, 0.0])


def test_clipping_by_hand():
    old = torch.zeros(2, 3)
    new = torch.log(torch.tensor([[1.0, 1.5, 0.5], [1.0, 1.5, 0.5]]))
    loss = clipped_policy_loss(new, old, torch.tensor([2.0, -2.0]), 0.2)
    # a gain is taken up to 1.2, a loss is never made smaller by clipping
    close(loss, [[-2.0, -2.4, -1.0], [2.0, 3.0, 1.6]])


def example(seed=0, batch=3, tokens=6, vocabulary=7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, tokens, vocabulary, generator=generator, requires_grad=True)
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator)
    mask = torch.randint(2, (batch, tokens), generator=generator)
    mask[0, 0], mask[0, 1] = 1, 0
    old = token_logprobs(logits, ids).detach() + 0.3 * torch.randn(batch, tokens, generator=generator)
    reference = old + 0.1 * torch.randn(batch, tokens, generator=generator)
    return logits, ids, mask, torch.tensor([1.5, -0.5, 0.3]), old, reference


def loss_in_plain_python(logits, ids, mask, advantages, old, reference, epsilon, beta, entropy_coef):
    """The formula once more, token by token, without torch's operations."""
    total = entropy = count = 0.0
    for row in range(len(ids)):
        for t in range(len(ids[row])):
            if not mask[row][t]:
                continue
            z = sum(math.exp(x) for x in logits[row][t])
            probabilities = [math.exp(x) / z for x in logits[row][t]]
            logp = math.log(probabilities[ids[row][t]])
            ratio = math.exp(logp - old[row][t])
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            total -= min(ratio * advantages[row], clipped * advantages[row])
            difference = reference[row][t] - logp
            total += beta * (math.exp(difference) - difference - 1)
            entropy -= sum(p * math.log(p) for p in probabilities)
            count += 1
    return (total - entropy_coef * entropy) / count


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_equals_the_formula_in_plain_python(seed):
    logits, ids, mask, advantages, old, reference = example(seed)
    loss = grpo_loss(logits, ids, mask, advantages, old, reference, epsilon=0.2, beta=0.04, entropy_coef=0.01)
    lists = [x.tolist() for x in (logits, ids, mask, advantages, old, reference)]
    assert loss.item() == pytest.approx(loss_in_plain_python(*lists, 0.2, 0.04, 0.01), abs=1e-5)


def test_the_gradient_is_exactly_zero_where_the_mask_is():
    logits, ids, mask, advantages, old, reference = example()
    grpo_loss(logits, ids, mask, advantages, old, reference).backward()
    size = logits.grad.abs().sum(dim=-1)
    assert (size[mask == 0] == 0).all() and (size[mask == 1] > 0).any()
    logits.grad = None
    grpo_loss(logits, ids, torch.ones_like(mask), advantages, old, reference).backward()
    assert (logits.grad.abs().sum(dim=-1)[mask == 0] > 0).any()


def test_on_policy_the_ratio_is_one_and_its_gradient_lives():
    logits, ids, mask, advantages, *_ = example()
    loss = grpo_loss(logits, ids, mask, advantages, beta=0.0, entropy_coef=0.0)
    weights = advantages.unsqueeze(1).expand_as(ids)
    close(loss.detach(), -masked_mean(weights, mask).item())
    by_policy_gradient = masked_mean(-weights * token_logprobs(logits, ids), mask)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, by_policy_gradient)))
