"""Make the tiny base model: a Qwen2 of about a million parameters that reads well and seldom searches well.

Stages: reading drills, trained on all tokens; then transcripts as well, under a short prompt, trained on what the
policy writes; last the same under Search-R1's full prompt. Hidden matrices are trained by Muon, the rest by AdamW.
Two processes of one thread each use two cores best. `make tiny-base` remakes `data/tiny-base/` in three calls,
each from the weights of the one before: the second with more drills and a falling learning rate, the third, a short
one, with the shares of habits that the base is to have.

Left out: resuming, and any evaluation beyond reading (notebooks 02 and 03 look at the rest).
"""

import json
import os
import random
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizer import train_tokenizer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transcripts import HABITS, PRACTICE_HABITS, Segment, Writer, state
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.rollouts.protocol import encode_prompt
from searchr1_lite.tasks.toy_world import ToyWorld

TOPK = 3
TOKENS_PER_BATCH = 6144  # a process, padding included
WORLD_SIZE = 16  # people; about 60 passages
PIECES_PER_WORLD = 64

Example = tuple[list[int], list[int]]  # ids, and 1 where a token is learned from


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def encode_segments(tokenizer: PreTrainedTokenizerFast, segments: list[Segment], learn_all: bool) -> Example:
    """Ids of the segments one by one, as a rollout appends them, and which of them are learned from."""
    ids, learned = [], []
    for segment in segments:
        new = tokenizer.encode(segment.text, add_special_tokens=False)
        new += [tokenizer.eos_token_id] if segment.ends else []
        ids += new
        learned += [int(segment.by_policy or learn_all)] * len(new)
    return ids, learned


@dataclass(frozen=True)
class Mix:
    """What is read when, as shares of the steps and of the pieces."""

    drills_only: float = 0.3  # of the steps, at first
    drill_share: float = 0.3  # of the pieces, after that
    short_prompt: float = 0.75  # up to this share of the steps the prompt's fixed part is left out: half the tokens
    practice: bool = False  # transcripts in PRACTICE_HABITS' shares instead of HABITS'


class Examples(IterableDataset):
    """Batches of (ids, learned), padded, of similar lengths, from one fresh world after another, for `steps` steps."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, mix: "Mix"):
        self.tokenizer, self.seed, self.steps, self.mix = tokenizer, seed, steps, mix

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        made, world_seed = 0, 1_000_000 * (self.seed + 1)
        while made < self.steps + 1:
            examples: list[Example] = []
            for _ in range(4):
                world_seed += 1
                examples += self._from_world(world_seed, made / self.steps)
            batches = list(_batches(examples))
            random.Random(world_seed).shuffle(batches)
            for batch in batches:
                made += 1
                yield _pad(batch, self.tokenizer.pad_token_id)

    def _from_world(self, seed: int, progress: float) -> Iterator[Example]:
        rng = random.Random(seed)
        world = ToyWorld(seed, WORLD_SIZE, names="pretraining")
        writer = Writer(world, BM25Retriever.build(world.passages()), TOPK, rng)
        for _ in range(PIECES_PER_WORLD):
            if progress < self.mix.drills_only or rng.random() < self.mix.drill_share:
                yield encode_segments(self.tokenizer, writer.drill(), learn_all=True)
            else:
                yield from self.pieces(writer, progress)

    def pieces(self, writer: Writer, progress: float) -> Iterator[Example]:
        """What is learned besides drills; instructions.py gives other pieces."""
        question, segments = writer.transcript(PRACTICE_HABITS if self.mix.practice else HABITS)
        yield self.after_prompt(self._prompt(question, short=progress < self.mix.short_prompt), segments)

    def after_prompt(self, prompt_ids: list[int], segments: list[Segment]) -> Example:
        """A prompt, of which nothing is learned, and what follows it."""
        ids, learned = encode_segments(self.tokenizer, segments, learn_all=False)
        return prompt_ids + ids, [0] * len(prompt_ids) + learned

    def _prompt(self, question: str, short: bool) -> list[int]:
        if not short:
            return encode_prompt(self.tokenizer, question, chat_template=True)
        text = f"<|im_start|>user\nQuestion: {question}\n<|im_end|>\n<|im_start|>assistant\n"
        return self.tokenizer.encode(text, add_special_tokens=False)


def _batches(examples: list[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in sorted(examples, key=lambda e: len(e[0])):
        if batch and (len(batch) + 1) * len(example[0]) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _pad(batch: list[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in batch])
    learned = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in batch])
    return ids, learned


def loss_on(model: Qwen2ForCausalLM, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over learned tokens; the output layer is taken at those alone. Padding is on the right."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = learned[:, 1:].bool()
    return cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])


@torch.no_grad()
def reading_skill(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, facts: int = 150) -> float:
    """Share of facts stated right, greedily, with the passages found for them just above, on names never trained on."""
    world = ToyWorld(seed, 40, names="world")
    writer = Writer(world, BM25Retriever.build(world.passages()), TOPK, random.Random(seed))
    right = 0
    for _ in range(facts):
        [fact] = writer.rng.choice(writer.chains[1])
        _, segments = writer.transcript_about([fact], "one search")
        begun = Segment(f"<think> {state(fact).removesuffix(f' {fact.value}.')}", True)
        before, _ = encode_segments(tokenizer, [segments[1], begun], learn_all=False)
        value, _ = encode_segments(tokenizer, [Segment(f" {fact.value}.", True)], learn_all=False)
        logits = model(torch.tensor([before + value])).logits[0, len(before) - 1 : -1]
        right += int((logits.argmax(-1) == torch.tensor(value)).all())
    return right / facts


def optimizers(model: Qwen2ForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(
    out: Path,
    weights: Path | None,
    steps: int,
    stop: int | None,
    mix: Mix,
    learning_rate: float,
    hold: float,
    seed: int,
    examples: type[Examples] = Examples,
) -> None:
    """Train for `steps` steps, or end at step `stop` of them. `weights`: a folder to begin from."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    model = Qwen2ForCausalLM.from_pretrained(weights, dtype=torch.float32) if weights else new_model(tokenizer)
    batches = iter(DataLoader(examples(tokenizer, 100 * seed + rank, steps, mix), batch_size=None, num_workers=1))
    both = optimizers(model, learning_rate)
    started, log = time.time(), []
    last = stop or steps
    for step in range(1, last + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_on(model, *next(batches))
        loss.backward()
        _average_gradients(model, world_size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(step / 100, 1.0, max(0.01, (steps - step) / ((1 - hold) * steps)))
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0 and (step % 50 == 0 or step == last):
            log.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - started)})
            if step % 250 == 0 or step == last:
                log[-1]["reading"] = round(reading_skill(model, tokenizer, seed=10_000 + seed), 3)
                _save(out, model, tokenizer, log)
            print(log[-1], f"{(time.time() - started) / step * (last - step) / 60:.0f} min left", flush=True)


def _average_gradients(model: Qwen2ForCausalLM, world_size: int) -> None:
    if world_size > 1:
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        for p, mean in zip(
            model.parameters(), (flat / world_size).split([p.numel() for p in model.parameters()]), strict=True
        ):
            p.grad.copy_(mean.view_as(p))


def _save(out: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, log: list[dict]) -> None:
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/tiny-base"))
    parser.add_argument("--weights", type=Path, help="a folder of weights to begin from")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--stop", type=int, help="end at this step, the learning rate still being that of --steps")
    parser.add_argument("--drills-only", type=float, default=Mix.drills_only)
    parser.add_argument("--drill-share", type=float, default=Mix.drill_share)
    parser.add_argument("--short-prompt", type=float, default=Mix.short_prompt)
    parser.add_argument("--practice", action="store_true", help="every habit often, before the last call")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--hold", type=float, default=0.5, help="share of the steps before the learning rate falls")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    mix = Mix(given.pop("drills_only"), given.pop("drill_share"), given.pop("short_prompt"), given.pop("practice"))
    pretrain(mix=mix, **given)
