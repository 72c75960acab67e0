"""Known faults of Search-R1 and of its relatives, each a switch: what they do can be looked at, and trained with.

`Profile.defects` names the ones that are on; by default none is. The others are one line each where they belong:
kl_sign (Search-R1 before commit 4b3c094) and bf16_lora (TRL casts so) in `trainer.build_trainer`,
unmasked_values in ppo.py (verl core_algos.py and dp_critic.py), truncated_closing_tag in
`protocol.encode_observation` (search_r1/llm_agent/generation.py, _process_next_obs), stale_updates and which of them
can go with which settings in config.py. Shown one by one in notebook 10. Left out: faults of the original that cannot
be made with this code, as a retriever that crashes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from math import nan
from typing import Any

import torch
from torch import Tensor

from searchr1_lite.config import Profile
from searchr1_lite.rollout.decoding import LocalWriter, Stops, decode
from searchr1_lite.rollout.policy import Policy
from searchr1_lite.rollout.trajectory import Trajectory
from searchr1_lite.training.objective import clipped_policy_loss, group_advantages, masked_mean

TOP_P = 0.95  # verl's default (ppo_trainer.yaml), which Search-R1's GRPO scripts leave on


def as_learned(trajectory: Trajectory, tokenizer: Any, profile: Profile) -> Trajectory:
    """The trajectory as the loss gets to see it: what was sampled, but for the defects that change ids or mask."""
    if "retokenised_text" in profile.defects:
        trajectory = retokenised(trajectory, tokenizer)
    if "mask_by_text" in profile.defects:
        trajectory = replace(trajectory, loss_mask=mask_by_text(trajectory.completion_ids, tokenizer))
    return trajectory


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


def stretches(mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each run of equal values begins and ends: (start, stop) of turns and observations in turn."""
    start = 0
    for _, run in groupby(mask):
        stop = start + len(list(run))
        yield start, stop
        start = stop


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
        before, within = (
            len(tokenizer.encode(part, add_special_tokens=False, verbose=False))
            for part in (text[:begin], text[begin:end])
        )
        stop = min(before + within, len(ids))
        mask[before:stop] = [0] * max(0, stop - before)
    return tuple(mask)


def regrouped_advantages(rewards: Tensor, profile: Profile) -> Tensor:
    """Advantages where the groups are wrong. (rollouts,) -> (rollouts,)

    groups_of_one: every sample is its own group, mean 0 and deviation 1, so its reward is its advantage (Search-R1
    before commit 9ec2fa9). colliding_ids: two questions next to each other share an id and with it a group (an id is
    the row's number in its source, so of two sources rows meet; here it befalls all of them).
    """
    return rewards if "groups_of_one" in profile.defects else group_advantages(rewards, 2 * profile.group_size)


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, counted: Tensor) -> Tensor:
    """One importance ratio a rollout: the geometric mean over the `counted` tokens. (rollouts, tokens) -> (rollouts, 1)

    GSPO's (arXiv 2507.18071), which is TRL's `importance_sampling_level="sequence"`.
    """
    return torch.exp(((logprobs - old_logprobs) * counted).sum(1) / counted.sum(1).clamp(min=1)).unsqueeze(1)


def leak(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, completion: Tensor, epsilon: float
) -> Tensor:
    """What the loss changes by where its ratio is the whole sequence's, retrieved tokens included. A scalar.

    The mask still takes the retrieved places out of the sum; but every place that stays holds the ratio, and through
    it the gradient, of all of them (`completion`, (rollouts, tokens), is 1 on each). Over the model's own tokens the
    ratio of a first update would have the very gradient of the usual loss.
    """
    ratio = sequence_ratio(logprobs, old_logprobs, completion).log().expand_as(logprobs)
    zero = torch.zeros_like(logprobs)
    usual = clipped_policy_loss(logprobs, old_logprobs, advantages, epsilon)
    return masked_mean(clipped_policy_loss(ratio, zero, advantages, epsilon) - usual, mask)


def in_nucleus(logprobs: Tensor, share: float = TOP_P) -> Tensor:
    """The likeliest tokens that together have this share of the probability, the one that reaches it included.

    Log-probabilities (rows, vocabulary) -> True or False, of the same shape.
    """
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    return torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, order, before < share)


def faulty_writer(policy: Policy, profile: Profile, rows: int) -> "FaultyWriter | None":
    """A writer of these rows with the profile's defects in writing; None where it has none of them."""
    if not {"no_stop_at_tag", "top_p_sampling"} & set(profile.defects):
        return None
    return FaultyWriter(policy, min(profile.rollout_rows, rows), profile)


class FaultyWriter(LocalWriter):
    """Samples as Search-R1's GRPO scripts have vLLM sample: from a top-p nucleus, and past the end of a turn.

    top_p_sampling: tokens come from the nucleus of TOP_P, log-probabilities are the full softmax's all the same.
    no_stop_at_tag: a turn is written to its end token or its limit, and what follows the tag is thrown away. The cut
    is made between the sampled tokens, so this costs time and changes nothing else (but for which random numbers a
    later turn gets); the original's cut is in the text, see `retokenised`.
    """

    def __init__(self, policy: Policy, capacity: int, profile: Profile) -> None:
        super().__init__(policy, capacity, profile.max_response_tokens, temperature=profile.temperature)
        self.defects, self.ends = profile.defects, Stops(policy)
        self.thrown_away = 0  # tokens
        if "no_stop_at_tag" in self.defects:
            self.stops.worth_a_look = frozenset()

    def _sample(self, logits: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        if "top_p_sampling" not in self.defects:
            return super()._sample(logits, rows)
        logprobs = (logits / self.temperature).log_softmax(dim=-1)
        tokens, _ = super()._sample(logits.masked_fill(~in_nucleus(logprobs), -torch.inf), rows)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def _add(self, row: int, token: Any, logprob: Any) -> bool:
        ended = super()._add(row, token, logprob)
        ids, logprobs = self.written[row]
        if ended:  # back to the tag: what the row has read of the rest is overwritten by what it reads next
            end = next((n for n in range(1, len(ids)) if self.ends.ended(ids[:n])), len(ids))
            self.lengths[self.slots.index(row)] -= len(ids) - end
            self.thrown_away += len(ids) - end
            del ids[end:], logprobs[end:]
        return ended
