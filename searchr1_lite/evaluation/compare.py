"""The paper's ways to answer, side by side: trained where they are trained, and all asked the same questions.

    python -m searchr1_lite.evaluation.compare --out runs/ten-ways --seeds 0 1 2       (make ten-ways)
    python -m searchr1_lite.evaluation.compare --out runs/two --ways rag search_r1_base --seeds 0 topk=1

A way is a strategy, a model (the profile's, or the one like it that follows instructions), and for some a training;
they differ in nothing but what WAYS says. Each leaves OUT/seed<N>/<way>/, an evaluation folder, and the trained ones
OUT/seed<N>/<way>-training/, a run folder. The same command again goes on after a cut. `analysis/table.py` makes the
table. As in the paper (arXiv 2503.09516), what only prompts asks the instruct model, which follows prompts; which
model its supervised fine-tuning began from it does not say, here it is the base.
"""

import re
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, Literal, NamedTuple

from searchr1_lite.config import Profile, load_profile
from searchr1_lite.evaluation.__main__ import evaluate_into
from searchr1_lite.plain import plain
from searchr1_lite.training.__main__ import ERRORS, setting
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


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m searchr1_lite.evaluation.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="tiny", help="a profile's name or a .yaml file")
    parser.add_argument("--out", type=Path, required=True, help="made here; a comparison that was cut off goes on")
    parser.add_argument("--instruct", help="the model that follows instructions; else that of the base's name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("settings", nargs="*", type=setting, metavar="name=value")
    # Settings may stand anywhere; after a list argparse would take them for its next members.
    typed = sorted(sys.argv[1:] if arguments is None else arguments, key=lambda one: not re.match(r"\w+=", one))
    given = parser.parse_intermixed_args(typed)
    began = time.monotonic()
    try:
        for seed in given.seeds:
            profile = load_profile(given.profile, **dict(given.settings) | {"seed": seed})
            for number, name in enumerate(given.ways, 1):
                result = follow(
                    name, profile, given.instruct or instruct_model(profile.model), given.out / f"seed{seed}"
                )
                scores = [f"{kind} {result[kind]['exact_match']:.3f}" for kind in ("greedy", "sampled")]
                minutes = (time.monotonic() - began) / 60
                print(
                    f"seed {seed}, {number} of {len(given.ways)}: {name}, exact match {', '.join(scores)}; "
                    f"{minutes:.1f} minutes so far",
                    flush=True,
                )
    except ERRORS as error:
        sys.exit(f"error: {plain(str(error))}")


if __name__ == "__main__":
    main()
