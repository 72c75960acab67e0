"""Writing by a vLLM server: an optional backend, in a process of its own, that nothing here imports.

The base is served in bfloat16 and the adapter beside it, as a LoRA request of its own name for every version: it is
never merged, and never replaced in place. Install vLLM 0.22 to 0.31 in an environment of its own, since it pins what
we pin otherwise (0.31 wants transformers below 5.18), start it, and set `sampler: vllm`, and `vllm_url` where it is not
this machine's port 8000:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve Qwen/Qwen2.5-3B --dtype bfloat16 --max-model-len 4096 \\
      --enable-lora --max-lora-rank 16 --enable-prefix-caching --logprobs-mode processed_logprobs

with `--max-loras 2` for two training processes, which load an adapter each. The server must see the folder that
adapters are saved in. Every turn of every row is a request with all ids so far: vLLM batches the requests and finds
what it has read in its prefix cache. What it samples is not quite what the learner would have; `sampler_weights` in
training/losses.py weighs that. Left out: starting the server, keys, and merging into its weights. No run with a real
server was made yet.
"""

import json
import math
import shutil
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from searchr1_lite.config import Profile, resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.rollouts.decoding import Stops
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import CLOSING_TAGS

SECONDS = 600  # for one request, which may queue on the server
WAITS = (0.5, 1, 2, 4, 8)  # seconds before the next try, where nothing listens or the server is not ready
MOMENT = 0.005  # seconds that `advance` waits for a turn to end
COMMAND = "the command is at the top of searchr1_lite/rollouts/vllm.py"
HELP = (
    f"Is a vLLM server there, alive, and started for adapters of this rank in a folder that it sees ({COMMAND})? Its "
    "log may say more. One that was started again has lost its adapters: start the run again, too"
)
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is our own server, behind no proxy

# What a request does not say, the server takes from the model's generation_config.json.
FULL_SOFTMAX = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
FULL_SOFTMAX |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
WHOLE_TURN = {"stop": list(CLOSING_TAGS), "include_stop_str_in_output": True, "skip_special_tokens": False}
IDS = {"return_token_ids": True, "logprobs": 0}  # of the sampled token alone

Written = tuple[list[int], list[float]]  # ids and log-probabilities of a turn


class VLLMError(UserError):
    """A server that is not there, not the right one, or fails; the message has the URL, the request and what to do."""


class VLLMSampler:
    """Writes with the model at `profile.vllm_url`; see `engine.TokenSampler`, whose methods these are.

    It begins with the base; `load_adapter` puts a version of the adapter in its place. Ids are those that were
    sampled, log-probabilities are at the sampling temperature (greedy: at 1). The policy's own weights are not used.
    Everything that speaks with the server raises VLLMError.
    """

    search_delay_steps = None  # rows do not wait for each other

    def __init__(self, policy: Policy, profile: Profile, greedy: bool = False) -> None:
        self.url, self.max_tokens = profile.vllm_url, profile.max_response_tokens
        self.capacity = max(profile.rollout_rows, profile.group_size)  # a group begins together
        self.model, self.adapter = _served_name(profile), None
        self.stops = Stops(policy)
        self.options = FULL_SOFTMAX | WHOLE_TURN | IDS | {"stop_token_ids": sorted(self.stops.ends)}
        self.options |= {"max_tokens": self.max_tokens, "temperature": 0.0 if greedy else profile.temperature}
        self.pool = ThreadPoolExecutor(self.capacity, thread_name_prefix="vllm")
        self.read_ids: dict[int, list[int]] = {}  # prompt, turns and observations so far, by row
        self.streams: dict[int, np.random.Generator] = {}
        self.turns: dict[int, Future[Written]] = {}
        self._check_logprobs()

    @property
    def active(self) -> int:
        return len(self.turns)

    def open(self, rows: Sequence[int], prompt: Sequence[int], streams: Sequence[np.random.Generator]) -> None:
        for row, stream in zip(rows, streams, strict=True):
            self.read_ids[row], self.streams[row] = [], stream
            self.read(row, prompt)

    def read(self, row: int, ids: Sequence[int]) -> None:
        self.read_ids[row] += ids
        seed = int(self.streams[row].integers(2**63))
        request = self.options | {"model": self.model, "prompt": list(self.read_ids[row]), "seed": seed}
        self.turns[row] = self.pool.submit(self._turn, request)

    def advance(self) -> list[tuple[int, list[int], list[float]]]:
        wait(self.turns.values(), MOMENT, FIRST_COMPLETED)
        ended = [row for row, turn in self.turns.items() if turn.done()]
        try:
            written = [(row, *self.turns.pop(row).result()) for row in ended]
        except VLLMError:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        for row, ids, _ in written:
            self.read_ids[row] += ids
        return written

    def close(self, row: int) -> None:
        del self.read_ids[row], self.streams[row]

    def load_adapter(self, model: Any, folder: Path, step: int) -> None:
        """Have the server write with the adapter of this PEFT model from now on; only between rollouts.

        It is saved to a new folder in `folder` and loaded under a new name; then the one before is given up. The name
        is never used twice on a server, not by another run either: its prefix cache knows an adapter by its name.
        """
        before, name = self.adapter, f"step-{step}-{uuid4().hex[:8]}"
        path = folder.resolve() / name
        model.save_pretrained(path, save_embedding_layers=False)
        _ask(self.url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        self.model, self.adapter = name, path
        if before:
            with suppress(VLLMError):  # a server that has made room for the new one has none to unload
                _ask(self.url, "/v1/unload_lora_adapter", {"lora_name": before.name})
            shutil.rmtree(before)

    def _turn(self, request: dict[str, Any]) -> Written:
        """Ids and log-probabilities up to where a turn ends by our own rule, whatever else the server sampled."""
        ids, logprobs, reason = _complete(self.url, request)
        end = next((n for n in range(1, len(ids) + 1) if self.stops.ended(ids[:n])), None)
        if len(ids[:end]) > self.max_tokens or (end is None and len(ids) < self.max_tokens):
            raise VLLMError(
                f"{_named(self.url, '/v1/completions', request)}: {len(ids)} tokens, ended by {reason!r}, without "
                "closing tag or end token. Does the server have this model, and its tokenizer?"
            )
        return ids[:end], logprobs[:end]

    def _check_logprobs(self) -> None:
        """Where one token alone is allowed, its log-probability is 0, if it is that of what is sampled from."""
        token = next(iter(self.stops.worth_a_look - self.stops.ends))
        request = self.options | {"model": self.model, "prompt": [token], "max_tokens": 1, "stop": []}
        ids, logprobs, _ = _complete(self.url, request | {"allowed_token_ids": [token]})
        if ids != [token] or abs(logprobs[0]) > 1e-3:
            raise VLLMError(
                f"{self.url}: the log-probabilities are not those of what the server samples from; start it with "
                f"--logprobs-mode processed_logprobs ({COMMAND})"
            )


def _served_name(profile: Profile) -> str:
    """The name by which the server knows the profile's model."""
    url, names = profile.vllm_url, {profile.model, str(resolve_path(profile.model))}
    try:
        models = json.loads(_ask(url, "/v1/models"))["data"]
        card = next((card for card in models if names & {card["id"], card.get("root")}), None)
        there = ", ".join(card["id"] for card in models)
        length = card and card["max_model_len"]
    except (ValueError, KeyError, TypeError) as error:
        raise VLLMError(f"{url}/v1/models: this is no vLLM server ({error!r}); set vllm_url to one") from error
    if card is None:
        raise VLLMError(f"{url}: serves {there}, not {profile.model}; start it with the profile's model ({COMMAND})")
    if length < profile.max_context_tokens:
        raise VLLMError(
            f"{url}: reads {length} tokens at most, but max_context_tokens = {profile.max_context_tokens}; start it "
            f"with --max-model-len {profile.max_context_tokens}, or lower the setting"
        )
    return card["id"]


def _complete(url: str, request: dict[str, Any]) -> tuple[list[int], list[float], str]:
    """Sampled ids, their log-probabilities, and why the server ended."""
    answer = _ask(url, "/v1/completions", request)
    try:
        (choice,) = json.loads(answer)["choices"]
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if not ids or len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise ValueError(f"{len(ids)} ids, {len(logprobs)} log-probabilities, or some that are no numbers")
        return ids, logprobs, choice["finish_reason"]
    except (ValueError, KeyError, TypeError) as error:
        raise VLLMError(
            f"{_named(url, '/v1/completions', request)}: the answer has not one log-probability for each sampled id "
            f"({error!r}); use vLLM 0.22 to 0.31"
        ) from error


def _ask(url: str, path: str, body: dict[str, Any] | None = None, waits: Sequence[float] = WAITS) -> str:
    """The server's answer; waits a while for one that is not ready."""
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url.rstrip("/") + path, data, {"Content-Type": "application/json"})
        with DIRECT.open(request, timeout=SECONDS) as answer:
            return answer.read().decode()
    except (OSError, HTTPException, ValueError) as error:
        code, reason = getattr(error, "code", None), getattr(error, "reason", error)
        if waits and (code == 503 or isinstance(reason, ConnectionError | IncompleteRead)):
            time.sleep(waits[0])
            return _ask(url, path, body, waits[1:])
        said = f"HTTP {code}, {error.read()[:500].decode(errors='replace')}" if code else repr(reason)
        if isinstance(reason, TimeoutError):
            said = f"no answer in {SECONDS} seconds"
        raise VLLMError(f"{_named(url, path, body)}: {said}. {HELP}") from error


def _named(url: str, path: str, body: dict[str, Any] | None) -> str:
    """Which request this was, briefly."""
    told = {key: value for key, value in (body or {}).items() if key in ("model", "seed", "lora_name", "lora_path")}
    tokens = f" {len(body['prompt'])} prompt tokens" if body and "prompt" in body else ""
    return f"{url}{path} {told or ''}{tokens}".strip()
