"""A retriever that is elsewhere: asks our server, the original's, or any that speaks the same API.

What is left out: keeping answers (batching.py), and servers of other APIs (online.py). Optional, as the server is.
"""

import hashlib
import ipaddress
import json
import math
import time
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from searchr1_lite.errors import UserError
from searchr1_lite.retrieval.corpus import split_contents
from searchr1_lite.types import Hit, Passage, QueryRefusedError, RetrievalError

BATCH = 256  # queries in a request: within our server's bounds for every k that it takes
SHOWN = 500  # characters of an answer, in an error


class RetrieverDownError(RetrievalError):
    """A server that cannot be reached, does not let us in or answers nonsense; the message has URL, cause, attempts."""


class _AgainError(Exception):
    """Worth another attempt, after as many seconds as the server asked for."""

    def __init__(self, cause: str, after: float = 0.0) -> None:
        super().__init__(cause)
        self.after = after


class RemoteRetriever:
    """`url` is the server's, with or without "/retrieve". Safe to be used by many threads at once.

    A request that got no answer within `timeout` seconds, or one that says to come again (429 and 5xx, `Retry-After`
    honoured), is sent again with growing, random waits, as long as `deadline` seconds allow. A server that gives no
    scores (the original's online ones) has its order kept and 0.0 for each; ids that are missing are made of contents.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, deadline: float = 300.0) -> None:
        try:
            self.url = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise UserError(f"{url!r} is no address: {error}") from None
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise UserError(f"{url!r} is no address of a server; it begins with http:// or https:// and a host")
        path = self.url.path.rstrip("/")
        self.url = self.url.copy_with(path=path if path.endswith("/retrieve") else f"{path}/retrieve")
        self.timeout, self.deadline = timeout, deadline
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.client = httpx.Client(headers=headers, trust_env=not is_loopback(self.url.host))  # else no proxies

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """As the server finds them; blank queries are not sent and find nothing.

        Raises RetrieverDownError where the server gave no usable answer until the deadline, QueryRefusedError where
        it refused what was asked.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        asked = [i for i, query in enumerate(queries) if query.strip()]
        found: list[list[Hit]] = [[] for _ in queries]
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            for i, hits in zip(part, self._ask([queries[i] for i in part], k), strict=True):
                found[i] = hits
        return found

    def _ask(self, queries: list[str], k: int) -> list[list[Hit]]:
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        end = time.monotonic() + self.deadline
        attempts = Retrying(
            stop=stop_before_delay(self.deadline),
            wait=_wait,
            retry=retry_if_exception_type(_AgainError),
            reraise=True,
        )
        try:
            answer = attempts(self._post, body, end)
        except _AgainError as error:
            tried = attempts.statistics["attempt_number"]
            raise self._down(f"given up after {tried} attempts in {self.deadline:g} s; the last: {error}") from error
        try:
            return _hits(json.loads(answer), len(queries), k)
        except (ValueError, RecursionError, OverflowError) as error:
            raise self._down(f"the answer is not what was asked for: {error}") from error

    def _post(self, body: bytes, end: float) -> bytes:
        timeout = min(self.timeout, max(1.0, end - time.monotonic()))
        try:
            answer = self.client.post(self.url, content=body, timeout=timeout)
        except httpx.TransportError as error:
            raise _AgainError(f"{type(error).__name__} {error}") from error
        status, said = answer.status_code, answer.text[:SHOWN] if answer.status_code != 200 else ""
        if status == 429 or status >= 500:
            raise _AgainError(f"HTTP {status}: {said}", _seconds(answer.headers.get("Retry-After")))
        if status in (400, 413, 422):
            raise QueryRefusedError(f"{self.url} refuses: {said}")
        if status != 200:
            raise self._down(f"HTTP {status}: {said}. Are address and token right?")
        return answer.content

    def _down(self, why: str) -> RetrieverDownError:
        return RetrieverDownError(f"the search server at {self.url}: {why}")


def _hits(answer: Any, queries: int, k: int) -> list[list[Hit]]:
    """Raises ValueError that says what is not as it should be."""
    result = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(result, list) or len(result) != queries:
        raise ValueError(f"`result` must be {queries} lists, one a query; it is {str(answer)[:SHOWN]}")
    for n, found in enumerate(result):
        if not isinstance(found, list) or len(found) > k:
            raise ValueError(f"result[{n}] must be at most {k} passages; it is {str(found)[:SHOWN]}")
    return [[_hit(one) for one in found] for found in result]


def _hit(one: Any) -> Hit:
    document, score = (one.get("document"), one.get("score", 0.0)) if isinstance(one, dict) else (None, None)
    contents = document.get("contents") if isinstance(document, dict) else None
    if not isinstance(contents, str) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"a hit must be a document with contents and a score; it is {str(one)[:SHOWN]}")
    key = document.get("id", hashlib.sha256(contents.encode()).hexdigest()[:16])  # raises at half a surrogate pair
    title, text, quoted = split_contents(contents)
    return Hit(Passage(str(key), title, text, quoted), float(score))


_backoff = wait_random_exponential(multiplier=0.5, max=15)


def _wait(state: RetryCallState) -> float:
    return state.outcome.exception().after + _backoff(state)


def _seconds(retry_after: str | None) -> float:
    """The header's seconds; its other form, a date, is not read."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
