"""The same run through TRL's stock GRPOTrainer, for those who want its ecosystem, over its public interface alone.

Set `trainer: trl`. Our rollouts go in through `rollout_func`, their loss mask as `env_mask`; rewards come with them.
Loss and gradient are those of loop.py (tests/test_trl_trainer.py). What differs: TRL does not limit the KL estimate of
a token; its entropy bonus is a mean over the tokens of a micro-batch, whatever `loss_mean` says; a mean over rollouts
counts those without a learned token; and where several updates are made from a batch of rollouts, CISPO's loss and
that of several micro-batches or processes is divided by the mean number of tokens in an update, not by its own. TRL
bounds micro-batches in rows and not in tokens, so that most of its work is padding, and averages `kl` and `entropy`
over micro-batches and over all learned tokens (null here where retrieved ones are learned from). Leaves out what TRL's
trainer cannot do, which `check_settings` refuses.
"""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback

from searchr1_lite.config import ConfigError, Profile
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.training.checkpoint import mark_checkpoint
from searchr1_lite.training.record import Recorder
from searchr1_lite.training.rewards import group_rewards

LOSS_TYPES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}  # by loss_mean
SAME = {"beta", "entropy_coef", "epsilon", "gradient_checkpointing", "learning_rate", "max_grad_norm", "seed"}
SAME |= {"temperature"}  # settings that TRL calls as we do
# What differs from TRL's defaults, so that the training is loop.py's; `question_order` has shuffled the questions.
FIXED = {"scale_rewards": "group", "use_bias_correction_kl": False, "shuffle_dataset": False, "optim": "adamw_torch"}
FIXED |= {"lr_scheduler_type": "constant_with_warmup", "save_strategy": "steps", "save_total_limit": 2}
FIXED |= {"report_to": [], "disable_tqdm": True, "ddp_find_unused_parameters": False}


def check_settings(profile: Profile) -> None:
    """Refuse what TRL's trainer cannot do, with the reason. Raises ConfigError."""
    wrong = {
        f"algorithm = {profile.algorithm}: TRL's GRPOTrainer has GRPO alone": profile.algorithm != "grpo",
        "sampler = vllm: TRL corrects for its own vLLM engines alone": profile.sampler == "vllm",
        "lora_r = 0: TRL would load the KL's reference from the hub": not profile.lora_r and profile.beta > 0,
        "stop_early": profile.stop_early,
        "drop_equal_groups": profile.drop_equal_groups,
        "llds_coef": profile.llds_coef > 0,
        "entropy_coef: TRL's bonus is a mean over tokens": profile.entropy_coef > 0 and profile.loss_mean != "token",
        "policy_loss = cispo: TRL's has no other mean": profile.policy_loss == "cispo" and profile.loss_mean != "token",
    }
    if found := [name for name, is_so in wrong.items() if is_so]:
        raise ConfigError(f"trainer = trl cannot do this: {'; '.join(found)}. Change it, or take trainer = loop")


def trl_config(profile: Profile, run_folder: Path, device: torch.device) -> Any:
    """The profile in TRL's words."""
    from trl import GRPOConfig

    updates = profile.updates_per_rollout
    rows = profile.rollouts_per_step // updates // PartialState().num_processes
    fits = max(1, profile.micro_batch_tokens // profile.max_context_tokens)
    micro_batch = next(size for size in range(min(fits, rows), 0, -1) if rows % size == 0)
    loss_type = "cispo" if profile.policy_loss == "cispo" else LOSS_TYPES[profile.loss_mean]
    if loss_type == "dapo" and rows == micro_batch and PartialState().num_processes == 1:
        loss_type = "bnpo"  # the mean over this update's tokens; "dapo" divides by the mean count of all updates
    return GRPOConfig(
        output_dir=str(run_folder / "checkpoints"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        steps_per_generation=rows // micro_batch * updates,
        num_generations=profile.group_size,
        max_steps=profile.steps * updates,
        max_completion_length=profile.max_context_tokens,
        loss_type=loss_type,
        importance_sampling_level="sequence" if profile.policy_loss == "gspo" else "token",
        epsilon_high=_epsilon_high(profile),
        warmup_steps=profile.warmup_steps * updates,
        bf16=device.type == "cuda" and profile.dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        save_steps=profile.save_every * updates,
        logging_steps=updates,
        **profile.model_dump(include=SAME),
        **FIXED,
    )


def _epsilon_high(profile: Profile) -> float | None:
    """TRL's is the largest weight itself for CISPO, and a distance from 1 elsewhere."""
    high = profile.epsilon if profile.epsilon_high is None else profile.epsilon_high
    return 1 + high if profile.policy_loss == "cispo" else profile.epsilon_high


def fit(model: Any, policy: Policy, rollouts: Callable, recorder: Recorder, checkpoint: Path | None, done: int) -> None:
    """All steps after `done`, as `loop.fit`."""
    trainer = make_trainer(model, policy, rollouts, recorder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def make_trainer(model: Any, policy: Policy, rollouts: Callable, recorder: Recorder) -> Any:
    """TRL's trainer of this model; `rollouts(step, model)` gives the trajectories of a step (loop.Rollouts)."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func
    from datasets import Dataset
    from trl import GRPOTrainer

    profile = rollouts.profile
    weights = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        recorder.started = time.perf_counter()
        step = trainer.state.global_step // profile.updates_per_rollout
        trajectories = rollouts(step, trainer.model)
        rewards = group_rewards(trajectories, profile, step / profile.steps)
        seconds = time.perf_counter() - recorder.started
        recorder.rollout(step + 1, trajectories, rewards, seconds, rollouts.cache_hits)
        return trl_columns(trajectories, profile.masked, policy.tokenizer.eos_token_id) | {"reward": rewards}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing's new name in transformers
        trainer = GRPOTrainer(
            model=model,
            processing_class=policy.tokenizer,
            args=trl_config(profile, recorder.run_folder, policy.device),
            reward_funcs=reward_of_rollout,
            rollout_func=rollout_func,
            train_dataset=Dataset.from_dict({"prompt": [question.id for question in rollouts.order]}),
            callbacks=[Callbacks(recorder)],
        )
    trainer.remove_callback(PrinterCallback)
    for name, parameter in trainer.model.named_parameters():
        if name in weights:  # TRL rounds them to bfloat16 on a 4-bit base, where small updates are lost
            parameter.data = weights[name]
    return trainer


def reward_of_rollout(prompts: list, completions: list, reward: list[float], **_: Any) -> list[float]:
    """TRL's reward function: the rewards were made where the trajectories are."""
    return reward


def trl_columns(trajectories: list[Trajectory], masked: bool, eos: int) -> dict[str, list[list] | None]:
    """Trajectories as TRL takes them: ids, and `env_mask`, 1 where a token is learned from (as `score.collate`).

    An answer gets an end token, so that TRL does not take it for cut off; its mask is 0.
    """
    columns: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "env_mask": []}
    for trajectory in trajectories:
        end = trajectory.finished or not trajectory.completion_ids
        mask = list(trajectory.loss_mask) if masked else [1] * len(trajectory.completion_ids)
        columns["prompt_ids"].append(list(trajectory.prompt_ids))
        columns["completion_ids"].append([*trajectory.completion_ids, *[eos] * end])
        columns["env_mask"].append([*([0] * len(mask) if trajectory.search_failed else mask), *[0] * end])
    return columns | {"logprobs": None}


class Callbacks(TrainerCallback):
    """Puts TRL's figures into the run folder, and marks its checkpoints."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_log(self, args, state, control, logs: dict[str, float], **_) -> None:
        if "grad_norm" in logs:  # without it: the summary after training
            own = self.recorder.profile.masked
            kl, entropy = (logs.get(name) if own else None for name in ("kl", "entropy"))
            figures = {"kl": kl, "entropy": entropy, "clip_ratio": logs.get("clip_ratio/region_mean")}
            figures |= {"loss": logs["loss"], "ratio_max": None, "value_loss": None}
            figures |= {name: logs[name] for name in ("grad_norm", "learning_rate")}
            self.recorder.update([figures], time.perf_counter() - self.recorder.started)

    def on_save(self, args, state, control, **_) -> None:
        PartialState().wait_for_everyone()  # every process has written its part
        if state.is_world_process_zero:
            profile, folder = self.recorder.profile, Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_checkpoint(self.recorder.run_folder, folder, state.global_step // profile.updates_per_rollout)
