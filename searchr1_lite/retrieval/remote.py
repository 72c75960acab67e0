"""A retriever that is elsewhere: asks our server, the original's, or any that speaks the same API.

What is left out: keeping answers (batching.py), and servers of other APIs (online.py). Optional, as the server is.
"""

import hashlib
import ipaddress
import json

import httpx
import tenacity
from pydantic import BaseModel, FiniteFloat, ValidationError

from searchr1_lite.retrieval.corpus import split_contents
from searchr1_lite.types import Hit, Passage, QueryRefusedError, RetrievalError

TOKEN = "SEARCHR1_TOKEN"  # the environment variable with a service's token; its value is never shown
BATCH = 256  # queries in a request: within our server's bounds for every k that it takes
SHOWN = 500  # characters of an answer, in an error


class Document(BaseModel, coerce_numbers_to_str=True):
    id: str = ""
    contents: str


class Result(BaseModel):
    document: Document
    score: FiniteFloat = 0.0


class Answer(BaseModel):
    result: list[list[Result]]


class RemoteRetriever:
    """`url` is the server's, with or without "/retrieve". Safe to be used by many threads at once.

    A request that got no answer within `timeout` seconds, or one that says to come again (429 and 5xx, `Retry-After`
    honoured), is sent again with growing, random waits, as long as `deadline` seconds allow. A server that gives no
    scores (the original's online ones) has its order kept and 0.0 for each; ids that are missing are made of contents.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, deadline: float = 300.0) -> None:
        try:
            self.url = httpx.URL(url)
            if self.url.scheme not in ("http", "https") or not self.url.host or (self.url.port or 0) > 65535:
                raise httpx.InvalidURL("it begins with http:// or https://, a host and perhaps a port up to 65535")
        except httpx.InvalidURL as error:
            raise RetrievalError(f"{url!r} is no address of a server: {error}") from None
        self.url = self.url.copy_with(path=self.url.path.rstrip("/").removesuffix("/retrieve") + "/retrieve")
        self.deadline = deadline
        headers = {"Content-Type": b"application/json"} | (
            {"Authorization": f"Bearer {token}".encode()} if token else {}
        )
        proxies = not is_loopback(self.url.host)  # those of the environment are not for this machine
        self.client = httpx.Client(headers=headers, timeout=timeout, trust_env=proxies)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """As the server finds them; blank queries are not sent and find nothing.

        Raises RetrievalError where the server gave no usable answer until the deadline, QueryRefusedError where it
        refused what was asked.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        sent = [query for query in queries if query.strip()]
        batches = (sent[start : start + BATCH] for start in range(0, len(sent), BATCH))
        results = [hits for batch in batches for hits in self._search_batch(batch, k)][::-1]
        return [results.pop() if query.strip() else [] for query in queries]

    def _search_batch(self, queries: list[str], k: int) -> list[list[Hit]]:
        content = self._send(json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode())
        try:
            rows = Answer.model_validate_json(content).result
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            why = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            raise self._failed(f"not an answer to what was asked ({why}): {content[:SHOWN]!r}") from None
        if len(rows) != len(queries) or max(map(len, rows)) > k:
            raise self._failed(f"the answer is not {len(queries)} lists, one a query, of at most {k} passages")
        return [[_hit(result) for result in row] for row in rows]

    def _send(self, body: bytes) -> bytes:
        busy = tenacity.retry_if_result(lambda answer: answer.status_code == 429 or answer.status_code >= 500)
        attempts = tenacity.Retrying(
            stop=tenacity.stop_before_delay(self.deadline),
            wait=_wait,
            retry=tenacity.retry_if_exception_type(httpx.TransportError) | busy,
            retry_error_callback=lambda state: state.outcome.result(),
        )
        try:
            answer = attempts(self.client.post, self.url, content=body)
        except httpx.TransportError as error:
            tried = attempts.statistics["attempt_number"]
            raise self._failed(f"{type(error).__name__} {error}, after {tried} attempts") from error
        if answer.status_code in (400, 413, 422):
            raise QueryRefusedError(f"{self.url} refuses: {answer.text[:SHOWN]}")
        if answer.status_code != 200:
            what = f"HTTP {answer.status_code}, after {attempts.statistics['attempt_number']} attempts"
            raise self._failed(f"{what}: {answer.text[:SHOWN]}. Are address and token right?")
        return answer.content

    def _failed(self, why: str) -> RetrievalError:
        return RetrievalError(f"the search server at {self.url}: {why}")


def _hit(result: Result) -> Hit:
    contents = result.document.contents
    key = result.document.id or hashlib.sha256(contents.encode()).hexdigest()[:16]
    return Hit(Passage(key, *split_contents(contents)), result.score)


_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=15)


def _wait(state: tenacity.RetryCallState) -> float:
    after = "" if state.outcome.failed else state.outcome.result().headers.get("Retry-After", "")
    return _backoff(state) + (float(after) if after.isdecimal() else 0.0)  # a date, its other form, is not read


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
