"""Masked GRPO, and its relatives, through TRL: our rollouts in, adapter weights and a run folder out.

TRL's GRPOTrainer computes advantages, KL, the clipped loss and the optimizer's steps (objective.py has the same loss
to read); `rollout_func` is the door through which trajectories and their loss mask come in. PPO and REINFORCE put
advantages of their own (algorithms.py) into the same loss. A step is one batch of rollouts and the
`updates_per_rollout` optimizer updates made from it. Started by `accelerate launch`, every process works on its share
of the questions, to the same result. Leaves out: processes without a common disk, and merging the adapter into the
4-bit base, which corrupts it.
"""

import copy
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from searchr1_lite.config import REINFORCED, ConfigError, Profile, save_config
from searchr1_lite.evaluation.evaluate import closed_book, evaluate, summarise
from searchr1_lite.jsonl import write_json
from searchr1_lite.memory import check_memory
from searchr1_lite.retrieval.cache import remembered
from searchr1_lite.retrieval.controls import Noisy, noise_share
from searchr1_lite.retrieval.corpus import load_corpus
from searchr1_lite.retrieval.load import load_retriever
from searchr1_lite.rollout.engine import rollout
from searchr1_lite.rollout.policy import Policy, choose_device, load_policy, load_skeleton
from searchr1_lite.rollout.protocol import PROMPTS
from searchr1_lite.rollout.trajectory import Trajectory
from searchr1_lite.rollout.vllm import VLLMWriter
from searchr1_lite.tasks.questions import load_questions
from searchr1_lite.training import checkpoints, defects
from searchr1_lite.training.algorithms import (
    VALUE_STEP,
    ValueHead,
    generalised_advantages,
    likelihood_loss,
    token_rewards,
    value_loss,
    whitened,
)
from searchr1_lite.training.correction import correct_for_sampler
from searchr1_lite.training.demonstrations import cross_entropy, make_demonstrations
from searchr1_lite.training.early_stop import STOPPED, EarlyStop, restore_best
from searchr1_lite.training.objective import k3_kl, masked_mean
from searchr1_lite.training.recording import Recorder, append_trajectories, environment
from searchr1_lite.training.rewards import trajectory_reward
from searchr1_lite.types import Question, Retriever

EVALUATION_SAMPLES = 24  # trajectories kept of each evaluation, of the same questions before and after
LEAST_SHARED = 16  # tokens: what fewer of them take is less than a second call of the model
VALUE_HEAD = "value_head.pt"  # beside the trainer's own files in a checkpoint
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
    settings that the model or the number of processes cannot work with, and MemoryFullError.
    """
    run_folder = Path(run_folder)
    device = policy.device if policy else choose_device(profile.device)
    process = PartialState(cpu=device.type == "cpu")  # one of several where `accelerate launch` started this
    if not process.is_main_process:
        progress = str  # says nothing
    questions = list(questions or load_questions(profile.questions, profile.train_split))
    eval_questions = list(eval_questions or held_out(profile))
    inputs = checkpoints.fingerprint(profile, questions, eval_questions)
    checkpoints.check_same_run(run_folder, profile, inputs)
    if checkpoints.is_finished(run_folder):
        progress(f"{run_folder.name}: finished already, nothing to do")
        return run_folder
    check_processes(profile, len(eval_questions), process.num_processes)
    if policy is None:
        check_settings(profile)
        check_memory(profile)
    order = question_order(questions, profile)
    checkpoint = checkpoints.latest_checkpoint(run_folder)
    process.wait_for_everyone()  # all have read the folder; from here on the main process alone writes to it
    if process.is_main_process:
        checkpoints.rewind(run_folder, checkpoint)
    retriever = retriever or load_retriever(profile)
    policy = policy or load_policy(profile)
    (run_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        if process.is_main_process:
            write_json(run_folder / "environment.json", environment(policy) | {"inputs": inputs})
            save_config(profile, run_folder / "config.yaml")
        evaluate_before(run_folder, policy, eval_questions, retriever, profile, progress)
    else:
        progress(f"{run_folder.name}: going on after step {_step_of(checkpoint, profile)}")
    with memory_for("rollout", profile, "rollout_rows", "max_context_tokens"):
        demonstrations = make_demonstrations(policy, questions, order, retriever, profile, run_folder, progress)
    trainer = build_trainer(profile, run_folder, policy, order, retriever, progress, demonstrations)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if profile.stop_early:
            restore_best(trainer.model, run_folder)
        trained = replace(policy, model=trainer.model.eval())
        if process.is_main_process:
            save_weights(trainer.model, policy, profile, run_folder)
        evaluate_after(run_folder, trained, eval_questions, retriever, profile, progress)
    finally:
        if profile.lora_r:
            trainer.model.unload()  # gives the caller's model back without the adapter
    process.wait_for_everyone()
    return run_folder


def check_processes(profile: Profile, eval_questions: int, processes: int) -> None:
    """Refuse work that does not divide among the processes; groups stay whole. Raises ConfigError."""
    share = profile.updates_per_rollout * processes
    if profile.questions_per_step % processes:
        wrong = f"questions_per_step = {profile.questions_per_step} must be a multiple of the {processes} processes"
    elif profile.rollouts_per_step % share:
        rollouts = f"questions_per_step x group_size = {profile.rollouts_per_step}"
        wrong = f"{rollouts} must be a multiple of updates_per_rollout x processes = {share}"
    elif processes > 1 and profile.algorithm == "ppo":
        wrong = "algorithm = ppo trains its value head in one process"
    elif eval_questions < processes:
        wrong = f"eval_questions: {eval_questions} held-out questions are too few for {processes} processes"
    else:
        return
    raise ConfigError(f"{wrong}; change the setting, or --num_processes")


def check_settings(profile: Profile) -> None:
    """Refuse what could only fail later, before weights are loaded; raises ConfigError with the setting to change."""
    if profile.strategy not in PROMPTS:
        several = f"strategy {profile.strategy!r} is several texts, and one trajectory is trained"
        raise ConfigError(f"{several}; there are {', '.join(PROMPTS)}")
    if not profile.lora_r and profile.sampler == "vllm":
        raise ConfigError("lora_r = 0: a vLLM server is given adapters; take sampler = local, or an adapter")
    if profile.rollout_rows < profile.group_size:
        raise ConfigError(f"rollout_rows = {profile.rollout_rows} leaves no room for a group of {profile.group_size}")
    model = load_skeleton(profile)
    own = getattr(model.config, "max_position_embeddings", None)
    if own and profile.max_context_tokens > own:
        reads = f"{profile.model} reads {own} tokens at most"
        raise ConfigError(f"max_context_tokens = {profile.max_context_tokens}, but {reads}; lower the setting")
    if profile.lora_target == "all-linear":
        return
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    wanted = profile.lora_target
    for target in [wanted] if isinstance(wanted, str) else wanted:
        # as PEFT takes them: one text is a regular expression, a list has names
        fits = re.compile(target if target is wanted else rf"(.*\.)?{re.escape(target)}")
        chosen = [name for name in layers if fits.fullmatch(name)]
        if not chosen or "lm_head" in chosen:
            reason = "the trainer reads lm_head without its adapter" if chosen else "no linear layer has this name"
            names = sorted({name.rpartition(".")[2] for name in layers} - {"lm_head"})
            raise ConfigError(f"lora_target {target!r}: {reason}; there are {', '.join(names)}, or all-linear")


def held_out(profile: Profile) -> list[Question]:
    """The `eval_questions` questions asked before and after training: the same ones whatever the run's seed."""
    questions = load_questions(profile.questions, profile.test_split)
    return random.Random(0).sample(questions, min(profile.eval_questions, len(questions)))


def question_order(questions: Sequence[Question], profile: Profile) -> list[Question]:
    """The questions of all steps, one after another: a new shuffle for each pass over them, made from the seed."""
    if len({question.id for question in questions}) < len(questions):
        raise ValueError("two training questions share an id; ids must be unique")
    if len(questions) < profile.questions_per_step:
        raise ValueError(f"questions_per_step = {profile.questions_per_step}, but there are only {len(questions)}")
    shuffle, order = random.Random(profile.seed), []
    needed = profile.steps * profile.questions_per_step
    while len(order) < needed:
        # A pass ends with its last whole step, so that no step asks a question twice.
        whole = len(questions) // profile.questions_per_step * profile.questions_per_step
        order += shuffle.sample(list(questions), whole)
    return order[:needed]


def build_trainer(
    profile: Profile,
    run_folder: Path,
    policy: Policy,
    order: Sequence[Question],
    retriever: Retriever,
    progress: Callable[[str], Any] = print,
    demonstrations: Sequence[Trajectory] = (),
) -> "MaskedGRPOTrainer":
    """A trainer with a fresh fp32 adapter on the policy's model; `order` holds the questions of all steps.

    Without an adapter (`lora_r` 0) it trains a copy of the model, and the KL's reference is another.
    So do `demonstrations`, `rollouts_per_step` a step, which are then learned from in place of rollouts.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    recorder = Recorder(profile, run_folder, progress, policy.tokenizer)
    if profile.algorithm in REINFORCED:
        rollout_func = make_rollout_func(profile, policy, order, retriever, recorder)
    else:
        rollout_func = hand_out(profile, policy, demonstrations, recorder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing's new name in transformers
        trainer = MaskedGRPOTrainer(
            model=policy.model if profile.lora_r else copy.deepcopy(policy.model),
            processing_class=policy.tokenizer,
            args=trl_config(profile, run_folder, policy.device),
            reward_funcs=reward_of_rollout,
            rollout_func=rollout_func,
            train_dataset=Dataset.from_dict({"prompt": [question.id for question in order]}),
            # Given here rather than wrapped before: the KL's reference is then the base without its adapter.
            peft_config=LoraConfig(
                r=profile.lora_r,
                lora_alpha=profile.lora_alpha,
                lora_dropout=profile.lora_dropout,
                target_modules=profile.lora_target,
                task_type="CAUSAL_LM",
            )
            if profile.lora_r
            else None,
            callbacks=[recorder, *([EarlyStop(profile, run_folder, progress)] if profile.stop_early else [])],
        )
    trainer.settings, trainer.scored = profile, []
    if not profile.lora_r and profile.beta and profile.algorithm in REINFORCED:
        trainer.beta, trainer.ref_model = profile.beta, copy.deepcopy(policy.model).eval().requires_grad_(False)
        add_fused_lm_head(trainer.ref_model, temperature=trainer.temperature)
    if profile.algorithm == "ppo":
        hidden = policy.model.config.get_text_config().hidden_size
        trainer.value_head = ValueHead(hidden).to(policy.device)
    if profile.sampler == "vllm" and profile.algorithm in REINFORCED:
        correct_for_sampler(trainer)
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts them to bfloat16 on a 4-bit base, where small updates are lost
            parameter.data = parameter.data.to(torch.bfloat16 if "bf16_lora" in profile.defects else torch.float32)
    if "kl_sign" in profile.defects:
        trainer.beta = -trainer.beta
    return trainer


def trl_config(profile: Profile, run_folder: Path, device: torch.device) -> GRPOConfig:
    """The profile in TRL's words. Everything that differs from TRL's defaults does so to match Search-R1's loss."""
    updates = profile.updates_per_rollout
    config = GRPOConfig(
        output_dir=str(run_folder / "checkpoints"),
        # A whole update is one micro-batch to TRL; `MaskedGRPOTrainer` splits it as memory allows.
        per_device_train_batch_size=profile.rollouts_per_step // updates // PartialState().num_processes,
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        num_generations=max(profile.group_size, 2),
        num_iterations=1,
        max_steps=profile.steps * updates,
        shuffle_dataset=False,  # `question_order` has done it
        temperature=profile.temperature if profile.algorithm in REINFORCED else 1.0,
        max_completion_length=profile.max_context_tokens,
        loss_type="bnpo",  # token mean, verl's masked_mean; here over all tokens of the update
        scale_rewards="group",
        importance_sampling_level="token",
        epsilon=profile.epsilon,
        # TRL would load a reference for full fine-tuning from disk; `build_trainer` gives it a copy
        beta=profile.beta if profile.algorithm in REINFORCED and profile.lora_r else 0.0,
        use_bias_correction_kl=False,
        entropy_coef=profile.entropy_coef,
        mask_truncated_completions=False,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=profile.warmup_steps * updates,
        max_grad_norm=profile.max_grad_norm,
        optim="adamw_torch",
        gradient_checkpointing=profile.gradient_checkpointing,
        bf16=device.type == "cuda" and profile.dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        seed=profile.seed,
        save_strategy="steps",
        save_steps=profile.save_every * updates,
        save_total_limit=2,
        logging_steps=updates,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every adapter weight is used,
        ddp_broadcast_buffers=False,  # and what is not trained is equal everywhere
    )
    config._n_gpu = min(config.n_gpu, 1)  # several GPUs are several processes, never torch's DataParallel
    config.num_generations = profile.group_size  # TRL refuses 1, which its own advantages cannot use; others can
    return config


class MaskedGRPOTrainer(GRPOTrainer):
    """TRL's trainer with memory bounded in tokens, without padding that nobody needs and without model cards."""

    settings: Profile  # given by build_trainer, as is the value head of PPO
    value_head: ValueHead | None = None
    hidden: torch.Tensor  # the policy's last hidden states in the latest forward, (rows, columns, hidden)
    scored: list[tuple[torch.Tensor, torch.Tensor | None]]  # log-probabilities and values of the latest forwards
    rewards: torch.Tensor  # of the latest rollouts of all processes, (rollouts, 1)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One optimizer update's gradient, part by part; returns its loss, a scalar whose mean over processes counts.

        TRL's loss of a part is the mean over the part's tokens. Weighted by its share of the tokens of all parts of
        all processes, the sum is the mean over all tokens: how memory is split changes nothing.
        """
        start = time.perf_counter()
        model.train()
        if self.value_head is not None:
            self.value_head.zero_grad()  # the Trainer clears the gradients of its model, and this is no part of it
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
        beta, self.scored = self.beta, []
        if self.settings.algorithm == "ppo":
            self.beta = 0.0  # its KL is in the reward
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        logprobs, values = self.scored[-1]
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        old = logprobs.detach() if inputs.get("old_per_token_logps") is None else inputs["old_per_token_logps"]
        if "ratio_over_retrieved" in self.settings.defects:
            whole = inputs["completion_mask"]
            loss = loss + defects.leak(logprobs, old, inputs["advantages"], mask, whole, self.settings.epsilon)
        with torch.no_grad():
            self._metrics["train"]["ratio_max"].append((((logprobs - old) * mask).exp() * mask).max().item())
        if self.settings.algorithm == "ppo":
            valued = inputs["completion_mask"] if "unmasked_values" in self.settings.defects else mask
            error = value_loss(values, inputs["old_values"], inputs["returns"], valued)
            self._metrics["train"]["value_loss"].append(error.item())
            self._metrics["train"]["kl"].append(
                masked_mean(k3_kl(logprobs.detach(), inputs["ref_per_token_logps"]), mask).item() if beta else 0.0
            )
            loss = loss + error
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
        elif settings.algorithm == "ppo":
            mask = batch["completion_mask"] * batch["tool_mask"]
            if batch.get("old_per_token_logps") is None:  # TRL needs them from two updates on only
                whole = [torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask")]
                self.scored = []
                with torch.no_grad():
                    self._get_per_token_logps_and_entropies(self.model, *whole, mask.size(1))
            old, values = self.scored[0]  # the policy's come before the reference's
            reference = batch["ref_per_token_logps"] if self.beta else old
            valued = batch["completion_mask"] if "unmasked_values" in settings.defects else mask
            earned = token_rewards(rewards[own], mask, old, reference, self.beta)
            advantages, returns = generalised_advantages(earned, values, valued, settings.gamma, settings.gae_lambda)
            batch |= {"advantages": whitened(advantages, valued), "returns": returns, "old_values": values}
        self.scored = []
        return batch

    def create_optimizer(self, *arguments):
        optimizer = super().create_optimizer(*arguments)
        if self.value_head is not None and len(optimizer.param_groups) < 3:  # TRL's: with weight decay and without
            rate = VALUE_STEP / self.value_head.linear.in_features
            optimizer.add_param_group({"params": list(self.value_head.parameters()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _save_checkpoint(self, *arguments) -> None:
        super()._save_checkpoint(*arguments)
        if self.value_head is not None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            torch.save(self.value_head.state_dict(), folder / VALUE_HEAD)

    def _load_from_checkpoint(self, checkpoint: str, *arguments) -> None:
        super()._load_from_checkpoint(checkpoint, *arguments)
        if self.value_head is not None:
            self.value_head.load_state_dict(torch.load(Path(checkpoint) / VALUE_HEAD, weights_only=True))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """While this lasts, `hidden` is what the model's body gives to its output layer."""
        if self.value_head is None:
            yield
            return
        model = self.accelerator.unwrap_model(self.model)
        body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
        handle = body.register_forward_hook(lambda *call: setattr(self, "hidden", call[-1][0]))
        try:
            yield
        finally:
            handle.remove()

    def _values(self, tokens: int) -> torch.Tensor | None:
        """Values of the latest forward before each of its last `tokens` tokens, (rows, tokens); only PPO has some."""
        return None if self.value_head is None else self.value_head(self.hidden[:, -tokens - 1 : -1])

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
            with self._watched():
                logps, entropies = self._score(
                    model,
                    input_ids[rows, first:last],
                    attention_mask[rows, first:last],
                    logits_to_keep - unused,
                    options,
                )
            values = self._values(logps.size(1))
            found = (logps, entropies, values)
            scored.append([None if x is None else torch.nn.functional.pad(x, (0, unused)) for x in found])
        back = torch.cat(parts).argsort()
        logps, entropies, values = (None if x[0] is None else torch.cat(x)[back] for x in zip(*scored, strict=True))
        self.scored.append((logps, values))
        return logps, entropies, None

    def _score(
        self, model, ids: torch.Tensor, mask: torch.Tensor, keep: int, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
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


def reward_of_rollout(prompts: list, completions: list, reward: list[float], **_: Any) -> list[float]:
    """TRL's reward function: the rewards were made where the trajectories are, in `make_rollout_func`."""
    return reward


def make_rollout_func(
    profile: Profile, policy: Policy, order: Sequence[Question], retriever: Retriever, recorder: "Recorder"
) -> Callable[[list[str], GRPOTrainer], dict[str, list]]:
    """TRL's rollout function. Its prompts are question ids, each `group_size` times in a row."""
    by_id = {question.id: question for question in order}
    noise = load_corpus(profile.corpus) if profile.noise_start or profile.noise_end else None
    cached = remembered(retriever)
    server = VLLMWriter(policy, profile) if profile.sampler == "vllm" else None

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        asked = [by_id[prompt] for prompt in prompts[:: profile.group_size]]
        step = trainer.state.global_step // profile.updates_per_rollout
        seed = profile.seed * 1_000_003 + step  # of this step alone: a run that goes on samples the same
        start = time.perf_counter()
        if server:
            server.load_adapter(trainer.model, recorder.run_folder / "checkpoints/served", step)
        searched, before = cached, getattr(cached, "hits", 0)
        if noise:
            share = noise_share(step, profile.steps, profile.noise_start, profile.noise_end)
            searched = Noisy(cached, noise, share, seed)
        memory = memory_for("rollout", profile, "rollout_rows", "max_context_tokens")
        with memory, torch.no_grad(), trainer.accelerator.autocast():
            current = replace(policy, model=trainer.model)
            trajectories = rollout(
                current,
                asked,
                searched,
                profile,
                group_size=profile.group_size,
                seed=seed,
                writer=server or defects.faulty_writer(current, profile, len(prompts)),
            )
        columns = _recorded(trajectories, step, start, profile, policy, recorder)
        if trainer.accelerator.is_main_process:
            recorder.rollouts["cache_hits"] = getattr(cached, "hits", 0) - before
        return columns

    return rollout_func


def hand_out(
    profile: Profile, policy: Policy, demonstrations: Sequence[Trajectory], recorder: Recorder
) -> Callable[[list[str], GRPOTrainer], dict[str, list]]:
    """As `make_rollout_func`, but nothing is rolled out: each step has the next `rollouts_per_step` demonstrations."""

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        step, start = trainer.state.global_step // profile.updates_per_rollout, time.perf_counter()
        first = step * profile.rollouts_per_step + trainer.accelerator.process_index * len(prompts)
        own = demonstrations[first : first + len(prompts)]
        return _recorded(own, step, start, profile, policy, recorder)

    return rollout_func


def _recorded(
    trajectories: Sequence[Trajectory], step: int, start: float, profile: Profile, policy: Policy, recorder: Recorder
) -> dict[str, list]:
    """This process's trajectories of a step as TRL takes them; those of all processes are put on record."""
    set_seed(profile.seed * 1_000_003 + step)  # what follows (order of rows, dropout) depends on the step alone as well
    rewards = group_rewards(trajectories, profile, step / profile.steps)
    everyone = gather_object(trajectories), gather_object(rewards)  # in the order of one process
    if PartialState().is_main_process:
        recorder.record(step + 1, *everyone, time.perf_counter() - start)
    learned = [defects.as_learned(trajectory, policy.tokenizer, profile) for trajectory in trajectories]
    return trl_columns(learned, profile.masked, policy.tokenizer.eos_token_id) | {"reward": rewards}


def group_rewards(trajectories: Sequence[Trajectory], profile: Profile, progress: float = 1.0) -> list[float]:
    """Each trajectory's reward, `progress` (0 to 1) through training; one whose search failed has its group's mean.

    So the group's mean is as if the failed one were not there; and no token of it is learned from (`trl_columns`).
    """
    rewards = [_reward(trajectory, profile, progress) for trajectory in trajectories]
    for start in range(0, len(rewards), profile.group_size):
        group = range(start, start + profile.group_size)
        known = [rewards[n] for n in group if not trajectories[n].search_failed]
        for n in group:
            if trajectories[n].search_failed:
                rewards[n] = fmean(known) if known else 0.0
    return rewards


def _reward(trajectory: Trajectory, profile: Profile, progress: float = 1.0) -> float:
    return trajectory_reward(trajectory, profile.reward, profile.reward_reads_prompt, progress)


def trl_columns(trajectories: Sequence[Trajectory], masked: bool, eos: int) -> dict[str, list[list]]:
    """Trajectories as TRL takes them: ids, log-probabilities and `env_mask`, 1 where a token is learned from.

    A token that was not sampled has None for its log-probability: nothing is corrected there (correction.py).
    Unmasked, retrieved and inserted tokens are learned from too. An answer gets an end token, so that TRL does not
    take it for cut off; nobody wrote that token and its mask is 0 in either case. Nothing is learned from a trajectory
    whose search failed.
    """
    columns: dict[str, list[list]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for trajectory in trajectories:
        end = trajectory.finished or not trajectory.completion_ids
        mask = list(trajectory.loss_mask) if masked else [1] * len(trajectory.completion_ids)
        if trajectory.search_failed:
            mask = [0] * len(mask)
        columns["prompt_ids"].append(list(trajectory.prompt_ids))
        columns["completion_ids"].append([*trajectory.completion_ids, *[eos] * end])
        sampled = zip(trajectory.logprobs, trajectory.loss_mask, strict=True)
        columns["logprobs"].append([*(one if own else None for one, own in sampled), *[None] * end])
        columns["env_mask"].append([*mask, *[0] * end])
    # TRL pads a mask that is too short with 1, in silence.
    for ids, logprobs, mask in zip(*list(columns.values())[1:], strict=True):
        assert len(ids) == len(logprobs) == len(mask)
    return columns


def evaluate_before(
    run_folder: Path,
    policy: Policy,
    questions: list[Question],
    retriever: Retriever,
    profile: Profile,
    progress: Callable[[str], Any],
) -> None:
    """The base model on held-out questions: with search, and with one turn and no search (closed book)."""
    summary = _evaluate(run_folder, policy, questions, retriever, profile, "before", progress)
    own = _share(questions)
    right = sum(gather_object([closed_book(policy, own, profile) * len(own)]))
    result = {"before": summary, "closed_book": round(right) / len(questions)}
    if PartialState().is_main_process:
        write_json(run_folder / "checkpoints/before.json", result)
    progress(
        f"{run_folder.name}: before, exact match {summary['exact_match']:.2f} on {summary['questions']} held-out "
        f"questions, {summary['mean_searches']:.2f} searches; closed book {result['closed_book']:.2f}"
    )


def evaluate_after(
    run_folder: Path,
    policy: Policy,
    questions: list[Question],
    retriever: Retriever,
    profile: Profile,
    progress: Callable[[str], Any],
) -> None:
    """The trained model on the same questions. evaluation.json is written last: it makes a run finished."""
    before = checkpoints.read_json(run_folder / "checkpoints/before.json")
    summary = _evaluate(run_folder, policy, questions, retriever, profile, "after", progress)
    result = {"before": before["before"], "after": summary, "closed_book": before["closed_book"]}
    if PartialState().is_main_process:
        write_json(run_folder / "evaluation.json", result)
    steps = checkpoints.read_json(run_folder / STOPPED).get("step", profile.steps)
    progress(
        f"{run_folder.name}: after {steps} steps, exact match {summary['exact_match']:.2f}, "
        f"{summary['mean_searches']:.2f} searches"
    )


def _evaluate(
    run_folder: Path,
    policy: Policy,
    questions: list[Question],
    retriever: Retriever,
    profile: Profile,
    phase: str,
    progress: Callable[[str], Any],
) -> dict[str, Any]:
    with memory_for("rollout", profile, "rollout_rows", "max_context_tokens"):
        summary, own = evaluate(policy, _share(questions), retriever, profile, progress=progress)
    shares = gather_object([own])
    trajectories = [shares[n % len(shares)][n // len(shares)] for n in range(len(questions))]
    samples = trajectories[:EVALUATION_SAMPLES]
    rewards = [_reward(trajectory, profile) for trajectory in samples]
    if PartialState().is_main_process:
        step = 0 if phase == "before" else profile.steps
        append_trajectories(run_folder, samples, rewards, step, phase, policy.tokenizer)
    return summary | summarise(trajectories)


def _share(questions: list[Question]) -> list[Question]:
    """The questions of this process: every n-th, where there are n processes."""
    return questions[PartialState().process_index :: PartialState().num_processes]


def save_weights(model: Any, policy: Policy, profile: Profile, run_folder: Path) -> None:
    """adapter/: the adapter alone, naming its base as the profile does, not where it lay on this machine.

    After full fine-tuning model/ instead: weights and tokenizer, to be used as the setting `model`.
    """
    if not profile.lora_r:
        model.save_pretrained(run_folder / "model")
        policy.tokenizer.save_pretrained(run_folder / "model")
        return
    folder = run_folder / "adapter"
    for config in model.peft_config.values():
        config.base_model_name_or_path = profile.model
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form for a model card


def _step_of(checkpoint: Path, profile: Profile) -> int:
    return int(checkpoint.name.rpartition("-")[2]) // profile.updates_per_rollout
