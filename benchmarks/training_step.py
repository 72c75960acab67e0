"""How long one training step takes trimmed and sorted (ours), and padded to the longest trajectory (TRL's own way).

    python benchmarks/training_step.py [--quick]

Both learn from the same trajectories with the same loss, the token mean over the update (in TRL's words "dapo"), and
must come to the same gradient. Timed is all that follows the rollout: reference pass, loss and backward. TRL's own
trainer takes ROWS rows in a micro-batch; ours as many tokens as those rows are with their padding, so that both need
as much memory. Ids and lengths are drawn; the lengths are then stretched so that the longest is 1.8 times the mean.
"""

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer
from workload import SHAPE, make_policy

from searchr1_lite.config import ROOT, Profile, load_profile
from searchr1_lite.jsonl import write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.rollout.policy import Policy
from searchr1_lite.rollout.trajectory import Trajectory
from searchr1_lite.training.trainer import build_trainer, reward_of_rollout, trl_columns, trl_config
from searchr1_lite.types import Question

ROWS = 4  # in a micro-batch of TRL's
MAX_OVER_MEAN = 1.8
TARGET = 1.5
LIBRARIES = ["torch", "transformers", "trl", "peft"]
OUT = ROOT / "data/results/benchmarks/training_step.json"


def draw_lengths(rows: int, longest: int, rng: random.Random) -> list[int]:
    """Lengths as rollouts have them, many short and few long, of which the longest is MAX_OVER_MEAN times the mean."""
    drawn = sorted(rng.lognormvariate(0, 0.5) for _ in range(rows))
    low, high = 0.0, 50.0  # shares are raised to a power until they have the wanted mean
    for _ in range(60):
        power = (low + high) / 2
        shares = [(x / drawn[-1]) ** power for x in drawn]
        low, high = (power, high) if sum(shares) / rows > 1 / MAX_OVER_MEAN else (low, power)
    lengths = [round(longest * share) for share in shares]
    rng.shuffle(lengths)
    return lengths


def make_trajectories(profile: Profile, longest: int, seed: int) -> list[Trajectory]:
    """Groups that share a prompt; a completion is half written and half retrieved. Ids without a meaning."""
    rng = random.Random(seed)
    lengths = draw_lengths(profile.rollouts_per_step, longest, rng)
    made = []
    for number in range(profile.questions_per_step):
        group = [lengths.pop() for _ in range(profile.group_size)]
        prompt = tuple(rng.randrange(10, 1000) for _ in range(max(4, min(*group, longest // 4) // 2)))
        for length in group:
            count = length - len(prompt)
            ids = tuple(rng.randrange(10, 1000) for _ in range(count))
            mask = tuple(int(4 * place // count % 2 == 0) for place in range(count))
            question = Question(str(number), "", ("",))
            made.append(Trajectory(question, prompt, ids, mask, (0.0,) * count, (), False, "turns"))
    return made


def make_trainers(policies: list[Policy], profile: Profile, folder: Path) -> dict[str, GRPOTrainer]:
    """Ours, and TRL's own with the same settings and adapter, each on a model of its own with the same weights."""
    questions = [Question(str(number), "", ("",)) for number in range(profile.questions_per_step)]
    ours = build_trainer(profile, folder, policies[0], questions, None)
    steps = profile.rollouts_per_step // ROWS
    config = replace(
        trl_config(profile, folder, policies[1].device),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=steps,
        steps_per_generation=steps,
        generation_batch_size=None,
        loss_type="dapo",
    )
    theirs = GRPOTrainer(
        model=policies[1].model,
        processing_class=policies[1].tokenizer,
        args=config,
        reward_funcs=reward_of_rollout,
        rollout_func=lambda prompts, trainer: {},
        train_dataset=Dataset.from_dict({"prompt": [question.id for question in questions]}),
        peft_config=ours.model.peft_config["default"],
    )
    generator = torch.Generator().manual_seed(0)
    for one, other in zip(adapter(ours), adapter(theirs), strict=True):
        other.data = one.data = 0.02 * torch.randn(one.shape, generator=generator)
    return {"trimmed": ours, "untrimmed": theirs}


def adapter(trainer: GRPOTrainer) -> list[torch.nn.Parameter]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def step_of(trainer: GRPOTrainer, trajectories: list[Trajectory]) -> Callable[[], float]:
    """A function that makes one update's gradient and returns the seconds it took."""
    columns = trl_columns(trajectories, True, trainer.processing_class.eos_token_id)
    rewards = [float(number % 3 == 0) for number in range(len(trajectories))]
    trainer.rollout_func = lambda prompts, trainer: {**columns, "reward": rewards}
    prompts = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps

    def step() -> float:
        trainer._step, trainer._buffered_inputs = 0, None
        trainer.model.train().zero_grad()
        start = time.perf_counter()
        for _ in range(trainer.args.gradient_accumulation_steps):
            trainer.training_step(trainer.model, prompts, None)
        return time.perf_counter() - start

    return step


def gradient(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in adapter(trainer)])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds; no file unless --out")
    parser.add_argument("--out", type=Path, help=f"default {OUT.relative_to(ROOT)}")
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    shape, longest, rounds = ({}, 200, 2) if given.quick else (SHAPE, 240, 5)
    profile = load_profile("tiny", quantization="none", questions_per_step=4, group_size=8, entropy_coef=0.0)
    trajectories = make_trajectories(profile, longest, seed=0)
    lengths = [len(one.prompt_ids) + len(one.completion_ids) for one in trajectories]
    width = max(len(one.prompt_ids) for one in trajectories) + max(len(one.completion_ids) for one in trajectories)
    profile = profile.model_copy(update={"micro_batch_tokens": ROWS * width})
    seconds: dict[str, list[float]] = {"trimmed": [], "untrimmed": []}
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers([make_policy(shape, 0), make_policy(shape, 0)], profile, Path(folder))
        steps = {name: step_of(trainer, trajectories) for name, trainer in trainers.items()}
        for number in range(-1, rounds):  # the first round warms up
            for name, step in steps.items():
                spent = step()
                print(f"round {number + 1}/{rounds}  {name:9}  {spent:6.2f} s", flush=True)
                seconds[name] += [spent] if number >= 0 else []
    ours, theirs = (gradient(trainer) for trainer in trainers.values())
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-3)
    ratios = [slow / fast for fast, slow in zip(*seconds.values(), strict=True)]
    result = provenance(LIBRARIES) | {
        "command": "python benchmarks/training_step.py" + " --quick" * given.quick,
        "what": "one training step: reference pass, loss, backward",
        "parameters": sum(x.numel() for name, x in trainers["trimmed"].model.named_parameters() if "lora" not in name),
        "trajectories": len(lengths),
        "tokens": {"mean": sum(lengths) / len(lengths), "longest": max(lengths), "padded": width},
        "max_over_mean": max(lengths) * len(lengths) / sum(lengths),
        "rows_in_a_micro_batch": {"untrimmed": ROWS},
        "micro_batch_tokens": {"trimmed": ROWS * width},
        "largest_gradient_difference": ((ours - theirs).abs().max() / theirs.abs().max()).item(),
        "seconds": seconds,
        "median_seconds": {name: median(values) for name, values in seconds.items()},
        "ratio": {"median": median(ratios), "least": min(ratios), "most": max(ratios), "target": TARGET},
    }
    print(f"untrimmed / trimmed: {median(ratios):.2f} (each round {', '.join(f'{x:.2f}' for x in ratios)})")
    if given.out or not given.quick:
        write_json(given.out or OUT, result)
    return result


if __name__ == "__main__":
    main()
