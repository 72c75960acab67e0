"""Masked GRPO, and its relatives, through TRL: our rollouts in, adapter weights and a run folder out.

TRL's GRPOTrainer computes advantages, KL, the clipped loss and the optimizer's steps (objective.py has the same loss
to read); `rollout_func` is the door through which trajectories and their loss mask come in. What we change of the
trainer itself, REINFORCE too, is in masked_trainer.py, and PPO in ppo.py. A step is one batch of rollouts and the
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
from collections.abc import Callable, Sequence
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
from searchr1_lite.training.correction import correct_for_sampler
from searchr1_lite.training.demonstrations import make_demonstrations
from searchr1_lite.training.early_stop import STOPPED, EarlyStop, restore_best
from searchr1_lite.training.masked_trainer import MaskedGRPOTrainer, memory_for
from searchr1_lite.training.ppo import PPOTrainer
from searchr1_lite.training.recording import Recorder, append_trajectories, environment
from searchr1_lite.training.rewards import trajectory_reward
from searchr1_lite.types import Question, Retriever

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
) -> MaskedGRPOTrainer:
    """A trainer with a fresh fp32 adapter on the policy's model; `order` holds the questions of all steps.

    Without an adapter (`lora_r` 0) it trains a copy of the model, and the KL's reference is another. An algorithm that
    makes no rollouts learns from `demonstrations` in their place, `rollouts_per_step` of them a step.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    recorder = Recorder(profile, run_folder, progress, policy.tokenizer)
    if profile.algorithm in REINFORCED:
        rollout_func = make_rollout_func(profile, policy, order, retriever, recorder)
    else:
        rollout_func = hand_out(profile, policy, demonstrations, recorder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing's new name in transformers
        trainer = (PPOTrainer if profile.algorithm == "ppo" else MaskedGRPOTrainer)(
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
