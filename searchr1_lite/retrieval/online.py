"""Search on the web, as an example of a search engine of your own: `retriever=searchr1_lite.retrieval.online:SerpAPI`.

A class with `search(queries, k)` is all that a run needs. This one asks SerpAPI (https://serpapi.com), whose key is in
the environment variable SERPAPI_API_KEY, as the original's search_r1/search/serp_search_server.py does. Answer boxes
and related questions, which that adds, fetching the pages themselves, and further pages of results are left out.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import httpx
from tenacity import retry, retry_if_result, stop_after_attempt, wait_random_exponential

from searchr1_lite.errors import UserError
from searchr1_lite.types import Hit, Passage, RetrievalError

KEY = "SERPAPI_API_KEY"
AT_ONCE = 4  # requests
logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs addresses, and the key is in them


class SerpAPI:
    """Google's results by SerpAPI; scores are 1 / rank. An error never shows the key."""

    def __init__(self, url: str = "https://serpapi.com/search.json") -> None:
        if not (key := os.environ.get(KEY, "").strip()):
            raise UserError(f"SerpAPI needs a key: set the environment variable {KEY} to it")
        self.url, self._key = url, key
        self.client = httpx.Client(timeout=15.0)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` results a query; blank queries are not sent. RetrievalError where there is no usable answer."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda query: self._search_one(query, k) if query.strip() else [], queries))

    def _search_one(self, query: str, k: int) -> list[Hit]:
        status, answer = self._fetch(query, k)
        results = answer.get("organic_results") if isinstance(answer, dict) else None
        if status == 200 and results is None and "hasn't returned any results" in str(answer):
            return []
        if status != 200 or not isinstance(results, list):
            hint = f"; is {KEY} right, and in its quota?" if status in (401, 403, 429) else ""
            raise RetrievalError(f"SerpAPI gave no usable answer for {query!r} (status {status}){hint}")
        fields = ("link", "title", "snippet")
        passages = [Passage(*(str(result.get(name) or "") for name in fields)) for result in results[:k]]
        return [Hit(passage, 1 / rank) for rank, passage in enumerate(passages, 1)]

    @retry(
        retry=retry_if_result(lambda outcome: outcome[0] in (0, 429) or outcome[0] >= 500),
        wait=wait_random_exponential(max=10),
        stop=stop_after_attempt(5),
        retry_error_callback=lambda state: state.outcome.result(),
    )
    def _fetch(self, query: str, k: int) -> tuple[int, object]:
        """Status and answer; 0 where none came."""
        parameters = {"engine": "google", "q": query, "num": k, "api_key": self._key}
        try:
            response = self.client.get(self.url, params=parameters)
            return response.status_code, response.json()
        except (httpx.TransportError, UnicodeError):
            return 0, None
        except ValueError:
            return response.status_code, None
