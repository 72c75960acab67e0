"""The remote client: our server, the original's answers, servers that fail in every way, deadlines."""

import json
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import OverlapRetriever
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving

from searchr1_lite.retrieval import remote, server
from searchr1_lite.retrieval.remote import RemoteRetriever
from searchr1_lite.types import Hit, Passage, QueryRefusedError, RetrievalError

HIT = {"document": {"id": "7", "contents": '"Rovana"\nFar away.\nReally.'}, "score": 0.875}
RIGHT = (200, {"result": [[HIT]]}, {})


class Stub:
    """A server that gives the answers of a list in turn, and the last one for ever: (status, body, headers)."""

    def __init__(self, *answers) -> None:
        self.answers, self.requests = list(answers), []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                stub.requests.append((time.monotonic(), self.path, dict(self.headers), json.loads(body)))
                answer = stub.answers.pop(0) if len(stub.answers) > 1 else stub.answers[0]
                if callable(answer):
                    answer = answer(json.loads(body))
                if answer is None:
                    self.close_connection = True  # hangs up without a word
                    return
                status, body, headers = answer
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "_backoff", lambda state: 0.01)


def found(stub: Stub, queries=("q",), k: int = 3, **options) -> list[list[Hit]]:
    return RemoteRetriever(stub.url, deadline=options.pop("deadline", 5), **options).search(list(queries), k)


# Answers


def test_hits_are_what_the_original_sends():
    with Stub(RIGHT) as stub:
        (hits,) = found(stub)
        assert hits == [Hit(Passage("7", "Rovana", "Far away.\nReally.", quoted=True), 0.875)]
        _, path, headers, body = stub.requests[0]
    assert path == "/retrieve" and "authorization" not in {name.lower() for name in headers}
    assert body == {"queries": ["q"], "topk": 3, "return_scores": True}
    assert headers["Content-Type"] == "application/json"  # or the original refuses


def test_other_forms_that_servers_of_this_api_send():
    pyserini = {"document": {"title": "T", "text": "x", "contents": "T\nx"}, "score": 9}  # no id, no quotes
    online = {"document": {"contents": '"only a title"'}}  # no id, no score
    number = {"document": {"id": 12, "contents": ""}, "score": -1e-3}
    with Stub((200, {"result": [[pyserini, online, number]]}, {})) as stub:
        (hits,), (again,) = found(stub), found(stub)
    assert [(h.passage.title, h.passage.text, h.passage.quoted, h.score) for h in hits] == [
        ("T", "x", False, 9.0),
        ("only a title", "", True, 0.0),
        ("", "", False, -0.001),
    ]
    assert hits == again and hits[2].passage.id == "12" and hits[0].passage.id != hits[1].passage.id


def test_blank_queries_are_not_sent_and_order_is_kept():
    def echo(body):
        return 200, {"result": [[{"document": {"id": q, "contents": q}, "score": 1}] for q in body["queries"]]}, {}

    with Stub(echo) as stub:
        hits = found(stub, ["", "a", " \n", "b"])
        assert [[hit.passage.id for hit in row] for row in hits] == [[], ["a"], [], ["b"]]
        assert stub.requests[0][3]["queries"] == ["a", "b"]
        assert found(stub, ["", " "]) == [[], []] and found(stub, []) == [] and len(stub.requests) == 1
        many = [f"q{n}" for n in range(600)]
        assert [row[0].passage.id for row in found(stub, many)] == many
        assert [len(request[3]["queries"]) for request in stub.requests[1:]] == [256, 256, 88]
        with pytest.raises(ValueError, match="k must be at least 1"):
            found(stub, k=0)


def test_a_part_of_a_batch_is_within_our_servers_bounds():
    assert remote.BATCH <= server.MAX_QUERIES and remote.BATCH * server.MAX_K <= server.MAX_HITS
    assert remote.BATCH <= server.MAX_WAITING


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"<html>", "not an answer"),
        (b"[" * 100_000, "not an answer"),
        (b'{"result": [[\xff]]}', "not an answer"),
        ([], "not an answer"),
        ({"results": [[]]}, "result: Field required"),
        ({"result": []}, "not 1 lists, one a query, of at most 3"),
        ({"result": [[], []]}, "not 1 lists"),
        ({"result": [None]}, r"result\.0: .*valid array"),
        ({"result": [[HIT] * 4]}, "of at most 3 passages"),
        ({"result": [[HIT["document"]]]}, r"result\.0\.0\.document: Field required"),
        ({"result": [["text"]]}, "not an answer"),
        ({"result": [[{"document": "text", "score": 1}]]}, "not an answer"),
        ({"result": [[{"document": {"id": "1"}, "score": 1}]]}, "contents: Field required"),
        ({"result": [[{"document": {"contents": None}, "score": 1}]]}, "contents: .*valid string"),
        ({"result": [[HIT | {"score": "high"}]]}, "score: .*valid number"),
        ({"result": [[HIT | {"score": None}]]}, "score: .*valid number"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": NaN}]]}', "score: .*finite number"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": 1' + b"0" * 400 + b"}]]}", "not an answer"),
        (b'{"result": [[{"document": {"contents": "\\ud800"}, "score": 1}]]}', "not an answer"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused_at_once(answer, reason):
    with Stub((200, answer, {})) as stub:
        with pytest.raises(RetrievalError, match=reason) as error:
            found(stub)
        assert stub.url in str(error.value) and len(str(error.value)) < 1000 and len(stub.requests) == 1


# Failures


@pytest.mark.parametrize(
    "failure",
    [None, (429, b"", {}), (500, b"oops", {}), (502, b"", {}), (503, b"", {}), (504, b"", {})],
    ids=["hangs up", "429", "500", "502", "503", "504"],
)
def test_what_may_pass_is_tried_again(impatient, failure):
    with Stub(failure, failure, RIGHT) as stub:
        assert found(stub)[0][0].passage.id == "7"
        assert len(stub.requests) == 3


def test_waits_as_long_as_the_server_says(impatient):
    with Stub((503, b"", {"Retry-After": "1"}), (503, b"", {"Retry-After": "soon"}), RIGHT) as stub:
        assert found(stub)
        first, second, third = (request[0] for request in stub.requests)
    assert second - first >= 1 and third - second < 0.9


def test_waits_grow_and_differ():
    """Each is drawn between 0 and twice as much as the one before, up to 15 s: clients do not come back together."""

    def waits(attempt: int) -> list[float]:
        return [remote._backoff(type("State", (), {"attempt_number": attempt})) for _ in range(200)]

    for attempt, most in ((1, 0.5), (2, 1), (4, 4), (30, 15)):
        drawn = waits(attempt)
        assert 0 <= min(drawn) < 0.2 * most and 0.8 * most < max(drawn) <= most


def test_gives_up_at_the_deadline_and_says_what_was_last(impatient):
    with Stub((503, b"index is loading", {})) as stub:
        start = time.monotonic()
        with pytest.raises(RetrievalError) as error:
            found(stub, deadline=0.5)
        assert 0.4 < time.monotonic() - start < 2
    tried = len(stub.requests)
    assert tried > 5 and isinstance(error.value, RetrievalError)
    for told in (f"{stub.url}/retrieve", f"HTTP 503, after {tried} attempts: index is loading"):
        assert told in str(error.value)


def test_does_not_wait_for_a_server_that_asks_for_more_than_the_deadline():
    with Stub((503, b"", {"Retry-After": "3600"})) as stub:
        start = time.monotonic()
        with pytest.raises(RetrievalError, match="after 1 attempts"):
            found(stub)
        assert time.monotonic() - start < 2


def test_nobody_there_and_nobody_answering(impatient):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RetrievalError, match="ConnectError"):
            RemoteRetriever(url, deadline=0.3).search(["q"], 3)
        silent.listen()
        start = time.monotonic()
        with pytest.raises(RetrievalError, match="ReadTimeout"):
            RemoteRetriever(url, timeout=0.2, deadline=0.7).search(["q"], 3)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_query_that_is_refused_is_not_asked_again(status):
    with Stub((status, {"detail": "queries.0: too long"}, {})) as stub:
        with pytest.raises(QueryRefusedError, match=r"queries\.0: too long"):
            found(stub)
        assert len(stub.requests) == 1


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405])
def test_a_wrong_address_or_token_is_no_fault_of_the_query(status):
    with Stub((status, b"no", {"Location": "/elsewhere"})) as stub:
        with pytest.raises(RetrievalError, match=f"HTTP {status}, after 1 attempts: no. Are address and token right"):
            found(stub, token="s3cret")
        assert len(stub.requests) == 1 and stub.requests[0][2]["Authorization"] == "Bearer s3cret"


def test_addresses():
    for url in ("http://h:1", "http://h:1/", "http://h:1/retrieve", "http://h:1/retrieve/"):
        assert str(RemoteRetriever(url).url) == "http://h:1/retrieve"
    assert str(RemoteRetriever("https://h/search/v1").url) == "https://h/search/v1/retrieve"
    for url in ("h:1", "ftp://h", "http://", "127.0.0.1:8000/retrieve", "http://h:65536", "http://h:p", "https://é é"):
        with pytest.raises(ValueError, match="no address of a server"):
            RemoteRetriever(url)


def test_proxies_of_the_environment_are_not_for_this_machine(monkeypatch):
    with Stub(RIGHT) as stub, Stub((502, b"proxy", {})) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert found(stub) and not proxy.requests
        with pytest.raises(RetrievalError, match="proxy"):
            RemoteRetriever("http://search.invalid", deadline=0.1).search(["q"], 3)


# With our own server


@pytest.fixture(scope="module")
def ours():
    passages = [Passage(str(n), f"T{n}", f"word{n} shared", quoted=n % 2 == 0) for n in range(100)]
    with serving(server.make_app(OverlapRetriever(passages))) as url:
        yield RemoteRetriever(url), OverlapRetriever(passages)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=20) | st.sampled_from(["word3 shared", "T7", "\x00 shared"]), max_size=5))
def test_any_query_finds_what_it_finds_in_process(ours, queries):
    far, near = ours
    try:
        "".join(queries).encode()
    except UnicodeEncodeError:
        with pytest.raises(QueryRefusedError):
            far.search(queries, 3)
    else:
        assert far.search(queries, 3) == near.search(queries, 3)


def test_many_threads_share_one_client(ours):
    far, near = ours

    def one_thread(n: int) -> int:
        for turn in range(10):
            queries = [f"word{(n + turn) % 100}", f"T{n} shared"]
            assert far.search(queries, 1 + turn % 3) == near.search(queries, 1 + turn % 3)
        return 10

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(one_thread, range(32))) == 320


def test_what_our_server_refuses(ours):
    far, _ = ours
    with pytest.raises(QueryRefusedError, match=r"queries\.1: String should have at most 20000"):
        far.search(["fine", "x" * 100_000], 3)
    with pytest.raises(QueryRefusedError, match="topk: Input should be less than or equal to 256"):
        far.search(["fine"], 257)


def test_our_server_overloaded_and_with_a_token():
    """Four clients of a server that takes two queries at once: all are served, some after another attempt."""

    class Slow:
        def search(self, queries, k):
            time.sleep(0.05)
            return [[Hit(Passage(query, query, query), 1.0)] for query in queries]

    app = server.make_app(Slow(), token="s3cret", max_waiting=2)
    statuses = Counter()

    async def watched(scope, receive, send):
        async def watch(message):
            statuses[message.get("status")] += 1
            await send(message)

        await app(scope, receive, watch)

    with serving(watched) as url:
        far = RemoteRetriever(url, token="s3cret", deadline=30)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda n: far.search([f"q{n}"], 1), range(4)))
        assert [answer[0][0].passage.id for answer in answers] == [f"q{n}" for n in range(4)]
        assert statuses[200] == 4 and statuses[503] > 0
        with pytest.raises(RetrievalError, match="HTTP 401"):
            RemoteRetriever(url).search(["q"], 1)
