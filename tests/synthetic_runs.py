"""Run folders made up for tests, in the form that training writes; their numbers mean nothing."""

import gzip
import json
from pathlib import Path

from searchr1_lite.config import load_profile, save_config


def write_run(
    folder: Path, *, masked: bool = True, seed: int = 0, steps: int = 6, hops: tuple[int, ...] = (1, 2)
) -> Path:
    """A finished run whose reward rises by 0.1 a step from 0.1 x (seed + 1) when masked and stays there when not."""
    folder.mkdir(parents=True)
    save_config(load_profile("tiny", masked=masked, seed=seed, steps=steps), folder / "config.yaml")
    environment = {
        "date": f"2026-01-0{seed + 1}T00:00:00+00:00",
        "machine": {"cpu": "a processor", "cores": 2, "gpu": None, "system": "Linux"},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "command": "train",
        "quantization": "nf4",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    rows = [
        metrics_row(step, 0.1 * (seed + 1) + (0.1 * (step - 1) if masked else 0), hops) for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = rows[-1]["reward"]
    evaluation = {"before": summary(0.1, hops), "after": summary(last, hops), "closed_book": 0.02}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    with gzip.open(folder / "trajectories.jsonl.gz", "wt", encoding="utf-8") as file:
        for phase in ("before", "after"):
            for number, count in enumerate(hops or (None,)):
                file.write(json.dumps(trajectory_row(phase, number, count)) + "\n")
    return folder


def metrics_row(step: int, reward: float, hops: tuple[int, ...]) -> dict:
    row = {
        "step": step,
        "reward": reward,
        "exact_match": reward,
        "searches": 1.0 + 0.05 * step,
        "invalid_actions": 1 / step,
    }
    row |= {"exact_match_by_hops": {str(hop): reward / hop for hop in hops}}
    row |= {"searches_by_hops": {str(hop): hop * step / 6 for hop in hops}, "ideal_searches": 1.5 if hops else None}
    row |= {"response_length": 30.0 + step, "answer_rate": 0.9, "kl": 0.01 * step, "entropy": 0.5, "grad_norm": 1.0}
    return row | {"retrieved_tokens": 80.0, "zero_variance_groups": 0.1, "clip_ratio": 0.0, "seconds": 2.5}


def summary(exact_match: float, hops: tuple[int, ...]) -> dict:
    return {
        "questions": 100,
        "exact_match": exact_match,
        "exact_match_by_hops": {str(hop): exact_match for hop in hops},
        "mean_searches": 1.0,
        "mean_searches_by_hops": {str(hop): float(hop) for hop in hops},
        "response_length": 40.0,
        "answer_rate": 1.0,
        "invalid_actions": 0.0,
        "seconds": 1.0,
        "greedy": True,
    }


def trajectory_row(phase: str, number: int, hops: int | None) -> dict:
    """A guess before training; after it a search and the right answer. The passage holds what must be escaped."""
    question = {
        "id": f"q{number}",
        "question": "Where is <b>Ola</b>?",
        "golden_answers": ["Rovana"],
        "metadata": {"hops": hops},
    }
    search = {"text": "<search> Ola </search>", "action": "search", "query": "Ola", "hit_ids": ["1"]}
    search["observation"] = '\n\n<information>Doc 1(Title: "Ola") <script>alert(1)</script>\n</information>\n\n'
    guess = {"text": "<answer> Ola </answer>", "action": "answer", "query": None, "hit_ids": [], "observation": ""}
    answer = guess | {"text": "<answer> Rovana </answer>"}
    right = phase == "after"
    row = {"step": 0, "phase": phase, "question": question, "reward": float(right), "exact_match": float(right)}
    row |= {"searches": int(right), "finished": True, "stop_reason": "answer", "response_length": 12}
    return row | {"turns": [search, answer] if right else [guess]}
