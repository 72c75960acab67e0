"""The paper's ways to answer, side by side: trained where they are trained, and all asked the same questions.

`searchr1 experiment ten_ways`. Each method of ten_ways.yaml leaves FOLDER/seed<N>/<method>/, an evaluation folder, and
the trained ones FOLDER/seed<N>/<method>-training/, a run folder; the same call again resumes. `analysis/table.py`
makes the table.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from searchr1_lite.config import Profile, load_profile
from searchr1_lite.evaluation.evaluate import evaluate_into
from searchr1_lite.training.loop import train

TEN_WAYS = Path(__file__).with_name("ten_ways.yaml")


class Method(BaseModel):
    """`training`: what its profile says besides; None where nothing is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: str
    model: Literal["base", "instruct"]
    training: dict[str, Any] | None = None


METHODS = {
    name: Method(**method) for name, method in yaml.safe_load(TEN_WAYS.read_text(encoding="utf-8"))["methods"].items()
}


def instruct_model(base: str) -> str:
    """The model like this base that was tuned to follow instructions, by the names that Qwen's have."""
    return "data/tiny-instruct" if base == "data/tiny-base" else f"{base}-Instruct"


def profile_of(method: Method, profile: Profile, instruct: str) -> Profile:
    """The profile with the method's strategy, model and training."""
    model = instruct if method.model == "instruct" else profile.model
    changed = {"strategy": method.strategy, "model": model} | (method.training or {})
    return Profile.model_validate(profile.model_dump() | changed)


def run_method(name: str, profile: Profile, instruct: str, folder: Path) -> dict[str, Any]:
    """Train a method if it is trained, ask it, and return its evaluation.json; what is finished is not made again."""
    chosen, adapter = profile_of(METHODS[name], profile, instruct), None
    if METHODS[name].training is not None:
        adapter = train(chosen, folder / f"{name}-training") / "adapter"
    return evaluate_into(folder / name, chosen, "both", adapter)


def run_ten_ways(folder: Path, seeds: Sequence[int], methods: Sequence[str] = (), **settings: Any) -> None:
    """All methods, or those named, with each seed; `settings` replace those of the profile "tiny"."""
    began, methods = time.monotonic(), methods or list(METHODS)
    for seed in seeds:
        profile = load_profile("tiny", **settings | {"seed": seed})
        for number, name in enumerate(methods, 1):
            result = run_method(name, profile, instruct_model(profile.model), folder / f"seed{seed}")
            scores = ", ".join(f"{kind} {result[kind]['exact_match']:.3f}" for kind in ("greedy", "sampled"))
            minutes = (time.monotonic() - began) / 60
            progress = f"seed {seed}, {number} of {len(methods)}: {name}, exact match {scores}"
            print(f"{progress}; {minutes:.1f} minutes so far", flush=True)
