"""Training, the whole of it: roll out, reward, advantage, loss, update, record, save; and going on after a cut.

What a step computes is in the files named by its lines: rollouts/engine.py, rewards.py, score.py, losses.py. A step is
one batch of rollouts and the `updates_per_rollout` optimizer updates made from it. Started by `accelerate launch`,
every process works on its share of the questions and gradients are added up: the result is that of one process (with
several updates from a batch, their rows are drawn within each process's share).
`trainer: trl` has TRL's trainer in the place of `fit` (trl_trainer.py). Leaves out: processes without a common disk,
and merging the adapter into the 4-bit base, which corrupts it.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import get_constant_schedule_with_warmup as constant_with_warmup

from searchr1_lite.config import PLUGIN, REINFORCED, Profile, save_config
from searchr1_lite.files import write_json
from searchr1_lite.memory import check_memory
from searchr1_lite.plugins import load_plugin
from searchr1_lite.preflight import check_processes, check_settings, memory_for
from searchr1_lite.retrieval.batching import cached
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.rollouts.dequantize import merged_adapter
from searchr1_lite.rollouts.policy import (
    Policy,
    autocast,
    choose_device,
    environment,
    load_policy,
    model_to_train,
    save_weights,
)
from searchr1_lite.runfolder import check_same_run, fingerprint, is_finished
from searchr1_lite.tasks.questions import held_out, load_questions, question_order
from searchr1_lite.training import losses, trl_trainer
from searchr1_lite.training.checkpoint import latest_checkpoint, load_checkpoint, rewind, save_checkpoint
from searchr1_lite.training.demonstrations import make_demonstrations
from searchr1_lite.training.early_stop import EarlyStop, restore_best
from searchr1_lite.training.held_out import HeldOut
from searchr1_lite.training.record import Figures, Recorder
from searchr1_lite.training.rewards import group_rewards
from searchr1_lite.training.score import Batch, ValueHead, collate, score, split_rows
from searchr1_lite.training.steps import Rollouts
from searchr1_lite.types import Question, Retriever

# An update may move a value by about this much: Adam moves each of the `hidden` weights, which read features of about
# size 1, by a learning rate of VALUE_STEP / hidden. (The original's critic has a rate for all weights of a model.)
VALUE_STEP = 0.1


def train(
    profile: Profile,
    run_folder: str | os.PathLike,
    *,
    questions: Sequence[Question] | None = None,
    retriever: Retriever | None = None,
    policy: Policy | None = None,
    eval_questions: Sequence[Question] | None = None,
    progress: Callable[[str], Any] = print,
) -> Path:
    """Train as the profile says and return the run folder; what is not given is loaded from what the profile names.

    A run that was cut off goes on from its last checkpoint, to the same result; a finished one is returned as it is.
    Raises RunFolderError where the folder holds a run with other settings, questions or model, ConfigError for
    settings that the model, the trainer or the number of processes cannot work with, and MemoryFullError.
    """
    run_folder = Path(run_folder)
    device = policy.device if policy else choose_device(profile.device)
    process = PartialState(cpu=device.type == "cpu")  # one of several where `accelerate launch` started this
    if not process.is_main_process:
        progress = str  # says nothing
    questions = list(questions or load_questions(profile.questions, profile.train_split))
    eval_questions = list(eval_questions or held_out(profile))
    inputs = fingerprint(profile, questions, eval_questions)
    check_same_run(run_folder, profile, inputs)
    if is_finished(run_folder):
        progress(f"{run_folder.name}: finished already, nothing to do")
        return run_folder
    check_processes(profile, len(eval_questions), process.num_processes)
    if PLUGIN.fullmatch(profile.reward):
        load_plugin(profile.reward)  # if it is not there, say so before the first rollout
    if profile.trainer == "trl":
        trl_trainer.check_settings(profile)
    if policy is None:
        check_settings(profile)
        check_memory(profile)
    order = question_order(questions, profile)
    checkpoint, done = latest_checkpoint(run_folder)
    process.wait_for_everyone()  # all have read the folder; from here on the main process alone writes to it
    if process.is_main_process:
        rewind(run_folder, checkpoint)
    retriever = retriever or load_retriever(profile)
    policy = policy or load_policy(profile)
    held_out_questions = HeldOut(eval_questions, retriever, profile, run_folder, progress)
    (run_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        if process.is_main_process:
            write_json(run_folder / "environment.json", environment(policy) | {"inputs": inputs})
            save_config(profile, run_folder / "config.yaml")
        held_out_questions.before(policy)
    else:
        progress(f"{run_folder.name}: going on after step {done}")
    with memory_for("rollout", profile, "rollout_rows", "max_context_tokens"):
        demonstrations = make_demonstrations(policy, questions, order, retriever, profile, run_folder, progress)
    rollouts = Rollouts(profile, policy, order, cached(retriever), demonstrations, run_folder)
    recorder = Recorder(profile, run_folder, progress, policy.tokenizer)
    model = model_to_train(policy, profile)
    try:
        train_steps = trl_trainer.fit if profile.trainer == "trl" else fit
        train_steps(model, policy, rollouts, recorder, checkpoint, done)
        restore_best(model, run_folder)  # where it was stopped early
        if process.is_main_process:
            save_weights(model, policy, profile, run_folder)
        held_out_questions.after(replace(policy, model=model.eval()))
    finally:
        if profile.lora_r:
            model.unload()  # gives the caller's model back without the adapter
    process.wait_for_everyone()
    return run_folder


def fit(model: Any, policy: Policy, rollouts: Rollouts, recorder: Recorder, checkpoint: Path | None, done: int) -> None:
    """All steps after `done`: the training loop."""
    profile, learner = rollouts.profile, Learner(model, policy, rollouts.profile)
    stopping = EarlyStop(profile, recorder.run_folder, recorder.progress) if profile.stop_early else None
    if checkpoint:
        learner.load_state(load_checkpoint(checkpoint, policy.device))
    if stopping:
        stopping.forget_after(done)
    for step in range(done, profile.steps):
        start = time.perf_counter()
        if stopping:
            stopping.keep(model)
        trajectories = rollouts(step, model)
        rewards = group_rewards(trajectories, profile, step / profile.steps)
        recorder.rollout(step + 1, trajectories, rewards, time.perf_counter() - start, rollouts.cache_hits)

        batch = collate(trajectories, rewards, profile.masked, policy.device)
        if profile.drop_equal_groups:
            losses.leave_out_equal_groups(batch, profile.group_size)
        with memory_for("training", profile, "micro_batch_tokens"):
            learner.look_back(batch)
            batch.advantages = learner.advantages(batch, profile)
            updates = [learner.update(batch.rows(rows)) for rows in shuffled(len(rewards), profile.updates_per_rollout)]
        recorder.update(updates, time.perf_counter() - start)

        alarm = stopping and stopping.look()
        if (step + 1) % profile.save_every == 0 and not alarm:  # a run that is killed now comes to its alarm again
            if PartialState().is_main_process:
                save_checkpoint(recorder.run_folder, step + 1, learner.state())
                if stopping:
                    stopping.drop_older()
            PartialState().wait_for_everyone()
        if alarm:
            break


def shuffled(rows: int, updates: int) -> list[list[int]]:
    """Row numbers in as many equal parts as there are updates, in random order if there are several."""
    order = torch.randperm(rows).tolist() if updates > 1 else list(range(rows))
    return [order[start : start + rows // updates] for start in range(0, rows, rows // updates)]


class Learner:
    """What training changes: the model's trainable weights, PPO's value head, the optimizer and its schedule."""

    def __init__(self, model: Any, policy: Policy, profile: Profile) -> None:
        self.model, self.profile, self.device = model, profile, policy.device
        self.reference = None if profile.lora_r else policy.model.eval()  # with an adapter: the model without it
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        groups = [{"params": list(self.weights.values()), "lr": profile.learning_rate}]
        self.advantages, self.token_losses = losses.ALGORITHMS[profile.algorithm]
        self.value_head = None
        if profile.algorithm == "ppo":
            self.value_head = ValueHead(model.config.get_text_config().hidden_size).to(policy.device)
            step = VALUE_STEP / self.value_head.linear.in_features
            groups.append({"params": list(self.value_head.parameters()), "lr": step})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.schedule = constant_with_warmup(self.optimizer, profile.warmup_steps * profile.updates_per_rollout)
        self.temperature = profile.temperature if profile.algorithm in REINFORCED else 1.0
        if profile.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def look_back(self, batch: Batch) -> None:
        """Score the batch before its first update: by the reference and, where it will be needed, by the policy."""
        profile = self.profile
        if profile.algorithm not in REINFORCED:
            return
        self.model.eval()
        if profile.algorithm == "ppo" or profile.updates_per_rollout > 1 or profile.sampler == "vllm":
            batch.old_logprobs, batch.old_values = self._scored(self.model, batch)
        if profile.beta:
            with self.model.disable_adapter() if profile.lora_r else nullcontext():
                batch.reference_logprobs, _ = self._scored(self.reference or self.model, batch)
        elif profile.algorithm == "ppo":
            batch.reference_logprobs = batch.old_logprobs

    @torch.no_grad()
    def _scored(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
        found = torch.zeros(2, *batch.ids.shape, device=self.device)
        with autocast(self.profile, self.device), merged_adapter(model):
            for rows in micro_batches(batch, self.profile.micro_batch_tokens):
                part = batch.rows(rows)
                logprobs, _, values = score(model, part, self.temperature, self.value_head)
                found[0, rows, : logprobs.size(1)] = logprobs
                if values is not None:
                    found[1, rows, : values.size(1)] = values
        return found[0], found[1] if self.value_head else None

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer update. How memory and processes split the batch changes nothing: every token has its weight
        in the whole update before the first part is read."""
        profile, figures = self.profile, Figures(self.profile, self.device)
        weights = losses.loss_weights(batch.mask, profile.loss_mean, profile.max_context_tokens)
        value_weights = losses.loss_weights(batch.valued)
        self.model.train()
        self.optimizer.zero_grad()
        with autocast(profile, self.device), merged_adapter(self.model):
            for rows in micro_batches(batch, profile.micro_batch_tokens):
                part = batch.rows(rows)
                here = rows, slice(part.ids.size(1))
                logprobs, entropies, values = score(self.model, part, self.temperature, self.value_head)
                loss = (self.token_losses(logprobs, entropies, part, profile) * weights[here]).sum()
                value_loss = torch.zeros_like(loss)
                if values is not None:
                    errors = losses.value_losses(values, part.old_values, part.returns)
                    value_loss = (errors * value_weights[here]).sum()
                (loss + value_loss).backward()
                figures.add(part, logprobs.detach(), entropies.detach(), loss.detach(), value_loss.detach())
        for weight in [weight for group in self.optimizer.param_groups for weight in group["params"]]:
            weight.grad = losses.over_processes(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), profile.max_grad_norm)
        rate = self.schedule.get_last_lr()[0]
        if losses.over_processes(batch.mask.sum()):  # else there is nothing to learn, and momentum alone would move it
            self.optimizer.step()
        self.schedule.step()
        return figures.means() | {"grad_norm": norm.item(), "learning_rate": rate}

    def state(self) -> dict[str, Any]:
        """All that training needs to go on, as `load_state` takes it."""
        head = self.value_head.state_dict() if self.value_head else None
        parts = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "value_head": head}
        return parts | {"weights": {name: weight.detach() for name, weight in self.weights.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, weight in self.weights.items():
            weight.data.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.value_head:
            self.value_head.load_state_dict(state["value_head"])


def micro_batches(batch: Batch, tokens: int) -> list[list[int]]:
    """The rows that have something to learn from, in parts that fit the memory."""
    rows = (batch.mask + batch.valued).any(dim=1).nonzero()[:, 0].tolist()
    lengths = batch.lengths.tolist()
    return [[rows[n] for n in part] for part in split_rows([lengths[row] for row in rows], tokens)]
