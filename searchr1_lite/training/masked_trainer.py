"""TRL's GRPOTrainer with a loss that is the same however memory is split, and other algorithms' advantages in it.

An update's rows are read in parts of `micro_batch_tokens`, without needless padding, and what all prompts begin
with is read once. REINFORCE, the bug lab's defects of grouping and LLDS (algorithms.py) come in here; PPO, which needs
a value head, is in ppo.py. Leaves out: what a rollout is (trainer.py).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from trl import GRPOTrainer

from searchr1_lite.config import REINFORCED, Profile
from searchr1_lite.training import defects
from searchr1_lite.training.algorithms import likelihood_loss
from searchr1_lite.training.demonstrations import cross_entropy

LEAST_SHARED = 16  # tokens: what fewer of them take is less than a second call of the model
TOKEN_MEANS = (
    "policy_loss",
    "value_loss",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
)


class MemoryFullError(RuntimeError):
    """The device's memory is full; the message names the settings to lower."""


@contextmanager
def memory_for(what: str, profile: Profile, *settings: str) -> Iterator[None]:
    """Turn running out of memory into a MemoryFullError that names the settings to lower and their values."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lower = " or ".join(f"{name} (it is {getattr(profile, name)})" for name in settings)
        off = what == "training" and not profile.gradient_checkpointing
        also = "; gradient_checkpointing is off, true needs far less" if off else ""
        reason = str(error).partition("\n")[0]
        raise MemoryFullError(f"the memory is full in the {what}: lower {lower}{also} ({reason})") from error


class MaskedGRPOTrainer(GRPOTrainer):
    """TRL's trainer with memory bounded in tokens, without padding that nobody needs and without model cards."""

    settings: Profile  # given by build_trainer
    scored: list[tuple[torch.Tensor | None, ...]]  # what `_score` gave, of each of the latest forwards
    rewards: torch.Tensor  # of the latest rollouts of all processes, (rollouts, 1)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One optimizer update's gradient, part by part; returns its loss, a scalar whose mean over processes counts.

        TRL's loss of a part is the mean over the part's tokens. Weighted by its share of the tokens of all parts of
        all processes, the sum is the mean over all tokens: how memory is split changes nothing.
        """
        start = time.perf_counter()
        model.train()
        with memory_for("training", self.settings, "micro_batch_tokens"):
            inputs = self._prepare_inputs(inputs)  # every `updates_per_rollout` steps this rolls out
            parts = _parts(inputs["prompt_mask"], inputs["completion_mask"], self.settings.micro_batch_tokens)
            learned = (inputs["completion_mask"] * inputs["tool_mask"]).sum(dim=1)
            tokens = torch.stack([learned[rows].sum() for rows in parts]).float()
            total = self.accelerator.reduce(tokens.sum(), reduction="sum").clamp(min=1)
            update = torch.zeros((), device=tokens.device)
            for rows, weight in zip(parts, tokens / total, strict=True):
                part = {key: x[rows] if torch.is_tensor(x) and x.dim() else x for key, x in inputs.items()}
                # Gradients travel between processes once, with the last part, and are averaged.
                with nullcontext() if rows is parts[-1] else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager(), self._alone():
                        loss = self.compute_loss(model, part) * weight * self.accelerator.num_processes
                    self.accelerator.backward(loss)
                update += loss.detach()
        self._merge_metrics(tokens, total)
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - start)
        return update

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """TRL gathers metrics of all processes with each loss, but their parts differ in number and in size."""
        self.accelerator.gather = self.accelerator.reduce = lambda tensor, **_: tensor
        try:
            yield
        finally:
            del self.accelerator.gather, self.accelerator.reduce  # the instance's; the methods are there again

    def _merge_metrics(self, tokens: torch.Tensor, total: torch.Tensor) -> None:
        """From one mean a part of this process to one over all tokens of the update. `tokens` (parts,), `total` ()."""
        noted = self._metrics["train"]
        for name in ("clip_ratio/low_min", "clip_ratio/high_max"):  # no means; of no use
            noted.pop(name, None)
        if ratios := noted.get("ratio_max"):
            ratios[-len(tokens) :] = [max(ratios[-len(tokens) :])]
        for name in TOKEN_MEANS:
            if values := noted.get(name):
                own = tokens @ torch.tensor(values[-len(tokens) :], device=tokens.device)
                values[-len(tokens) :] = [(self.accelerator.reduce(own, reduction="sum") / total).item()]

    def _compute_loss(self, model, inputs) -> torch.Tensor:
        if self.settings.algorithm not in REINFORCED:
            return cross_entropy(self, model, inputs)
        self.scored = []
        loss = super()._compute_loss(model, inputs)
        logprobs = self.scored[-1][0]
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        old = logprobs.detach() if inputs.get("old_per_token_logps") is None else inputs["old_per_token_logps"]
        if "ratio_over_retrieved" in self.settings.defects:
            whole = inputs["completion_mask"]
            loss = loss + defects.leak(logprobs, old, inputs["advantages"], mask, whole, self.settings.epsilon)
        with torch.no_grad():
            self._metrics["train"]["ratio_max"].append((((logprobs - old) * mask).exp() * mask).max().item())
        if self.settings.llds_coef:
            loss = loss + self.settings.llds_coef * likelihood_loss(logprobs, old, inputs["advantages"], mask)
        return loss

    def _calculate_rewards(self, *arguments) -> torch.Tensor:
        self.rewards = super()._calculate_rewards(*arguments)
        return self.rewards

    def _generate_and_score_completions(self, inputs) -> dict[str, Any]:
        """TRL's batch of rollouts; its advantages replaced where the algorithm is not GRPO."""
        self.scored = []
        batch, settings = super()._generate_and_score_completions(inputs), self.settings
        own = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        rewards = self.rewards[:, 0]  # of all processes
        if {"groups_of_one", "colliding_ids"} & set(settings.defects):
            batch["advantages"] = defects.regrouped_advantages(rewards, settings)[own]
        elif settings.algorithm == "reinforce":
            batch["advantages"] = rewards[own]
        elif settings.algorithm == "reinforce_baseline":
            batch["advantages"] = (rewards - rewards.mean())[own]
        return batch

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **options
    ):
        """TRL pads every row to the longest of the step; here only what is in use is computed.

        Rows are independent of each other, so those of like length go together, no more than `micro_batch_tokens`
        allows, without the columns that none of them needs. Left-out places come back as zeros, which the masks take
        out.
        """
        masks = attention_mask[:, :-logits_to_keep], attention_mask[:, -logits_to_keep:]
        parts = _parts(*masks, self.settings.micro_batch_tokens)
        scored = []
        for rows in parts:
            used = attention_mask[rows].any(dim=0).nonzero()
            first, last = int(used[0]), int(used[-1]) + 1
            unused = input_ids.size(1) - last
            columns = slice(first, last)
            found = self._score(
                model, input_ids[rows, columns], attention_mask[rows, columns], logits_to_keep - unused, options
            )
            scored.append([None if x is None else torch.nn.functional.pad(x, (0, unused)) for x in found])
        back = torch.cat(parts).argsort()
        self.scored.append(tuple(None if x[0] is None else torch.cat(x)[back] for x in zip(*scored, strict=True)))
        return *self.scored[-1][:2], None

    def _score(
        self, model, ids: torch.Tensor, mask: torch.Tensor, keep: int, options: dict[str, Any]
    ) -> tuple[torch.Tensor | None, ...]:
        """TRL's log-probabilities and entropies of the last `keep` columns; what all prompts begin with is read once.

        `ids` and `mask` are (rows, columns), padded on both sides. Exact but for rounding, with the same gradient. Not
        with gradient checkpointing, which cannot keep keys and values, nor in several processes.
        """
        alone = self.accelerator.num_processes == 1 and not self.settings.gradient_checkpointing
        shared = shared_prefix(ids, mask, keep) if alone else 0
        if shared < LEAST_SHARED:
            return super()._get_per_token_logps_and_entropies(model, ids, mask, keep, **options)[:2]
        begin = mask.argmax(dim=1, keepdim=True)
        columns = torch.arange(ids.size(1) - shared, device=ids.device).expand(len(ids), -1)
        columns = columns + shared * (columns >= begin)  # of the rest, after the left padding
        rest, rest_mask = ids.gather(1, columns), mask.gather(1, columns)
        labels = rest.masked_fill(rest_mask == 0, -100)
        labels[:, :-keep] = -100
        with self.accelerator.autocast():
            start = int(begin[0])
            read = model(input_ids=ids[:1, start : start + shared], use_cache=True, logits_to_keep=1)
            read.past_key_values.batch_repeat_interleave(len(ids))
            out = model(
                input_ids=rest,
                attention_mask=torch.cat([torch.ones_like(ids[:, :shared]), rest_mask], dim=1),
                position_ids=shared + (rest_mask.cumsum(dim=1) - 1).clamp(min=0),
                past_key_values=read.past_key_values,
                labels=labels,
                fused_lm_head=True,
            )
        return out.log_probs[:, -keep:], out.entropy[:, -keep:] if options.get("compute_entropy") else None

    def create_model_card(self, *arguments, **options) -> None:
        """Checkpoints here are for going on, not for publishing."""


def split_rows(prompts: list[int], completions: list[int], tokens: int) -> list[list[int]]:
    """Rows in parts, longest first, each of `tokens` at most, padding included; a longer row is a part alone.

    `prompts` and `completions` are lengths. A part is as wide as its longest prompt, padded on the left, and its
    longest completion, padded on the right, together.
    """
    parts: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: -prompts[row] - completions[row]):
        rows = [*parts[-1], row] if parts else []
        width = max((prompts[r] for r in rows), default=0) + max((completions[r] for r in rows), default=0)
        if rows and len(rows) * width <= tokens:
            parts[-1] = rows
        else:
            parts.append([row])
    return parts


def shared_prefix(ids: torch.Tensor, mask: torch.Tensor, keep: int) -> int:
    """How many tokens all rows begin with, after their left padding, before the last token of the shortest prompt.

    `ids` and `mask` are (rows, columns), prompts in all columns but the last `keep`.
    """
    begin = mask.argmax(dim=1, keepdim=True)
    shortest = ids.size(1) - keep - int(begin.max()) - 1  # a prompt's last token predicts its completion's first
    if len(ids) < 2 or shortest < 1:
        return 0
    heads = ids.gather(1, begin + torch.arange(shortest, device=ids.device))
    return int((heads == heads[:1]).all(dim=0).cumprod(dim=0).sum())


def _parts(prompt_mask: torch.Tensor, completion_mask: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """`split_rows` for masks (rows, columns)."""
    lengths = (mask.sum(dim=1).tolist() for mask in (prompt_mask, completion_mask))
    return [torch.tensor(rows, device=prompt_mask.device) for rows in split_rows(*lengths, tokens)]
