"""The masked GRPO loss written out, term by term, as TRL's trainer computes it with our settings.

Search-R1's own loss in TRL's words (facts checked by tests/test_objective.py): token mean ("bnpo"; here over all
tokens of an update, where the original takes it of each micro-batch), advantages divided by the group's standard
deviation, clipped importance ratio, k3 KL to the base model and an entropy bonus, all of them only where `mask` is 1.
This module is for reading, notebooks and tests; training runs through TRL (trainer.py). It leaves out everything the
method does not use: sequence-level ratios, other reductions, distributed training.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """How much better each rollout did than its group, in standard deviations. (rollouts,) -> (rollouts,)

    Rollouts of one question stand next to each other. The deviation is the unbiased one (ddof 1); 1e-4 makes a group
    of equal rewards 0 (up to rounding) instead of 0/0.
    """
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not make whole groups of {group_size}")
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token that came next. (batch, tokens, vocabulary), (batch, tokens) -> (batch, tokens)

    `logits[:, t]` must be the prediction *of* `ids[:, t]`, that is, shifted by one already.
    """
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def token_entropies(logits: Tensor) -> Tensor:
    """Entropy of each prediction in nats. (batch, tokens, vocabulary) -> (batch, tokens)"""
    logprobs = torch.log_softmax(logits, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is 1, over the whole batch; 0 where it is 1 nowhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def k3_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference), token by token: never negative, 0 where both agree."""
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """PPO's clipped loss, token by token. (batch, tokens), (batch, tokens), (batch,) -> (batch, tokens)"""
    ratio = torch.exp(logprobs - old_logprobs)
    advantages = advantages.unsqueeze(1)
    return -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def grpo_loss(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    epsilon: float = 0.2,
    beta: float = 0.001,
    entropy_coef: float = 0.001,
) -> Tensor:
    """The loss of one update's rollouts, a scalar.

    `logits` (batch, tokens, vocabulary) are divided by the sampling temperature already and predict `ids`
    (batch, tokens); `mask` (batch, tokens) is 1 where the policy wrote the token; `advantages` is (batch,).
    Without `old_logprobs` the batch is on-policy, the ratio 1 in value and alive in the gradient.
    """
    logprobs = token_logprobs(logits, ids)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    loss = clipped_policy_loss(logprobs, old_logprobs, advantages, epsilon)
    if beta and reference_logprobs is not None:
        loss = loss + beta * k3_kl(logprobs, reference_logprobs)
    return masked_mean(loss, mask) - entropy_coef * masked_mean(token_entropies(logits), mask)
