"""Advantages and losses: values worked out on paper, and the formula once more in plain Python."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import original
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.config import load_profile
from searchr1_lite.training.losses import (
    KL_LIMIT,
    SAMPLER_CAP,
    cispo_loss,
    clipped_policy_loss,
    group_advantages,
    k3_kl,
    leave_out_equal_groups,
    loss_weights,
    losses_from_rewards,
    masked_mean,
    sampler_weights,
    sequence_logprobs,
    token_losses,
)
from searchr1_lite.training.score import token_entropies, token_logprobs


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


@pytest.mark.parametrize("difference", [3.2, 1000.0, -12.0])  # beyond the limit, above and below
def test_k3_kl_is_limited_and_has_no_gradient_beyond(difference):
    assert KL_LIMIT == 10
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    kl = k3_kl(logprobs, torch.tensor([-1.0 + difference, -2.0]))
    close(kl.detach(), [10.0, math.exp(-1) + 1 - 1])
    kl.sum().backward()
    close(logprobs.grad, [0.0, 1 - math.exp(-1)])


def test_clipping_by_hand():
    old = torch.zeros(2, 3)
    new = torch.log(torch.tensor([[1.0, 1.5, 0.5], [1.0, 1.5, 0.5]]))
    advantages = torch.tensor([[2.0], [-2.0]])
    # a gain is taken up to 1.2, a loss is never made smaller by clipping
    close(clipped_policy_loss(new, old, advantages, 0.2), [[-2.0, -2.4, -1.0], [2.0, 3.0, 1.6]])
    close(clipped_policy_loss(new, old, advantages, 0.2, 0.4), [[-2.0, -2.8, -1.0], [2.0, 3.0, 1.6]])
    by_token = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, -2.0]])
    close(clipped_policy_loss(new, old, by_token, 0.2), [[-1.0, -2.4, -1.5], [0.0, 1.5, 1.6]])


def test_gspo_by_hand():
    """The ratio is the sequence's: the geometric mean over its learned tokens."""
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    new = torch.log(torch.tensor([[1.44, 1.0, 9.0], [0.5, 1.0, 2.0]])).requires_grad_()
    old = torch.zeros(2, 3)
    close(sequence_logprobs(new.detach(), mask), [[math.log(1.2)] * 3, [0.0] * 3])

    def gspo(high):
        advantages = torch.tensor([2.0, -1.0])
        options = {"policy_loss": "gspo", "epsilon": 0.1, "epsilon_high": high, "beta": 0.0, "entropy_coef": 0.0}
        return token_losses(new, torch.zeros(2, 3), advantages, mask, old, **options) * mask

    close(gspo(None).detach(), [[-2.2, -2.2, 0.0], [1.0, 1.0, 1.0]])  # the first is clipped at 1.1
    loss = gspo(0.5)
    close(loss.detach(), [[-2.4, -2.4, 0.0], [1.0, 1.0, 1.0]])
    loss.sum().backward()  # each of two tokens: two losses of -2 x 1.2, half of each; of three: 3 x 1/3
    close(new.grad, [[-2.4, -2.4, 0.0], [1.0, 1.0, 1.0]])


def test_cispo_by_hand():
    new = torch.log(torch.tensor([[0.75, 0.5, 0.05]])).requires_grad_()
    old = torch.log(torch.tensor([[0.5, 0.5, 0.5]]))  # ratios 1.5, 1, 0.1
    for high, weights in ((0.2, [1.2, 1.0, 0.1]), (1.0, [1.5, 1.0, 0.1])):
        for advantage in (2.0, -2.0):
            loss = cispo_loss(new, old, torch.tensor([[advantage]]), high)
            expected = [-w * advantage * math.log(p) for w, p in zip(weights, (0.75, 0.5, 0.05), strict=True)]
            close(loss.detach(), [expected])
            (gradient,) = torch.autograd.grad(loss.sum(), new)
            close(gradient, [[-w * advantage for w in weights]])
    options = {"policy_loss": "cispo", "beta": 0.0, "entropy_coef": 0.0, "epsilon": 0.2}
    arguments = (new, torch.zeros(1, 3), torch.tensor([2.0]), torch.ones(1, 3), old)
    for high, is_high in ((None, 0.2), (1.0, 1.0)):
        loss = token_losses(*arguments, **options, epsilon_high=high)
        torch.testing.assert_close(loss, cispo_loss(new, old, torch.tensor([[2.0]]), is_high))


def test_loss_weights_by_hand():
    mask = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    sixth = 1 / 6
    close(loss_weights(mask), [[0.25, 0.25, 0.0, 0.25], [0.0, 0.25, 0.0, 0.0], [0.0] * 4])
    # two rollouts are counted: the third has nothing to learn from
    close(loss_weights(mask, "sequence"), [[sixth, sixth, 0.0, sixth], [0.0, 0.5, 0.0, 0.0], [0.0] * 4])
    close(loss_weights(mask, "constant", 8), [[0.0625, 0.0625, 0.0, 0.0625], [0.0, 0.0625, 0.0, 0.0], [0.0] * 4])
    for mean in ("token", "sequence", "constant"):
        assert not loss_weights(torch.zeros(2, 3), mean).any()


def test_groups_that_are_equal_are_left_out():
    batch = SimpleNamespace(rewards=torch.tensor([0.5, 0.5, 0.0, 1.0, 1.0, 1.0]))
    batch.mask = batch.valued = torch.ones(6, 2)
    leave_out_equal_groups(batch, 2)
    for mask in (batch.mask, batch.valued):
        close(mask, [[0.0] * 2, [0.0] * 2, [1.0] * 2, [1.0] * 2, [0.0] * 2, [0.0] * 2])


def test_sampler_weights_by_hand():
    learner, sampler = torch.full((1, 5), -6.0), torch.tensor([[-6.4, -11.0, -3.0, -6.0, 0.0]])
    own = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])  # e^0.4; e^5, over the cap; e^-3; 1; what nobody sampled
    weights = sampler_weights(learner, sampler, own)
    close(weights, [[1.4918247, 3.0, 0.0497871, 1.0, 1.0]])
    assert SAMPLER_CAP == 3


def test_sampler_weights_weigh_the_policy_loss_alone():
    """And only where another program sampled."""
    logits, ids, mask, advantages, old, reference = example()
    logprobs, entropies = token_logprobs(logits, ids).detach(), torch.zeros(ids.shape)
    sampled = old - torch.linspace(-3, 3, ids.numel()).view(ids.shape)
    batch = SimpleNamespace(advantages=advantages, mask=mask, own=mask, sampled_logprobs=sampled)
    batch.old_logprobs, batch.reference_logprobs = old, reference
    local, served = (
        losses_from_rewards(logprobs, entropies, batch, load_profile("tiny", sampler=sampler, beta=0.5))
        for sampler in ("local", "vllm")
    )
    kl = 0.5 * k3_kl(logprobs, reference)
    weights = sampler_weights(old, sampled, mask)
    assert weights.min() < 0.5 and weights.max() == SAMPLER_CAP
    torch.testing.assert_close(served, (local - kl) * weights + kl)
    torch.testing.assert_close(local, token_losses(logprobs, entropies, advantages, mask, old, reference, beta=0.5))


def example(seed=0, batch=3, tokens=6, vocabulary=7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, tokens, vocabulary, generator=generator, requires_grad=True)
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator)
    mask = torch.randint(2, (batch, tokens), generator=generator).float()
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


def total_loss(logits, ids, mask, *rest, mean="token", **options):
    each = token_losses(token_logprobs(logits, ids), token_entropies(logits), rest[0], mask, *rest[1:], **options)
    return (each * loss_weights(mask, mean, longest=9)).sum()


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_equals_the_formula_in_plain_python(seed):
    logits, ids, mask, advantages, old, reference = example(seed)
    loss = total_loss(logits, ids, mask, advantages, old, reference, epsilon=0.2, beta=0.04, entropy_coef=0.01)
    lists = [x.tolist() for x in (logits, ids, mask, advantages, old, reference)]
    assert loss.item() == pytest.approx(loss_in_plain_python(*lists, 0.2, 0.04, 0.01), abs=1e-5)


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@pytest.mark.parametrize("policy_loss", ["clipped", "gspo", "cispo"])
def test_the_gradient_is_exactly_zero_where_the_mask_is(policy_loss, mean):
    logits, ids, mask, advantages, old, reference = example()
    options = {"policy_loss": policy_loss, "mean": mean}
    total_loss(logits, ids, mask, advantages, old, reference, **options).backward()
    size = logits.grad.abs().sum(dim=-1)
    assert (size[mask == 0] == 0).all() and (size[mask == 1] > 0).any()
    logits.grad = None
    total_loss(logits, ids, torch.ones_like(mask), advantages, old, reference, **options).backward()
    assert (logits.grad.abs().sum(dim=-1)[mask == 0] > 0).any()


@pytest.mark.parametrize("policy_loss", ["clipped", "gspo"])
def test_on_policy_the_ratio_is_one_and_its_gradient_lives(policy_loss):
    logits, ids, mask, advantages, *_ = example()
    mean = "token" if policy_loss == "clipped" else "sequence"
    options = {"beta": 0.0, "entropy_coef": 0.0, "policy_loss": policy_loss, "mean": mean}
    loss = total_loss(logits, ids, mask, advantages, **options)
    weights = loss_weights(mask, mean) * advantages.unsqueeze(1)
    close(loss.detach(), -weights.sum().item())
    by_policy_gradient = -(weights * token_logprobs(logits, ids)).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, by_policy_gradient)))


def test_kl_and_policy_loss_are_those_of_the_original_itself(monkeypatch):
    helpers = original("verl/utils/torch_functional.py")
    monkeypatch.setitem(sys.modules, "verl.utils.torch_functional", helpers)
    theirs = original("verl/trainer/ppo/core_algos.py")
    monkeypatch.setattr(theirs, "verl_F", helpers)
    logits, ids, mask, advantages, old, reference = example()
    logprobs = token_logprobs(logits, ids).detach()
    reference = reference + torch.linspace(-20, 20, ids.numel()).view(ids.shape)  # beyond the limit, too
    kl = k3_kl(logprobs, reference)
    assert (kl == KL_LIMIT).any() and (kl < KL_LIMIT).any()
    torch.testing.assert_close(kl, theirs.kl_penalty(logprobs, reference, "low_var_kl"))
    by_token = advantages.unsqueeze(1).expand_as(logprobs)
    expected, clipped, _ = theirs.compute_policy_loss(old, logprobs, by_token, mask, 0.2)
    assert clipped > 0
    ours = clipped_policy_loss(logprobs, old, by_token, 0.2) * loss_weights(mask)
    torch.testing.assert_close(ours.sum(), expected)
