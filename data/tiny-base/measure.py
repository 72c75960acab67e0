"""What a tiny model can and does before any reinforcement: reading, closed-book answers, sampled habits.

    python data/tiny-base/measure.py --out data/tiny-base/measured.json

Everything is measured on the test questions of the default world, whose names it has never seen.
"""

import random
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
from pretrain import encode_segments
from transcripts import Writer

from searchr1_lite.config import Profile, load_profile
from searchr1_lite.evaluation.evaluate import closed_book, evaluate
from searchr1_lite.files import write_json
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.rollouts.policy import Policy, environment, load_policy
from searchr1_lite.rollouts.protocol import encode_prompt
from searchr1_lite.tasks.answers import exact_match
from searchr1_lite.tasks.questions import load_questions
from searchr1_lite.tasks.toy_world import ToyWorld


@torch.no_grad()
def reading(policy: Policy, profile: Profile, questions: int) -> float:
    """Share of one-hop test questions answered right, greedily, once a good query and its passages stand there."""
    world = ToyWorld(0)
    rng = random.Random(0)
    writer = Writer(world, BM25Retriever.build(world.passages()), profile.topk, rng)
    chains = rng.sample([chain for chain in world.chains("test") if len(chain) == 1], questions)
    right = 0.0
    for facts in chains:
        question, segments = writer.transcript_about(facts, "hop by hop")
        ids = encode_prompt(policy.tokenizer, question, profile.chat_template)
        ids += encode_segments(policy.tokenizer, segments[:2], learn_all=False)[0]
        inputs = torch.tensor([ids], device=policy.device)
        output = policy.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=profile.max_response_tokens, do_sample=False
        )
        said = policy.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        right += exact_match(said, [facts[-1].value])
    return right / len(chains)


def measure(questions: int, model: str | None = None) -> dict[str, Any]:
    """Reading with and without NF4; greedy and sampled answers with search; greedy answers without."""
    profile = load_profile("tiny", model=model)
    asked = load_questions(profile.questions, profile.test_split)[:questions]
    retriever = BM25Retriever.build(ToyWorld(0).passages())
    plain = load_policy(profile.model_copy(update={"quantization": "none"}))
    policy = load_policy(profile)
    result = {
        "reading, unquantised": reading(plain, profile, questions),
        "reading": reading(policy, profile, questions),
        "closed_book": closed_book(policy, asked, profile),
        "greedy": evaluate(policy, asked, retriever, profile, greedy=True)[0],
        "sampled": evaluate(policy, asked * 4, retriever, profile, greedy=False)[0],
    }
    return environment(policy) | result


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; else the tiny profile's")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    write_json(given.out, measured := measure(given.questions, given.model))
    print({name: value for name, value in measured.items() if isinstance(value, float)})
