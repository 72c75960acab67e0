"""Writing in this process: one token at a time for every row that is in the middle of a turn, and for no other.

All rows share one rectangle of keys and values a layer, made once and grown rarely. Token n of a row lies at entry n
of the row's slot, so there are no holes to drop. Slots are sorted: rows that write come first, and a step is a
forward over these alone; rows that wait for a search or are done lie behind them and cost nothing. Left out: sharing
the entries of a group's prompt (each copy has its own), and models whose layers see a window only.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import torch
from transformers import Cache

from searchr1_lite.rollouts.cuda_graphs import Record, Recorded
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import CLOSING_TAGS

Pick = Callable[[torch.Tensor, list[int]], tuple[torch.Tensor, torch.Tensor]]
READ_TOKENS = 8192  # tokens of prompts or observations in one forward, at most; a longer one goes alone
READ_ENTRIES = 2**16  # and entries that it sees, rows times the longest: keys and values are repeated for query heads
ENTRIES = 256  # the cache grows by as many at a time


class LocalSampler:
    """Writes with the policy's own model; see `engine.TokenSampler`, whose methods these are.

    `pick(logits, rows)` chooses the tokens: logits (n, vocabulary) in 32 bits, of these rows; it returns ids (n,) and
    their log-probabilities (n,). Without it they are sampled, each row from its own stream of random numbers, from
    the full softmax at `temperature`. `record`, see `Recorded` in cuda_graphs.py, is `cuda_graph` or nothing.
    """

    search_delay_steps = (
        4  # steps between an observation's search and its reading; rows that ask about then are read together
    )

    def __init__(
        self,
        policy: Policy,
        capacity: int,
        max_tokens: int,
        pick: Pick | None = None,
        temperature: float = 1.0,
        record: Record | None = None,
    ) -> None:
        self.policy, self.capacity, self.max_tokens = policy, capacity, max_tokens
        self.pick, self.temperature = pick or self._sample, temperature
        self.stops = Stops(policy)
        self.cache = _Cache(capacity)
        self.recorded = Recorded(policy, self.cache, record, ENTRIES, _read) if record else None
        self.slots: list[int | None] = [None] * capacity  # the row in each slot
        self.decoding = 0  # rows that write; they are in the first slots
        self.lengths = np.zeros(capacity, dtype=np.int64)  # tokens read, by slot
        self.logits: torch.Tensor | None = None  # (writing, vocabulary), for the next token
        self.streams: dict[int, np.random.Generator] = {}
        self.written: dict[int, tuple[list[int], list[float]]] = {}  # of the turn that a row is in, or was last in
        self.prompts: list[tuple[list[int], list[int]]] = []  # rows and the prompt that they share, to be read
        self.chunks: dict[int, list[int]] = {}  # what else is to be read

    @property
    def active(self) -> int:
        return self.decoding + len(self.chunks) + sum(len(rows) for rows, _ in self.prompts)

    def open(self, rows: Sequence[int], prompt: Sequence[int], streams: Sequence[np.random.Generator]) -> None:
        for row, stream in zip(rows, streams, strict=True):
            slot = self.slots.index(None)
            self.slots[slot], self.lengths[slot] = row, 0
            self.streams[row] = stream
        self.prompts.append((list(rows), list(prompt)))

    def read(self, row: int, ids: Sequence[int]) -> None:
        self.chunks[row] = [self.written[row][0][-1], *ids]  # the last token of a turn was not read when it was written

    def close(self, row: int) -> None:
        self.slots[self.slots.index(row)] = None
        del self.streams[row], self.written[row]

    def advance(self) -> list[tuple[int, list[int], list[float]]]:
        self._read_what_waits()
        if not self.decoding:
            return []
        rows = self.slots[: self.decoding]
        picked, logprobs = (one.cpu().numpy() for one in self.pick(self.logits, rows))
        ended = [slot for slot in range(self.decoding) if self._add(rows[slot], picked[slot], logprobs[slot])]
        going = self._stop_writing(ended)
        if going:
            self._step(picked[going])
        return [(rows[slot], *self.written[rows[slot]]) for slot in ended]

    def _add(self, row: int, token: np.integer, logprob: np.floating) -> bool:
        """Add a token to the row's turn and say whether it ends the turn."""
        ids, logprobs = self.written[row]
        ids.append(int(token))
        logprobs.append(float(logprob))
        return len(ids) == self.max_tokens or self.stops.ended(ids)

    def _stop_writing(self, ended: list[int]) -> list[int]:
        """Put the rows that go on into the first slots; which slots they were in, in their new order."""
        gone, going = set(ended), self.decoding - len(ended)
        stays = [slot for slot in range(self.decoding) if slot not in gone]
        late = [slot for slot in stays if slot >= going]
        order = [late.pop() if slot in gone else slot for slot in range(going)]
        rows = [self.slots[slot] for slot in order]
        self.decoding = going
        self._arrange(0, rows)
        return order

    def _arrange(self, start: int, rows: Sequence[int]) -> None:
        """Bring these rows into the slots from `start` on, in this order, by exchanging slots."""
        where = {row: slot for slot, row in enumerate(self.slots) if row is not None}
        order = list(range(self.capacity))
        for target, row in enumerate(rows, start):
            slot, other = where[row], self.slots[target]
            if slot == target:
                continue
            self.slots[target], self.slots[slot] = row, other
            order[target], order[slot] = order[slot], order[target]
            if other is not None:
                where[other] = slot
        moved = [slot for slot, old in enumerate(order) if old != slot]
        if moved:
            old = [order[slot] for slot in moved]
            self.lengths[moved] = self.lengths[old]
            self.cache.move(old, moved, int(self.lengths[moved].max()))

    def _step(self, tokens: np.ndarray) -> None:
        """Read one token for every row that writes."""
        if self.recorded:
            self.cache.reach(int(self.lengths[: self.decoding].max()) + 1)
            self.logits = self.recorded.step(tokens, self.lengths[: self.decoding])
            self.lengths[: self.decoding] += 1
        else:
            self.logits = self._forward(0, tokens[:, None], np.ones((len(tokens), 1), dtype=np.int64))

    def _read_what_waits(self) -> None:
        """Read prompts, once for all rows that share one, and observations; all these rows then write."""
        if not (self.prompts or self.chunks):
            return
        leaders = [rows[0] for rows, _ in self.prompts]
        texts = {rows[0]: prompt for rows, prompt in self.prompts} | self.chunks
        copies = {copy: rows[0] for rows, _ in self.prompts for copy in rows[1:]}
        order = [*sorted(leaders, key=lambda row: len(texts[row])), *sorted(self.chunks, key=lambda r: len(texts[r]))]
        self._arrange(self.decoding, [*order, *copies])
        logits = [] if self.logits is None or not self.decoding else [self.logits]
        before = dict(zip(self.slots, self.lengths.tolist(), strict=True))
        for part in _alike(order, texts, before):
            slot = self.slots.index(part[0])
            logits.append(self._forward(slot, *_left_padded([texts[row] for row in part], self.policy)))
        first = self.decoding
        self.decoding += len(order) + len(copies)
        self.logits = torch.cat(logits)
        if copies:
            leader_slots = [first + order.index(leader) for leader in copies.values()]
            copy_slots = list(range(first + len(order), self.decoding))
            self.lengths[copy_slots] = self.lengths[leader_slots]
            self.cache.move(leader_slots, copy_slots, int(self.lengths[leader_slots].max()))
            self.logits = torch.cat([self.logits, self.logits[leader_slots]])
        for row in self.slots[first : self.decoding]:
            self.written[row] = ([], [])
        self.prompts, self.chunks = [], {}

    def _forward(self, start: int, ids: np.ndarray, real: np.ndarray) -> torch.Tensor:
        """Read `ids` (n, tokens) into the n slots from `start` on and return the last logits (n, vocabulary).

        Where `real` is 0, on the left, is padding: it is put into the last entry, which nothing looks at.
        """
        slots = slice(start, start + len(ids))
        positions = (self.lengths[slots, None] + real.cumsum(1) - 1).clip(min=0)
        width = int(positions.max()) + 1
        self.cache.reach(width)
        places = np.where(real, positions, self.cache.entries - 1)
        self.lengths[slots] += real.sum(1)
        ids, positions, places = (torch.from_numpy(x).to(self.policy.device) for x in (ids, positions, places))
        return _read(self.policy.model, self.cache, slots, ids, positions, places, width)

    def _sample(self, logits: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """By inverting the distribution at one random number a row, so that a row's tokens are its own affair."""
        logprobs = (logits / self.temperature).log_softmax(dim=-1)
        share = torch.tensor([self.streams[row].random() for row in rows], dtype=torch.float64, device=logits.device)
        below = logprobs.double().exp().cumsum(dim=-1)
        token = torch.searchsorted(below, share[:, None] * below[:, -1:], right=True)
        token = token.clamp(max=logits.shape[1] - 1)
        return token[:, 0], logprobs.gather(1, token)[:, 0]


def _read(
    model: torch.nn.Module,
    cache: "_Cache",
    slots: slice,
    ids: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """One forward: `ids` (n, tokens) at `positions`, kept at `places`, seeing all before them, up to `width`."""
    cache.aim(slots, places, width)
    visible = torch.arange(width, device=ids.device) <= positions[:, None, :, None]  # (n, 1, tokens, entries)
    output = model(
        input_ids=ids,
        attention_mask=visible,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def greedy(logits: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest token, and its log-probability at temperature 1."""
    token = logits.argmax(dim=-1)
    return token, logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]


class Stops:
    """Where a turn ends. A tag may end inside a token ('>\\n\\n'), so texts are compared, but only after a '>'."""

    def __init__(self, policy: Policy) -> None:
        self.tokenizer = policy.tokenizer
        ends = policy.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {end for end in [*ends, policy.tokenizer.eos_token_id] if end is not None}
        self.worth_a_look = _with_sign(policy.tokenizer)

    def ended(self, ids: list[int]) -> bool:
        """Whether a turn with these ids is complete."""
        if ids[-1] in self.ends:
            return True
        return ids[-1] in self.worth_a_look and any(tag in decode(self.tokenizer, ids) for tag in CLOSING_TAGS)


@cache
def _with_sign(tokenizer) -> frozenset[int]:
    """Tokens that hold a '>'. Made once a tokenizer: Qwen's has 151,000 tokens."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return frozenset(i for i, token in enumerate(tokens) if token is not None and ">" in token)


def decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _alike(order: Sequence[int], texts: dict[int, list[int]], before: dict[int, int]) -> Iterator[list[int]]:
    """Neighbours in `order` in parts that pad little and are bounded in memory; `before` is what each row has read."""
    part: list[int] = []
    for row in order:
        lengths = [len(texts[one]) for one in (*part, row)]
        entries = max(before[one] + len(texts[one]) for one in (*part, row))
        pads = 4 * min(lengths) < 3 * max(lengths)
        if part and (pads or len(lengths) * max(lengths) > READ_TOKENS or len(lengths) * entries > READ_ENTRIES):
            yield part
            part = []
        part.append(row)
    yield part


def _left_padded(texts: list[list[int]], policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (n, longest) and where they are real, padded on the left, so that all last tokens come last."""
    width = max(map(len, texts))
    ids = np.full((len(texts), width), policy.tokenizer.pad_token_id, dtype=np.int64)
    real = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], real[row, width - len(text) :] = text, 1
    return ids, real


class _Cache(Cache):
    """Keys and values, for each layer (slots, heads, entries, head size). `aim` says where the next ones go."""

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])
        self.slots, self.entries = slots, 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def aim(self, slots: slice, places: torch.Tensor, width: int) -> None:
        """Put what comes into these slots at `places` (n, tokens), and show their entries up to `width`."""
        index = torch.arange(slots.start, slots.stop, device=places.device)[:, None]
        self.where, self.shown, self.width = (index, slice(None), places), slots, width

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_, **__) -> tuple:
        if layer_idx == len(self.keys):
            for store, new in ((self.keys, keys), (self.values, values)):
                # zeros: what is masked still meets a weight of 0, and 0 times whatever was there could be NaN
                store.append(new.new_zeros((self.slots, new.shape[1], self.entries, new.shape[3])))
        shown = []
        for store, new in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            store[self.where] = new.transpose(1, 2)
            shown.append(store[self.shown, :, : self.width])
        return tuple(shown)

    def reach(self, width: int) -> None:
        """Room for `width` entries and a last one for padding."""
        if width < self.entries:
            return
        more = -(-(width + 1) // ENTRIES) * ENTRIES
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = torch.nn.functional.pad(old, (0, 0, 0, more - self.entries))
        self.entries = more

    def move(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy slots onto others, up to `width` entries; exchanges are fine."""
        for store in (*self.keys, *self.values):
            store[targets, :, :width] = store[sources, :, :width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width
