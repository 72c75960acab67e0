"""Plain matrices while writing: the same function as the 4-bit layers with their adapter, and nothing left behind."""

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from searchr1_lite.config import load_profile
from searchr1_lite.rollouts.dequantize import dequantized_weights
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy, load_policy
from searchr1_lite.types import Question

IDS = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))


def adapted(tmp_path, quantization: str, dtype: str) -> Policy:
    """A model with an adapter that says something (a fresh one has B = 0)."""
    make_model(544).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    profile = load_profile("tiny", model=str(tmp_path), quantization=quantization, dtype=dtype)
    policy = load_policy(profile)
    assert policy.quantization == quantization
    policy.model = get_peft_model(policy.model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    policy.model.eval()
    return policy


@torch.no_grad()
def logits(policy: Policy) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=policy.model.dtype == torch.bfloat16):
        return policy.model(input_ids=IDS).logits.float()


def plain_layers(policy: Policy) -> list[str]:
    return [name for name, module in policy.model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 0.0)])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_same_function(tmp_path, quantization, dtype, within):
    policy = adapted(tmp_path, quantization, dtype)
    before = logits(policy)
    with policy.model.disable_adapter():
        assert (logits(policy) - before).abs().max() > 0.1  # the adapter matters
    with dequantized_weights(policy.model):
        changed = plain_layers(policy)
        assert (logits(policy) - before).abs().max() <= within
    assert len(changed) == (0 if (quantization, dtype) == ("none", "bfloat16") else 14)
    # in float32 the adapter is inside; in bfloat16 it stays beside its base
    assert all(name.endswith("base_layer") == (dtype == "bfloat16") for name in changed)
    assert plain_layers(policy) == []
    assert torch.equal(logits(policy), before)


def test_it_follows_the_adapter_and_leaves_training_alone(tmp_path):
    policy = adapted(tmp_path, "nf4", "float32")
    packed = {name: value.clone() for name, value in policy.model.state_dict().items()}
    for _ in range(2):
        before = logits(policy)
        with dequantized_weights(policy.model):
            assert torch.allclose(logits(policy), before, atol=1e-5)
        for name, value in policy.model.state_dict().items():
            assert "lora_" in name or torch.equal(value, packed[name]), name
        policy.model.train()
        policy.model(input_ids=IDS).logits.square().mean().backward()
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                assert parameter.grad.abs().max() > 0, name
                parameter.data -= parameter.grad
                parameter.grad = None
        policy.model.eval()
        assert (logits(policy) - before).abs().max() > 1e-4


def test_an_adapter_that_is_switched_off_stays_off(tmp_path):
    policy = adapted(tmp_path, "nf4", "float32")
    with policy.model.disable_adapter():
        base = logits(policy)
        with dequantized_weights(policy.model):
            assert torch.allclose(logits(policy), base, atol=1e-5)
            assert all(name.endswith("base_layer") for name in plain_layers(policy))


def test_nothing_stays_after_an_error_and_the_setting_is_heeded(tmp_path, retriever, profile):
    policy = adapted(tmp_path, "nf4", "float32")
    seen = []

    class StopHereError(Exception): ...

    hook = policy.model.register_forward_pre_hook(lambda *_: seen.append(len(plain_layers(policy))))
    short = profile.model_copy(update={"max_turns": 0, "max_response_tokens": 1})
    for choice in ("dequantized", "quantized"):
        settings = short.model_copy(update={"sampling_weights": choice})
        rollout(policy, [Question("q", "Who?", ("x",))], retriever, settings)
    hook.remove()
    assert seen == [14, 0]
    with pytest.raises(StopHereError), dequantized_weights(policy.model):
        raise StopHereError
    assert plain_layers(policy) == []
