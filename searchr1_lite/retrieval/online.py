"""Search on the web: SerpAPI (serpapi.yaml), or any service that answers with JSON, by a template of its own.

    url: https://api.example.org/search     # a template is a YAML file; these are all its keys
    method: POST                            # or GET, the default
    headers: {Authorization: "Bearer {key}"}
    params: {lang: en}                      # what follows the "?" of the address
    body: {text: "{query}", size: "{k}"}    # sent as JSON; "{k}" alone becomes a number
    results: data.items                     # the path to the list of results; a number is a place in a list
    id: url                                 # paths within a result; an id must stay the same from day to day
    title: name
    text: summary.plain                     # a result without title or text has an empty one
    key_env: EXAMPLE_KEY                    # the environment variable that holds the key, where one is needed
    nothing_found: No results               # words of an answer that rightly has no list of results
    per_second: 5                           # requests at most

The key is in no log, error or representation. Left out: answer boxes and related questions (which the original's
serp_search_server.py adds), fetching the pages themselves, and further pages of results.
"""

import html
import json
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import httpx
import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, ValidationError, model_validator
from tenacity import Retrying, retry_if_result, stop_before_delay, wait_random_exponential

from searchr1_lite.config import resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.retrieval.remote import SHOWN, RetrieverDownError, _seconds, is_loopback
from searchr1_lite.types import Hit, Passage, QueryRefusedError

AT_ONCE = 8  # requests
PLACEHOLDER = re.compile(r"\{(\w+)\}")
KEY_HINT = {401: "wrong", 402: "out of quota", 403: "not allowed this", 429: "out of quota, or asked for too often"}

# httpx logs addresses and httpcore headers: nothing of a request that may carry a key
_asking: ContextVar[bool] = ContextVar("asking", default=False)
for _logger in ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks"))):
    logging.getLogger(_logger).addFilter(lambda record: not _asking.get())


class OnlineError(UserError):
    """A template or a key that cannot be used."""


class Template(BaseModel):
    """How to ask a service and where its answer has what (see the module's docstring)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    method: Literal["GET", "POST"] = "GET"
    headers: dict[str, str] = {}
    params: dict[str, str | int | float | bool] = {}
    body: dict[str, JsonValue] | None = None
    results: str
    id: str
    title: str
    text: str
    key_env: str | None = None
    nothing_found: str | None = None
    per_second: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "Template":
        url, used = httpx.URL(self.url), set(PLACEHOLDER.findall(json.dumps([self.headers, self.params, self.body])))
        if url.scheme not in ("http", "https") or not url.host or url.query or url.userinfo or "{" in self.url:
            raise ValueError("url must be http(s)://host/path alone; what follows a '?' goes to params")
        if "query" not in used or used - {"query", "k", "key"} or ("key" in used) != bool(self.key_env):
            raise ValueError(
                "headers, params and body must have {query}, may have {k}, have {key} if key_env is given, and no "
                f"other placeholder; they have {sorted(used)}"
            )
        return self


class _Answer(NamedTuple):
    status: int  # 0: none came
    text: str
    after: float = 0.0  # seconds that the server asks us to wait


class OnlineRetriever:
    """Asks one query a request, a few at once, at most `per_second` of them. Safe to be used by many threads.

    No answer within `timeout` seconds, 429 and 5xx: asked again with growing, random waits (`Retry-After` honoured),
    as long as `deadline` seconds allow. Raises OnlineError where the key's environment variable is not set.
    """

    def __init__(self, template: Template, timeout: float = 15.0, deadline: float = 60.0) -> None:
        key = os.environ.get(template.key_env or "", "").strip()
        if template.key_env and not key:
            raise OnlineError(f"{template.url} needs a key: set the environment variable {template.key_env} to it")
        self.template, self.timeout, self.deadline = template, timeout, deadline
        self._key, self._lock, self._next = SecretStr(key), Lock(), 0.0
        self.client = httpx.Client(trust_env=not is_loopback(httpx.URL(template.url).host))

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` results a query in the service's order, scored 1 / rank; the first of two with the same id.

        Blank queries are not sent, equal ones once. HTML is taken out of titles and texts. Raises RetrieverDownError
        where no usable answer came until the deadline, QueryRefusedError where the service refused a query.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        asked = list(dict.fromkeys(query for query in queries if query.strip()))
        with ThreadPoolExecutor(AT_ONCE) as pool:  # after an error, `map` cancels what has not begun
            found = dict(zip(asked, pool.map(lambda query: self._search_one(query, k), asked), strict=True))
        return [list(found.get(query, [])) for query in queries]

    def _search_one(self, query: str, k: int) -> list[Hit]:
        backoff = wait_random_exponential(multiplier=0.5, max=15)
        attempts = Retrying(
            stop=stop_before_delay(self.deadline),
            wait=lambda state: state.outcome.result().after + backoff(state),
            retry=retry_if_result(lambda answer: answer.status in (0, 429) or answer.status >= 500),
            retry_error_callback=lambda state: state.outcome.result(),
        )
        answer = attempts(self._fetch, query, k, time.monotonic() + self.deadline)
        if answer.status == 200:
            return self._hits(answer.text, k)
        if answer.status in (400, 413, 414, 422):
            raise QueryRefusedError(f"{self.template.url} refuses {query[:SHOWN]!r}: {answer.text[:SHOWN]}")
        what = f"HTTP {answer.status}" if answer.status else "no answer"
        if answer.status in KEY_HINT:
            what += f" (the key in {self.template.key_env} may be {KEY_HINT[answer.status]})"
        tried = attempts.statistics["attempt_number"]
        raise self._down(f"{what}, after {tried} attempts in at most {self.deadline:g} s: {answer.text[:SHOWN]}")

    def _fetch(self, query: str, k: int, end: float) -> _Answer:
        """All that holds the key stays in here: what is returned has no trace of it, and no httpx error leaves."""
        self._wait_for_turn()
        template = self.template
        told = _asking.set(True)
        try:
            headers, params, body = self._filled({"query": query, "k": str(k), "key": self._key.get_secret_value()})
            timeout = max(0.001, min(self.timeout, end - time.monotonic()))
            answer = self.client.request(
                template.method, template.url, headers=headers, params=params, json=body, timeout=timeout
            )
            return _Answer(answer.status_code, self._keyless(answer.text), _seconds(answer.headers.get("Retry-After")))
        except httpx.TransportError as error:
            return _Answer(0, type(error).__name__)
        except Exception as error:  # half a surrogate pair, or what a header cannot hold
            return _Answer(400, f"it could not be sent ({type(error).__name__})")
        finally:
            _asking.reset(told)

    def _wait_for_turn(self) -> None:
        with self._lock:
            wait = max(0.0, self._next - time.monotonic())
            self._next = time.monotonic() + wait + 1 / self.template.per_second
        time.sleep(wait)

    def _filled(self, values: dict[str, str]) -> list[Any]:
        """Headers, params and body, in one pass, so that a query which says "{key}" gets none."""
        empty = json.dumps([self.template.headers, self.template.params])[:-1] + ", "
        empty += json.dumps(self.template.body).replace('"{k}"', values["k"]) + "]"
        return json.loads(PLACEHOLDER.sub(lambda match: json.dumps(values[match[1]])[1:-1], empty))

    def _keyless(self, text: str) -> str:
        """A service may say the key back: as it is, in an address or in JSON."""
        if key := self._key.get_secret_value():
            for form in (key, str(httpx.QueryParams({"": key}))[1:], json.dumps(key)[1:-1], key.replace("/", r"\/")):
                text = text.replace(form, "***")
        return text.encode("utf-8", "replace").decode("utf-8")

    def _hits(self, text: str, k: int) -> list[Hit]:
        template, answer = self.template, _json(text)
        results = _at(answer, template.results)
        if not isinstance(results, list):
            if answer is not None and template.nothing_found and template.nothing_found in text:
                return []
            what = "is not JSON" if answer is None else f"has no list at {template.results!r}"
            raise self._down(f"the answer {what}: {text[:SHOWN]}")
        passages: dict[str, Passage] = {}
        for result in results:
            key, title, words = (_at(result, path) for path in (template.id, template.title, template.text))
            if not key:
                raise self._down(f"a result has nothing at {template.id!r}: {json.dumps(result)[:SHOWN]}")
            key, title, words = map(self._keyless, (str(key), _plain(title), _plain(words)))
            passages.setdefault(key, Passage(key, title, words))
        return [Hit(passage, 1 / rank) for rank, passage in enumerate(list(passages.values())[:k], 1)]

    def _down(self, why: str) -> RetrieverDownError:
        return RetrieverDownError(f"online search at {self.template.url}: {why}")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(value, list):
            value = dict(enumerate(value)).get(int(part) if part.isdecimal() else None)
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _plain(value: Any) -> str:
    """Words without tags, entities resolved, in one line; nothing for null."""
    return " ".join(html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", str(value or ""))).split())


def load_online(name: str, timeout: float = 15.0, deadline: float = 60.0) -> OnlineRetriever:
    """By the name "serpapi" (its key in SERPAPI_API_KEY), or by the path of a template; raises OnlineError."""
    path = Path(__file__).with_name("serpapi.yaml") if name == "serpapi" else resolve_path(name)
    try:
        template = Template.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = [f"- {'.'.join(map(str, each['loc'])) or 'template'}: {each['msg']}" for each in error.errors()]
        raise OnlineError("\n".join([f"{name}: the template cannot be used:", *wrong])) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, httpx.InvalidURL) as error:
        line = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise OnlineError(
            f"{name!r} is neither 'serpapi' nor a YAML template that can be read: {type(error).__name__}{line}"
        ) from None
    return OnlineRetriever(template, timeout, deadline)
