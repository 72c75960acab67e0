"""The weights of tokens that another program sampled, against a loss and gradient written out by hand."""

import itertools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from searchr1_lite.training.correction import CAP, correct_for_sampler

TEMPERATURE, GROUP = 0.7, 4
PROMPT = [50, 60, 70, 80]
REWARDS = [1.0, 0.0, 0.0, 1.0]
ROWS = [  # ids, and which of them the policy wrote
    ([101, 102, 103, 104, 105, 106], [1, 1, 0, 0, 1, 1]),
    ([111, 112, 113, 114], [1, 1, 1, 1]),
    ([121, 122, 123, 124, 125], [1, 0, 0, 0, 1]),
    ([131, 132], [1, 1]),
]
SHIFTS = [  # sampling log-probability minus the learner's, for the tokens that the policy wrote
    [0.0, 0.4, -0.3, 0.0],
    [-5.0, 0.0, 3.0, -1.0],  # ratios e^5, over the cap, 1, e^-3 and e
    [0.2, -0.2],
    [0.0, 0.0],
]


def learner_logprobs(model, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def sampled(model, shifts: list[list[float]], elsewhere: float | None) -> list[list[float | None]]:
    """Log-probabilities as a sampler would report them: shifted where the policy wrote, else `elsewhere`."""
    rows = []
    for (ids, mask), shift in zip(ROWS, shifts, strict=True):
        with torch.no_grad():
            own, shift = learner_logprobs(model, ids).tolist(), iter(shift)
        rows.append([p + next(shift) if written else elsewhere for p, written in zip(own, mask, strict=True)])
    return rows


def update(policy, tmp_path, shifts, correct: bool, masks=None, elsewhere=0.0):
    """TRL's trainer, its loss and the adapter's gradient for ROWS; the adapter has moved away from the base."""
    masks = masks or [mask for _, mask in ROWS]

    def rollout_func(prompts, trainer):
        logprobs = sampled(trainer.model, shifts, elsewhere)
        ids = [ids for ids, _ in ROWS]
        columns = {"prompt_ids": [PROMPT] * len(ids), "completion_ids": ids, "logprobs": logprobs, "env_mask": masks}
        return columns | {"reward": REWARDS}

    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            **{"per_device_train_batch_size": GROUP, "num_generations": GROUP, "max_steps": 1, "report_to": "none"},
            **{"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "gradient_checkpointing": False},
            **{"loss_type": "bnpo", "temperature": TEMPERATURE, "beta": 0.0, "epsilon": 0.2},
        ),
        reward_funcs=lambda prompts, completions, reward, **_: reward,
        rollout_func=rollout_func,
        train_dataset=Dataset.from_dict({"prompt": ["q"]}),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    if correct:
        correct_for_sampler(trainer)
    generator = torch.Generator().manual_seed(0)
    adapter = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in adapter:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs)
    return trainer, adapter, loss, torch.cat([part.flatten() for part in torch.autograd.grad(loss, adapter)])


def by_hand(trainer, adapter, ratios: list[list[float]], masks):
    """Mean over tokens of -advantage x ratio x p / p_before, where p_before is p without its gradient."""
    rewards = torch.tensor(REWARDS)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    total = torch.zeros(())
    for (ids, _), mask, ratio, advantage in zip(ROWS, masks, ratios, advantages, strict=True):
        logprobs = learner_logprobs(trainer.model, ids)
        one = (logprobs - logprobs.detach()).exp()
        total = total - (torch.tensor(mask) * torch.tensor(ratio) * advantage * one).sum()
    loss = total / sum(map(sum, masks))
    return loss, torch.cat([part.flatten() for part in torch.autograd.grad(loss, adapter)])


def ratios_of(shifts) -> list[list[float]]:
    """min(learner / sampler, CAP) for what the policy wrote, 1 elsewhere."""
    rows = []
    for (_, mask), shift in zip(ROWS, shifts, strict=True):
        shift = iter(shift)
        rows.append([min(float(torch.tensor(-next(shift)).exp()), CAP) if written else 1.0 for written in mask])
    return rows


def same(one, other) -> bool:
    return torch.allclose(one[0], other[0], atol=1e-6) and torch.allclose(one[1], other[1], atol=1e-6, rtol=1e-4)


def test_each_token_is_weighted_by_its_own_ratio_up_to_the_cap(policy, tmp_path):
    masks = [mask for _, mask in ROWS]
    trainer, adapter, *got = update(policy, tmp_path, SHIFTS, correct=True)
    ratios = ratios_of(SHIFTS)
    assert ratios[1] == pytest.approx([CAP, 1.0, 0.049787, 2.718282], abs=1e-5)
    assert same(got, by_hand(trainer, adapter, ratios, masks))
    assert not same(got, by_hand(trainer, adapter, [[1.0] * len(mask) for mask in masks], masks))
    # the sum over the second row is -3, its one weight would be e^3: TRL's default would drop the row
    written = list(itertools.chain(*SHIFTS))
    noted = trainer._metrics["train"]["sampling/sampling_logp_difference/mean"]
    assert noted == pytest.approx([sum(map(abs, written)) / len(written)], abs=1e-5)


def test_what_the_learner_would_have_sampled_alike_is_not_changed(policy, tmp_path):
    nothing = [[0.0] * len(shift) for shift in SHIFTS]
    trainer, _, loss, gradient = update(policy, tmp_path, nothing, correct=True)
    trainer.model.unload()
    *_, plain_loss, plain_gradient = update(policy, tmp_path, SHIFTS, correct=False)
    assert gradient.abs().max() > 1e-3
    assert same((loss, gradient), (plain_loss, plain_gradient))


def test_tokens_that_nobody_sampled_keep_their_weight(policy, tmp_path):
    """Where retrieved tokens are learned from too, None for their log-probability means a ratio of 1; 0 does not."""
    ones = [[1] * len(ids) for ids, _ in ROWS]
    trainer, adapter, *got = update(policy, tmp_path, SHIFTS, correct=True, masks=ones, elsewhere=None)
    assert same(got, by_hand(trainer, adapter, ratios_of(SHIFTS), ones))
    trainer.model.unload()
    _, _, *wrong = update(policy, tmp_path, SHIFTS, correct=True, masks=ones, elsewhere=0.0)
    assert not same(wrong, got)
