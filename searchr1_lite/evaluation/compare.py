"""The paper's ways to answer, side by side: trained where they are trained, and all asked the same questions.

    python -m searchr1_lite.evaluation.compare --out runs/ten-ways --seeds 0 1 2       (make ten-ways)
    python -m searchr1_lite.evaluation.compare --out runs/two --ways rag search_r1_base --seeds 0 topk=1

A way is a strategy, a model (the profile's, or the one like it that follows instructions), and for some a training;
they differ in nothing but what WAYS says. Each leaves OUT/seed<N>/<way>/, an evaluation folder, and the trained ones
OUT/seed<N>/<way>-training/, a run folder. The same command again goes on after a cut. `analysis/table.py` makes the
table. As in the paper (arXiv 2503.09516), what only prompts asks the instruct model, which follows prompts; which
model its supervised fine-tuning began from it does not say, here it is the base.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from searchr1_lite.config import Profile
from searchr1_lite.evaluation.evaluate import evaluate_into
from searchr1_lite.training.loop import train


class Way(NamedTuple):
    """`training`: what its profile says besides; None where nothing is trained."""

    strategy: str
    model: Literal["base", "instruct"]
    training: dict[str, Any] | None = None


WAYS = {
    "direct": Way("direct", "instruct"),
    "cot": Way("cot", "instruct"),
    "ircot": Way("ircot", "instruct"),
    "search_o1": Way("search_o1", "instruct"),
    "rag": Way("rag", "instruct"),
    "inter": Way("inter", "instruct"),
    "sft": Way("direct", "base", {"algorithm": "sft"}),
    "r1_base": Way("r1", "base", {}),
    "r1_instruct": Way("r1", "instruct", {}),
    # five candidates a question: the paper, section "Baselines"
    "rejection_sampling": Way("search_r1", "instruct", {"algorithm": "rejection_sampling", "group_size": 5}),
    "search_r1_base": Way("search_r1", "base", {}),
    "search_r1_instruct": Way("search_r1", "instruct", {}),
}


def instruct_model(base: str) -> str:
    """The model like this base that was tuned to follow instructions, by the names that Qwen's have."""
    return "data/tiny-instruct" if base == "data/tiny-base" else f"{base}-Instruct"


def profile_of(way: Way, profile: Profile, instruct: str) -> Profile:
    """The profile with the way's strategy, model and training."""
    model = instruct if way.model == "instruct" else profile.model
    changed = {"strategy": way.strategy, "model": model} | (way.training or {})
    return Profile.model_validate(profile.model_dump() | changed)


def follow(name: str, profile: Profile, instruct: str, folder: Path) -> dict[str, Any]:
    """Train a way if it is trained, ask it, and return its evaluation.json; what is there already is not made again."""
    chosen, adapter = profile_of(WAYS[name], profile, instruct), None
    if WAYS[name].training is not None:
        adapter = train(chosen, folder / f"{name}-training") / "adapter"
    return evaluate_into(folder / name, chosen, "both", adapter)
