"""The work that every engine of the benchmarks does: the same model, questions, searches, and the same written words.

A model with random weights writes nothing worth timing, so what it "writes" is scripted: a think text of a drawn
length, then a search or an answer. Every logit is computed as in life; the sampler's choice alone is replaced by the
script's next token. Left out: reading what was written for its sense.
"""

import contextlib
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, StoppingCriteria

from searchr1_lite.config import Profile, load_profile, resolve_path
from searchr1_lite.retrieval.corpus import load_corpus
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.rollouts.decoding import LocalSampler
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import CLOSING_TAGS, encode_prompt
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.tasks.questions import load_questions
from searchr1_lite.types import Question, Retriever

Written = tuple[list[int], list[int]]  # completion ids and loss mask of a row
SHAPE = {"hidden_size": 512, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPE |= {"intermediate_size": 1536}  # the tiny model's proportions, with 32 million parameters
LENGTHS = (40, 0.5, 25, 120)  # tokens of a turn: median and sigma of the lognormal they are drawn from, least, most
QUICK_LENGTHS = (24, 0.2, 20, 32)
RECORDED = (
    "2,249 turns of the released Search-R1 3B model, tokens taken as characters / 4.2: mean 41, median 44, 95 % under "
    "91, 99 % under 114, one in 1,000 over 158"
)


@dataclass(slots=True)
class Work:
    """`scripts`: by row and turn, the ids to be written. Rows are copies of a question together, questions in order."""

    policy: Policy
    questions: list[Question]
    retriever: Retriever
    profile: Profile
    group_size: int
    scripts: list[list[list[int]]]
    tail: list[int]  # what an engine that does not stop at the tag writes after it
    prompts: list[list[int]]  # of each row
    scripted: float = 0.0  # seconds spent on scripting since it was last set to 0
    rows: dict[bytes, tuple[int, list[int]]] = field(default_factory=dict)  # what a row has read: its turn, which rows

    @property
    def written_tokens(self) -> int:
        return sum(len(turn) for script in self.scripts for turn in script)

    @contextlib.contextmanager
    def scripting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.scripted += time.perf_counter() - start


def make_policy(shape: dict[str, int], seed: int, context: int = 2048) -> Policy:
    """The tiny model's config with other sizes and random weights, its tokenizer, in 32 bits on the CPU."""
    source = str(resolve_path("data/tiny-base"))
    layers = ["full_attention"] * shape.get("num_hidden_layers", 4)
    config = AutoConfig.from_pretrained(source, layer_types=layers, max_position_embeddings=context, **shape)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = config.eos_token_id, 0
    return Policy(model, AutoTokenizer.from_pretrained(source), torch.device("cpu"))


def make_work(
    policy: Policy,
    *,
    questions: int = 8,
    group_size: int = 8,
    searches: int = 2,
    lengths: tuple[float, float, int, int] = LENGTHS,
    max_response_tokens: int = 256,
    seed: int = 0,
    **settings: int,
) -> Work:
    """Questions of the toy world and its BM25; each row searches `searches` times, then answers."""
    settings = {"max_turns": searches, "group_size": group_size, "rollout_rows": questions * group_size} | settings
    settings = {"max_context_tokens": policy.model.config.max_position_embeddings} | settings
    profile = load_profile("tiny", quantization="none", max_response_tokens=max_response_tokens, **settings)
    passages = load_corpus("toy")
    rng = random.Random(seed)
    asked = rng.sample(load_questions("toy", "test"), questions)
    words = [word for passage in passages for word in passage.text.split()]
    rows = [question for question in asked for _ in range(group_size)]
    scripts = []
    for question in rows:
        queries = [rng.choice(passages).title for _ in range(searches)]
        ends = [f"<search> {q} </search>" for q in queries] + [f"<answer> {question.golden_answers[0]} </answer>"]
        scripts.append([_turn(policy.tokenizer, end, words, lengths, rng) for end in ends])
    prompts = [encode_prompt(policy.tokenizer, row.question, profile.chat_template) for row in rows]
    tail = policy.tokenizer.encode(" " + " ".join(rng.choices(words, k=max_response_tokens)))[:max_response_tokens]
    with contextlib.redirect_stdout(None):
        retriever = load_retriever(profile, passages)
    return Work(policy, asked, retriever, profile, group_size, scripts, tail, prompts)


def _turn(tokenizer, end: str, words: list[str], lengths: tuple, rng: random.Random) -> list[int]:
    """A turn of about a drawn number of tokens, whose text encodes to the very same ids (the original encodes it)."""
    median, sigma, least, most = lengths
    wanted = min(max(median * rng.lognormvariate(0, sigma), least), most)
    thought = ["I"]
    while True:
        ids = tokenizer.encode(f"<think> {' '.join(thought)} </think>\n{end}", add_special_tokens=False)
        if len(ids) >= wanted:
            break
        thought.append(rng.choice(words))
    if tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids:
        raise RuntimeError(f"a scripted turn does not come back from its text: {tokenizer.decode(ids)!r}")
    return ids


# How the script takes the place of a sampler


def ours(work: Work, seed: int = 0) -> list[Trajectory]:
    """Our engine. Its sampler does its work too; then the scripted ids replace its own."""
    longest = max(sum(map(len, script)) for script in work.scripts)
    tokens = np.zeros((len(work.scripts), longest), dtype=np.int64)
    for row, script in enumerate(work.scripts):
        flat = list(chain.from_iterable(script))
        tokens[row, : len(flat)] = flat
    at = np.zeros(len(tokens), dtype=np.int64)

    def pick(logits: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        _, logprobs = sampler._sample(logits, rows)
        with work.scripting():
            ids = torch.from_numpy(tokens[rows, at[rows]])
            at[rows] += 1
        return ids, logprobs

    capacity = max(work.group_size, min(work.profile.rollout_rows, len(tokens)))
    sampler = LocalSampler(work.policy, capacity, work.profile.max_response_tokens, pick)
    return rollout(
        work.policy,
        work.questions,
        work.retriever,
        work.profile,
        group_size=work.group_size,
        seed=seed,
        sampler=sampler,
    )


def learn_histories(work: Work, trajectories: list[Trajectory]) -> list[Written]:
    """What each row must come to, and, for peers that are told no row, which rows write after which ids."""
    work.rows.clear()
    for row, (trajectory, script) in enumerate(zip(trajectories, work.scripts, strict=True)):
        ids, mask = list(trajectory.completion_ids), list(trajectory.loss_mask)
        if [i for i, own in zip(ids, mask, strict=True) if own] != list(chain.from_iterable(script)):
            raise RuntimeError(f"row {row}: our engine did not write its script")
        at = 0
        for turn, own in enumerate(script):
            key = np.array(work.prompts[row] + ids[:at], dtype=np.int64).tobytes()
            work.rows.setdefault(key, (turn, []))[1].append(row)
            at += len(own)
            at += next((n for n, mine in enumerate(mask[at:]) if mine), 0)
    return [(list(one.completion_ids), list(one.loss_mask)) for one in trajectories]


class Scripted(LogitsProcessor):
    """The script as the last logits processor of one `generate` call, whose rows it knows by what they have read.

    A row whose ids are no history of this work is an error: it was not fed what our engine fed. Copies of a prompt are
    taken in order. With `runs_on`, the tail follows the tag until the call ends.
    """

    def __init__(self, work: Work, runs_on: bool = False) -> None:
        self.work, self.runs_on, self.tokens = work, runs_on, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with self.work.scripting():
            if self.tokens is None:
                self.start, self.tokens = input_ids.shape[1], self._tokens(input_ids)
            column = min(input_ids.shape[1] - self.start, self.tokens.shape[1] - 1)
            return scores.fill_(-torch.inf).scatter_(1, self.tokens[:, column, None], 0.0)

    def _tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        taken, turns = Counter(), []
        for ids in input_ids.numpy():
            key = ids[ids != self.work.policy.tokenizer.pad_token_id].tobytes()
            if key not in self.work.rows:
                raise RuntimeError("a peer's row has read something that ours has not")
            turn, rows = self.work.rows[key]
            turns.append(self.work.scripts[rows[taken[key]]][turn])
            taken[key] += 1
        width = self.work.profile.max_response_tokens if self.runs_on else max(map(len, turns))
        tail = self.work.tail if self.runs_on else [0] * width
        return torch.tensor([(turn + tail)[:width] for turn in turns])


class TagStop(StoppingCriteria):
    """Ends rows at a closing tag, cheaply: a table says which tokens hold a '>', and only then text is looked at."""

    def __init__(self, tokenizer) -> None:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.tokenizer, self.worth_a_look = tokenizer, torch.tensor([">" in token for token in tokens])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        done = self.worth_a_look[input_ids[:, -1]]
        for row in done.nonzero()[:, 0].tolist():
            text = self.tokenizer.decode(input_ids[row, -12:])
            done[row] = any(tag in text for tag in CLOSING_TAGS)
        return done


class Clock:
    """Progress with the time that is left, by how long each kind of run took the last time."""

    def __init__(self, runs: list[str]) -> None:
        self.left, self.last = deque(runs), {}

    def ran(self, name: str, seconds: float) -> None:
        self.left.popleft()
        self.last[name] = seconds
        known = sum(self.last.values()) / len(self.last)
        left = sum(self.last.get(one, known) for one in self.left)
        print(f"{name:<34} {seconds:7.2f} s   {len(self.left)} runs to go, about {left / 60:.1f} min", flush=True)
