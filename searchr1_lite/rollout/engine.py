"""Rollouts: many questions worked through at once, the model writing and the search engine answering in between.

One key-value cache lives from the prompt to the last turn. A turn is: sample until every row has stopped, search for
all rows that asked in one call, read the observations into the same cache. Ids are never made from decoded text.
Left out on purpose: continuous batching (rows wait for each other at the end of a turn) and splitting a list of
questions that does not fit into memory, which is the caller's choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache

from searchr1_lite.config import Profile
from searchr1_lite.rollout.policy import Policy
from searchr1_lite.rollout.protocol import (
    CLOSING_TAGS,
    INVALID_ACTION,
    encode_observation,
    encode_prompt,
    parse_action,
    render_observation,
)
from searchr1_lite.rollout.trajectory import Trajectory, Turn
from searchr1_lite.types import Hit, Question, Retriever

Picker = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class PromptTooLongError(ValueError):
    """A question whose prompt does not fit; the message names it."""


class RetrievalError(RuntimeError):
    """The retriever failed or broke its contract; the message names the queries."""


def rollout(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    profile: Profile,
    *,
    group_size: int = 1,
    greedy: bool = False,
    seed: int = 0,
) -> list[Trajectory]:
    """Work through every question `group_size` times; the copies of a question stand together, questions in order.

    Sampling is from the full softmax at `profile.temperature`, reproducible from `seed` for the same batch; `logprobs`
    are at that temperature. Greedy takes the likeliest token, and its `logprobs` are at temperature 1.
    All rows are in memory at once. Raises PromptTooLongError and RetrievalError.
    """
    if not questions:
        return []
    limit = _context_limit(policy, profile)
    prompts = _encode_prompts(policy, questions, profile, limit)
    rows = [_Row(q, ids) for q, ids in zip(questions, prompts, strict=True) for _ in range(group_size)]
    pick = _greedy if greedy else _sampler(profile.temperature, policy.device, seed)
    was_training = policy.model.training
    policy.model.eval()  # no dropout; and in training mode gradient checkpointing silently drops the cache
    try:
        with torch.no_grad():
            batch = _Batch.start(policy, prompts, group_size)
            _work_through(rows, batch, policy, retriever, profile, pick, limit)
    finally:
        policy.model.train(was_training)
    return [row.trajectory() for row in rows]


def _work_through(
    rows: list["_Row"],
    batch: "_Batch",
    policy: Policy,
    retriever: Retriever,
    profile: Profile,
    pick: Picker,
    limit: int,
) -> None:
    """`max_turns` turns in which a search is executed, then a last one in which it is not (Search-R1, run_llm_loop)."""
    stops = _Stops(policy, batch.logits.shape[1])
    for turn in range(profile.max_turns + 1):
        written = _write_turn(batch, pick, stops, profile.max_response_tokens)
        for row, (ids, logprobs) in zip(rows, written, strict=True):
            row.add(ids, logprobs)
        texts = [stops.decode(ids) for ids, _ in written]
        chunks = _respond(rows, texts, turn == profile.max_turns, policy, retriever, profile, limit)
        going = [index for index, row in enumerate(rows) if not row.stop_reason]
        if not going:
            return
        batch.keep(going)
        batch.read_chunks([[written[index][0][-1], *chunks[index]] for index in going])
        rows = [rows[index] for index in going]


def _write_turn(batch: "_Batch", pick: Picker, stops: "_Stops", max_tokens: int) -> list[tuple[list, list]]:
    """Sample one turn: ids and log-probabilities for each row, up to its closing tag, its end token or `max_tokens`.

    The last token of a row is not read into the cache. Rows that have stopped stay in the batch, unread.
    """
    rows = len(batch.lengths)
    ids, logprobs = np.zeros((rows, max_tokens), dtype=np.int64), np.zeros((rows, max_tokens), dtype=np.float32)
    lengths, going = np.zeros(rows, dtype=np.int64), np.ones(rows, dtype=bool)
    for step in range(max_tokens):
        token, logprob = pick(batch.logits)
        ids[:, step], logprobs[:, step] = token.cpu().numpy(), logprob.cpu().numpy()
        lengths += going
        for row in np.flatnonzero(going & stops.worth_a_look[ids[:, step]]):
            going[row] = not stops.ended(ids[row, : step + 1])
        if step + 1 == max_tokens or not going.any():
            break
        batch.read(token[:, None], torch.from_numpy(going)[:, None].to(token.device))
    return [(ids[row, :n].tolist(), logprobs[row, :n].tolist()) for row, n in enumerate(lengths)]


def _respond(
    rows: list["_Row"],
    texts: list[str],
    last_turn: bool,
    policy: Policy,
    retriever: Retriever,
    profile: Profile,
    limit: int,
) -> list[list[int]]:
    """Record each row's turn, end the rows that are done, and give the others their observation (ids, else [])."""
    actions = [parse_action(text) for text in texts]
    queries = [] if last_turn else [action.content for action in actions if action.kind == "search"]
    found = iter(_search(retriever, queries, profile.topk))
    chunks = []
    for row, text, action in zip(rows, texts, actions, strict=True):
        chunks.append([])
        if action.kind == "answer" or last_turn:
            row.turns.append(Turn(text, action.kind))
            row.stop_reason = "answer" if action.kind == "answer" else "turns"
            continue
        searched = action.kind == "search"
        query, hits = (action.content, tuple(next(found))) if searched else (None, ())
        observation = render_observation(hits) if searched else INVALID_ACTION
        chunk = encode_observation(policy.tokenizer, observation, profile.max_observation_tokens)
        if row.tokens + len(chunk) + profile.max_response_tokens > limit:
            row.turns.append(Turn(text, action.kind, query, hits))
            row.stop_reason = "context"
            continue
        row.turns.append(Turn(text, action.kind, query, hits, _decode(policy, chunk)))
        row.add(chunk)
        chunks[-1] = chunk
    return chunks


def _search(retriever: Retriever, queries: list[str], k: int) -> list[list[Hit]]:
    """One call for all queries; fewer than `k` hits, or none, are taken as they are."""
    if not queries:
        return []
    named = ", ".join(repr(query) for query in queries[:5]) + (", …" if len(queries) > 5 else "")
    try:
        found = retriever.search(queries, k)
    except Exception as error:
        raise RetrievalError(f"the retriever failed on {len(queries)} queries ({named}): {error}") from error
    if len(found) != len(queries):
        raise RetrievalError(f"the retriever returned {len(found)} lists of hits for {len(queries)} queries ({named})")
    for query, hits in zip(queries, found, strict=True):
        if len(hits) > k:
            raise RetrievalError(f"the retriever returned {len(hits)} hits for {query!r} where {k} were asked for")
    return found


@dataclass(slots=True)
class _Row:
    """A trajectory in the making."""

    question: Question
    prompt_ids: list[int]
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


@dataclass(slots=True)
class _Batch:
    """What the model has read, for all rows that go on. The cache may hold entries that count for nothing."""

    model: torch.nn.Module
    cache: DynamicCache
    attention: torch.Tensor  # (rows, cached entries), 1 where the entry is a token of the row
    lengths: torch.Tensor  # (rows,), tokens read, which is the position of the next one
    logits: torch.Tensor  # (rows, vocabulary), for the next token
    pad: int

    @classmethod
    def start(cls, policy: Policy, prompts: list[list[int]], group_size: int) -> "_Batch":
        """Read each prompt once, then let the copies of a question share what was read."""
        empty = torch.zeros((len(prompts), 0), dtype=torch.long, device=policy.device)
        batch = cls(policy.model, DynamicCache(), empty, empty.sum(1), empty, policy.tokenizer.pad_token_id)
        batch.read_chunks(prompts)
        if group_size > 1:
            batch.cache.batch_repeat_interleave(group_size)
            for name in ("attention", "lengths", "logits"):
                setattr(batch, name, getattr(batch, name).repeat_interleave(group_size, dim=0))
        return batch

    def read_chunks(self, chunks: list[list[int]]) -> None:
        """Read a list of tokens for each row, padded on the left, so that every row's last token comes last."""
        width = max(map(len, chunks))
        ids = [[self.pad] * (width - len(chunk)) + chunk for chunk in chunks]
        real = [[0] * (width - len(chunk)) + [1] * len(chunk) for chunk in chunks]
        device = self.attention.device
        self.read(torch.tensor(ids, device=device), torch.tensor(real, device=device))

    def read(self, ids: torch.Tensor, real: torch.Tensor) -> None:
        """Read `ids` (rows, tokens) into the cache; those where `real` is 0 are padding that nothing will look at."""
        real = real.to(self.attention.dtype)
        self.attention = torch.cat([self.attention, real], dim=1)
        positions = (self.lengths[:, None] + real.cumsum(1) - 1).clamp(min=0)
        self.lengths = self.lengths + real.sum(1)
        output = self.model(
            input_ids=ids,
            attention_mask=self.attention,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1].float()

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the entries that count for nothing as far as the longest row allows."""
        index = torch.tensor(rows, device=self.attention.device)
        attention = self.attention[index]
        width = int(attention.sum(1).max())
        order = attention.argsort(dim=1, stable=True)[:, -width:]  # a row's own entries, in order, at the right
        for layer in self.cache.layers:
            layer.keys = _take_entries(layer.keys[index], order)
            layer.values = _take_entries(layer.values[index], order)
        self.attention, self.lengths = attention.gather(1, order), self.lengths[index]


def _take_entries(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Keys or values (rows, heads, entries, head size) with each row's entries as `order` (rows, kept) says."""
    return states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


class _Stops:
    """Where a turn ends. A tag may end inside a token ('>\\n\\n'), so texts are compared, but only after a '>'."""

    def __init__(self, policy: Policy, vocabulary: int) -> None:
        self.policy = policy
        ends = policy.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {end for end in [*ends, policy.tokenizer.eos_token_id] if end is not None}
        self.worth_a_look = np.zeros(vocabulary, dtype=bool)
        tokens = policy.tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(policy.tokenizer)))))
        self.worth_a_look[: len(tokens)] = [token is not None and ">" in token for token in tokens]
        self.worth_a_look[list(self.ends)] = True

    def ended(self, ids: np.ndarray) -> bool:
        """Whether a turn with these ids is complete."""
        return int(ids[-1]) in self.ends or any(tag in self.decode(ids.tolist()) for tag in CLOSING_TAGS)

    def decode(self, ids: list[int]) -> str:
        return _decode(self.policy, ids)


def _decode(policy: Policy, ids: list[int]) -> str:
    return policy.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    token = logits.argmax(dim=-1)
    return token, logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]


def _sampler(temperature: float, device: torch.device, seed: int) -> Picker:
    generator = torch.Generator(device=device).manual_seed(seed)

    def sample(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = (logits / temperature).log_softmax(dim=-1)
        token = torch.multinomial(logprobs.exp(), 1, generator=generator)
        return token[:, 0], logprobs.gather(1, token)[:, 0]

    return sample


def _context_limit(policy: Policy, profile: Profile) -> int:
    own = getattr(policy.model.config, "max_position_embeddings", None)
    return min(profile.max_context_tokens, own) if own else profile.max_context_tokens


def _encode_prompts(policy: Policy, questions: Sequence[Question], profile: Profile, limit: int) -> list[list[int]]:
    prompts = [encode_prompt(policy.tokenizer, q.question, profile.chat_template) for q in questions]
    most = min(profile.max_prompt_tokens, limit - profile.max_response_tokens)
    for question, ids in zip(questions, prompts, strict=True):
        if len(ids) > most:
            raise PromptTooLongError(
                f"question {question.id}: its prompt has {len(ids)} tokens, at most {most} fit "
                f"(max_prompt_tokens = {profile.max_prompt_tokens}; context = {limit}, of which "
                f"{profile.max_response_tokens} are for one turn); shorten the question or raise the limits"
            )
    return prompts
