"""What differs between GRPO, PPO and REINFORCE: where the advantage of a token comes from. And LLDS, a brake.

All learn from the same trajectories, through the same clipped loss and the same mask (objective.py). GRPO compares a
rollout with its group. REINFORCE takes the reward as it is, or less the mean reward of the batch. PPO, the paper's
main algorithm, asks a value head what reward it expected before each token (arXiv 2503.09516, section 3.1; Search-R1
verl/trainer/ppo/core_algos.py). LLDS (arXiv 2512.04220) keeps what was right from becoming unlikely.

Shapes are (rollouts, tokens) unless another is given; `mask` is 1 where the policy wrote the token. Leaves out a critic
with weights of its own (the original's is a second model of full size): the head reads the policy's last hidden state.
"""

import torch
from torch import Tensor

from searchr1_lite.training.objective import masked_mean

VALUE_CLIP = 0.5  # how far a value may move from the one at sampling time (verl, cliprange_value)
# An update may move a value by about this much: Adam moves each of the `hidden` weights, which read features of about
# size 1, by a learning rate of VALUE_STEP / hidden. (The original's critic has a rate for all weights of a model.)
VALUE_STEP = 0.1


class ValueHead(torch.nn.Module):
    """The reward to expect, from the policy's last hidden state: (..., hidden) -> (...). Begins at 0 everywhere.

    Gradients stop here, so that fitting values does not move the policy.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden, elementwise_affine=False)  # hidden states differ in scale by model
        self.linear = torch.nn.Linear(hidden, 1)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(self.norm(hidden.detach().float())).squeeze(-1)


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
    mean = masked_mean(advantages, mask)
    variance = ((advantages - mean) ** 2 * mask).sum() / (mask.sum() - 1).clamp(min=1)
    return (advantages - mean) * (variance + 1e-8).rsqrt() * mask


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error; a value gains nothing by moving more than VALUE_CLIP at once. A scalar."""
    clipped = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask) / 2


def likelihood_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """LLDS: how much less likely tokens of rollouts that are no worse than others became, a mean over all tokens.

    Only of actions (what the policy writes between two observations) that lost likelihood as a whole, and in them
    only of tokens that did. `advantages` is (rollouts,) or by token. Nothing has changed at the first update from a
    batch, so it acts from the second on. The original can weigh the last action, the answer, apart; here it counts.
    """
    advantages = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
    kept = mask * (advantages >= 0)
    lost = (old_logprobs - logprobs) * kept
    begins = torch.nn.functional.pad(mask, (1, 0))[:, :-1] < mask
    action = begins.long().cumsum(dim=1)  # the number of the action that a token belongs to
    sums = torch.zeros(lost.size(0), int(action.max()) + 1, dtype=lost.dtype, device=lost.device)
    sums = sums.scatter_add(1, action, lost.detach())
    return masked_mean(lost.clamp(min=0) * (sums.gather(1, action) > 0), mask)
