"""Online search against a stub of a search service in a thread of this process; the key must show up nowhere."""

import json
import logging
import threading
import time
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import yaml

from searchr1_lite.retrieval import online
from searchr1_lite.retrieval.online import OnlineError, load_online
from searchr1_lite.retrieval.remote import RetrieverDownError
from searchr1_lite.types import Passage, QueryRefusedError

KEY = "s3cret/k+y="
IN_ADDRESS = str(httpx.QueryParams({"": KEY}))[1:]
RESULTS = {
    "organic_results": [
        {"link": "https://a.org/?x=1&copy=2", "title": "Alpha &amp; <b>Omega</b>", "snippet": "5 < 6 in <em>Rome</em>"},
        {"link": "https://b.org", "title": "Beta"},
        {"link": "https://a.org/?x=1&copy=2", "title": "Alpha again"},
        {"link": "https://c.org", "title": None, "snippet": "third\n line"},
    ]
}


@contextmanager
def service(*answers):
    """Each answer is (status, JSON value or text) or (status, value, headers); the last is given again and again."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlsplit(self.path)
            asked.append((time.monotonic(), address, dict(self.headers), json.loads(body) if body else None))
            status, value, *headers = answers[min(len(asked), len(answers)) - 1]
            value = value(asked[-1]) if callable(value) else value
            text = value if isinstance(value, str) else json.dumps(value)
            self.send_response(status)
            for name, content in (headers[0] if headers else {}).items():
                self.send_header(name, content)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # with the usual 5, connections made at once are dropped and made again a second later

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/search", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("STUB_KEY", f" {KEY}\n")


@pytest.fixture
def template(tmp_path):
    """Writes serpapi.yaml with other settings to a file; a setting of None is left out."""

    def write(**settings) -> str:
        serpapi = yaml.safe_load((online.Path(online.__file__).with_name("serpapi.yaml")).read_text())
        settings = serpapi | {"key_env": "STUB_KEY", "per_second": 1000} | settings
        file = tmp_path / "service.yaml"
        file.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
        return str(file)

    return write


def test_serpapi_as_its_template_says(monkeypatch):
    monkeypatch.setenv("SERPAPI_API_KEY", KEY)
    with service((200, RESULTS)) as (url, asked):
        retriever = load_online("serpapi")
        assert retriever.template.url == "https://serpapi.com/search"
        retriever.template = retriever.template.model_copy(update={"url": url})
        [hits] = retriever.search(["who & when?"], 3)
    assert [hit.passage for hit in hits] == [
        Passage("https://a.org/?x=1&copy=2", "Alpha & Omega", "5 < 6 in Rome"),
        Passage("https://b.org", "Beta", ""),
        Passage("https://c.org", "", "third line"),
    ]
    assert [hit.score for hit in hits] == [1, 1 / 2, 1 / 3]
    [(_, address, _, body)] = asked
    assert parse_qs(address.query) == {"engine": ["google"], "q": ["who & when?"], "api_key": [KEY]}
    assert body is None


def test_any_json_service_by_template(template):
    settings = dict(
        method="POST",
        params={"lang": "en"},
        headers={"X-Key": "Bearer {key}"},
        body={"ask": [{"text": "{query}", "size": "{k}"}], "note": "at most {k}"},
        results="data.0.items",
        id="meta.n",
        text="body",
    )
    answer = {"data": [{"items": [{"meta": {"n": 7}, "title": "T", "body": "B"}] * 3 + [{"meta": {"n": 8}}]}]}
    with service((200, answer)) as (url, asked), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUB_KEY", "plain-key")
        retriever = load_online(template(url=url, **settings))
        query = 'a "{key}" {k} \\ ü'
        assert [hit.passage.id for hit in retriever.search([query], 5)[0]] == ["7", "8"]
        assert len(retriever.search([query], 1)[0]) == 1
    _, address, headers, body = asked[0]
    assert (address.path, address.query, headers["X-Key"]) == ("/search", "lang=en", "Bearer plain-key")
    assert body == {"ask": [{"text": query, "size": 5}], "note": "at most 5"}


def test_order_blanks_and_repeats(template):
    def echo(request):
        [query] = parse_qs(request[1].query)["q"]
        return {"organic_results": [{"link": f"https://x.org/{query}", "title": query}]}

    with service((200, echo)) as (url, asked):
        retriever = load_online(template(url=url))
        queries = [*(f"q{i}" for i in range(20)), "", "q3", " \n"]
        found = retriever.search(queries, 2)
    assert [[hit.passage.title for hit in hits] for hits in found] == [[q] if q.strip() else [] for q in queries]
    assert len(asked) == 20
    with pytest.raises(ValueError, match="k must be at least 1"):
        retriever.search(["q"], 0)


def test_no_more_requests_a_second_than_allowed(template):
    with service((200, RESULTS)) as (url, asked):
        load_online(template(url=url, per_second=20)).search(["a", "b", "c", "d", "e"], 1)
    times = sorted(request[0] for request in asked)
    assert times[-1] - times[0] >= 4 / 20 - 0.02


def test_what_may_pass_is_asked_again(template):
    with service((503, "busy"), (429, "slow down", {"Retry-After": "1"}), (200, RESULTS)) as (url, asked):
        [hits] = load_online(template(url=url)).search(["q"], 1)
    assert len(hits) == 1 and len(asked) == 3
    assert asked[2][0] - asked[1][0] >= 1


def leaks(error: BaseException) -> str:
    """All that a traceback, a debugger or a log of this error could show."""
    seen, texts = set(), []
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        texts += [repr(error), repr(vars(error)), "".join(traceback.format_exception(error))]
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if "searchr1_lite" in frame.f_code.co_filename or "tenacity" in frame.f_code.co_filename:
                texts += [repr(value) + repr(getattr(value, "__dict__", "")) for value in frame.f_locals.values()]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


PHP = KEY.replace("/", "\\/")  # how PHP writes it in JSON
ECHO = f'{{"error": "no such key: {KEY}", "url": "/search?api_key={IN_ADDRESS}", "key": "{PHP}"}}'


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        ((401, ECHO), RetrieverDownError, r"HTTP 401 \(the key in STUB_KEY may be wrong\), after 1 attempts"),
        ((403, ECHO), RetrieverDownError, r"HTTP 403 \(the key in STUB_KEY may be not allowed this\)"),
        ((402, ECHO), RetrieverDownError, r"HTTP 402 \(the key in STUB_KEY may be out of quota\)"),
        ((429, ECHO), RetrieverDownError, r"HTTP 429 \(the key in STUB_KEY may be out of quota, or asked for too"),
        ((500, ECHO), RetrieverDownError, r"HTTP 500, after [1-9] attempts in at most 0.5 s"),
        ((400, ECHO), QueryRefusedError, r"refuses 'a query': .*no such key: \*\*\*"),
        ((302, ECHO, {"Location": f"/elsewhere?api_key={IN_ADDRESS}"}), RetrieverDownError, "HTTP 302"),
        ((200, ECHO[:-1]), RetrieverDownError, r"the answer is not JSON: .*no such key: \*\*\*"),
        ((200, "[" * 100_000), RetrieverDownError, "the answer is not JSON"),
        ((200, ECHO), RetrieverDownError, r"the answer has no list at 'organic_results': .*no such key: \*\*\*"),
        ((200, {"organic_results": [{"title": KEY}]}), RetrieverDownError, r"a result has nothing at 'link'"),
        ((200, {"organic_results": ["text"]}), RetrieverDownError, r"a result has nothing at 'link'"),
    ],
)
def test_errors_say_what_is_wrong_and_never_the_key(template, caplog, capfd, answer, error, says):
    caplog.set_level(logging.DEBUG)
    with service(answer) as (url, asked):
        retriever = load_online(template(url=url), deadline=0.5)
        with pytest.raises(error, match=says) as caught:
            retriever.search(["a query"], 3)
    assert len(asked) == 1 or answer[0] in (429, 500)
    assert KEY in asked[0][1].query or IN_ADDRESS in asked[0][1].query  # it was sent
    shown = [leaks(caught.value), caplog.text, *capfd.readouterr(), repr(retriever), repr(vars(retriever))]
    for text in shown:
        assert KEY not in text and IN_ADDRESS not in text and "s3cret" not in text


def test_no_answer_at_all_names_no_key(template, caplog):
    caplog.set_level(logging.DEBUG)
    with service((200, RESULTS)) as (url, _):
        pass  # the server is gone, and its port closed
    with pytest.raises(RetrieverDownError, match=r"no answer, after \d+ attempts .*: ConnectError") as caught:
        load_online(template(url=url), deadline=0.3).search(["q"], 1)
    with service((200, lambda _: time.sleep(0.4) or RESULTS)) as (url, _):
        start = time.monotonic()
        with pytest.raises(RetrieverDownError, match="ReadTimeout"):
            load_online(template(url=url), timeout=0.1, deadline=0.3).search(["q"], 1)
        assert time.monotonic() - start < 1
    assert "s3cret" not in leaks(caught.value) + caplog.text


def test_a_key_that_comes_back_in_results_is_blotted_out(template, caplog):
    caplog.set_level(logging.DEBUG)
    said = {"link": f"https://x.org/?k={IN_ADDRESS}", "title": f"you sent {KEY}", "snippet": KEY.replace("/", "&#x2F;")}
    with service((200, {"organic_results": [said]})) as (url, _):
        [[hit]] = load_online(template(url=url)).search(["what is {key}?"], 1)
    assert hit.passage == Passage("https://x.org/?k=***", "you sent ***", "***")
    assert "s3cret" not in caplog.text


def test_other_users_of_httpx_keep_their_logs(caplog):
    caplog.set_level(logging.INFO)
    with service((200, RESULTS)) as (url, _):
        httpx.get(url)
    assert "HTTP Request: GET http://127.0.0.1" in caplog.text


def test_nothing_found_is_no_error(template):
    empty = {"error": "Google hasn't returned any results for this query."}
    with service((200, empty), (200, {"organic_results": []})) as (url, _):
        retriever = load_online(template(url=url))
        assert retriever.search(["q"], 3) == retriever.search(["r"], 3) == [[]]


def test_a_query_that_cannot_be_sent_is_refused(template):
    with service((200, RESULTS)) as (url, asked):
        retriever = load_online(template(url=url, params={}, headers={"X-Query": "{query}", "X-Key": "{key}"}))
        with pytest.raises(QueryRefusedError, match=r"could not be sent \(UnicodeEncodeError\)") as caught:
            retriever.search(["静か"], 1)
    assert not asked and "s3cret" not in leaks(caught.value)


def test_after_an_error_the_rest_is_not_sent(template):
    with service((401, "no", {})) as (url, asked), pytest.raises(RetrieverDownError):
        load_online(template(url=url, per_second=50)).search([f"q{i}" for i in range(100)], 1)
    assert len(asked) < 30


def test_a_key_that_is_not_set(template, monkeypatch):
    monkeypatch.setenv("STUB_KEY", "  ")
    with pytest.raises(OnlineError, match="set the environment variable STUB_KEY"):
        load_online(template())
    monkeypatch.delenv("STUB_KEY")
    with pytest.raises(OnlineError, match="set the environment variable STUB_KEY"):
        load_online(template())
    assert load_online(template(key_env=None, params={"q": "{query}"})).template.key_env is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"results": None}, "- results: Field required"),
        ({"result": "items"}, "- result: Extra inputs are not permitted"),
        ({"method": "PUT"}, "- method: Input should be 'GET' or 'POST'"),
        ({"params": {"q": {"query": None}}}, r"- params.q.str: Input should be a valid string"),
        ({"params": {"q": "{qery}", "key": "{key}"}}, r"must have {query}.*they have \['key', 'qery'\]"),
        ({"params": {"q": "{query}"}}, "have {key} if key_env is given"),
        ({"url": "https://x.org/search?api_key=abc"}, "what follows a '\\?' goes to params"),
        ({"url": "ftp://x.org"}, "url must be http"),
        ({"url": "https://x:port"}, "InvalidURL"),
        ({"per_second": 0}, "- per_second: Input should be greater than 0"),
    ],
)
def test_templates_that_cannot_be_used(template, settings, says):
    with pytest.raises(OnlineError, match=says) as caught:
        load_online(template(**settings))
    assert "service.yaml" in str(caught.value) and "=abc" not in str(caught.value)


def test_files_that_are_no_templates(tmp_path):
    for name, content, says in [
        ("a.yaml", b"url: [1", r"ParserError in line 1"),
        ("b.yaml", b"\xff\xfe", "UnicodeDecodeError"),
        ("c.yaml", b"", "- template: Input should be a valid dictionary"),
        ("d.yaml", None, "FileNotFoundError"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(OnlineError, match=says):
            load_online(str(tmp_path / name))
    with pytest.raises(OnlineError, match="'bing' is neither 'serpapi' nor a YAML template"):
        load_online("bing")
