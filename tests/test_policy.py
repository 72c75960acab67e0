"""Loading a policy, on a shrunken Qwen2.5-3B with random weights saved to a folder."""

import builtins
import shutil

import pytest
import torch
from conftest import make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from searchr1_lite.config import load_profile
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import PolicyError, load_policy, with_adapter
from searchr1_lite.types import Question


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Qwen2.5-3B's shape in small: grouped attention, tied embeddings, more embeddings than tokens."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=576,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def profile_for(folder, **settings):
    budgets = {"max_prompt_tokens": 600, "max_response_tokens": 12, "max_turns": 1, "device": "cpu"}
    return load_profile("tiny", model=str(folder), **{**budgets, **settings})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loads_and_rolls_out(folder, retriever, quantization, dtype):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    profile = profile_for(folder, quantization=quantization, dtype=dtype)
    policy = load_policy(profile)
    assert policy.quantization == quantization
    assert not policy.model.training
    assert policy.device == torch.device("cpu")
    weight = policy.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == (torch.uint8 if quantization == "nf4" else getattr(torch, dtype))
    assert policy.model.model.norm.weight.dtype == getattr(torch, dtype)
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight  # tied, and not quantised
    trajectory = rollout(policy, [Question("q", "Who?", ("x",))], retriever, profile)[0]
    assert len(trajectory.turns) == 2
    assert all(logprob < 0 for logprob, own in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if own)


def test_nf4_is_double_quantised_and_close(folder):
    bnb = pytest.importorskip("bitsandbytes")
    quantised = load_policy(profile_for(folder, quantization="nf4")).model.model.layers[1].mlp.down_proj.weight
    plain = load_policy(profile_for(folder, quantization="none")).model.model.layers[1].mlp.down_proj.weight
    assert (quantised.quant_state.quant_type, quantised.quant_state.nested) == ("nf4", True)
    error = bnb.functional.dequantize_4bit(quantised.data, quantised.quant_state) - plain
    assert 0.01 < error.norm() / plain.norm() < 0.15


def test_nf4_trains_after_a_forward_without_gradient(folder):
    """bitsandbytes repacks weights at such a forward on CPUs with AVX512-BF16; the next training step then fails."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    policy = load_policy(profile_for(folder, quantization="nf4"))
    linears = [module for module in policy.model.modules() if isinstance(module, Linear4bit)]
    assert len(linears) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in linears)
    model = get_peft_model(policy.model, LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, before, atol=1e-5)


def test_without_bitsandbytes_it_runs_unquantised_and_says_so(folder, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "bitsandbytes":
            raise ImportError("no wheel for this platform")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.warns(RuntimeWarning, match=r"unquantised \(ImportError: no wheel for this platform\)"):
        policy = load_policy(profile_for(folder, quantization="nf4"))
    assert policy.quantization == "none"
    assert policy.model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def save_tokenizer(folder, path, **changes):
    """A copy of the model with another tokenizer."""
    Qwen2ForCausalLM.from_pretrained(folder).save_pretrained(path)
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_missing_pad_token(folder, tmp_path):
    save_tokenizer(folder, tmp_path, pad_token=None).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"has no pad token; set one in its tokenizer_config.json"):
        load_policy(profile_for(tmp_path, quantization="none"))


def test_foreign_tokenizer(folder, tmp_path):
    tokenizer = save_tokenizer(folder, tmp_path)
    tokenizer.add_tokens([f"new{i}" for i in range(100)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"has 639 tokens but the model embeds 576: they do not belong together"):
        load_policy(profile_for(tmp_path, quantization="none"))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_hub_out_of_reach_says_how_to_get_the_model(monkeypatch, quantization):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    profile = profile_for("nobody/no-such-model", quantization=quantization)
    with pytest.raises(PolicyError, match=r"nobody/no-such-model: .*hf download nobody/no-such-model --local-dir"):
        load_policy(profile)


def test_missing_folder_is_not_asked_of_the_hub(tmp_path):
    with pytest.raises(PolicyError, match="there is no model folder"):
        load_policy(profile_for(tmp_path / "nothing"))


def test_folder_without_weights(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="the folder cannot be loaded"):
        load_policy(profile_for(tmp_path, quantization="none"))


def test_no_gpu_is_one_clear_error(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(PolicyError, match="device: cuda, but no GPU is visible"):
        load_policy(profile_for(folder, device="cuda"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter of the model that changes what it says."""
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_trained_adapter_is_put_on_as_peft_does(folder, adapter, quantization):
    profile, ids = profile_for(folder, quantization=quantization, dtype="bfloat16"), torch.arange(12)[None]
    with torch.no_grad():
        base = load_policy(profile).model(input_ids=ids).logits
        policy = with_adapter(load_policy(profile), adapter)
        reference = PeftModel.from_pretrained(load_policy(profile).model, adapter)(input_ids=ids).logits
        assert torch.equal(policy.model(input_ids=ids).logits, reference)
    assert not torch.allclose(base, reference, atol=0.1)
    assert policy.quantization == quantization
    assert not policy.model.training
    assert {p.dtype for name, p in policy.model.named_parameters() if "lora_" in name} == {torch.float32}


def changed_adapter(adapter, path, change):
    """A copy of the adapter whose weights `change` has changed."""
    shutil.copytree(adapter, path)
    weights = load_file(path / "adapter_model.safetensors")
    change(weights)  # in place
    save_file(weights, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(next(iter(weights))), "1 weights, such as .*lora_A.*, do not fit this model"),
        (
            lambda weights: weights.update(
                {key.replace("layers.1", "layers.7"): weights.pop(key) for key in list(weights) if "layers.1" in key}
            ),
            "28 weights, such as .*layers.7.*, do not fit",
        ),
        (
            lambda weights: weights.update({key: weights[key][:, :3].contiguous() for key in weights}),
            "cannot be put on this model",
        ),
    ],
    ids=["one is missing", "of another layer", "of another shape"],
)
def test_an_adapter_that_does_not_fit_is_refused(folder, adapter, tmp_path, change, message):
    changed = changed_adapter(adapter, tmp_path / "adapter", change)
    with pytest.raises(PolicyError, match=message):
        with_adapter(load_policy(profile_for(folder, quantization="none")), changed)


def test_an_adapter_that_was_cut_off_or_is_not_there(folder, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    policy = load_policy(profile_for(folder, quantization="none"))
    with pytest.raises(PolicyError, match="the adapter cannot be put on this model"):
        with_adapter(policy, tmp_path / "adapter")
    with pytest.raises(PolicyError, match="the adapter cannot be put on this model"):
        with_adapter(policy, tmp_path / "nothing")
