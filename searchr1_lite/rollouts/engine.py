"""Rollouts: many questions worked through at once, the model writing and the search engine answering in between.

Every row goes at its own pace: it writes a turn, its search starts the moment it asks, the others write on meanwhile,
and when it is done the next question takes its place. Ids are never made from decoded text. What writes is a
`TokenSampler`: decoding.py in this process, vllm.py through a server. A row whose search fails for good ends there, and
says so; the others go on.
"""

import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from searchr1_lite.config import ConfigError, Profile
from searchr1_lite.errors import UserError
from searchr1_lite.retrieval.batching import Batcher
from searchr1_lite.rollouts.cuda_graphs import cuda_graph
from searchr1_lite.rollouts.decoding import LocalSampler, decode
from searchr1_lite.rollouts.decoding import greedy as likeliest
from searchr1_lite.rollouts.dequantize import dequantized_weights
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import (
    INVALID_ACTION,
    PROMPTS,
    encode_observation,
    encode_prompt,
    parse_action,
    render_observation,
)
from searchr1_lite.rollouts.trajectory import Trajectory, Turn
from searchr1_lite.types import QueryRefusedError, Question, Retriever


class PromptTooLongError(UserError):
    """A question whose prompt does not fit; the message names it."""


class TokenSampler(Protocol):
    """What writes the model's part of trajectories. Rows are numbers that the engine gives out."""

    capacity: int  # rows that it holds at once
    writing: int  # rows that are in the middle of a turn, or about to begin one
    search_delay_steps: int | None  # calls of `advance` until a search's hits are read; None: as soon as they are there

    def open(self, rows: Sequence[int], prompt: Sequence[int], streams: Sequence[np.random.Generator]) -> None:
        """Rows that share a prompt begin their first turn; each samples from its own stream."""

    def read(self, row: int, ids: Sequence[int]) -> None:
        """The row reads these ids, an observation, and begins its next turn."""

    def advance(self) -> list[tuple[int, list[int], list[float]]]:
        """Write on for a moment. Returns the turns that ended: row, ids, and their log-probabilities.

        A turn ends right after the token that completes a closing tag, at an end token or at `max_response_tokens`.
        """

    def close(self, row: int) -> None:
        """The row is done; forget it."""


def rollout(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    profile: Profile,
    *,
    group_size: int = 1,
    greedy: bool = False,
    seed: int = 0,
    sampler: TokenSampler | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    done: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Work through every question `group_size` times; the copies of a question stand together, questions in order.

    The prompt and whether there are searches is the profile's strategy ("search_r1", or, in one turn, "r1", "cot"
    and "direct"). `prompts` are ids to begin with instead, a question each, for anything else that is said in one turn.

    At most `profile.rollout_rows` rows are in memory; the others wait, and take the place of those that are done.
    Sampling is from the full softmax at `profile.temperature`. Each row has its own random numbers, made from `seed`,
    the question's id and the copy's number, so what it writes does not depend on the rows beside it (but for
    rounding). `logprobs` are at that temperature. Greedy takes the likeliest token; its `logprobs` are at 1.
    `done` gets each trajectory, in order, as soon as it and all before it are ready.
    A trajectory whose search fails for good ends there (`stop_reason` "search failed", or "search refused" where the
    retriever does not take the query) and a warning counts them.
    Raises PromptTooLongError, ConfigError where not even one group has room, and RetrievalError where no search came
    back at all, or as many in a row failed as rows are written at a time: the retriever is gone then.
    """
    if not questions:
        return []
    limit = context_limit(policy, profile)
    if prompts is None:
        prompts = _encode_prompts(policy, questions, profile)
    else:
        profile = profile.model_copy(update={"strategy": "direct", "max_prompt_tokens": limit})
    _check_lengths(questions, prompts, profile, limit)
    if profile.strategy != "search_r1":
        profile = profile.model_copy(update={"max_turns": 0})
    rows = [_Row(q, ids) for q, ids in zip(questions, prompts, strict=True) for _ in range(group_size)]
    if sampler is None:
        capacity = min(profile.rollout_rows, len(rows))
        pick = likeliest if greedy else None
        record = cuda_graph if profile.cuda_graphs and policy.device.type == "cuda" else None
        sampler = LocalSampler(policy, capacity, profile.max_response_tokens, pick, profile.temperature, record)
    if sampler.capacity < group_size:
        raise ConfigError(f"rollout_rows = {sampler.capacity} leaves no room for a group of {group_size} rows")
    ours = isinstance(sampler, LocalSampler) and profile.sampling_weights == "dequantized"
    weights = dequantized_weights(policy.model) if ours else nullcontext()
    was_training = policy.model.training
    policy.model.eval()  # no dropout; and in training mode gradient checkpointing silently drops the cache
    try:
        with torch.no_grad(), weights, Batcher(retriever) as searches:
            streams = _streams([row.question for row in rows], seed)
            loop = _Loop(rows, group_size, streams, sampler, searches, policy.tokenizer, profile, limit)
            for trajectory in loop.run():
                if done:
                    done(trajectory)
    finally:
        policy.model.train(was_training)
    return [row.trajectory() for row in rows]


class _Asked(NamedTuple):
    """A row that waits for its observation; `hits` is None where the action was invalid and nothing is searched."""

    step: int
    row: int
    hits: Future | None


@dataclass(slots=True)
class _Loop:
    """Search-R1's loop (generation.py, run_llm_loop), row by row: turns that may search, then one that may not.

    With a sampler that has search_delay_steps, which rows are read together depends on steps and never on the time that
    a search took: a rollout can be repeated exactly.
    """

    rows: list["_Row"]  # the copies of a question together
    group_size: int
    streams: list[np.random.Generator]  # one a row
    sampler: TokenSampler
    searches: Batcher
    tokenizer: Any
    profile: Profile
    limit: int  # tokens of a row
    begun: int = 0  # rows that have begun, or are done
    open: int = 0  # rows that the sampler holds
    asked: list[_Asked] = field(default_factory=list)
    failed: int = 0  # searches, refused queries included
    failed_in_a_row: int = 0
    searched: bool = False  # the retriever has said something
    error: BaseException | None = None  # of the last search that failed

    def run(self) -> Iterator[Trajectory]:
        ready = step = 0
        while ready < len(self.rows):
            if not self.sampler.active or step % (self.sampler.search_delay_steps or 1) == 0:
                self._refill()
                self._observe(self._answered(step))
            ended = self.sampler.advance()
            self._take_turns(step, ended)
            step += 1
            while ready < len(self.rows) and self.rows[ready].stop_reason:
                yield self.rows[ready].trajectory()
                ready += 1
        if self.error and not self.searched:
            raise self.error
        if self.failed:
            warnings.warn(f"{self.failed} of {len(self.rows)} trajectories ended because a search failed", stacklevel=3)

    def _refill(self) -> None:
        while self.begun < len(self.rows) and self.open + self.group_size <= self.sampler.capacity:
            group = range(self.begun, self.begun + self.group_size)
            self.sampler.open(group, self.rows[group.start].prompt_ids, self.streams[group.start : group.stop])
            self.begun, self.open = group.stop, self.open + self.group_size

    def _take_turns(self, step: int, ended: list[tuple[int, list[int], list[float]]]) -> None:
        """Record the turns that ended; end the rows that are done, and start the searches of the others at once."""
        queries, searching = [], []
        for number, ids, logprobs in ended:
            row = self.rows[number]
            row.add(ids, logprobs)
            text = decode(self.tokenizer, ids)
            action = parse_action(text)
            last = action.kind == "answer" or len(row.turns) == self.profile.max_turns
            searched = action.kind == "search" and not last
            row.turns.append(Turn(text, action.kind, action.content if searched else None))
            if last:
                self._close(number, "answer" if action.kind == "answer" else "turns")
            elif searched:
                queries.append(action.content)
                searching.append(number)
            else:
                self.asked.append(_Asked(step, number, None))
        of = [self.rows[number].question for number in searching]
        for number, hits in zip(searching, self.searches.ask(queries, self.profile.topk, of), strict=True):
            self.asked.append(_Asked(step, number, hits))

    def _answered(self, step: int) -> list[_Asked]:
        """The rows that are to read their observations now, taken off the list."""
        search_delay_steps, idle = self.sampler.search_delay_steps, not self.sampler.active
        if search_delay_steps is not None:
            due = [one for one in self.asked if idle or one.step <= step - search_delay_steps]
        else:
            if idle:
                wait([one.hits for one in self.asked if one.hits], return_when=FIRST_COMPLETED)
            due = [one for one in self.asked if one.hits is None or one.hits.done()]
        self.asked = [one for one in self.asked if one not in due]
        return due

    def _observe(self, due: list[_Asked]) -> None:
        """Give rows their observation, or end those whose next turn would not fit any more."""
        for _, number, found in due:
            row = self.rows[number]
            if found is not None and self._gave_up(number, found.exception()):
                continue
            hits = () if found is None else tuple(found.result())
            observation = INVALID_ACTION if found is None else render_observation(hits)
            chunk = encode_observation(self.tokenizer, observation, self.profile.max_observation_tokens)
            fits = row.tokens + len(chunk) + self.profile.max_response_tokens <= self.limit
            said = row.turns[-1]
            seen = decode(self.tokenizer, chunk) if fits else ""
            row.turns[-1] = Turn(said.text, said.action, said.query, hits, seen)
            if fits:
                row.add(chunk)
                self.sampler.read(number, chunk)
            else:
                self._close(number, "context")

    def _gave_up(self, number: int, error: BaseException | None) -> bool:
        """Whether this row's search failed, which ends it; raises the error where the retriever seems to be gone."""
        if error is None or isinstance(error, QueryRefusedError):
            self.searched, self.failed_in_a_row = True, 0
        else:
            self.error, self.failed_in_a_row = error, self.failed_in_a_row + 1
            if self.failed_in_a_row >= self.sampler.capacity:
                raise error
        if error is not None:
            self.failed += 1
            self._close(number, "search refused" if isinstance(error, QueryRefusedError) else "search failed")
        return error is not None

    def _close(self, number: int, reason: str) -> None:
        self.rows[number].stop_reason = reason
        self.sampler.close(number)
        self.open -= 1


def _streams(questions: Sequence[Question], seed: int) -> list[np.random.Generator]:
    """Random numbers for each row, of the seed, its question and how many copies of that came before it."""
    copies: Counter[str] = Counter()
    streams = []
    for question in questions:
        number = zlib.crc32(question.id.encode()) << 32 | copies[question.id]
        copies[question.id] += 1
        streams.append(np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64))))
    return streams


@dataclass(slots=True)
class _Row:
    """A trajectory in the making."""

    question: Question
    prompt_ids: Sequence[int]
    completion_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    stop_reason: str = ""  # "" while the row goes on

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def add(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        """Tokens that the policy wrote, or, without log-probabilities, that the environment put there."""
        self.completion_ids += ids
        self.loss_mask += [int(logprobs is not None)] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs

    def trajectory(self) -> Trajectory:
        return Trajectory(
            question=self.question,
            prompt_ids=tuple(self.prompt_ids),
            completion_ids=tuple(self.completion_ids),
            loss_mask=tuple(self.loss_mask),
            logprobs=tuple(self.logprobs),
            turns=tuple(self.turns),
            finished=self.stop_reason == "answer",
            stop_reason=self.stop_reason,
        )


def context_limit(policy: Policy, profile: Profile) -> int:
    """Tokens that a trajectory can have: what the profile allows, or the model if that is less."""
    own = getattr(policy.model.config, "max_position_embeddings", None)
    return min(profile.max_context_tokens, own) if own else profile.max_context_tokens


def _encode_prompts(policy: Policy, questions: Sequence[Question], profile: Profile) -> list[list[int]]:
    if profile.strategy not in PROMPTS:
        raise ConfigError(f"strategy {profile.strategy!r} is more than one trajectory; there are {', '.join(PROMPTS)}")
    return [encode_prompt(policy.tokenizer, q.question, profile.chat_template, profile.strategy) for q in questions]


def _check_lengths(
    questions: Sequence[Question], prompts: Sequence[Sequence[int]], profile: Profile, limit: int
) -> None:
    most = min(profile.max_prompt_tokens, limit - profile.max_response_tokens)
    for question, ids in zip(questions, prompts, strict=True):
        if len(ids) > most:
            raise PromptTooLongError(
                f"question {question.id}: its prompt has {len(ids)} tokens, at most {most} fit "
                f"(max_prompt_tokens = {profile.max_prompt_tokens}; context = {limit}, of which "
                f"{profile.max_response_tokens} are for one turn); shorten the question or raise the limits"
            )
