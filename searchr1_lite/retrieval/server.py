"""The search service: an index behind the HTTP API of Search-R1, so that it, verl and SkyRL can ask it unchanged.

`searchr1 serve FOLDER` starts it. `POST /retrieve {"queries": [...], "topk": 3, "return_scores": true}` is answered as
by the original's search_r1/search/retrieval_server.py, and without scores too, where that crashes. What differs: a
blank query finds nothing (the original encodes it and finds something); bad input is refused with a 4xx whose `detail`
says why; queries of all clients are searched together (batching.py). `GET /health` says what is served, `GET /metrics`
has counters for Prometheus. Left out: TLS, more than one process, and limits for each client, which a reverse proxy
gives. Optional: `pip install "searchr1_lite[service]"`.
"""

import asyncio
import hmac
import json
import logging
import os
import signal
import socket
import time
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field

from searchr1_lite.errors import UserError
from searchr1_lite.retrieval.batching import Batcher
from searchr1_lite.retrieval.corpus import join_contents
from searchr1_lite.retrieval.index import MANIFEST, TOKEN, open_index
from searchr1_lite.retrieval.remote import is_loopback
from searchr1_lite.types import Hit, QueryRefusedError, RetrievalError, Retriever

MAX_QUERIES = 4096  # in a request; Search-R1 sends the 512 x 5 of a training step in one
MAX_CHARACTERS = 20_000  # of a query
MAX_K = 256
MAX_HITS = 1 << 16  # queries x topk: about 50 MB of answer
MAX_BODY = 16 << 20  # bytes
MAX_WAITING = 4 * MAX_QUERIES  # queries begun or queued; beyond, clients are told to come again
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

log = logging.getLogger("uvicorn.error")


class Body(BaseModel):
    """The body of a request. As in the original, other fields are ignored and numbers may be written as strings."""

    queries: list[Annotated[str, Field(max_length=MAX_CHARACTERS)]] = Field(max_length=MAX_QUERIES)
    topk: int | None = Field(None, ge=0, le=MAX_K)  # None or 0: the server's default
    return_scores: bool = False


class Metrics:
    """What `/metrics` shows. As a middleware, it counts and times requests to `/retrieve` and bounds their bodies."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("searchr1_requests", "Requests to /retrieve", ["status"], registry=registry)
        self.queries = Counter("searchr1_queries", "Queries taken", registry=registry)
        self.waiting = Gauge("searchr1_waiting_queries", "Queries begun or queued", registry=registry)
        self.batches = Histogram(
            "searchr1_batch_queries", "Queries in a search", registry=registry, buckets=BATCH_SIZES
        )
        self.seconds = Histogram("searchr1_request_seconds", "Until the answer", registry=registry)

    def __call__(self, app: Any) -> Any:
        async def counted(scope: dict, receive: Any, send: Any) -> None:
            start, size = time.perf_counter(), 0

            async def bounded() -> dict:
                nonlocal size
                message = await receive()
                size += len(message.get("body", b""))
                if size > MAX_BODY:
                    raise HTTPException(413, f"the body has more than {MAX_BODY:,} bytes; send fewer queries at once")
                return message

            async def watched(message: dict) -> None:
                if message["type"] == "http.response.start":
                    self.requests.labels(message["status"]).inc()
                    self.seconds.observe(time.perf_counter() - start)
                await send(message)

            await (app(scope, bounded, watched) if scope.get("path") == "/retrieve" else app(scope, receive, send))

        return counted


class Distinct:
    """The retriever, asked once for what several clients ask at the same time."""

    def __init__(self, retriever: Retriever, metrics: Metrics) -> None:
        self.retriever, self.metrics = retriever, metrics

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        self.metrics.batches.observe(len(queries))
        distinct = list(dict.fromkeys(queries))
        hits = dict(zip(distinct, self.retriever.search(distinct, k), strict=True))
        return [hits[query] for query in queries]


def make_app(
    retriever: Retriever,
    topk: int = 3,
    about: dict[str, Any] | None = None,
    token: str | None = None,
    max_waiting: int = MAX_WAITING,
) -> FastAPI:
    """The service over any retriever. `topk` is for requests that name none, `about` is what `/health` answers.

    With a `token`, every request must carry `Authorization: Bearer <token>`.
    """
    metrics = Metrics()
    batcher = Batcher(Distinct(retriever, metrics))
    waiting = 0

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        batcher.close()  # called when every request is answered

    number = version("searchr1_lite")
    app = FastAPI(title="searchr1_lite", version=number, lifespan=lifespan)

    def authorized(inner: Any) -> Any:
        async def gate(scope: dict, receive: Any, send: Any) -> None:
            sent = dict(scope.get("headers", ())).get(b"authorization", b"")
            if scope["type"] == "http" and token and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
                reason = {"detail": f"send the server's {TOKEN} as a bearer token"}
                inner_or_refusal = JSONResponse(reason, 401, {"WWW-Authenticate": "Bearer"})
            else:
                inner_or_refusal = inner
            await inner_or_refusal(scope, receive, send)

        return gate

    app.add_middleware(authorized)
    app.add_middleware(metrics)

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # without what was sent, which may be long, and no text
        where = ".".join(map(str, first["loc"][1:])) or "body"
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    @app.post("/retrieve")
    async def retrieve(body: Body) -> Response:
        nonlocal waiting
        queries, k = body.queries, body.topk or topk
        if len(queries) * k > MAX_HITS:
            raise HTTPException(422, f"{len(queries):,} queries x topk {k}: at most {MAX_HITS:,} passages in a request")
        if waiting and waiting + len(queries) > max_waiting:
            raise HTTPException(503, f"{waiting} queries are waiting already; come again", {"Retry-After": "1"})
        waiting += len(queries)
        metrics.waiting.set(waiting)
        metrics.queries.inc(len(queries))
        try:
            hits = await asyncio.gather(*map(asyncio.wrap_future, batcher.ask(queries, k)))
        except QueryRefusedError as error:
            raise HTTPException(422, str(error)) from None
        except RetrievalError as error:
            log.error("%s", error)  # it names queries of other clients, too: it is not for this one
            raise HTTPException(500, "the search failed; the server's log says why") from None
        finally:
            waiting -= len(queries)
            metrics.waiting.set(waiting)
        return Response(write_answer(hits, body.return_scores), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "topk": topk} | (about or {})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def write_answer(lists: list[list[Hit]], with_scores: bool) -> bytes:
    """The original's JSON, byte for byte as FastAPI writes it there, without its detour over response models."""

    def document(hit: Hit) -> dict[str, str]:
        return {"id": hit.passage.id, "contents": join_contents(hit.passage)}

    if with_scores:
        result: list = [[{"document": document(hit), "score": hit.score} for hit in hits] for hits in lists]
    else:
        result = [[document(hit) for hit in hits] for hits in lists]
    return json.dumps({"result": result}, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def load(folders: list[Path], rerank: str | None) -> tuple[Retriever, dict[str, Any]]:
    """The retriever over one index folder, or over several fused, and what `/health` says of them."""
    retriever, *others = [open_index(folder) for folder in folders]
    if others:
        from searchr1_lite.retrieval.rerank import Hybrid

        retriever = Hybrid([retriever, *others])
    if rerank:
        from searchr1_lite.retrieval.rerank import Reranked, load_reranker

        retriever = Reranked(retriever, load_reranker(rerank))
    shown = ("kind", "passages", "corpus_checksum", "encoder", "versions")
    indexes = []
    for folder in folders:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        indexes.append({"folder": folder.name} | {key: manifest[key] for key in shown if key in manifest})
    return retriever, {"indexes": indexes, "reranker": rerank, "version": version("searchr1_lite")}


def bind(host: str, port: int) -> socket.socket:
    """The address, taken but not yet listening; raises OSError with a message for people."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; name another --port or --host") from None
    return listener


def serve(app: FastAPI, listener: socket.socket, what: str) -> None:
    """Until SIGTERM or SIGINT; then what was begun is finished."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # uvicorn takes them over, and at its end raises them once more
    host, port = listener.getsockname()[:2]
    listener.listen(2048)  # from here on clients can connect, and wait the moment until uvicorn answers
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/retrieve serves {what}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=60)
    uvicorn.Server(config).run(sockets=[listener])


def serve_folders(folders: list[Path], rerank: str | None, host: str, port: int, topk: int) -> None:
    """Serve index folders, fused if there are several; raises UserError and OSError."""
    if topk > MAX_K:
        raise UserError(f"--topk must be from 1 to {MAX_K}")
    token = os.environ.get(TOKEN)
    if not is_loopback(host) and not token:
        raise UserError(f"{host} can be reached by others; set {TOKEN} to a secret that clients must send")
    with bind(host, port) as listener:
        retriever, about = load(folders, rerank)
        what = "; ".join(f"{i['folder']} ({i['kind']}, {i['passages']:,} passages)" for i in about["indexes"])
        serve(make_app(retriever, topk, about, token), listener, what)
