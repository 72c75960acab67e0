"""Trajectories as tensors, and what a model says of their tokens: log-probabilities, entropies and values.

Memory is bounded: rows are scored a few at a time, and logits over the vocabulary exist for a moment, for the learned
tokens alone, and are made again in the backward pass. None of this changes a number but for rounding. Leaves out
losses (losses.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from searchr1_lite.memory import LOGITS
from searchr1_lite.rollouts.trajectory import Trajectory


@dataclass(slots=True)
class Batch:
    """Trajectories of an update. Tensors are (rollouts, tokens), prompt and completion, padded on the right with 0.

    What is said of a token stands at the token's own place. `mask` is 1 where it is learned from, `own` where the
    policy wrote it, `valued` where it has a value (PPO: `mask`). Fields from `advantages` on are filled in later.
    """

    ids: Tensor
    lengths: Tensor  # (rollouts,)
    prompts: Tensor  # (rollouts,) tokens of the prompt
    mask: Tensor
    own: Tensor
    valued: Tensor
    sampled_logprobs: Tensor  # at sampling; 0 where the policy did not write
    rewards: Tensor  # (rollouts,)
    advantages: Tensor | None = None  # (rollouts,) or (rollouts, tokens)
    old_logprobs: Tensor | None = None  # before the first update; None where that is the only one
    reference_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None

    def rows(self, rows: Sequence[int]) -> "Batch":
        """These rows, without the columns that none of them needs."""
        index = torch.as_tensor(rows, device=self.ids.device)
        width = int(self.lengths[index].max())
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        picked = {name: None if x is None else x[index] for name, x in parts.items()}
        return Batch(**{name: x if x is None or x.dim() == 1 else x[:, :width] for name, x in picked.items()})


def collate(trajectories: Sequence[Trajectory], rewards: Sequence[float], masked: bool, device: Any = "cpu") -> Batch:
    """A batch of trajectories. Unmasked, retrieved and inserted tokens are learned from, too.

    Nothing is learned from a trajectory whose search failed.
    """
    count, width = len(trajectories), max(len(t.prompt_ids) + len(t.completion_ids) for t in trajectories)
    ids = torch.zeros(count, width, dtype=torch.long)
    own, mask, logprobs = torch.zeros(3, count, width)
    for row, t in enumerate(trajectories):
        start, end = len(t.prompt_ids), len(t.prompt_ids) + len(t.completion_ids)
        ids[row, :end] = torch.tensor(t.prompt_ids + t.completion_ids)
        own[row, start:end] = torch.tensor(t.loss_mask)
        logprobs[row, start:end] = torch.tensor(t.logprobs)
        mask[row, start:end] = 0.0 if t.search_failed else own[row, start:end] if masked else 1.0
    prompts = torch.tensor([len(t.prompt_ids) for t in trajectories])
    lengths = prompts + torch.tensor([len(t.completion_ids) for t in trajectories])
    tensors = ids, lengths, prompts, mask, own, mask, logprobs, torch.tensor(rewards, dtype=torch.float32)
    return Batch(*(tensor.to(device) for tensor in tensors))


def split_rows(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in parts, longest first, each of `tokens` at most, padding included; a longer row is a part alone."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


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


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token that came next. (..., vocabulary), (...) -> (...)

    `logits[..., t, :]` must be the prediction *of* `ids[..., t]`, that is, shifted by one already.
    """
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def token_entropies(logits: Tensor) -> Tensor:
    """Entropy of each prediction in nats. (..., vocabulary) -> (...)"""
    logprobs = torch.log_softmax(logits, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def score(
    model: Any, batch: Batch, temperature: float = 1.0, value_head: ValueHead | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities, entropies and values of the tokens where `mask` or `valued` is 1; elsewhere 0.

    Log-probabilities are at the sampling temperature; a value is what was expected before its token.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows, places = (batch.mask + batch.valued).nonzero(as_tuple=True)
    # What is padded stands on the right, where no token looks: no attention mask is needed, and a causal one is faster.
    hidden = base.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state[rows, places - 1]
    ids, size = batch.ids[rows, places], max(1, LOGITS // base.get_output_embeddings().weight.shape[0])
    scored = [
        checkpoint(_read_head, base, part, wanted, temperature, use_reentrant=False)
        for part, wanted in zip(hidden.split(size), ids.split(size), strict=True)
    ]
    found = [torch.cat(x) for x in zip(*scored, strict=True)] + ([value_head(hidden)] if value_head else [])
    found = [x.new_zeros(batch.ids.shape).index_put((rows, places), x) for x in found]
    return found[0], found[1], found[2] if value_head else None


def _read_head(model: Any, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(tokens, hidden), (tokens,) -> log-probabilities and entropies (tokens,), as the model's own forward has them."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / cap) * cap
    logits = logits / temperature
    return token_logprobs(logits, ids), token_entropies(logits)
