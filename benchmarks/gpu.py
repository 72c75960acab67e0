"""One GPU, one call: does the memory plan hold, what bounds decoding, and how long does a step take?

    python benchmarks/gpu.py              # on a CUDA GPU, under ten minutes, without network
    python benchmarks/gpu.py --dry-run    # a shrunken model on the CPU: the same lines, no figure worth reading

Models have the true shapes of Qwen2.5 and random weights. They cannot search, so what they write is scripted: every
logit is computed and sampled from, then the script's token takes the sample's place. The results are written after
each part; a part that fails leaves its error there. Left out: several GPUs, vLLM, and real lengths of trajectories,
which are shorter than the longest that is measured here.
"""

import copy
import gc
import json
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from memory import CARDS, model_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from searchr1_lite.config import ROOT, Profile, load_profile, resolve_path
from searchr1_lite.files import write_json
from searchr1_lite.memory import CONTEXT, GB, cache_bytes_per_token, memory_plan, model_shape
from searchr1_lite.provenance import provenance
from searchr1_lite.rollouts.cuda_graphs import Record, cuda_graph
from searchr1_lite.rollouts.decoding import LocalSampler
from searchr1_lite.rollouts.dequantize import dequantized_weights
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy, autocast, load_policy, model_to_train
from searchr1_lite.rollouts.protocol import encode_prompt
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.training.loop import fit
from searchr1_lite.training.record import Recorder
from searchr1_lite.types import Hit, Passage, Question

PUBLISHED = {  # of Search-R1 3B on 8 H100; authors' and users' remarks, not measurements
    "seconds a step": [36, 126],
    "hours of 1,005 steps": [10, 35],
    "source": "github.com/PeterGriffinJin/Search-R1/issues/1: 200 steps in 2 to 3 hours (author), 6 to 7 (a user)",
}
PAPER = {"steps": 1005, "trajectories": 512 * 5}  # a run of Search-R1, scripts/nq_hotpotqa/v0.2/train_grpo.sh
WORD = "why "  # what questions, passages and turns are filled with


@dataclass(slots=True)
class Sizes:
    """How large things are: as they are, or shrunken for a dry run."""

    model: dict[str, int] = field(default_factory=dict)  # changes to the true shape
    settings: dict[str, Any] = field(default_factory=dict)  # changes to every profile
    rows: tuple[int, ...] = (8, 64)
    contexts: tuple[int, ...] = (1024, 4096)
    micro_batches: tuple[int, ...] = (4096, 8192)
    steps: int = 20  # that a median of decoding is taken from
    copied: int = 2**30  # bytes
    searches: int = 3  # of a full trajectory


DRY = Sizes(
    model={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    | {"vocab_size": 1024},
    settings={"device": "cpu", "dtype": "float32", "max_context_tokens": 400, "max_response_tokens": 16}
    | {"max_observation_tokens": 40, "max_prompt_tokens": 380, "rollout_rows": 4, "questions_per_step": 2}
    | {"group_size": 2, "micro_batch_tokens": 800},
    rows=(2,),
    contexts=(64,),
    micro_batches=(400, 800),
    steps=2,
    copied=2**16,
    searches=2,
)


# Timers and memory readers


def now(device: torch.device) -> float:
    """Seconds, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes in use, and held by torch, since this was last called; 0 where there is no GPU."""
    if device.type != "cuda":
        return {"allocated": 0, "reserved": 0}
    gc.collect()  # what refers to itself is freed only now
    peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    torch.cuda.empty_cache()  # what the phase before held and no longer uses is not the next one's
    torch.cuda.reset_peak_memory_stats()
    return peak


def seconds_of(step: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The median of `repeats` runs, after three that do not count."""
    times = []
    for _ in range(repeats + 3):
        start = now(device)
        step()
        times.append(now(device) - start)
    return median(times[3:])


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that the card moves, reading and writing, in a large copy."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), 10, device)


# Models of the true shape


@contextmanager
def model_folder(model: str, sizes: Sizes, device: torch.device) -> Iterator[str]:
    """A folder as the hub would give it: random weights in bfloat16, and the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("data/tiny-base"))
    config = model_config(model, **sizes.model, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        del made
        peak_memory(device)
        tokenizer.save_pretrained(folder)
        yield folder


def profile_for(name: str, folder: str, sizes: Sizes, **changes: Any) -> Profile:
    """The profile on a made model, without dense retrieval and with two steps."""
    settings = {"retriever": "bm25", "steps": 2, "warmup_steps": 0, **changes} | sizes.settings
    return load_profile(name, model=folder, **settings)


# Decoding


def decoding(profile: Profile, sizes: Sizes, moved: float, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Seconds of a step for NF4 and for its unpacked copy, beside what moving weights and cache alone would take."""
    policy, shape, plan = load_policy(profile), model_shape(profile), memory_plan(profile)
    lora = LoraConfig(r=profile.lora_r, target_modules=profile.lora_target, task_type="CAUSAL_LM")
    policy.model = get_peft_model(policy.model, lora).eval()
    packed = plan.fixed["weights, linear layers"]
    rest = plan.fixed["weights, embeddings and the rest"] + shape.adapter * 2
    weights = {"quantized": packed + rest, "dequantized": plan.rollout["plain copy of the weights"] + rest}
    found = []
    for kind, rows, context in [(k, r, c) for k in weights for r in sizes.rows for c in sizes.contexts]:
        cache = rows * context * cache_bytes_per_token(profile, shape)
        result: dict[str, Any] = {"weights": kind, "rows": rows, "context": context}
        result["floor_ms"] = 1000 * (weights[kind] + cache) / moved
        for way, make in (("eager", eager_step), ("graph", graph_step), ("forward", forward_step)):
            seconds = attempt(result, way, partial(_timed, make, policy, rows, context, kind, sizes))
            if seconds is None:
                continue
            result[f"{way}_ms"], result[f"{way}_over_floor"] = 1000 * seconds, 1000 * seconds / result["floor_ms"]
        found.append(result)
        say(f"decoding {kind}, {rows} rows of {context}: " + _short(result, ("floor", "eager", "graph", "forward")))
    return found


def _timed(make: Callable, policy: Policy, rows: int, context: int, kind: str, sizes: Sizes) -> float:
    on_gpu = policy.device.type == "cuda"
    with torch.no_grad(), torch.autocast(policy.device.type, torch.bfloat16, enabled=on_gpu):
        if kind == "quantized":
            return seconds_of(make(policy, rows, context), sizes.steps, policy.device)
        with dequantized_weights(policy.model):
            return seconds_of(make(policy, rows, context), sizes.steps, policy.device)


def attempt(result: dict[str, Any], what: str, run: Callable[[], Any]) -> Any:
    """What `run` gives, or None with its error in the result; a card may be too small, or a graph not to be had."""
    try:
        return run()
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        result[f"{what}_error"] = str(error).partition("\n")[0]
        print(f"{what}: {result[f'{what}_error']}", flush=True)
        return None


def writer_of(policy: Policy, rows: int, context: int, record: Record | None) -> LocalSampler:
    """Rows of almost `context` tokens that all write, in a turn that does not end."""
    filler = policy.tokenizer.encode(WORD)[0]
    sampler = LocalSampler(policy, rows, context, temperature=1.0, record=record)

    def pick(logits: torch.Tensor, which: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, logprobs = sampler._sample(logits, which)
        return torch.full_like(ids, filler), logprobs

    sampler.pick = pick
    streams = [np.random.Generator(np.random.Philox(row)) for row in range(rows)]
    sampler.open(list(range(rows)), [filler] * (context - context // 16), streams)
    return sampler


def eager_step(policy: Policy, rows: int, context: int) -> Callable[[], Any]:
    """A step as in a rollout: sampling, looking for stops, and the forward as Python calls it."""
    return writer_of(policy, rows, context, None).advance


def graph_step(policy: Policy, rows: int, context: int) -> Callable[[], Any]:
    """A step as in a rollout, its forward repeated as a CUDA graph."""
    return writer_of(policy, rows, context, recording(policy)).advance


def forward_step(policy: Policy, rows: int, context: int) -> Callable[[], Any]:
    """The recorded forward alone: what is left of a step when the sampler around it costs nothing."""
    sampler = writer_of(policy, rows, context, recording(policy))
    sampler.advance()
    return next(iter(sampler.recorded.steps.values()))


def recording(policy: Policy) -> Record:
    return cuda_graph if policy.device.type == "cuda" else lambda step: step


# Training steps


@dataclass
class ScriptedRollouts:
    """In the place of `Rollouts`: rows write their script, and peaks of memory are noted.

    The second step trains on the first one's trajectories again, so that its time is that of training alone.
    """

    profile: Profile
    policy: Policy
    questions: list[Question]
    scripts: list[list[int]]  # of even and odd rows: all turns of a trajectory, one after the other
    kept: list[Trajectory] = field(default_factory=list)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)  # by phase
    cache_hits: int | None = None

    def __call__(self, step: int, model: Any) -> list[Trajectory]:
        device = self.policy.device
        self.note("training" if self.peaks else "loading", device)
        if not self.kept:
            with torch.no_grad(), autocast(self.profile, device):
                self.kept = self._write(replace(self.policy, model=model))
        self.note("rollout", device)
        return self.kept

    def _write(self, policy: Policy) -> list[Trajectory]:
        profile = self.profile
        rows = profile.rollouts_per_step
        at = np.zeros(rows, dtype=np.int64)

        def pick(logits: torch.Tensor, which: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            ids, logprobs = sampler._sample(logits, which)
            scripted = [self.scripts[row % 2][at[row]] for row in which]
            at[which] += 1
            return torch.tensor(scripted, device=ids.device), logprobs

        capacity = max(profile.group_size, min(profile.rollout_rows, rows))
        record = recording(policy) if profile.cuda_graphs else None
        sampler = LocalSampler(policy, capacity, profile.max_response_tokens, pick, profile.temperature, record)
        options = {"group_size": profile.group_size, "seed": 0, "sampler": sampler}
        return rollout(policy, self.questions, LongPassages(), profile, **options)

    def note(self, phase: str, device: torch.device) -> None:
        peak, before = peak_memory(device), self.peaks.get(phase, {})
        self.peaks[phase] = {kind: max(size, before.get(kind, 0)) for kind, size in peak.items()}


class LongPassages:
    """Finds passages that fill an observation, whatever is asked."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return [[Hit(Passage("1", "why", WORD * 2000), 1.0)] for _ in queries]


def script(tokenizer, profile: Profile, searches: int, answer: str) -> list[int]:
    """`searches` turns that search and one that answers, each as long as a turn may be."""
    filler, ids = tokenizer.encode(WORD)[0], []
    for end in ["<search> why </search>"] * searches + [f"<answer> {answer} </answer>"]:
        tail = tokenizer.encode(end, add_special_tokens=False)
        ids += [filler] * (profile.max_response_tokens - len(tail)) + tail
    return ids


def long_questions(tokenizer, profile: Profile, searches: int) -> list[Question]:
    """A step's questions, which with their searches fill the context."""
    observed, turns = searches * profile.max_observation_tokens, (searches + 1) * profile.max_response_tokens
    wanted = profile.max_context_tokens - observed - turns

    def tokens(words: int) -> int:
        return len(encode_prompt(tokenizer, WORD * words, profile.chat_template))

    words = 100 * (wanted - tokens(0)) // (tokens(100) - tokens(0))
    if words <= 0:
        raise ValueError(f"max_context_tokens = {profile.max_context_tokens} leaves no room for {searches} searches")
    while tokens(words) > wanted:
        words -= 1
    return [Question(str(n), WORD * words, ("yes",)) for n in range(profile.questions_per_step)]


def training(profile: Profile, micro_batches: tuple[int, ...], searches: int, say: Callable[[str], Any]) -> list[dict]:
    """Two steps for each size of micro-batch, the rollouts made once: seconds, and peaks beside the memory plan."""
    policy = load_policy(profile)
    questions = long_questions(policy.tokenizer, profile, searches)
    scripts = [script(policy.tokenizer, profile, searches, answer) for answer in ("yes", "no")]
    scripted, found = ScriptedRollouts(profile, policy, questions, scripts), []
    for tokens in micro_batches:
        changed = profile.model_copy(update={"micro_batch_tokens": tokens})
        scripted.profile = changed
        scripted.peaks = {key: peak for key, peak in scripted.peaks.items() if key == "rollout"}
        model = model_to_train(policy, changed)
        with TemporaryDirectory() as folder:
            fit(model, policy, scripted, Recorder(changed, Path(folder), str), None, 0)
            scripted.note("training", policy.device)
            steps = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        model.unload()
        del model
        if not found:
            rollout_seconds = steps[0]["seconds_rollout"]
        found.append(_training_result(changed, scripted, rollout_seconds, steps[1]["seconds_training"]))
        say(f"training, micro-batches of {tokens}: " + _short(found[-1], ("rollout", "training", "step"), "seconds"))
    return found


def _training_result(profile: Profile, scripted: ScriptedRollouts, rollouts: float, training: float) -> dict[str, Any]:
    plan, kept = memory_plan(profile), scripted.kept
    lengths = [len(one.prompt_ids) + len(one.completion_ids) for one in kept]
    always = sum(plan.fixed.values()) - CONTEXT  # which torch does not count
    # The optimizer's state is made at the end of the first step, after its rollouts
    predicted = {"rollout": always - plan.fixed["AdamW state"] + sum(plan.rollout.values())}
    predicted["training"] = always + sum(plan.training.values())
    memory = {phase: _beside(predicted[phase], scripted.peaks[phase]) for phase in predicted}
    step, settings = rollouts + training, ("questions_per_step", "group_size", "rollout_rows", "micro_batch_tokens")
    return {key: getattr(profile, key) for key in (*settings, "sampling_weights", "cuda_graphs")} | {
        "trajectory_tokens": [min(lengths), max(lengths)],
        "predicted_peak_gb": plan.peak / GB,
        "memory": memory,
        "rollout_seconds": rollouts,
        "training_seconds": training,
        "step_seconds": step,
        "tokens_per_second": sum(lengths) / step,
        "written_tokens_per_second": sum(sum(one.loss_mask) for one in kept) / rollouts,
        "trained_tokens_per_second": sum(lengths) / training,
        "projected_hours_of_the_paper's_run": PAPER["steps"] * PAPER["trajectories"] / len(kept) * step / 3600,
    }


def _beside(predicted: float, peak: dict[str, int]) -> dict[str, Any]:
    """Predicted and measured GB of a phase, without CUDA's own context; the ratio is measured by predicted."""
    ratio = peak["allocated"] / predicted
    gigabytes = {f"{kind}_gb": size / GB for kind, size in peak.items()}
    return {"predicted_gb": predicted / GB, **gigabytes, "ratio": ratio, "within_15_percent": abs(ratio - 1) <= 0.15}


def _short(result: dict[str, Any], names: tuple[str, ...], unit: str = "ms") -> str:
    return ", ".join(f"{name} {result[f'{name}_{unit}']:.1f} {unit}" for name in names if f"{name}_{unit}" in result)


def gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": None}
    free, total = torch.cuda.mem_get_info()
    own = total - free - torch.cuda.memory_reserved()  # CUDA's context, and other programs
    found = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found | {"gpu_total_gb": total / GB, "gpu_taken_before_gb": own / GB}


def parts_of(sizes: Sizes, moved: float, say: Callable[[str], Any]) -> dict[str, dict[str, Callable[[str], Any]]]:
    """By model and by name, what to run on the model's folder; the most asked for first."""
    one, short = "qwen2.5-3b-4bit", {"max_response_tokens": 32, "max_prompt_tokens": 4000}
    # 32 rows at once: as many whole groups as are predicted under 15.5 GB
    full = {"questions_per_step": 5, "group_size": 8, "rollout_rows": 32, "cuda_graphs": True}

    def step(folder: str) -> list[dict]:
        return training(profile_for(one, folder, sizes, **full), sizes.micro_batches, sizes.searches, say)

    def memory_of(name: str, folder: str) -> list[dict]:
        profile = profile_for(name, folder, sizes, **short)
        return training(profile, (profile.micro_batch_tokens,), 1, say)

    named = {name: {f"memory of {name}": partial(memory_of, name)} for name in CARDS}
    decode = {"decoding": lambda folder: decoding(profile_for(one, folder, sizes), sizes, moved, say)}
    return {
        "Qwen/Qwen2.5-3B": {"step of 5 x 8": step} | decode | named[one] | named[f"{one}-24gb"],
        "Qwen/Qwen2.5-0.5B": named["qwen2.5-0.5b"],
        "Qwen/Qwen2.5-7B": named["qwen2.5-7b-4bit"],
    }


def measure(
    sizes: Sizes, device: torch.device, minutes: float, only: str, save: Callable[[dict], Any]
) -> dict[str, Any]:
    """The parts whose names hold `only`; those for which the time has run out are named and left out."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {text}", flush=True)

    moved = bandwidth(device, sizes.copied)
    result: dict[str, Any] = {**gpu(device), "bandwidth_gb_per_second": moved / GB, "published": PUBLISHED}
    result["left_out"] = []
    say(f"bandwidth {moved / GB:.0f} GB/s")
    for model, parts in parts_of(sizes, moved, say).items():
        parts = {name: run for name, run in parts.items() if only in name}
        with ExitStack() as stack:
            folder = ""
            for name, run in parts.items():
                if time.perf_counter() - start > minutes * 60:
                    result["left_out"].append(name)
                    say(f"{name}: left out, the {minutes:g} minutes are over")
                    continue
                folder = folder or stack.enter_context(model_folder(model, sizes, device))
                result[name] = attempt(result, name, partial(run, folder))
                peak_memory(device)
                save(copy.deepcopy(result))
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/benchmarks/gpu.json")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part begins after these")
    parser.add_argument("--only", default="", help="parts whose names hold this text, e.g. 7b")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, to see that every line runs")
    given = parser.parse_args(arguments)
    if not (given.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA GPU is visible here; --dry-run goes through everything on the CPU")
    if given.dry_run and given.out == parser.get_default("out"):
        parser.error("a dry run measures nothing: give --out a file of its own")
    warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing's new name in transformers
    sizes, device = (DRY, torch.device("cpu")) if given.dry_run else (Sizes(), torch.device("cuda"))
    about = provenance(["torch", "transformers", "trl", "peft", "bitsandbytes"]) | {"dry_run": given.dry_run}
    measure(sizes, device, given.minutes, given.only, lambda result: write_json(given.out, about | result))


if __name__ == "__main__":
    main()
