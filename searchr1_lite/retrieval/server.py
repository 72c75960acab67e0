"""The search service: indexes behind the HTTP API of Search-R1, so that it, verl and SkyRL can ask them unchanged.

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
import os
import signal
import socket
import time
from collections.abc import Callable
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
from searchr1_lite.retrieval.remote import TOKEN, is_loopback
from searchr1_lite.types import Hit, QueryRefusedError, RetrievalError, Retriever

MAX_QUERIES = 4096  # in a request; Search-R1 sends the 512 x 5 of a training step in one
MAX_CHARACTERS = 20_000  # of a query
MAX_K = 256
MAX_HITS = 1 << 16  # queries x topk: about 50 MB of answer
MAX_BODY = 16 << 20  # bytes
MAX_WAITING = 4 * MAX_QUERIES  # queries begun or queued; beyond, clients are told to come again
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

log = logging.getLogger("uvicorn.error")


class SearchRequest(BaseModel):
    """The body of a request. As in the original, other fields are ignored and numbers may be written as strings."""

    queries: list[Annotated[str, Field(max_length=MAX_CHARACTERS)]] = Field(max_length=MAX_QUERIES)
    topk: int | None = Field(None, ge=0, le=MAX_K)  # None or 0: the server's default
    return_scores: bool = False


class Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("searchr1_requests", "Requests to /retrieve", ["status"], registry=registry)
        self.queries = Counter("searchr1_queries", "Queries taken", registry=registry)
        self.waiting = Gauge("searchr1_waiting_queries", "Queries begun or queued", registry=registry)
        self.batches = Histogram("searchr1_batch_queries", "In a search", registry=registry, buckets=BATCH_SIZES)
        self.seconds = Histogram("searchr1_request_seconds", "Until the answer", registry=registry, buckets=SECONDS)


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

    app = FastAPI(title="searchr1_lite", version=version("searchr1_lite"), lifespan=lifespan, max_body_size=MAX_BODY)

    @app.middleware("http")
    async def watch(request: Request, answer: Callable) -> Response:
        start, sent = time.perf_counter(), request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
            detail = {"detail": f"send the server's {TOKEN} as a bearer token"}
            response = JSONResponse(detail, 401, {"WWW-Authenticate": "Bearer"})
        else:
            response = await answer(request)
        if request.url.path == "/retrieve":
            metrics.requests.labels(response.status_code).inc()
            metrics.seconds.observe(time.perf_counter() - start)
        return response

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> Response:
        """What is wrong, without what was sent, which FastAPI would send back."""
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:])) or "body"
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    @app.post("/retrieve")
    async def retrieve(request: SearchRequest) -> Response:
        nonlocal waiting
        queries, k = request.queries, request.topk or topk
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
        return Response(write_answer(hits, request.return_scores), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "topk": topk} | (about or {})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def write_answer(results: list[list[Hit]], with_scores: bool) -> bytes:
    """The original's JSON, byte for byte as FastAPI writes it there, without its detour over response models."""

    def one(hit: Hit) -> dict[str, Any]:
        document = {"id": hit.passage.id, "contents": join_contents(hit.passage)}
        return {"document": document, "score": hit.score} if with_scores else document

    answer = {"result": [[one(hit) for hit in hits] for hits in results]}
    return json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def load_indexes(folders: list[Path], rerank: str | None) -> tuple[Retriever, list[dict[str, Any]]]:
    """The retriever over one index folder, or over several fused, and what `/health` says of each."""
    from searchr1_lite.retrieval.index import open_index
    from searchr1_lite.retrieval.rerank import Hybrid, Reranked, load_reranker

    retrievers = [open_index(folder) for folder in folders]
    manifests = [json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in folders]
    shown = ("kind", "passages", "corpus_checksum", "encoder", "versions")
    about = [
        {"folder": folder.name} | {key: manifest[key] for key in shown if key in manifest}
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    retriever = retrievers[0] if len(retrievers) == 1 else Hybrid(retrievers)
    return Reranked(retriever, load_reranker(rerank)) if rerank else retriever, about


def serve(app: FastAPI, listener: socket.socket, what: str) -> None:
    """Until SIGTERM or SIGINT; then what was begun is finished."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # uvicorn takes them over, and at its end raises them once more
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/retrieve serves {what}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=60)
    uvicorn.Server(config).run(sockets=[listener])


def serve_folders(
    folders: list[Path], rerank: str | None = None, host: str = "127.0.0.1", port: int = 8000, topk: int = 3
) -> None:
    """Serve index folders, fused if there are several, until a signal; the token is the environment's SEARCHR1_TOKEN.

    Prints one line when it takes requests. Raises UserError for an address that others reach without a token.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads of torch and FAISS, loaded later, wait busily
    token = os.environ.get(TOKEN)
    if not is_loopback(host) and not token:
        raise UserError(f"{host} can be reached by others; set {TOKEN} to a secret that clients must send")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=2048) as listener:  # who comes early waits
        retriever, about = load_indexes(folders, rerank)
        app = make_app(
            retriever, topk, {"indexes": about, "reranker": rerank, "version": version("searchr1_lite")}, token
        )
        serve(app, listener, "; ".join(f"{i['folder']} ({i['kind']}, {i['passages']:,} passages)" for i in about))
