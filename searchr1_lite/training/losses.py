"""The advantages and losses of every algorithm, and the loss mask, applied in one place: `loss_weights`.

These are the functions that train (loop.py), and those that notebook 03 builds one by one. GRPO compares a rollout
with its group; REINFORCE takes the reward as it is, or less the batch's mean; PPO asks a value head what reward it
expected before each token (arXiv 2503.09516, section 3.1; Search-R1 verl/trainer/ppo/core_algos.py). SFT and rejection
sampling make given tokens likely. `Profile.algorithm` chooses, through the table ALGORITHMS at the end.

Shapes are (rollouts, tokens) unless another is given; `mask` is 1 where a token is learned from. Leaves out how
log-probabilities come about (score.py), and a critic with weights of its own: the original's is a second model of
full size, the value head here reads the policy's last hidden state.
"""

from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from searchr1_lite.config import Profile

KL_LIMIT = 10.0  # of a token's KL estimate (Search-R1 core_algos.py, kl_penalty, low_var_kl)
VALUE_CLIP = 0.5  # how far a value may move from the one at sampling time (verl, cliprange_value)
SAMPLER_CAP = 3.0  # of the weight that corrects for another program's sampling


def over_processes(value: Tensor) -> Tensor:
    """The sum over all processes of a training; of a single one, the value itself."""
    return reduce(value, "sum")


# The mask


def loss_weights(mask: Tensor, mean: str = "token", longest: int = 1) -> Tensor:
    """How much each token counts in the loss of an update, whose tokens' weights sum to 1; 0 where the mask is.

    "token": all tokens alike, the mean over the update (Search-R1; TRL's "dapo"). "sequence": all rollouts alike, a
    mean of means (the original GRPO, arXiv 2402.03300; TRL's "grpo"). "constant": every token counts 1 / (rollouts x
    `longest`), so that a token weighs the same in a long rollout and in a short one (Dr. GRPO, arXiv 2503.20783; the
    sum is then below 1). Rollouts without a learned token are not counted.
    """
    tokens = mask.sum(dim=1, keepdim=True)
    rollouts = (tokens > 0).sum()
    if mean == "token":
        return mask / over_processes(tokens.sum()).clamp(min=1)
    return mask / (tokens.clamp(min=1) if mean == "sequence" else longest) / over_processes(rollouts).clamp(min=1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is 1, over the whole update; 0 where it is 1 nowhere."""
    return over_processes((values * mask).sum()) / over_processes(mask.sum()).clamp(min=1)


# Advantages


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


def token_rewards(rewards: Tensor, mask: Tensor, logprobs: Tensor, reference_logprobs: Tensor, beta: float) -> Tensor:
    """The reward, (rollouts,), at the last token of the policy, less `beta` times log(policy / base) at each.

    PPO's KL in the original (verl/trainer/ppo/ray_trainer.py, apply_kl_penalty; the estimate k1).
    """
    places = torch.arange(mask.size(1), device=mask.device)
    last = (places * mask).max(dim=1, keepdim=True).values == places
    return (rewards.unsqueeze(1) * last - beta * (logprobs - reference_logprobs)) * mask


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv 1506.02438) over the policy's own tokens: advantages and returns, 0 where the mask is.

    What was retrieved between two tokens is skipped, as if the second followed the first: it is no action, has no
    value and takes no time. The original's GAE runs over all tokens (core_algos.py, compute_gae_advantage_return);
    for that, give a mask of all of them.
    """
    advantages = torch.zeros_like(values)
    running = next_value = torch.zeros_like(values[:, 0])
    for place in reversed(range(values.size(1))):
        own = mask[:, place].bool()
        error = rewards[:, place] + gamma * next_value - values[:, place]
        running = torch.where(own, error + gamma * gae_lambda * running, running)
        next_value = torch.where(own, values[:, place], next_value)
        advantages[:, place] = running * own
    return advantages, (advantages + values) * mask


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and (unbiased) variance 1 over the tokens where the mask is 1, and 0 elsewhere."""
    mean, count = masked_mean(advantages, mask), over_processes(mask.sum())
    variance = over_processes(((advantages - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    return (advantages - mean) * (variance + 1e-8).rsqrt() * mask


def ppo_advantages(batch: Any, profile: Profile) -> Tensor:
    """Whitened GAE with the KL in the rewards. Sets `batch.returns`, what the values are fitted to."""
    earned = token_rewards(batch.rewards, batch.mask, batch.old_logprobs, batch.reference_logprobs, profile.beta)
    advantages, batch.returns = generalised_advantages(
        earned, batch.old_values, batch.valued, profile.gamma, profile.gae_lambda
    )
    return whitened(advantages, batch.valued)


# What each token costs


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None = None
) -> Tensor:
    """PPO's clipped loss, token by token; `advantages` (rollouts, tokens) or (rollouts, 1).

    The importance ratio may gain down to 1 - epsilon and up to 1 + epsilon_high (epsilon, where it is None; a larger
    one is DAPO's clip-higher, arXiv 2503.14476).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    high = epsilon if epsilon_high is None else epsilon_high
    return -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Each token's is its rollout's mean over the learned tokens: ratios of these are GSPO's (arXiv 2507.18071)."""
    return ((logprobs * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logprobs)


def cispo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, high: float) -> Tensor:
    """REINFORCE weighted by the importance ratio, at most 1 + high, without its gradient (arXiv 2506.13585).

    No token is left out, however far its ratio went.
    """
    weights = torch.exp(logprobs - old_logprobs).clamp(max=1 + high).detach()
    return -weights * advantages * logprobs


def k3_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference), token by token: never negative, 0 where both agree.

    At most KL_LIMIT, as in the original; beyond it a token has no gradient.
    """
    difference = (reference_logprobs - logprobs).clamp(-20, 20)  # an infinite exp's gradient, times 0, is no number
    return (torch.exp(difference) - difference - 1).clamp(-KL_LIMIT, KL_LIMIT)


def token_losses(
    logprobs: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    sampler_weights: Tensor | float = 1.0,
    policy_loss: str = "clipped",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.001,
    entropy_coef: float = 0.001,
) -> Tensor:
    """Policy loss, KL to the reference and entropy bonus of each token; the loss is their sum under `loss_weights`.

    `advantages` is (rollouts,) or (rollouts, tokens). Without `old_logprobs` the batch is on-policy, the ratio 1 in
    value and alive in the gradient. `policy_loss` is "clipped", "gspo" or "cispo".
    """
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    if policy_loss == "cispo":
        loss = cispo_loss(logprobs, old_logprobs, advantages, epsilon if epsilon_high is None else epsilon_high)
    elif policy_loss == "gspo":
        pair = sequence_logprobs(logprobs, mask), sequence_logprobs(old_logprobs, mask)
        loss = clipped_policy_loss(*pair, advantages, epsilon, epsilon_high)
    else:
        loss = clipped_policy_loss(logprobs, old_logprobs, advantages, epsilon, epsilon_high)
    loss = loss * sampler_weights
    if beta and reference_logprobs is not None:
        loss = loss + beta * k3_kl(logprobs, reference_logprobs)
    return loss - entropy_coef * entropies


def sampler_weights(learner_logprobs: Tensor, sampler_logprobs: Tensor, own: Tensor) -> Tensor:
    """Learner's probability over the sampler's, at most SAMPLER_CAP, for what another program (vLLM) sampled; else 1.

    Truncated importance sampling, token by token. One weight for a whole sequence would be a product over thousands
    of tokens, which small biases drive to nothing, or over the cap.
    """
    ratio = torch.exp(learner_logprobs - sampler_logprobs).clamp(max=SAMPLER_CAP)
    return torch.where(own > 0, ratio, 1.0)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
    """PPO: half the squared error of each value; it gains nothing by moving more than VALUE_CLIP at once."""
    clipped = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return torch.max((values - returns) ** 2, (clipped - returns) ** 2) / 2


def likelihood_losses(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """LLDS (arXiv 2512.04220): how much less likely each token of rollouts that are no worse than others became.

    Only of actions (what the policy writes between two observations) that lost likelihood as a whole, and in them
    only of tokens that did. `advantages` is (rollouts,) or by token. Nothing has changed at the first update from a
    batch, so it acts from the second on. The original can weigh the last action, the answer, apart; here it counts.
    """
    advantages = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
    lost = (old_logprobs - logprobs) * mask * (advantages >= 0)
    begins = torch.nn.functional.pad(mask, (1, 0))[:, :-1] < mask
    action = begins.long().cumsum(dim=1)  # the number of the action that a token belongs to
    sums = torch.zeros(lost.size(0), int(action.max()) + 1, dtype=lost.dtype, device=lost.device)
    sums = sums.scatter_add(1, action, lost.detach())
    return lost.clamp(min=0) * (sums.gather(1, action) > 0)


# The algorithms


def leave_out_equal_groups(batch: Any, group_size: int) -> None:
    """Mask the groups whose rewards are all equal (DAPO, arXiv 2503.14476): comparing them teaches nothing."""
    groups = batch.rewards.view(-1, group_size)
    differs = (groups != groups[:, :1]).any(dim=1).repeat_interleave(group_size).unsqueeze(1)
    batch.mask, batch.valued = batch.mask * differs, batch.valued * differs


def losses_from_rewards(logprobs: Tensor, entropies: Tensor, batch: Any, profile: Profile) -> Tensor:
    """`token_losses` of a batch, as the profile says; PPO's KL is in its rewards. LLDS is added where it is on."""
    old, reference = batch.old_logprobs, None if profile.algorithm == "ppo" else batch.reference_logprobs
    served = profile.sampler == "vllm"
    weights = sampler_weights(old, batch.sampled_logprobs, batch.own) if served else 1.0
    names = ("policy_loss", "epsilon", "epsilon_high", "beta", "entropy_coef")
    settings = {name: getattr(profile, name) for name in names}
    loss = token_losses(logprobs, entropies, batch.advantages, batch.mask, old, reference, weights, **settings)
    if profile.llds_coef and old is not None:
        loss = loss + profile.llds_coef * likelihood_losses(logprobs, old, batch.advantages, batch.mask)
    return loss


def cross_entropy(logprobs: Tensor, entropies: Tensor, batch: Any, profile: Profile) -> Tensor:
    """What SFT minimises. Its gradient is the policy loss's where every advantage and every ratio is 1."""
    return -logprobs


# Of each algorithm: the advantages of a batch (score.Batch), (rollouts,) or for PPO (rollouts, tokens); and what each
# token costs.
ALGORITHMS = {
    "grpo": (lambda batch, profile: group_advantages(batch.rewards, profile.group_size), losses_from_rewards),
    "ppo": (ppo_advantages, losses_from_rewards),
    "reinforce": (lambda batch, profile: batch.rewards, losses_from_rewards),
    "reinforce_baseline": (
        lambda batch, profile: batch.rewards - reduce(batch.rewards.mean(), "mean"),
        losses_from_rewards,
    ),
    "sft": (lambda batch, profile: torch.ones_like(batch.rewards), cross_entropy),
    "rejection_sampling": (lambda batch, profile: torch.ones_like(batch.rewards), cross_entropy),
}
