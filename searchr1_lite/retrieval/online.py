"""Search on the web through SerpAPI: `retriever=searchr1_lite.retrieval.online:SerpAPI`, and a pattern for your own.

Any class with a method `search(queries, k)` can take its place (plugins.py). The key is in the environment variable
SERPAPI_API_KEY, and in no error or log. Left out: answer boxes and related questions (which the original's
serp_search_server.py adds), fetching the pages themselves, and further pages of results.
"""

import html
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import tenacity

from searchr1_lite.types import Hit, Passage, RetrievalError

KEY = "SERPAPI_API_KEY"
URL = "https://serpapi.com/search"
AT_ONCE, TIMEOUT, DEADLINE = 8, 15.0, 60.0  # requests, seconds of one, seconds of one with its repetitions


class SerpAPI:
    """Google's results: ids are links, titles and texts without HTML, scores 1 / rank."""

    def __init__(self) -> None:
        self._key = os.environ.get(KEY, "").strip()
        if not self._key:
            raise RetrievalError(f"set the environment variable {KEY} to a key of serpapi.com")

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` results a query; blank queries are not sent, equal ones once. Raises RetrievalError."""
        distinct = list(dict.fromkeys(query for query in queries if query.strip()))
        with ThreadPoolExecutor(AT_ONCE) as pool:  # after an error, `map` cancels what has not begun
            hits = dict(zip(distinct, pool.map(self._search_one, distinct), strict=True))
        return [hits.get(query, [])[:k] for query in queries]

    def _search_one(self, query: str) -> list[Hit]:
        attempts = tenacity.Retrying(
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=15),
            stop=tenacity.stop_before_delay(DEADLINE),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            answer = attempts(self._fetch, query)
            results = answer.get("organic_results", [] if "any results" in answer.get("error", "") else None)
            passages = [Passage(r["link"], *(_plain(r.get(name)) for name in ("title", "snippet"))) for r in results]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"HTTP {error.code}" if isinstance(error, HTTPError) else type(error).__name__
            raise RetrievalError(f"{URL} gave no usable answer ({why}); is the key in {KEY} right?") from None
        by_link = {}
        for passage in passages:
            by_link.setdefault(passage.id, passage)
        return [Hit(passage, 1 / rank) for rank, passage in enumerate(by_link.values(), 1)]

    def _fetch(self, query: str) -> dict:
        parameters = urlencode({"engine": "google", "q": query, "api_key": self._key})
        with urlopen(f"{URL}?{parameters}", timeout=TIMEOUT) as response:
            return json.load(response)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code == 429 or error.code >= 500
    return isinstance(error, OSError)  # no connection, or no answer in time


def _plain(text: str | None) -> str:
    """Words without tags, entities resolved, in one line; nothing for null."""
    return " ".join(html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text or "")).split())
