"""Plain matrices in the place of 4-bit ones: made once a rollout to sample with, and once an update to learn with.

A 4-bit layer unpacks its weights in every forward. That is nothing where a forward reads thousands of tokens, and most
of the work while sampling, where it reads one a row. What is unpacked here are the very values that the layer computes
with, so sampling stays on-policy; they are dropped before training goes on. In float32 the adapter is added to them. In
bfloat16, which would round much of a small adapter away, it stays beside them, as in training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import linear


@contextmanager
def dequantized_weights(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, 4-bit layers, and in float32 those with an adapter, compute with a matrix made now.

    That takes memory for those layers in their compute type. Gradients do not flow, and training must wait.
    """
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer

    plain: list[torch.nn.Module] = []
    done: set[torch.nn.Module] = set()
    try:
        for module in model.modules():
            adapted = isinstance(module, LoraLayer)
            base = module.get_base_layer() if adapted else module
            if base in done or not isinstance(base, torch.nn.Linear):
                continue
            if "forward" in vars(module):  # made already, around this
                done.add(base)
                continue
            packed = isinstance(base, Linear4bit)
            weight = _unpacked(base) if packed else base.weight.data
            if adapted and (weight.dtype != torch.float32 or module.disable_adapters):
                continue  # its base, which comes next, is on its own
            if adapted:
                done.add(base)
                weight = weight + sum(module.get_delta_weight(name).data for name in module.active_adapters)
            if adapted or packed:
                module.forward = partial(linear, weight=weight, bias=base.bias)
                plain.append(module)
        yield
    finally:
        for module in plain:
            del module.forward  # the class's own shows again


def _unpacked(layer: torch.nn.Module) -> torch.Tensor:
    """The weights (out, in) of a 4-bit layer, in the type that it computes in."""
    from bitsandbytes.functional import dequantize_4bit

    state = layer.weight.quant_state
    return dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype or state.dtype)


@contextmanager
def merged_adapter(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, on a CPU in float32, a layer with an adapter is one matrix product, and gradients flow.

    4-bit weights are unpacked once, and the adapter's product, made anew in each forward, is added to them: fewer and
    larger operations, the same values but for rounding. Elsewhere, and with dropout, layers stay as they are: on a GPU
    the copies would cost the memory that 4 bits save.
    """
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer

    merged = []
    try:
        for module in model.modules():
            base = module.get_base_layer() if isinstance(module, LoraLayer) else None
            if not isinstance(base, torch.nn.Linear) or base.weight.device.type != "cpu" or len(module.lora_A) > 1:
                continue
            weight = _unpacked(base) if isinstance(base, Linear4bit) else base.weight
            if weight.dtype == torch.float32 and not any(getattr(x, "p", 0) for x in module.lora_dropout.values()):
                module.forward = partial(_with_delta, module, weight.detach(), base.bias)
                merged.append(module)
        yield
    finally:
        for module in merged:
            del module.forward


def _with_delta(module: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor):
    if not module.disable_adapters:
        for name in module.active_adapters:
            delta = module.lora_B[name].weight @ module.lora_A[name].weight
            weight = weight + module.scaling[name] * delta
    return linear(rows, weight, bias)
