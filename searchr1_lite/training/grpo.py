"""Masked GRPO through TRL: our rollouts in, adapter weights and a run folder out.

TRL's GRPOTrainer computes advantages, KL, the clipped loss and the optimizer's steps (objective.py has the same loss
to read); `rollout_func` is the door through which trajectories and their loss mask come in. A step is one batch of
rollouts and the `updates_per_rollout` optimizer updates made from it. Leaves out: vLLM, several GPUs, PPO, and
merging the adapter into the 4-bit base, which corrupts it.
"""

import os
import random
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from searchr1_lite.config import ConfigError, Profile, save_config
from searchr1_lite.evaluation.evaluate import closed_book, evaluate
from searchr1_lite.jsonl import write_json
from searchr1_lite.retrieval.build import load_retriever
from searchr1_lite.retrieval.corpus import load_corpus
from searchr1_lite.rollout.engine import rollout
from searchr1_lite.rollout.policy import Policy, load_policy, load_skeleton
from searchr1_lite.rollout.trajectory import Trajectory
from searchr1_lite.tasks.questions import load_questions
from searchr1_lite.training import checkpoints
from searchr1_lite.training.recording import Recorder, append_trajectories, environment
from searchr1_lite.training.rewards import trajectory_reward
from searchr1_lite.types import Question, Retriever

ROWS_TOGETHER = 8  # trajectories of like length in one forward, at most
EVALUATION_SAMPLES = 24  # trajectories kept of each evaluation, of the same questions before and after


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
    Raises RunFolderError where the folder holds a run with other settings, questions or model, and ConfigError for
    settings that the model cannot work with.
    """
    run_folder = Path(run_folder)
    questions = list(questions or load_questions(profile.questions, profile.train_split))
    eval_questions = list(eval_questions or held_out(profile))
    inputs = checkpoints.fingerprint(profile, questions, eval_questions)
    checkpoints.check_same_run(run_folder, profile, inputs)
    if checkpoints.is_finished(run_folder):
        progress(f"{run_folder.name}: finished already, nothing to do")
        return run_folder
    if policy is None:
        check_settings(profile)
    order = question_order(questions, profile)
    checkpoint = checkpoints.latest_checkpoint(run_folder)
    checkpoints.rewind(run_folder, checkpoint)
    retriever = retriever or load_retriever(profile, load_corpus(profile.corpus))
    policy = policy or load_policy(profile)
    (run_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        write_json(run_folder / "environment.json", environment(policy) | {"inputs": inputs})
        save_config(profile, run_folder / "config.yaml")
        evaluate_before(run_folder, policy, eval_questions, retriever, profile, progress)
    else:
        progress(f"{run_folder.name}: going on after step {_step_of(checkpoint, profile)}")
    trainer = build_trainer(profile, run_folder, policy, order, retriever, progress)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trained = replace(policy, model=trainer.model.eval())
        save_adapter(trainer.model, profile, run_folder / "adapter")
        evaluate_after(run_folder, trained, eval_questions, retriever, profile, progress)
    finally:
        trainer.model.unload()  # gives the caller's model back without the adapter
    return run_folder


def check_settings(profile: Profile) -> None:
    """Refuse what could only fail later, before weights are loaded; raises ConfigError with the setting to change."""
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
) -> "MaskedGRPOTrainer":
    """A trainer with a fresh fp32 adapter on the policy's model; `order` holds the questions of all steps."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    recorder = Recorder(profile, run_folder, progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing's new name in transformers
        trainer = MaskedGRPOTrainer(
            model=policy.model,
            processing_class=policy.tokenizer,
            args=trl_config(profile, run_folder, policy.device),
            reward_funcs=reward_of_rollout,
            rollout_func=make_rollout_func(profile, policy, order, retriever, recorder),
            train_dataset=Dataset.from_dict({"prompt": [question.id for question in order]}),
            # Given here rather than wrapped before: the KL's reference is then the base without its adapter.
            peft_config=LoraConfig(
                r=profile.lora_r,
                lora_alpha=profile.lora_alpha,
                lora_dropout=profile.lora_dropout,
                target_modules=profile.lora_target,
                task_type="CAUSAL_LM",
            ),
            callbacks=[recorder],
        )
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts them to bfloat16 on a 4-bit base, where small updates are lost
            parameter.data = parameter.data.float()
    return trainer


def trl_config(profile: Profile, run_folder: Path, device: torch.device) -> GRPOConfig:
    """The profile in TRL's words. Everything that differs from TRL's defaults does so to match Search-R1's loss."""
    micro_batches = profile.rollouts_per_step // profile.micro_batch_size
    updates = profile.updates_per_rollout
    return GRPOConfig(
        output_dir=str(run_folder / "checkpoints"),
        per_device_train_batch_size=profile.micro_batch_size,
        gradient_accumulation_steps=micro_batches // updates,
        steps_per_generation=micro_batches,
        num_generations=profile.group_size,
        num_iterations=1,
        max_steps=profile.steps * updates,
        shuffle_dataset=False,  # `question_order` has done it
        temperature=profile.temperature,
        max_completion_length=profile.max_context_tokens,
        loss_type="bnpo",  # token mean over the micro-batch, verl's masked_mean
        scale_rewards="group",
        importance_sampling_level="token",
        epsilon=profile.epsilon,
        beta=profile.beta,
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
    )


class MaskedGRPOTrainer(GRPOTrainer):
    """TRL's trainer, without padding that nobody needs and without model cards."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **options
    ):
        """TRL pads every row to the longest of the step; here only what is in use is computed.

        Rows are independent of each other, so a few of like length go together and columns that none of them needs
        are left out. The micro-batch, over which the loss is a mean, stays as it is. Left-out places come back as
        zeros, which the masks take out.
        """
        order = attention_mask.sum(dim=1).argsort(stable=True)
        scored = []
        for rows in order.split(min(batch_size or len(order), ROWS_TOGETHER)):
            used = attention_mask[rows].any(dim=0).nonzero()
            first, last = int(used[0]), int(used[-1]) + 1
            unused = input_ids.size(1) - last
            logps, entropies, _ = super()._get_per_token_logps_and_entropies(
                model,
                input_ids[rows, first:last],
                attention_mask[rows, first:last],
                logits_to_keep - unused,
                **options,
            )
            scored.append([None if x is None else torch.nn.functional.pad(x, (0, unused)) for x in (logps, entropies)])
        back = order.argsort()
        logps, entropies = (None if x[0] is None else torch.cat(x)[back] for x in zip(*scored, strict=True))
        return logps, entropies, None

    def create_model_card(self, *arguments, **options) -> None:
        """Checkpoints here are for going on, not for publishing."""


def reward_of_rollout(prompts: list, completions: list, reward: list[float], **_: Any) -> list[float]:
    """TRL's reward function: the rewards were made where the trajectories are, in `make_rollout_func`."""
    return reward


def make_rollout_func(
    profile: Profile, policy: Policy, order: Sequence[Question], retriever: Retriever, recorder: "Recorder"
) -> Callable[[list[str], GRPOTrainer], dict[str, list]]:
    """TRL's rollout function. Its prompts are question ids, each `group_size` times in a row."""
    by_id = {question.id: question for question in order}

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        asked = [by_id[prompt] for prompt in prompts[:: profile.group_size]]
        step = trainer.state.global_step // profile.updates_per_rollout
        seed = profile.seed * 1_000_003 + step  # of this step alone: a run that goes on samples the same
        start = time.perf_counter()
        with torch.no_grad(), trainer.accelerator.autocast():
            trajectories = rollout(
                replace(policy, model=trainer.model),
                asked,
                retriever,
                profile,
                group_size=profile.group_size,
                seed=seed,
            )
        set_seed(seed)  # what follows (micro-batches, dropout) depends on the step alone as well
        rewards = [_reward(trajectory, profile) for trajectory in trajectories]
        recorder.record(step + 1, trajectories, rewards, time.perf_counter() - start)
        return trl_columns(trajectories, profile.masked, policy.tokenizer.eos_token_id) | {"reward": rewards}

    return rollout_func


def _reward(trajectory: Trajectory, profile: Profile) -> float:
    return trajectory_reward(trajectory, profile.reward, profile.reward_reads_prompt)


def trl_columns(trajectories: Sequence[Trajectory], masked: bool, eos: int) -> dict[str, list[list]]:
    """Trajectories as TRL takes them: ids, log-probabilities and `env_mask`, 1 where a token is learned from.

    Unmasked, retrieved and inserted tokens are learned from too. An answer gets an end token, so that TRL does not
    take it for cut off; nobody wrote that token and its mask is 0 in either case.
    """
    columns: dict[str, list[list]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for trajectory in trajectories:
        end = trajectory.finished or not trajectory.completion_ids
        mask = list(trajectory.loss_mask) if masked else [1] * len(trajectory.completion_ids)
        columns["prompt_ids"].append(list(trajectory.prompt_ids))
        columns["completion_ids"].append([*trajectory.completion_ids, *[eos] * end])
        columns["logprobs"].append([*trajectory.logprobs, *[0.0] * end])
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
    result = {"before": summary, "closed_book": closed_book(policy, questions, profile)}
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
    write_json(run_folder / "evaluation.json", result)
    progress(
        f"{run_folder.name}: after {profile.steps} steps, exact match {summary['exact_match']:.2f}, "
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
    summary, trajectories = evaluate(policy, questions, retriever, profile, progress=progress)
    samples = trajectories[:EVALUATION_SAMPLES]
    rewards = [_reward(trajectory, profile) for trajectory in samples]
    append_trajectories(run_folder, samples, rewards, 0 if phase == "before" else profile.steps, phase)
    return summary


def save_adapter(model: Any, profile: Profile, folder: Path) -> None:
    """The adapter alone, naming its base as the profile does, not where it lay on this machine."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = profile.model
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form for a model card


def _step_of(checkpoint: Path, profile: Profile) -> int:
    return int(checkpoint.name.rpartition("-")[2]) // profile.updates_per_rollout
