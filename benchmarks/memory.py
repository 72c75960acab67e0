"""The predicted memory of the profiles for real models, part by part; searchr1_lite/memory.py does the arithmetic.

    python benchmarks/memory.py

Nothing is downloaded: the shapes of Qwen2.5 stand here, from the config.json of each model. Nothing is measured
either; benchmarks/gpu.py does that, on a GPU.
"""

from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Qwen2Config

from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.files import write_json
from searchr1_lite.memory import GB, format_plan, memory_plan
from searchr1_lite.provenance import provenance

FIELDS = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads vocab_size".split()
SHAPES = {
    "Qwen/Qwen2.5-0.5B": dict(zip(FIELDS, (24, 896, 4864, 14, 2, 151936), strict=True)),
    "Qwen/Qwen2.5-3B": dict(zip(FIELDS, (36, 2048, 11008, 16, 2, 151936), strict=True)),
    "Qwen/Qwen2.5-7B": dict(zip(FIELDS, (28, 3584, 18944, 28, 4, 152064), strict=True)),
}
CARDS = {"qwen2.5-0.5b": 8, "qwen2.5-3b-4bit": 16, "qwen2.5-3b-4bit-24gb": 24, "qwen2.5-7b-4bit": 24}  # GB, by profile


def model_config(model: str, **changes: Any) -> Qwen2Config:
    """The config of a Qwen2.5 by its name on the hub; only the largest has a head of its own."""
    return Qwen2Config(
        **SHAPES[model] | changes, tie_word_embeddings=model != "Qwen/Qwen2.5-7B", max_position_embeddings=32768
    )


def predicted(name: str, **settings: Any) -> tuple[dict[str, Any], str]:
    """A profile's settings that matter and the parts of its memory in GB; and the same as a table to print."""
    profile = load_profile(name, **settings)
    with TemporaryDirectory() as folder:
        model_config(profile.model).save_pretrained(folder)
        plan = memory_plan(profile.model_copy(update={"model": folder}))
    asked = ("model", "quantization", "sampling_weights", "rollout_rows", "max_context_tokens", "micro_batch_tokens")
    phases = {"always": plan.fixed, "rollout": plan.rollout, "training": plan.training}
    gigabytes = {phase: {part: round(size / GB, 3) for part, size in parts.items()} for phase, parts in phases.items()}
    result = {key: getattr(profile, key) for key in asked} | gigabytes | {"peak": round(plan.peak / GB, 3)}
    return result, format_plan(profile, plan)


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/benchmarks/memory.json")
    given = parser.parse_args(arguments)
    profiles = {}
    for name, card in CARDS.items():
        profiles[name], table = predicted(name)
        profiles[name] = {"card": card} | profiles[name]
        print(table, end="\n\n")
    about = {"what": "predicted, not measured", "unit": "GB of 10^9 bytes"}
    write_json(given.out, provenance(["torch", "transformers", "peft"]) | about | {"profiles": profiles})


if __name__ == "__main__":
    main()
