"""PPO in the same trainer: a value head beside the policy, its own advantages, and its KL in the reward.

The arithmetic is in algorithms.py; here is where its inputs come from and where the head is kept. TRL has no such
trainer. Leaves out: several processes, in which the head's gradients would have to be averaged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from searchr1_lite.training.algorithms import (
    VALUE_STEP,
    ValueHead,
    generalised_advantages,
    token_rewards,
    value_loss,
    whitened,
)
from searchr1_lite.training.masked_trainer import MaskedGRPOTrainer
from searchr1_lite.training.objective import k3_kl, masked_mean

VALUE_HEAD = "value_head.pt"  # beside the trainer's own files in a checkpoint


class PPOTrainer(MaskedGRPOTrainer):
    """`scored` has a third entry here: the value before each token, from the same forward as the log-probabilities.

    With the defect "unmasked_values" values, advantages and whitening are over all tokens, as in the original.
    """

    hidden: torch.Tensor  # the last hidden states of the latest forward, (rows, columns, hidden)

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        size = self.model.config.get_text_config().hidden_size
        self.value_head = ValueHead(size).to(self.accelerator.device)

    def create_optimizer(self, *arguments):
        optimizer = super().create_optimizer(*arguments)
        if len(optimizer.param_groups) < 3:  # TRL's: with weight decay and without
            rate = VALUE_STEP / self.value_head.linear.in_features
            optimizer.add_param_group({"params": list(self.value_head.parameters()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def training_step(self, *arguments) -> torch.Tensor:
        self.value_head.zero_grad()  # the Trainer clears the gradients of its model, and this is no part of it
        return super().training_step(*arguments)

    def _generate_and_score_completions(self, inputs) -> dict[str, Any]:
        """The batch of rollouts with GAE's advantages, by token, and what values are to be fitted to."""
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"] * batch["tool_mask"]
        if batch.get("old_per_token_logps") is None:  # TRL needs them from two updates on only
            whole = [torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask")]
            self.scored = []
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(self.model, *whole, mask.size(1))
        old, _, values = self.scored[0]  # the policy's come before the reference's
        reference = batch["ref_per_token_logps"] if self.beta else old
        valued = self._valued(batch)
        earned = token_rewards(self.rewards[:, 0], mask, old, reference, self.beta)
        gamma, gae_lambda = self.settings.gamma, self.settings.gae_lambda
        advantages, returns = generalised_advantages(earned, values, valued, gamma, gae_lambda)
        return batch | {"advantages": whitened(advantages, valued), "returns": returns, "old_values": values}

    def _compute_loss(self, model, inputs) -> torch.Tensor:
        beta, self.beta = self.beta, 0.0  # the KL is in the reward
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        logprobs, _, values = self.scored[-1]
        error = value_loss(values, inputs["old_values"], inputs["returns"], self._valued(inputs))
        self._metrics["train"]["value_loss"].append(error.item())
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        kl = masked_mean(k3_kl(logprobs.detach(), inputs["ref_per_token_logps"]), mask).item() if beta else 0.0
        self._metrics["train"]["kl"].append(kl)
        return loss + error

    def _valued(self, batch: dict[str, Any]) -> torch.Tensor:
        """1 where a token has a value, (rollouts, tokens)."""
        mask = batch["completion_mask"]
        return mask if "unmasked_values" in self.settings.defects else mask * batch["tool_mask"]

    def _score(self, model, ids, mask, keep, options) -> tuple[torch.Tensor | None, ...]:
        with self._watched(model):
            logps, entropies = super()._score(model, ids, mask, keep, options)
        return logps, entropies, self.value_head(self.hidden[:, -keep - 1 : -1])

    @contextmanager
    def _watched(self, model) -> Iterator[None]:
        """While this lasts, `hidden` is what the body of a model, the policy or its reference, gives to the head."""
        model = self.accelerator.unwrap_model(model)
        body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
        handle = body.register_forward_hook(lambda *call: setattr(self, "hidden", call[-1][0]))
        try:
            yield
        finally:
            handle.remove()

    def _save_checkpoint(self, *arguments) -> None:
        super()._save_checkpoint(*arguments)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        torch.save(self.value_head.state_dict(), folder / VALUE_HEAD)

    def _load_from_checkpoint(self, checkpoint: str, *arguments) -> None:
        super()._load_from_checkpoint(checkpoint, *arguments)
        self.value_head.load_state_dict(torch.load(Path(checkpoint) / VALUE_HEAD, weights_only=True))
