"""Plain matrices to sample with: a 4-bit base unpacked once a rollout, not once a token.

A 4-bit layer unpacks its weights in every forward. That is nothing in training, where a forward reads thousands of
tokens, and most of the work while writing, where it reads one a row. What is unpacked here are the very values that
the layer computes with, so sampling stays on-policy; they are dropped before training goes on. In float32 the adapter
is added to them. In bfloat16, which would round much of a small adapter away, it stays beside them, as in training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import linear


@contextmanager
def plain_weights(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, 4-bit layers, and in float32 layers with an adapter, compute with one plain matrix each.

    That takes memory for the base in its compute type. Gradients do not flow, and training must wait until the end.
    """
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer

    plain: list[torch.nn.Module] = []
    merged: set[torch.nn.Module] = set()
    try:
        for module in model.modules():
            adapted = isinstance(module, LoraLayer)
            base = module.get_base_layer() if adapted else module
            packed = isinstance(base, Linear4bit)
            if base in merged or not (packed or (adapted and isinstance(base, torch.nn.Linear))):
                continue
            weight = _unpacked(base) if packed else base.weight.data
            if adapted and (weight.dtype != torch.float32 or module.disable_adapters):
                continue  # its base, which comes next, is unpacked alone
            if adapted:
                merged.add(base)
                weight = weight + sum(module.get_delta_weight(name).data for name in module.active_adapters)
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
