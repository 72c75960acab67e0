"""What the evaluation command adds to the bare rollout: the same questions by both, turn about.

    python benchmarks/evaluation.py

The bare engine is `rollout` on the loaded model; the command's part is what it does with the model loaded as well:
the same rollout, judging, the rows with their tokens, writing them, and the mark. Both are checked to write the same
answers. Rounds are interleaved, the order changes from round to round.
"""

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.evaluation.evaluate import ROWS, answer_all, load_adapted
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval.batching import cached
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.tasks.questions import held_out

RUN = ROOT / "data/results/runs/tiny-masked-seed0"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/benchmarks/evaluation.json")
    given = parser.parse_args(arguments)
    profile = load_profile(RUN / "config.yaml", eval_questions=given.questions)
    questions, policy = held_out(profile), load_adapted(profile, RUN / "adapter")
    retriever = load_retriever(profile)

    def bare() -> list[str]:
        answers = rollout(policy, questions, cached(retriever), profile, greedy=True, seed=profile.seed)
        return [one.policy_text for one in answers]

    def command() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            answer_all(Path(folder), policy, questions, profile, ["greedy"])
            with gzip.open(Path(folder) / ROWS, "rt", encoding="utf-8") as rows:
                return ["".join(turn["text"] for turn in json.loads(row)["turns"]) for row in rows]

    if bare() != command():  # the warm-up, too
        raise RuntimeError("the command's answers are not the bare engine's")
    seconds: dict[str, list[float]] = {"bare": [], "command": []}
    for number in range(given.rounds):
        for name, work in [("bare", bare), ("command", command)][:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    ratios = [c / b for b, c in zip(seconds["bare"], seconds["command"], strict=True)]
    result = provenance(["torch", "transformers"]) | {
        "what": f"{len(questions)} toy questions, greedy, the committed tiny-masked-seed0",
        "seconds": {name: [round(one, 3) for one in its] for name, its in seconds.items()},
        "questions_a_second": {name: len(questions) / median(its) for name, its in seconds.items()},
        "command_over_bare": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
    }
    write_json(given.out, result)
    print(json.dumps(result["command_over_bare"]), json.dumps(result["questions_a_second"]))


if __name__ == "__main__":
    main()
