"""The search service: an index behind the HTTP API of Search-R1, so that it, verl and SkyRL can ask it unchanged.

    python -m searchr1_lite.retrieval.server --index FOLDER

`POST /retrieve {"queries": [...], "topk": 3, "return_scores": true}` is answered as by the original's
search_r1/search/retrieval_server.py, and without scores too, where that crashes. What differs: a blank query finds
nothing (the original encodes it and finds something); bad input is refused with a 4xx whose `detail` says why; queries
of all clients are searched together (batching.py). `GET /health` says what is served, `GET /metrics` how it goes
(Prometheus). Left out: TLS, more than one process, and limits for each client, which a reverse proxy gives. Optional:
`pip install "searchr1_lite[service]"`.
"""

import asyncio
import hmac
import json
import logging
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from searchr1_lite.retrieval.batching import Batcher
from searchr1_lite.retrieval.corpus import join_contents
from searchr1_lite.retrieval.load import TOKEN
from searchr1_lite.retrieval.manifest import MANIFEST
from searchr1_lite.types import Hit, QueryRefusedError, RetrievalError, Retriever

MAX_QUERIES = 4096  # in a request; Search-R1 sends the 512 x 5 of a training step in one
MAX_CHARACTERS = 20_000  # of a query
MAX_K = 256
MAX_HITS = 1 << 16  # queries x topk: about 50 MB of answer
MAX_BODY = 16 << 20  # bytes
MAX_WAITING = 4 * MAX_QUERIES  # queries begun or queued; beyond, clients are told to come again
PART = 8  # queries that one thread encodes at once; of 8, 16 and 64, 8 took the least time of a core
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REFUSALS = {401: "no token", 413: "too large", 422: "refused", 500: "the search failed", 503: "overloaded"}

log = logging.getLogger("uvicorn.error")


class Asked(BaseModel):
    """The body of a request. As in the original, other fields are ignored and numbers may be written as strings."""

    queries: list[str]
    topk: int | None = None  # None or 0: the server's default
    return_scores: bool = False


class Metrics:
    """What `/metrics` shows. As a middleware, it counts and times the requests to `/retrieve`."""

    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        self.requests = Counter("searchr1_requests", "Requests to /retrieve", ["status"], registry=of)
        self.queries = Counter("searchr1_queries", "Queries taken", registry=of)
        self.waiting = Gauge("searchr1_waiting_queries", "Queries begun or queued", registry=of)
        self.batches = Histogram("searchr1_batch_queries", "Queries in a search", registry=of, buckets=BATCH_SIZES)
        self.seconds = Histogram("searchr1_request_seconds", "Until the answer", registry=of, buckets=SECONDS)

    def __call__(self, app: Any) -> Any:
        async def counted(scope: dict, receive: Any, send: Any) -> None:
            start = time.perf_counter()

            async def watched(message: dict) -> None:
                if message["type"] == "http.response.start":
                    self.requests.labels(message["status"]).inc()
                    self.seconds.observe(time.perf_counter() - start)
                await send(message)

            await app(scope, receive, watched if scope.get("path") == "/retrieve" else send)

        return counted


class Distinct:
    """The retriever, asked once for what several clients ask at the same time."""

    def __init__(self, retriever: Retriever, metrics: Metrics) -> None:
        self.retriever, self.metrics = retriever, metrics

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        self.metrics.batches.observe(len(queries))
        distinct = list(dict.fromkeys(queries))
        found = dict(zip(distinct, self.retriever.search(distinct, k), strict=True))
        return [found[query] for query in queries]


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

    async def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, f"send the server's {TOKEN} as a bearer token", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="searchr1_lite",
        version=version("searchr1_lite"),
        lifespan=lifespan,
        dependencies=[Depends(authorize)],
        responses={status: {"description": what} for status, what in REFUSALS.items()},
    )
    app.add_middleware(metrics)
    schema = {"content": {"application/json": {"schema": Asked.model_json_schema()}}, "required": True}

    @app.post("/retrieve", openapi_extra={"requestBody": schema})
    async def retrieve(request: Request) -> Response:
        nonlocal waiting
        asked = parse(await read_body(request))
        queries, k = asked.queries, asked.topk or topk
        check_bounds(queries, k)
        if waiting and waiting + len(queries) > max_waiting:
            raise HTTPException(503, f"{waiting} queries are waiting already; come again", {"Retry-After": "1"})
        waiting += len(queries)
        metrics.waiting.set(waiting)
        metrics.queries.inc(len(queries))
        try:
            found = await asyncio.gather(*map(asyncio.wrap_future, batcher.ask(queries, k)))
        except QueryRefusedError as error:
            raise HTTPException(422, str(error)) from None
        except RetrievalError as error:
            log.error("%s", error)  # it names queries of other clients, too: it is not for this one
            raise HTTPException(500, "the search failed; the server's log says why") from None
        finally:
            waiting -= len(queries)
            metrics.waiting.set(waiting)
        return Response(write_answer(found, asked.return_scores), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "topk": topk} | (about or {})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def read_body(request: Request) -> bytes:
    """The body, of which no more than MAX_BODY bytes are ever held."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"the body has more than {MAX_BODY:,} bytes; send fewer queries at once")
    except ClientDisconnect:
        raise HTTPException(400, "the client left before it had sent its request") from None
    return bytes(body)


def parse(body: bytes) -> Asked:
    try:
        return Asked.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise HTTPException(422, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None


def check_bounds(queries: list[str], k: int) -> None:
    """Refuses, with a 422, what is more than one request may ask."""
    reason = None
    if len(queries) > MAX_QUERIES:
        reason = f"{len(queries):,} queries; at most {MAX_QUERIES:,} in a request"
    elif not 1 <= k <= MAX_K:
        reason = f"topk must be from 1 to {MAX_K}"
    elif len(queries) * k > MAX_HITS:
        reason = f"{len(queries):,} queries x topk {k}: at most {MAX_HITS:,} passages in a request"
    elif too_long := [i for i, query in enumerate(queries) if len(query) > MAX_CHARACTERS]:
        i = too_long[0]
        reason = f"queries.{i}: {len(queries[i]):,} characters; at most {MAX_CHARACTERS:,} in a query"
    if reason:
        raise HTTPException(422, reason)


def write_answer(found: list[list[Hit]], with_scores: bool) -> bytes:
    """The original's JSON, byte for byte as FastAPI writes it there, without its detour over response models."""

    def document(hit: Hit) -> dict[str, str]:
        return {"id": hit.passage.id, "contents": join_contents(hit.passage)}

    if with_scores:
        result: list = [[{"document": document(hit), "score": hit.score} for hit in hits] for hits in found]
    else:
        result = [[document(hit) for hit in hits] for hits in found]
    return json.dumps({"result": result}, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class ThreadedEncoder:
    """An encoder on a CPU, for many short queries: each of torch's threads encodes a few of similar length.

    That torch's threads share every matrix product instead is slower for so few words, and many times slower where
    other work keeps one of them waiting.
    """

    def __init__(self, encoder: Any) -> None:
        import torch

        self.encoder = encoder
        encoder.encode_queries(["first"])  # a tokenizer's first call settles how it pads, which two must not do at once
        self.pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode_queries(self, queries: list[str]) -> np.ndarray:
        longest_first = sorted(range(len(queries)), key=lambda i: -len(queries[i]))
        parts = [longest_first[start : start + PART] for start in range(0, len(queries), PART)]
        encoded = self.pool.map(lambda part: self.encoder.encode_queries([queries[i] for i in part]), parts)
        return np.concatenate(list(encoded))[np.argsort(longest_first)]


def open_for_service(folder: Path) -> Retriever:
    from searchr1_lite.retrieval.build import open_index

    retriever = open_index(folder)
    encoder = getattr(retriever, "encoder", None)
    if encoder and encoder.model.device.type == "cpu":
        return replace(retriever, encoder=ThreadedEncoder(encoder))
    return retriever


def load(folders: list[Path], rerank: str | None) -> tuple[Retriever, dict[str, Any]]:
    """The retriever over one index folder, or over several fused, and what `/health` says of them."""
    retriever, *others = [open_for_service(folder) for folder in folders]
    if others:
        from searchr1_lite.retrieval.hybrid import Hybrid

        retriever = Hybrid([retriever, *others])
    if rerank:
        from searchr1_lite.retrieval.rerank import Reranked, load_reranker

        retriever = Reranked(retriever, load_reranker(rerank))
    manifests = [json.loads((folder / MANIFEST).read_text(encoding="utf-8")) for folder in folders]
    shown = ("kind", "passages", "corpus_checksum", "encoder", "versions")
    indexes = [
        {"folder": folder.name} | {key: manifest[key] for key in shown if key in manifest}
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    return retriever, {"indexes": indexes, "reranker": rerank, "version": version("searchr1_lite")}


class _Announced(uvicorn.Server):
    """Says one line when it takes requests."""

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self.line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.line, flush=True)


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
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)  # uvicorn takes them over, and at its end raises them once more
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=60)
    _Announced(config, f"{url}/retrieve serves {what}").run(sockets=[listener])
