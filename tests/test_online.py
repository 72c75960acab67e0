"""SerpAPI against a stub of it in a thread of this process; the key must show up nowhere."""

import json
import threading
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from searchr1_lite.config import load_profile
from searchr1_lite.retrieval import online
from searchr1_lite.retrieval.load import load_retriever
from searchr1_lite.retrieval.online import SerpAPI
from searchr1_lite.types import Passage, RetrievalError

KEY = "s3cret/k+y="
RESULTS = {
    "organic_results": [
        {"link": "https://a.org/?x=1&copy=2", "title": "Alpha &amp; <b>Omega</b>", "snippet": "5 < 6 in <em>Rome</em>"},
        {"link": "https://b.org", "title": "Beta"},
        {"link": "https://a.org/?x=1&copy=2", "title": "Alpha again"},
        {"link": "https://c.org", "title": None, "snippet": "third\n line"},
    ]
}


@contextmanager
def service(monkeypatch, *answers):
    """Each answer is (status, JSON value or text); the last is given again and again. Yields the addresses asked."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(parse_qs(urlsplit(self.path).query))
            status, value = answers[min(len(requests), len(answers)) - 1]
            value = value(requests[-1]) if callable(value) else value
            self.send_response(status)
            self.end_headers()
            self.wfile.write((value if isinstance(value, str) else json.dumps(value)).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(online, "URL", f"http://127.0.0.1:{server.server_port}/search")
    try:
        yield requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SERPAPI_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(online, "DEADLINE", 3.0)


def test_results_become_hits_through_the_plug_in(monkeypatch):
    with service(monkeypatch, (200, RESULTS)) as requests:
        retriever = load_retriever(load_profile("tiny", retriever="searchr1_lite.retrieval.online:SerpAPI"))
        [hits], [two] = retriever.search(["who & when?"], 3), retriever.search(["who & when?"], 2)
    assert [hit.passage for hit in hits] == [
        Passage("https://a.org/?x=1&copy=2", "Alpha & Omega", "5 < 6 in Rome"),
        Passage("https://b.org", "Beta", ""),
        Passage("https://c.org", "", "third line"),
    ]
    assert [hit.score for hit in hits] == [1, 1 / 2, 1 / 3] and two == hits[:2]
    assert requests[0] == {"engine": ["google"], "q": ["who & when?"], "api_key": [KEY]}


def test_order_blanks_and_repeats(monkeypatch):
    def echo(request):
        return {"organic_results": [{"link": f"https://x.org/{request['q'][0]}", "title": request["q"][0]}]}

    queries = [*(f"q{i}" for i in range(20)), "", "q3", " \n"]
    with service(monkeypatch, (200, echo)) as requests:
        results = SerpAPI().search(queries, 2)
    assert [[hit.passage.title for hit in hits] for hits in results] == [[q] if q.strip() else [] for q in queries]
    assert len(requests) == 20


def test_what_may_pass_is_asked_again_and_nothing_found_is_no_error(monkeypatch):
    empty = {"error": "Google hasn't returned any results for this query."}
    with service(monkeypatch, (503, "busy"), (429, "slow down"), (200, RESULTS), (200, empty)) as requests:
        assert [len(hits) for hits in SerpAPI().search(["q"], 1)] == [1] and len(requests) == 3
        assert SerpAPI().search(["r"], 1) == [[]]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, f"no such key: {KEY}"), "HTTP 401"),
        ((400, "q is missing"), "HTTP 400"),
        ((500, KEY), "HTTP 500"),
        ((200, f'{{"error": "{KEY}'), "JSONDecodeError"),
        ((200, {"error": KEY}), "TypeError"),
        ((200, [KEY]), "AttributeError"),
        ((200, {"organic_results": [{"title": KEY}]}), "KeyError"),
        ((200, {"organic_results": ["text"]}), "TypeError"),
    ],
)
def test_errors_name_the_cause_and_never_the_key(monkeypatch, caplog, capfd, answer, says):
    monkeypatch.setattr(online, "DEADLINE", 0.3)
    caplog.set_level("DEBUG")
    with service(monkeypatch, answer) as requests, pytest.raises(RetrievalError, match=says) as caught:
        SerpAPI().search(["a query"], 3)
    assert requests[0]["api_key"] == [KEY] and (len(requests) == 1 or answer[0] == 500)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert "s3cret" not in shown and "SERPAPI_API_KEY" in shown


def test_nobody_there_and_no_key(monkeypatch):
    monkeypatch.setattr(online, "DEADLINE", 0.3)
    monkeypatch.setattr(online, "URL", "http://127.0.0.1:9/search")
    with pytest.raises(RetrievalError, match="URLError"):
        SerpAPI().search(["q"], 1)
    monkeypatch.setenv("SERPAPI_API_KEY", "  ")
    with pytest.raises(RetrievalError, match=r"^set the environment variable SERPAPI_API_KEY"):
        load_retriever(load_profile("tiny", retriever="searchr1_lite.retrieval.online:SerpAPI"))
