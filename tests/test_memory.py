"""The memory plan: hand-computed figures, and what torch really holds on a small model of the same make."""

import re
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import searchr1
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

from searchr1_lite import memory
from searchr1_lite.config import PROFILES, ROOT, ConfigError, load_profile
from searchr1_lite.memory import check_memory, memory_plan, model_shape, nf4_bytes
from searchr1_lite.rollouts import decoding
from searchr1_lite.rollouts.dequantize import dequantized_weights
from searchr1_lite.rollouts.policy import Policy, load_policy

sys.path.insert(0, str(ROOT / "benchmarks"))
from memory import CARDS, model_config, predicted  # benchmarks/memory.py

ROWS, TOKENS = 4, 128  # of the micro-batch that is measured


def profile_of(folder: Path, config: Qwen2Config, **settings):
    config.save_pretrained(folder)
    return load_profile("qwen2.5-3b-4bit", model=str(folder), device="cpu", retriever="bm25", **settings)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The 3B profile with the true shape, and that shape."""
    profile = profile_of(tmp_path_factory.mktemp("3b"), model_config("Qwen/Qwen2.5-3B"))
    return profile, model_shape(profile)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    """Settings for a shrunken Qwen2.5-3B (4 layers, MLP 5.4 times as wide as the stream) and a loader of it."""
    folder = tmp_path_factory.mktemp("small")
    config = model_config(
        "Qwen/Qwen2.5-3B",
        **{"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1376, "num_attention_heads": 8},
        vocab_size=2048,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def settings(**changes):
        return profile_of(folder, config, **{"max_context_tokens": 4096, **changes})

    return settings


def with_adapter(profile):
    """A policy's model with a 32-bit adapter, ready to be trained, as training/loop.py makes it."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=profile.lora_r, target_modules=profile.lora_target, task_type="CAUSAL_LM")
    model = get_peft_model(load_policy(profile).model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.enable_input_require_grads()
    if profile.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


class Living(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still alive, and the most there ever were."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        owned = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self.seen = {storage._cdata: lambda storage=storage: storage for storage in owned}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen and self.seen[key]() is not None:
            return

        def gone(_):
            self.now -= size
            self.seen.pop(key, None)

        self.now += size
        self.peak = max(self.peak, self.now)
        self.seen[key] = weakref.ref(storage, gone)


def batch():
    ids = torch.randint(0, 600, (ROWS, TOKENS))
    attention = torch.ones_like(ids)
    attention[0, -1] = 0  # padding: attention then takes a mask, as it does in a real micro-batch
    return {"input_ids": ids, "attention_mask": attention, "use_cache": False}


@pytest.fixture
def autocast(monkeypatch):
    """bfloat16 autocast as on a GPU; PEFT asks for the GPU's, so it gets the CPU's answer."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: asked("cpu"))
    return lambda profile: torch.autocast("cpu", torch.bfloat16, enabled=profile.dtype == "bfloat16")


KINDS = [("nf4", "bfloat16"), ("none", "bfloat16"), ("nf4", "float32")]


@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_activations_of_forward_and_backward(small, autocast, monkeypatch, quantization, dtype, checkpointing):
    """What autograd keeps after a forward, and the most that lives at once until backward is through."""
    monkeypatch.setattr(memory, "LOGITS", 0)  # the head is not part of what runs here
    profile = small(quantization=quantization, dtype=dtype, gradient_checkpointing=checkpointing)
    model = with_adapter(profile)
    parts = memory_plan(  # as for rows of the measured length, which bounds the mask
        profile.model_copy(update={"max_context_tokens": TOKENS, "micro_batch_tokens": ROWS * TOKENS})
    ).training
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(profile):
        states = model.base_model.model.model(**batch()).last_hidden_state
    measured = sum(size for pointer, size in saved.items() if pointer not in owned)
    kept = parts["kept hidden states"] + parts["activations of all layers"]
    kept += 0 if checkpointing else parts["adapter for autocast"]  # each layer casts its own again
    assert states.requires_grad and kept == pytest.approx(measured, rel=0.15)
    del states
    with Living(model) as living, autocast(profile):
        states = model.base_model.model.model(**batch()).last_hidden_state
        states.backward(torch.ones_like(states))
    assert sum(parts.values()) == pytest.approx(living.peak, rel=0.15)


@pytest.mark.parametrize("sampling", ["quantized", "dequantized"])
def test_the_peak_of_a_rollout(small, autocast, monkeypatch, tokenizer, sampling):
    """Prompts and observations that are read together by rows that fill their slots, then a sampled token each."""
    monkeypatch.setattr(decoding, "READ_TOKENS", 512)
    monkeypatch.setattr(memory, "READ_TOKENS", 512)
    settings = {"max_prompt_tokens": 460, "max_response_tokens": 32, "max_observation_tokens": 32}
    profile = small(sampling_weights=sampling, rollout_rows=16, max_context_tokens=500, **settings)
    policy = Policy(with_adapter(profile).eval(), tokenizer, torch.device("cpu"), "nf4")
    weights = dequantized_weights(policy.model) if sampling == "dequantized" else nullcontext()
    with Living(policy.model) as living, torch.no_grad(), autocast(profile), weights:
        sampler = decoding.LocalSampler(policy, 16, max_tokens=2)
        sampler.open(range(16), [5] * 450, [np.random.default_rng(row) for row in range(16)])
        while not (ended := sampler.advance()):
            pass
        for row, *_ in ended:
            sampler.read(row, [5] * 32)
        sampler.advance()
    assert sum(memory_plan(profile).rollout.values()) == pytest.approx(living.peak, rel=0.15)


def test_the_bytes_of_weights_adapter_and_optimizer(small):
    profile = small()
    model = with_adapter(profile)
    plan = memory_plan(profile)
    weights = 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            weights += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            weights += sum(part.nbytes for part in parts)
    assert plan.fixed["weights, linear layers"] + plan.fixed["weights, embeddings and the rest"] == weights
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert plan.fixed["adapter"] == sum(parameter.nbytes for parameter in trained)
    optimizer = torch.optim.AdamW(trained)
    model(**batch()).logits.float().sum().backward()
    optimizer.step()
    assert plan.training["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    state = [value.nbytes for values in optimizer.state.values() for name, value in values.items() if name != "step"]
    assert plan.fixed["AdamW state"] == sum(state)


def test_the_bytes_of_the_cache(small):
    profile = small(rollout_rows=ROWS, group_size=2, max_context_tokens=4096, dtype="float32")
    model, cache = load_policy(profile).model, DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.zeros((ROWS, TOKENS), dtype=torch.long), past_key_values=cache)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == ROWS * TOKENS * memory.cache_bytes_per_token(profile, model_shape(profile))
    assert memory_plan(profile).rollout["key-value cache"] == measured / TOKENS * (4096 + 256)  # grown by 256 at a time


@pytest.mark.parametrize("parameters", [1, 64, 65, 64 * 256, 64 * 257, 100_003])
def test_a_4_bit_matrix_takes_what_bitsandbytes_gives_it(parameters):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(1, parameters), quant_type="nf4", compress_statistics=True)
    parts = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert sum(part.nbytes for part in parts) == nf4_bytes(parameters)


def test_qwen_3b_by_hand(real):
    profile, shape = real
    # a layer: 2 x 2048 x 2048 for query and output, 2 x 2048 x 256 for keys and values, 3 x 2048 x 11008
    assert sum(shape.linear) == 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008) == 2_774_532_096
    # r x (in + out) for each of the seven
    assert shape.adapter == 36 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008)) == 29_933_568
    assert memory.cache_bytes_per_token(profile, shape) == 36 * 2 * 256 * 2 == 36 * 1024
    plan = memory_plan(profile, shape)
    assert plan.fixed["weights, linear layers"] == pytest.approx(1.43e9, rel=0.005)
    assert plan.fixed["weights, embeddings and the rest"] == pytest.approx(151936 * 2048 * 2, rel=0.002)
    assert plan.rollout["key-value cache"] == 30 * 4352 * 36 * 1024  # 4,097 entries, in whole 256s
    assert plan.rollout["plain copy of the weights"] == 2 * 2_774_532_096
    assert plan.training["kept hidden states"] == pytest.approx(2 * 0.604e9, rel=0.07)  # 36 x 16.8 MB a trajectory
    assert plan.peak == sum(plan.fixed.values()) + sum(plan.rollout.values()) > sum(plan.training.values())


def test_a_head_of_its_own_is_not_packed_and_counts_twice(tmp_path):
    shape = model_shape(profile_of(tmp_path, model_config("Qwen/Qwen2.5-7B")))
    assert shape.other == pytest.approx(2 * 152064 * 3584, rel=0.001)
    assert sum(shape.linear) + shape.other == pytest.approx(7.616e9, rel=0.001)


@pytest.mark.parametrize("name", CARDS)
def test_every_profile_fits_its_card_with_room_to_spare(name):
    assert predicted(name)[0]["peak"] < CARDS[name] - 0.5


@pytest.mark.parametrize("name", CARDS)
def test_the_figures_in_the_comments_of_a_profile_are_those_of_the_plan(name):
    text, found = (PROFILES / f"{name}.yaml").read_text(encoding="utf-8"), predicted(name)[0]
    training = sum(found["always"].values()) + sum(found["training"].values())
    assert re.search(r"^rollout_rows.*memory: ([\d.]+) GB", text, re.M)[1] == f"{found['peak']:.1f}"
    assert re.search(r"^micro_batch_tokens.*training ([\d.]+) GB", text, re.M)[1] == f"{training:.1f}"


SETTINGS = ["rollout_rows", "micro_batch_tokens", "max_context_tokens", "lora_r"]


@given(st.sampled_from(SETTINGS), st.integers(1, 5), st.sampled_from(["quantized", "dequantized"]), st.booleans())
def test_nothing_gets_smaller_when_a_setting_grows(real, setting, times, sampling, checkpointing):
    profile, shape = real
    profile = profile.model_copy(update={"sampling_weights": sampling, "gradient_checkpointing": checkpointing})
    larger = profile.model_copy(update={setting: getattr(profile, setting) * times})
    assert memory_plan(larger, shape).peak >= memory_plan(profile, shape).peak
    assert memory_plan(profile, replace(shape, layers=shape.layers + times)).peak > memory_plan(profile, shape).peak


def test_what_cannot_fit_is_refused_with_the_values_that_would(real):
    profile, _ = real
    check_memory(profile, free=15 * 10**9)
    with pytest.raises(ConfigError) as raised:
        check_memory(profile, free=12_700_000_000)
    message = str(raised.value)
    assert "needs 14.3 GB of GPU memory at its peak, and 12.7 GB are free" in message
    assert "the largest part is plain copy of the weights (5.5 GB)" in message
    # a row is 4,352 x 36 KiB = 0.1604 GB: 14.26 - 10 x 0.1604 = 12.66; 256 tokens of 30 rows are 0.2831 GB, and
    # five times that is not enough
    assert "It would fit with rollout_rows=20 or max_context_tokens=2560 or sampling_weights=quantized" in message
    assert "micro_batch_tokens" not in message  # the rollout is what does not fit
    for setting in message.partition("fit with ")[2].split(" or "):
        name, value = setting.split("=")
        value = value if name == "sampling_weights" else int(value)
        check_memory(profile.model_copy(update={name: value}), free=12_700_000_000)


def test_a_training_step_that_cannot_fit_and_a_hopeless_case(real):
    profile, _ = real
    with pytest.raises(ConfigError, match=r"largest part is activations of all .* with gradient_checkpointing=true$"):
        check_memory(profile.model_copy(update={"gradient_checkpointing": False}), free=15 * 10**9)
    with pytest.raises(ConfigError, match=r"largest part is one layer again .* with micro_batch_tokens=\d+$"):
        check_memory(profile.model_copy(update={"micro_batch_tokens": 65536}), free=15 * 10**9)
    with pytest.raises(ConfigError, match="No one setting is enough: lower rollout_rows, micro_batch_tokens"):
        check_memory(profile, free=4 * 10**9)


def test_without_a_gpu_nothing_is_refused(real, monkeypatch):
    profile, _ = real
    monkeypatch.setattr(memory, "model_shape", lambda profile: pytest.fail("the model is not asked for"))
    check_memory(profile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_memory(profile.model_copy(update={"device": "auto"}))


def test_the_card_is_asked_where_there_is_one(real, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * 10**9, 16 * 10**9))
    with pytest.raises(ConfigError, match=r"8\.0 GB are free"):
        check_memory(real[0].model_copy(update={"device": "auto"}))


def test_a_server_that_writes_takes_nothing_here(real):
    profile, shape = real
    assert memory_plan(profile.model_copy(update={"sampler": "vllm"}), shape).rollout == {}


def test_an_encoder_takes_its_share_with_every_kind_of_vectors(real):
    profile, shape = real
    sizes = {
        kind: memory_plan(profile.model_copy(update={"retriever": kind}), shape).fixed["encoder of dense retrieval"]
        for kind in (
            "bm25",
            "empty",
            "http://127.0.0.1:8000/retrieve",
            "flat",
            "hnsw",
            "ivf-pq",
            "faiss:SQ8",
            "bm25+flat",
        )
    }
    assert [kind for kind, size in sizes.items() if size] == ["flat", "hnsw", "ivf-pq", "faiss:SQ8", "bm25+flat"]
    assert memory_plan(profile.model_copy(update={"reranker": "a"}), shape).fixed["reranker"] == memory.ENCODER


def test_the_command_prints_the_table(capsys):
    searchr1("memory", "--profile", "tiny", "rollout_rows=8", "device=cpu")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("always") and printed[-1].startswith("peak of tiny")
    for wrong in (["--profile", "huge"], ["model=no/where/at/all"], ["lora_target=nothing"]):
        with pytest.raises(SystemExit, match=r"^error: "):
            searchr1("memory", *wrong)
