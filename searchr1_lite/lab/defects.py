"""Known faults of Search-R1 and of its relatives, made on purpose: what they do can be looked at, and trained with.

`BrokenProfile.defects` names those that are on, and while `broken` lasts wrong functions stand in the right ones'
place; the training itself knows nothing of them. Shown one by one in notebook 10. Left out: faults of the original
that cannot be made with this code, as a retriever that crashes.

    train_broken(load_broken("tiny", group_size=5, defects=["kl_sign"]), "runs/mine")
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoTokenizer

from searchr1_lite.config import resolve_path
from searchr1_lite.lab.profile import BrokenProfile
from searchr1_lite.rollouts import engine
from searchr1_lite.rollouts.decoding import LocalSampler, Stops, decode
from searchr1_lite.rollouts.policy import Policy, model_to_train
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.training import loop, losses
from searchr1_lite.training.losses import group_advantages
from searchr1_lite.training.score import Batch, collate

TOP_P = 0.95  # verl's default (ppo_trainer.yaml), which Search-R1's GRPO scripts leave on


def train_broken(profile: BrokenProfile, run_folder: str | os.PathLike, **options: Any) -> Path:
    """`loop.train` with the profile's defects, which config.yaml names: the folder is no healthy run's."""
    with broken(profile, getattr(options.get("policy"), "tokenizer", None)):
        return loop.train(profile, run_folder, **options)


@contextmanager
def broken(profile: BrokenProfile, tokenizer: Any = None) -> Iterator[None]:
    """While this lasts, the functions that the profile's defects are about are the wrong ones.

    Defects of ids and masks need the model's tokenizer; where none is given, the profile's is loaded.
    """
    samplers = tuple(SAMPLERS[name] for name in SAMPLERS if name in profile.defects)
    changes = [(loop, "collate", partial(wrong_batch, profile, tokenizer))]
    changes += [WRONG[name] for name in profile.defects if name in WRONG]
    changes += [(engine, "LocalSampler", type("FaultySampler", samplers, {}))] if samplers else []
    with ExitStack() as stack:
        for module, name, wrong in changes:
            stack.enter_context(patch.object(module, name, wrong))
        if {"kl_sign", "ratio_over_retrieved"} & set(profile.defects):
            advantages, _ = losses.ALGORITHMS[profile.algorithm]
            stack.enter_context(patch.dict(losses.ALGORITHMS, {profile.algorithm: (advantages, wrong_losses)}))
        yield


# The batch


def wrong_batch(profile: BrokenProfile, tokenizer: Any, trajectories: Sequence[Trajectory], *rest: Any) -> Batch:
    """`collate` of the trajectories as the loss gets to see them; `rest` is what it takes besides.

    unmasked_values: retrieved tokens have values, and advantages and their whitening run over them (verl
    core_algos.py and dp_critic.py). ratio_over_retrieved has them scored as well, see `wrong_losses`.
    """
    if {"retokenised_text", "mask_by_text"} & set(profile.defects):
        tokenizer = tokenizer or _tokenizer(profile.model)
    if "retokenised_text" in profile.defects:
        trajectories = [retokenised(one, tokenizer) for one in trajectories]
    if "mask_by_text" in profile.defects:
        trajectories = [replace(one, loss_mask=mask_by_text(one.completion_ids, tokenizer)) for one in trajectories]
    batch = collate(trajectories, *rest)
    if {"unmasked_values", "ratio_over_retrieved"} & set(profile.defects):
        batch.valued = collate(trajectories, rest[0], False, *rest[2:]).mask
    return batch


@cache
def _tokenizer(model: str) -> Any:
    folder = resolve_path(model)
    return AutoTokenizer.from_pretrained(folder if folder.is_dir() else model)


def retokenised(trajectory: Trajectory, tokenizer: Any) -> Trajectory:
    """Each turn as text, cut behind its tag and encoded again: other ids than were sampled, and no end token.

    Search-R1 search_r1/llm_agent/generation.py, _postprocess_responses. There the next turn reads the new ids as well;
    here they are only learned from. Log-probabilities of a turn whose ids changed are not known: nan.
    """
    ids, mask, logprobs = [], [], []
    for start, stop in stretches(trajectory.loss_mask):
        sampled = list(trajectory.completion_ids[start:stop])
        known, own = trajectory.logprobs[start:stop], trajectory.loss_mask[start]
        new = tokenizer.encode(cut_at_tag(decode(tokenizer, sampled)), add_special_tokens=False) if own else sampled
        ids += new
        mask += [own] * len(new)
        logprobs += known if new == sampled else [nan] * len(new)
    return replace(trajectory, completion_ids=tuple(ids), loss_mask=tuple(mask), logprobs=tuple(logprobs))


def stretches(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Where each run of equal values begins and ends: (start, stop) of turns and observations in turn."""
    edges = {0, len(mask), *(n for n in range(1, len(mask)) if mask[n] != mask[n - 1])}
    return list(pairwise(sorted(edges)))


def cut_at_tag(text: str) -> str:
    """Up to the first </search>, or where there is none the first </answer>: in this order, as in the original."""
    for tag in ("</search>", "</answer>"):
        if tag in text:
            return text.partition(tag)[0] + tag
    return text


def mask_by_text(ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """A loss mask found in the decoded text: 0 for <information>...</information>, counted in newly made tokens.

    Search-R1 verl/trainer/ppo/ray_trainer.py, _create_loss_mask, before commit 32719b5. The n-th opening tag is paired
    with the n-th closing tag, whoever wrote them; line breaks around a block, and what is said of an invalid action,
    count as the model's.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    begins = [match.start() for match in re.finditer("<information>", text)]
    ends = [match.end() for match in re.finditer("</information>", text)]
    mask = [1] * len(ids)
    for begin, end in zip(begins, ends, strict=False):
        parts = text[:begin], text[begin:end]
        before, within = (len(tokenizer.encode(part, add_special_tokens=False, verbose=False)) for part in parts)
        stop = min(before + within, len(ids))
        mask[before:stop] = [0] * max(0, stop - before)
    return tuple(mask)


# Advantages, losses, weights


def groups_of_one(rewards: Tensor, group_size: int) -> Tensor:
    """Every sample is its own group, mean 0 and deviation 1: its reward is its advantage. (rollouts,) -> (rollouts,)

    Search-R1 before commit 9ec2fa9.
    """
    return rewards


def colliding_ids(rewards: Tensor, group_size: int) -> Tensor:
    """Two questions next to each other share an id and with it a group. (rollouts,) -> (rollouts,)

    An id is the row's number in its source (Search-R1 verl/trainer/ppo/ray_trainer.py, `index`), so rows of two
    sources meet; here it befalls all of them.
    """
    return group_advantages(rewards, 2 * group_size)


def wrong_losses(logprobs: Tensor, entropies: Tensor, batch: Batch, profile: BrokenProfile) -> Tensor:
    """kl_sign: the KL is subtracted (Search-R1 before commit 4b3c094). ratio_over_retrieved: one ratio a rollout.

    That ratio is GSPO's (arXiv 2507.18071; TRL's `importance_sampling_level="sequence"`), but with retrieved tokens in
    its mean. The mask still takes the retrieved places out of the sum; yet every place that stays holds the ratio,
    and through it the gradient, of all of them.
    """
    if "kl_sign" in profile.defects:
        profile = profile.model_copy(update={"beta": -profile.beta})
    if "ratio_over_retrieved" in profile.defects:
        batch, profile = replace(batch, mask=batch.valued), profile.model_copy(update={"policy_loss": "gspo"})
    return losses.losses_from_rewards(logprobs, entropies, batch, profile)


def model_in_bfloat16(policy: Policy, profile: BrokenProfile) -> Any:
    """`model_to_train` with the adapter's weights in bfloat16, as TRL 1.16 casts them on a 4-bit base."""
    model = model_to_train(policy, profile)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16()
    return model


# Rollouts


def truncated_observation(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    """An observation cut with its closing tag (Search-R1 search_r1/llm_agent/generation.py, _process_next_obs)."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)[:max_tokens]


class SamplerPastTags(LocalSampler):
    """no_stop_at_tag: a turn is written to its end token or its limit, and what follows the tag is thrown away.

    So have Search-R1's scripts vLLM sample (no `stop`). The cut is made between the sampled tokens, so this costs time
    and changes nothing else (but for which random numbers a later turn gets); the original's cut is in the text, see
    `retokenised`.
    """

    def __init__(self, policy: Policy, *rest: Any, **options: Any) -> None:
        super().__init__(policy, *rest, **options)
        self.ends = Stops(policy)
        self.stops.worth_a_look = frozenset()
        self.thrown_away = 0  # tokens

    def _add(self, row: int, token: Any, logprob: Any) -> bool:
        ended = super()._add(row, token, logprob)
        ids, logprobs = self.written[row]
        if ended:  # back to the tag: what the row has read of the rest is overwritten by what it reads next
            end = next((n for n in range(1, len(ids)) if self.ends.ended(ids[:n])), len(ids))
            self.lengths[self.slots.index(row)] -= len(ids) - end
            self.thrown_away += len(ids) - end
            del ids[end:], logprobs[end:]
        return ended


class NucleusSampler(LocalSampler):
    """top_p_sampling: tokens come from the nucleus of TOP_P, log-probabilities are the full softmax's all the same.

    Search-R1's GRPO scripts, with verl/trainer/config/ppo_trainer.yaml.
    """

    def _sample(self, logits: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        logprobs = (logits / self.temperature).log_softmax(dim=-1)
        tokens, _ = super()._sample(logits.masked_fill(~in_nucleus(logprobs), -torch.inf), rows)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def in_nucleus(logprobs: Tensor, share: float = TOP_P) -> Tensor:
    """The likeliest tokens that together have this share of the probability, the one that reaches it included.

    Log-probabilities (rows, vocabulary) -> True or False, of the same shape.
    """
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    return torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, order, before < share)


SAMPLERS = {"no_stop_at_tag": SamplerPastTags, "top_p_sampling": NucleusSampler}
WRONG = {  # where the right function is, its name, and the wrong one
    "groups_of_one": (losses, "group_advantages", groups_of_one),
    "colliding_ids": (losses, "group_advantages", colliding_ids),
    "truncated_closing_tag": (engine, "encode_observation", truncated_observation),
    "bf16_lora": (loop, "model_to_train", model_in_bfloat16),
}
