"""Loading the model that writes: weights from a folder or the hub, in 4 bits where that works, and its tokenizer.

An adapter, trained or fresh, goes on top, unmerged: merging corrupts 4-bit weights in place. Saved are adapters alone.
"""

import copy
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from searchr1_lite.config import Profile, resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.provenance import provenance


class PolicyError(UserError):
    """A model or tokenizer that cannot be used; the message says what to do."""


@dataclass(slots=True)
class Policy:
    """A causal language model with its tokenizer. `quantization` is what is really in use, "nf4" or "none"."""

    model: Any
    tokenizer: Any
    device: torch.device
    quantization: str = "none"


def load_policy(profile: Profile) -> Policy:
    """The profile's model in eval mode. Raises PolicyError where the model, the tokenizer or the device is missing."""
    device = choose_device(profile.device)
    source = _source(profile.model)
    tokenizer = _from_pretrained(AutoTokenizer, source, profile.model)
    if profile.quantization == "nf4":
        model, quantization = _load_nf4(source, profile, device)
    else:
        model, quantization = _load(source, profile, device), "none"
    _check_tokenizer(tokenizer, model, profile.model)
    model.eval()
    return Policy(model, tokenizer, device, quantization)


def load_skeleton(profile: Profile) -> Any:
    """The profile's model without its weights, from its config alone: what it is made of, before it is loaded."""
    config = _from_pretrained(AutoConfig, _source(profile.model), profile.model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def with_adapter(policy: Policy, folder: Path) -> Policy:
    """The policy with the LoRA adapter of a PEFT folder on its model, which is changed in place, and in 32 bits.

    Raises PolicyError where the adapter is damaged or does not fit the model in every weight; PEFT alone would leave
    out what does not, with a warning at most.
    """
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing's new name in transformers
            model = get_peft_model(policy.model, PeftConfig.from_pretrained(str(folder)))
            found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    except Exception as error:  # peft and safetensors raise many kinds
        raise PolicyError(f"{folder}: the adapter cannot be put on this model: {error}") from error
    strange = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
    if strange:
        raise PolicyError(f"{folder}: {len(strange)} weights, such as {strange[0]}, do not fit this model")
    return replace(policy, model=model.eval())


def model_to_train(policy: Policy, profile: Profile) -> Any:
    """The policy's model with a fresh adapter in 32 bits; without one (`lora_r` 0), a copy whose weights all train."""
    set_seed(profile.seed)
    if not profile.lora_r:
        return copy.deepcopy(policy.model).requires_grad_(True)
    lora = LoraConfig(
        r=profile.lora_r,
        lora_alpha=profile.lora_alpha,
        lora_dropout=profile.lora_dropout,
        target_modules=profile.lora_target,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing's new name in transformers
        model = get_peft_model(policy.model, lora)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # small updates are lost in 16 bits
    return model


def save_weights(model: Any, policy: Policy, profile: Profile, run_folder: Path) -> None:
    """adapter/: the adapter alone, naming its base as the profile does, not where it lay on this machine.

    After full fine-tuning model/ instead: weights and tokenizer, to be used as the setting `model`.
    """
    if not profile.lora_r:
        model.save_pretrained(run_folder / "model")
        policy.tokenizer.save_pretrained(run_folder / "model")
        return
    folder = run_folder / "adapter"
    model.peft_config["default"].base_model_name_or_path = profile.model
    model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)  # an empty form for a model card


def autocast(profile: Profile, device: torch.device) -> torch.autocast:
    """On a GPU in bfloat16, 32-bit adapters compute in bfloat16, too."""
    return torch.autocast(device.type, torch.bfloat16, device.type == "cuda" and profile.dtype == "bfloat16")


def choose_device(name: str) -> torch.device:
    """The profile's `device`; of several GPUs the one that belongs to this process."""
    if name == "cuda" and not torch.cuda.is_available():
        raise PolicyError("the profile says device: cuda, but no GPU is visible here; use device=auto or device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def _source(model: str) -> str:
    """A folder if there is one, else the name as the hub knows it."""
    path = resolve_path(model)
    if path.is_dir():
        return str(path)
    if model.startswith((".", "/", "~", "data/")):
        raise PolicyError(f"there is no model folder {model!r}; the tiny base belongs to the repository")
    return model


def _from_pretrained(auto: Any, source: str, name: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise PolicyError(f"{name}: the folder cannot be loaded: {error}") from error
        raise PolicyError(
            f"{name}: no such folder, and the hub does not give it. Check the name and the connection, or fetch it "
            f"elsewhere with `hf download {name} --local-dir FOLDER` and set model to that folder "
            f"({str(error).splitlines()[0]})"
        ) from error


def _load(source: str, profile: Profile, device: torch.device, **options: Any) -> Any:
    dtype = getattr(torch, profile.dtype)
    model = _from_pretrained(AutoModelForCausalLM, source, profile.model, dtype=dtype, **options)
    return model if options else model.to(device)


def _load_nf4(source: str, profile: Profile, device: torch.device) -> tuple[Any, str]:
    """The model in 4 bits and "nf4", or, where bitsandbytes does not work, unquantised and "none", with a warning."""
    try:
        import bitsandbytes  # noqa: F401

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, profile.dtype),
        )
        model = _load(source, profile, device, quantization_config=config, device_map={"": device})
        _keep_weights_unpacked(model)
        with torch.no_grad():  # some platforms load 4-bit weights and fail at the first use
            model.eval()(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device))
        return model, "nf4"
    except PolicyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"4-bit loading does not work here, running unquantised ({reason})", RuntimeWarning, stacklevel=3)
    return _load(source, profile, device), "none"


def _keep_weights_unpacked(model: Any) -> None:
    """Stop bitsandbytes repacking weights for AVX512-BF16 at the first forward: later training steps then fail."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_tokenizer(tokenizer: Any, model: Any, name: str) -> None:
    if tokenizer.pad_token_id is None:
        raise PolicyError(
            f"{name}: the tokenizer has no pad token; set one in its tokenizer_config.json, for instance "
            f'"pad_token": "{tokenizer.eos_token or "<|endoftext|>"}"'
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise PolicyError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens but the model embeds {embeddings}: "
            "they do not belong together"
        )


def environment(policy: Policy) -> dict[str, Any]:
    """When, on what and with what a run was made."""
    made = provenance(["torch", "transformers", "trl", "peft", "bitsandbytes"])
    made["machine"]["gpu"] = torch.cuda.get_device_name() if policy.device.type == "cuda" else None
    return made | {"quantization": policy.quantization, "processes": PartialState().num_processes}
