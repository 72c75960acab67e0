"""How long one training step takes: our loop, 0.6.0's trimmed trainer on TRL, and TRL's own as it pads.

    python benchmarks/training_step.py [--quick]

All three learn from the same trajectories with the same loss, the token mean over the update, and must come to the
same gradient. Timed is all that follows the rollout: reference pass, loss and backward. There are two workloads:

- tiny: the tiny profile, with what the adapter of data/results/runs/tiny-masked-seed0 writes on toy questions;
- wide: 32 million parameters, ids and lengths drawn, the longest 1.8 times the mean.

TRL takes as many rows in a micro-batch as `trainer: trl` does, the others as many tokens as the profile allows, so that
all need about as much memory. Left out is where the losses differ: the entropy bonus, of which TRL takes each
micro-batch's mean, and the limit of a token's KL estimate, which the loop alone has.
"""

import argparse
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import trl_060
from torch import Tensor
from trl import GRPOTrainer
from workload import SHAPE, make_policy

from searchr1_lite.config import ROOT, Profile, load_profile
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy, load_policy, model_to_train, with_adapter
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.tasks.questions import load_questions, question_order
from searchr1_lite.training import losses
from searchr1_lite.training.loop import Learner
from searchr1_lite.training.record import Recorder
from searchr1_lite.training.rewards import group_rewards
from searchr1_lite.training.score import collate
from searchr1_lite.training.trl_trainer import make_trainer, trl_columns
from searchr1_lite.types import Question

ADAPTER = ROOT / "data/results/runs/tiny-masked-seed0/adapter"
ROWS = 4  # in a micro-batch of TRL's, of the wide workload
MAX_OVER_MEAN = 1.8
TARGET = 0.6  # of 0.6.0's time, in the tiny workload
SETTINGS = {"entropy_coef": 0.0, "max_grad_norm": 1e9}  # gradients are compared unclipped
LIBRARIES = ["torch", "transformers", "trl", "peft", "bitsandbytes"]
OUT = ROOT / "data/results/benchmarks/training_step.json"


@dataclass(slots=True)
class Workload:
    profile: Profile
    trajectories: list[Trajectory]
    rewards: list[float]
    new_policy: Callable[[], Policy]  # each way has a model of its own, with the same weights
    adapter: list[Tensor]  # of all ways


def tiny_workload(quick: bool) -> Workload:
    fewer = {"questions_per_step": 2, "group_size": 2} if quick else {}
    profile = load_profile("tiny", **SETTINGS, **fewer)
    policy = with_adapter(load_policy(profile), ADAPTER)
    adapter = [weight.detach().clone() for name, weight in policy.model.named_parameters() if ".default." in name]
    order = question_order(load_questions("toy", "train"), profile)[: profile.questions_per_step]
    with torch.no_grad():
        made = rollout(policy, order, load_retriever(profile), profile, group_size=profile.group_size, seed=0)
    return Workload(profile, made, group_rewards(made, profile), lambda: load_policy(profile), adapter)


def wide_workload(quick: bool) -> Workload:
    shape, longest, group_size = ({}, 120, 2) if quick else (SHAPE, 240, 8)
    profile = load_profile("tiny", quantization="none", questions_per_step=4, group_size=group_size, **SETTINGS)
    trajectories = make_trajectories(profile, longest, seed=0)
    width = padded_width(trajectories)
    profile = profile.model_copy(update={"micro_batch_tokens": ROWS * width, "max_context_tokens": width})
    rewards = [float(number % 3 == 0) for number in range(len(trajectories))]
    model, generator = model_to_train(make_policy(shape, 0), profile), torch.Generator().manual_seed(0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adapter = [0.02 * torch.randn(weight.shape, generator=generator) for weight in weights]
    return Workload(profile, trajectories, rewards, lambda: make_policy(shape, 0), adapter)


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


def padded_width(trajectories: list[Trajectory]) -> int:
    """As TRL pads: prompts on the left, completions on the right."""
    return max(len(one.prompt_ids) for one in trajectories) + max(len(one.completion_ids) for one in trajectories)


# Three ways to the same gradient: the model, and a function that leaves the gradient in it


def loop_step(work: Workload, folder: Path) -> tuple[Any, Callable[[], Any]]:
    """The loop's own lines between two rollouts, with an optimizer that leaves the weights as they are."""
    policy = work.new_policy()
    learner = Learner(model_to_train(policy, work.profile), policy, work.profile)
    learner.optimizer.step = learner.schedule.step = lambda: None

    def step() -> None:
        batch = collate(work.trajectories, work.rewards, work.profile.masked, policy.device)
        learner.look_back(batch)
        batch.advantages = learner.advantages(batch, work.profile)
        learner.update(batch)

    return learner.model, step


def step_of_060(work: Workload, folder: Path) -> tuple[Any, Callable[[], Any]]:
    trainer = trl_060.make_trainer(work.new_policy(), work.profile, folder)
    return trainer.model, step_of(trainer, work)


def trl_step(work: Workload, folder: Path) -> tuple[Any, Callable[[], Any]]:
    policy = work.new_policy()
    asked = [one.question for one in work.trajectories[:: work.profile.group_size]]
    rollouts = SimpleNamespace(profile=work.profile, order=asked)
    recorder = Recorder(work.profile, folder)
    trainer = make_trainer(model_to_train(policy, work.profile), policy, rollouts, recorder)
    return trainer.model, step_of(trainer, work)


def step_of(trainer: GRPOTrainer, work: Workload) -> Callable[[], Any]:
    columns = trl_columns(work.trajectories, work.profile.masked, trainer.processing_class.eos_token_id)
    trainer.rollout_func = lambda prompts, trainer: {**columns, "reward": work.rewards}
    prompts = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps

    def step() -> None:
        trainer._step, trainer._buffered_inputs = 0, None
        trainer.model.train().zero_grad()
        for _ in range(trainer.args.gradient_accumulation_steps):
            trainer.training_step(trainer.model, prompts, None)

    return step


WAYS = {"loop": loop_step, "0.6.0": step_of_060, "TRL": trl_step}


def trained_weights(model: Any) -> list[torch.nn.Parameter]:
    """The adapter's; TRL adds a copy of it, its reference."""
    return [weight for name, weight in model.named_parameters() if ".default." in name]


def measure(name: str, work: Workload, rounds: int) -> dict[str, Any]:
    """All ways in turn, round by round. Raises AssertionError where the gradients differ."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        made = {way: make(work, Path(folder)) for way, make in WAYS.items()}
        for model, _ in made.values():
            for weight, value in zip(trained_weights(model), work.adapter, strict=True):
                weight.data = value.clone()
        for number in range(-1, rounds):  # the first round warms up
            for way, (_, step) in made.items():
                start = time.perf_counter()
                with patch.object(losses, "KL_LIMIT", math.inf):
                    step()
                spent = time.perf_counter() - start
                print(f"{name}  round {number + 1}/{rounds}  {way:5}  {spent:6.2f} s", flush=True)
                seconds[way] += [spent] if number >= 0 else []
    gradients = {way: torch.cat([x.grad.flatten() for x in trained_weights(model)]) for way, (model, _) in made.items()}
    ours, largest = gradients["loop"], gradients["loop"].abs().max().item()
    for way, gradient in gradients.items():
        message = f"{name}: the gradient of {way} is not the loop's"
        torch.testing.assert_close(gradient, ours, atol=1e-5 * largest, rtol=1e-3, msg=lambda x, m=message: f"{m}\n{x}")
    lengths = [len(one.prompt_ids) + len(one.completion_ids) for one in work.trajectories]
    result = {
        "parameters": work.new_policy().model.num_parameters(),
        "trajectories": len(lengths),
        "tokens": {"mean": mean(lengths), "longest": max(lengths), "padded": padded_width(work.trajectories)},
        "micro_batch_tokens": work.profile.micro_batch_tokens,
        "largest_gradient_difference": {
            way: ((gradient - ours).abs().max() / largest).item() for way, gradient in gradients.items()
        },
        "seconds": seconds,
        "median_seconds": {way: median(values) for way, values in seconds.items()},
        "ratio": {f"loop / {way}": ratio(seconds["loop"], seconds[way]) for way in WAYS if way != "loop"},
    }
    for pair, its in result["ratio"].items():
        print(f"{name}: {pair} {its['median']:.2f} ({its['least']:.2f} to {its['most']:.2f})")
    return result


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Of each round, and of these the median and the ends."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": median(rounds), "least": min(rounds), "most": max(rounds)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small workloads and one round; no file unless --out")
    parser.add_argument("--out", type=Path, help=f"default {OUT.relative_to(ROOT)}")
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    result = provenance(LIBRARIES) | {
        "command": "python benchmarks/training_step.py" + " --quick" * given.quick,
        "what": "one training step: reference pass, loss, backward",
        "target": {"workload": "tiny", "loop / 0.6.0": TARGET},
        "workloads": {
            "tiny": measure("tiny", tiny_workload(given.quick), 1 if given.quick else 9),
            "wide": measure("wide", wide_workload(given.quick), 1 if given.quick else 5),
        },
    }
    print(f"the target, in the tiny workload: loop / 0.6.0 at most {TARGET}")
    if given.out or not given.quick:
        write_json(given.out or OUT, result)
    return result


if __name__ == "__main__":
    main()
