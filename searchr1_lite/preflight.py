"""What can be refused before weights are loaded, and memory that ran out, with the setting to change in one message."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from searchr1_lite.config import ConfigError, Profile
from searchr1_lite.errors import UserError
from searchr1_lite.rollouts.policy import load_skeleton
from searchr1_lite.rollouts.protocol import PROMPTS


class MemoryFullError(UserError):
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


def check_processes(profile: Profile, eval_questions: int, processes: int) -> None:
    """Refuse work that does not divide among the processes; groups stay whole. Raises ConfigError."""
    share = profile.updates_per_rollout * processes
    if profile.questions_per_step % processes:
        wrong = f"questions_per_step = {profile.questions_per_step} must be a multiple of the {processes} processes"
    elif profile.rollouts_per_step % share:
        rollouts = f"questions_per_step x group_size = {profile.rollouts_per_step}"
        wrong = f"{rollouts} must be a multiple of updates_per_rollout x processes = {share}"
    elif eval_questions < processes:
        wrong = f"eval_questions: {eval_questions} held-out questions are too few for {processes} processes"
    else:
        return
    raise ConfigError(f"{wrong}; change the setting, or --num_processes")


def check_settings(profile: Profile) -> None:
    """Refuse what could only fail later; raises ConfigError with the setting to change."""
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
