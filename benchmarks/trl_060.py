"""0.6.0's training step, kept to be measured against (training_step.py): TRL's trainer subclassed, without padding.

The part that computes a gradient is 0.6.0's, line by line: an update's rows in parts of `micro_batch_tokens`, and what
all prompts begin with read once. Left out is what went on around it: other algorithms, several processes, metrics, and
TRL's settings that say the same as those of `trainer: trl`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import GRPOTrainer

from searchr1_lite.config import Profile
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.training.trl_trainer import reward_of_rollout, trl_config

LEAST_SHARED = 16  # tokens: what fewer of them take is less than a second call of the model


def make_trainer(policy: Policy, profile: Profile, folder: Path) -> "MaskedGRPOTrainer":
    config = replace(
        trl_config(profile, folder, policy.device),
        # A whole update is one micro-batch to TRL; `MaskedGRPOTrainer` splits it as memory allows.
        per_device_train_batch_size=profile.rollouts_per_step,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        generation_batch_size=None,
        loss_type="bnpo",  # token mean
    )
    trainer = MaskedGRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        args=config,
        reward_funcs=reward_of_rollout,
        rollout_func=lambda prompts, trainer: {},
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(profile.questions_per_step)]}),
        peft_config=LoraConfig(
            r=profile.lora_r,
            lora_alpha=profile.lora_alpha,
            lora_dropout=profile.lora_dropout,
            target_modules=profile.lora_target,
            task_type="CAUSAL_LM",
        ),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.settings = profile
    return trainer


class MaskedGRPOTrainer(GRPOTrainer):
    """TRL's trainer with memory bounded in tokens and without padding that nobody needs."""

    settings: Profile

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)  # the reference pass, too
        parts = _parts(inputs["prompt_mask"], inputs["completion_mask"], self.settings.micro_batch_tokens)
        learned = (inputs["completion_mask"] * inputs["tool_mask"]).sum(dim=1)
        tokens = torch.stack([learned[rows].sum() for rows in parts]).float()
        update = torch.zeros((), device=tokens.device)
        for rows, weight in zip(parts, tokens / tokens.sum().clamp(min=1), strict=True):
            part = {key: x[rows] if torch.is_tensor(x) and x.dim() else x for key, x in inputs.items()}
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, part) * weight
            self.accelerator.backward(loss)
            update += loss.detach()
        self._step += 1
        return update

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **options
    ):
        """Rows of like length together, without the columns that none of them needs; these come back as zeros."""
        masks = attention_mask[:, :-logits_to_keep], attention_mask[:, -logits_to_keep:]
        parts = _parts(*masks, self.settings.micro_batch_tokens)
        scored = []
        for rows in parts:
            used = attention_mask[rows].any(dim=0).nonzero()
            first, last = int(used[0]), int(used[-1]) + 1
            unused, columns = input_ids.size(1) - last, slice(first, last)
            keep = logits_to_keep - unused
            found = self._score(model, input_ids[rows, columns], attention_mask[rows, columns], keep, options)
            scored.append([None if x is None else torch.nn.functional.pad(x, (0, unused)) for x in found])
        back = torch.cat(parts).argsort()
        return *(None if x[0] is None else torch.cat(x)[back] for x in zip(*scored, strict=True)), None

    def _score(
        self, model: Any, ids: Tensor, mask: Tensor, keep: int, options: dict[str, Any]
    ) -> tuple[Tensor | None, ...]:
        """TRL's log-probabilities and entropies of the last `keep` columns; what all prompts begin with is read once.

        `ids` and `mask` are (rows, columns), padded on both sides.
        """
        shared = 0 if self.settings.gradient_checkpointing else shared_prefix(ids, mask, keep)
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


def split_rows(prompts: list[int], completions: list[int], tokens: int) -> list[list[int]]:
    """Rows in parts, longest first, each of `tokens` at most, padding included; a longer row is a part alone.

    A part is as wide as its longest prompt, padded on the left, and its longest completion, padded on the right.
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


def shared_prefix(ids: Tensor, mask: Tensor, keep: int) -> int:
    """How many tokens all rows begin with, after their left padding, before the last token of the shortest prompt."""
    begin = mask.argmax(dim=1, keepdim=True)
    shortest = ids.size(1) - keep - int(begin.max()) - 1  # a prompt's last token predicts its completion's first
    if len(ids) < 2 or shortest < 1:
        return 0
    heads = ids.gather(1, begin + torch.arange(shortest, device=ids.device))
    return int((heads == heads[:1]).all(dim=0).cumprod(dim=0).sum())


def _parts(prompt_mask: Tensor, completion_mask: Tensor, tokens: int) -> list[Tensor]:
    """`split_rows` for masks (rows, columns)."""
    lengths = (mask.sum(dim=1).tolist() for mask in (prompt_mask, completion_mask))
    return [torch.tensor(rows, device=prompt_mask.device) for rows in split_rows(*lengths, tokens)]
