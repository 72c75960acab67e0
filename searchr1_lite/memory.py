"""How much GPU memory a profile needs at its peak, from the model's config alone: no weights, no GPU.

    searchr1 memory --profile qwen2.5-3b-4bit rollout_rows=64

Bytes are counted for decoders of the common shape (attention, then a gated MLP, as in Qwen2 and Llama), at their
worst: every trajectory as long as it may be. A rollout and a training step do not overlap, so the peak is what always
stays plus the larger of the two. Left out: what a vLLM server or another program takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

from searchr1_lite.config import ConfigError, Profile, retriever_parts
from searchr1_lite.rollouts.decoding import ENTRIES, READ_ENTRIES, READ_TOKENS
from searchr1_lite.rollouts.policy import load_skeleton

GB = 1e9
LOGITS = 2**25  # logits that exist at a time, at most: 128 MiB in 32 bits
CONTEXT = 0.6e9  # CUDA's own context, cuBLAS' workspace and kernels; an allowance, 0.4 to 0.8 by card and driver
ENCODER = 0.5e9  # e5-base-v2 in 32 bits (109 million parameters) and a batch of queries; an allowance
TOGETHER = (
    "lower rollout_rows, micro_batch_tokens and max_context_tokens together, with sampling_weights=quantized and "
    "gradient_checkpointing=true, or take a smaller model"
)
SAMPLING = 24  # bytes a logit: 32-bit logits and log-probabilities, two of 64 bits (decoding.LocalSampler._sample)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the arithmetic needs of a model with its adapter. Numbers of parameters, or widths of activations."""

    linear: tuple[int, ...]  # parameters of each linear layer that 4 bits apply to: all but the head
    other: int  # all other parameters: embeddings, norms, biases, the head; tied ones once
    adapter: int
    layers: int
    hidden: int
    intermediate: int
    query: int  # heads x head size
    keys: int  # key-value heads x head size
    heads: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by name: what stays all the time, what a rollout adds, and what a training step adds."""

    fixed: dict[str, float]
    rollout: dict[str, float]
    training: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.fixed.values()) + max(sum(self.rollout.values()), sum(self.training.values()))


def model_shape(profile: Profile) -> Shape:
    """The profile's model and adapter, counted on a model without weights."""
    model = load_skeleton(profile)
    head = model.get_output_embeddings()
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    everything = sum(p.numel() for p in model.parameters())  # a tied matrix is one parameter
    if profile.lora_r:
        lora = LoraConfig(r=profile.lora_r, target_modules=profile.lora_target)
        try:
            model = inject_adapter_in_model(lora, model, low_cpu_mem_usage=True)
        except ValueError as error:  # PEFT finds no such layer
            raise ConfigError(f"lora_target {profile.lora_target!r}: {str(error).splitlines()[0]}") from None
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        linear=tuple(linear),
        other=everything - sum(linear),
        # without one, all weights are trained in a copy of their own
        adapter=sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or not profile.lora_r),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query=config.num_attention_heads * head_size,
        keys=getattr(config, "num_key_value_heads", config.num_attention_heads) * head_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
    )


def memory_plan(profile: Profile, shape: Shape | None = None) -> Plan:
    """The profile's memory in bytes, each part with its reason beside it."""
    shape = shape or model_shape(profile)
    return Plan(_fixed(profile, shape), _rollout(profile, shape), _training(profile, shape))


def _fixed(profile: Profile, shape: Shape) -> dict[str, float]:
    packed = profile.quantization == "nf4"
    linear = sum(map(nf4_bytes, shape.linear)) if packed else sum(shape.linear) * _width(profile)
    return {
        "CUDA context": CONTEXT,
        "weights, linear layers": linear,
        "weights, embeddings and the rest": shape.other * _width(profile),
        "adapter": 4 * shape.adapter,  # 32 bits, whatever the base has
        "AdamW state": 8 * shape.adapter,  # two means a parameter, in the parameter's 32 bits
        "encoder of dense retrieval": ENCODER * _encodes(profile),
        "reranker": ENCODER * bool(profile.reranker),
    }


def _encodes(profile: Profile) -> bool:
    """Whether any of the retrievers searches vectors in this process; an index folder is taken to do so."""
    vectors = ("flat", "hnsw", "ivf-", "faiss:", "index:", "milvus:")
    return any(part.startswith(vectors) for part in retriever_parts(profile.retriever))


def nf4_bytes(parameters: int) -> float:
    """A matrix as bitsandbytes packs it, double quantised: 4.127 bits a parameter (QLoRA, arXiv 2305.14314, section 3).

    Half a byte each, an 8-bit scale for 64, a 32-bit scale of scales for 256 of those, two code books and an offset.
    """
    blocks = -(-parameters // 64)
    return -(-parameters // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def _rollout(profile: Profile, shape: Shape) -> dict[str, float]:
    if profile.sampler == "vllm":  # the server has its own card, or its own share of this one
        return {}
    width, rows = _width(profile), profile.rollout_rows
    entries = -(-(profile.max_context_tokens + 1) // ENTRIES) * ENTRIES
    packed = profile.quantization == "nf4"
    copied = (packed or width == 4) and profile.sampling_weights == "dequantized"  # rollouts/dequantize.py
    # Reading observations: in the MLP the gate and three results on the way up (base, LoRA, sum); in attention keys
    # and values repeated for every query head, which a mask asks for (transformers/integrations/sdpa_attention.py).
    tokens = min(READ_TOKENS, rows * profile.max_context_tokens)
    seen = min(rows * entries, max(READ_ENTRIES, entries))
    mlp = tokens * width * (4 * shape.intermediate + 3 * shape.hidden)
    attention = width * (2 * seen * shape.query + tokens * (entries + 4 * shape.hidden))
    return {
        "key-value cache": rows * entries * cache_bytes_per_token(profile, shape),
        "adapter for autocast": shape.adapter * width * (width < 4),
        "plain copy of the weights": sum(shape.linear) * width * copied,
        "one 4-bit layer unpacked": max(shape.linear) * width * (packed and not copied),
        "reading or sampling": max(mlp, attention, rows * shape.vocabulary * SAMPLING),
    }


def cache_bytes_per_token(profile: Profile, shape: Shape) -> int:
    """A key and a value in every layer."""
    return 2 * shape.layers * shape.keys * _width(profile)


def _training(profile: Profile, shape: Shape) -> dict[str, float]:
    """Activations of one micro-batch; a trajectory longer than it goes alone."""
    width = _width(profile)
    tokens = max(profile.micro_batch_tokens, profile.max_context_tokens)
    stream = tokens * shape.hidden  # one hidden state for each token
    mask = tokens * min(tokens, profile.max_context_tokens)  # what each token may look at
    layer = tokens * layer_bytes_per_token(profile, shape) + mask * width
    # Backward through the MLP: gradients of its two halves, and 32-bit ones where LoRA's input was cast
    gradients = tokens * shape.intermediate * (2 * width + 4 * _casts(profile))
    # The head, a part of the tokens at a time: logits, and in 32 bits these, their log-probabilities twice, and
    # gradients of both; the last norm's 32-bit input, what it reads, and the gradient of that in 32 bits and not
    head = min(tokens * shape.vocabulary, LOGITS) * (width + 5 * 4) + stream * (4 + width + 4 + width)
    checkpointed = profile.gradient_checkpointing
    return {
        "gradients": 4 * shape.adapter,
        "adapter for autocast": shape.adapter * width * (width < 4),
        "kept hidden states": stream * width * (shape.layers + 1) + mask if checkpointed else stream * width + mask,
        "activations of all layers": 0 if checkpointed else layer * shape.layers,
        "one layer again and back, or the head": max(layer * checkpointed + gradients, head),
        "one 4-bit layer unpacked": max(shape.linear) * width * (profile.quantization == "nf4"),
    }


def layer_bytes_per_token(profile: Profile, shape: Shape) -> int:
    """What a layer's backward needs of its forward: the tensors that autograd saves, without padding's mask."""
    width = _width(profile)
    norms = 2 * (4 * shape.hidden + 4)  # the input in 32 bits, and its scale
    inputs = (6 if _casts(profile) else 2) * width * shape.hidden  # of LoRA; shared, unless each casts its own
    attention = 4 * width * shape.query + 4 * shape.heads  # query, repeated keys and values, result; log-sum-exp
    mlp = 4 * width * shape.intermediate  # gate, its activation, up, and their product
    lora = 7 * width * profile.lora_r  # between its two matrices
    return norms + inputs + attention + mlp + lora


def _casts(profile: Profile) -> bool:
    """Whether PEFT casts LoRA's inputs to 32 bits: on an unquantised base in 16 (peft/tuners/lora/layer.py)."""
    return profile.quantization == "none" and profile.dtype == "bfloat16"


def _width(profile: Profile) -> int:
    return {"float32": 4, "bfloat16": 2}[profile.dtype]


def format_plan(profile: Profile, plan: Plan) -> str:
    """A table for people, in GB of 10^9 bytes."""
    lines = []
    for phase, parts in (("always", plan.fixed), ("a rollout adds", plan.rollout), ("training adds", plan.training)):
        lines.append(f"{phase:<40}{sum(parts.values()) / GB:7.2f} GB")
        lines += [f"  {name:<38}{size / GB:7.2f}" for name, size in parts.items() if size]
    return "\n".join([*lines, f"{'peak of ' + profile.name:<40}{plan.peak / GB:7.2f} GB"])


def check_memory(profile: Profile, free: int | None = None) -> None:
    """Refuse a profile that the GPU cannot hold, before its weights are loaded; does nothing where no GPU is used.

    `free` is the card's free bytes, asked of the card if not given. Raises ConfigError with the setting to lower.
    """
    if free is None:
        if profile.device == "cpu" or not torch.cuda.is_available():
            return
        free = torch.cuda.mem_get_info()[0]
    shape = model_shape(profile)
    plan = memory_plan(profile, shape)
    if plan.peak <= free:
        return
    largest, size = max((plan.fixed | plan.rollout | plan.training).items(), key=lambda part: part[1])
    ways: dict[str, Any] = {}
    for setting, value in _smaller(profile):
        smaller = profile.model_copy(update={setting: value})
        if setting not in ways and memory_plan(smaller, shape).peak <= free:
            ways[setting] = value
    would_fit = " or ".join(f"{setting}={str(value).lower()}" for setting, value in ways.items())
    raise ConfigError(
        f"profile {profile.name!r} needs {plan.peak / GB:.1f} GB of GPU memory at its peak, and {free / GB:.1f} GB are "
        f"free; the largest part is {largest} ({size / GB:.1f} GB). "
        + (f"It would fit with {would_fit}" if ways else f"No one setting is enough: {TOGETHER}")
    )


def _smaller(profile: Profile) -> Iterator[tuple[str, Any]]:
    """One setting lowered, each by little at first."""
    group, least = profile.group_size, profile.max_prompt_tokens + profile.max_response_tokens
    yield from (("rollout_rows", n) for n in range((profile.rollout_rows - 1) // group * group, 0, -group))
    yield from (("micro_batch_tokens", n) for n in range(profile.micro_batch_tokens - 512, 511, -512))
    yield from (("max_context_tokens", n) for n in range(profile.max_context_tokens - 256, least - 1, -256))
    if profile.quantization == "nf4" and profile.sampling_weights == "dequantized":
        yield "sampling_weights", "quantized"
    if not profile.gradient_checkpointing:
        yield "gradient_checkpointing", True
