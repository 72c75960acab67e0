"""Retrieval in Milvus, for what no laptop holds: `retriever=milvus:FILE.db` and `milvus:http://HOST:19530/COLLECTION`.

The first is embedded (milvus-lite), the second a server or a cluster; the client is the same. A collection holds
passages with their vectors (HNSW) and their words (Milvus' BM25 over the stems of bm25.py, so that both tokenise
alike), and is asked for both, fused by the engine (reciprocal ranks); `?search=dense` or `?search=bm25` behind the
address asks for one. `searchr1 index milvus` loads a corpus. MILVUS_TOKEN is the environment variable for a server's
token. Left out: starting a server (docs/scale.md), partitions, GPU indexes. Optional: `pip install
"searchr1_lite[milvus]"`.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from pymilvus import AnnSearchRequest, DataType, Function, FunctionType, MilvusClient, RRFRanker
from pymilvus.exceptions import MilvusException
from tqdm import tqdm

from searchr1_lite.config import resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.files import read_rows
from searchr1_lite.retrieval.bm25 import K1, B, tokenize
from searchr1_lite.retrieval.corpus import CorpusError, corpus_checksum, in_shards, passage_of
from searchr1_lite.retrieval.dense import EF_CONSTRUCTION, EF_SEARCH, checked, encode
from searchr1_lite.retrieval.encoders import Encoder, load_encoder
from searchr1_lite.types import Hit, Passage, RetrievalError

SEARCHES = ("fused", "dense", "bm25")
FIELDS = ["id", "title", "text", "quoted"]
LONGEST = 65_535  # bytes of a text field of Milvus
DEPTH = 100  # passages that each search gives to be fused
SECONDS = 10.0  # to wait for a server
for _name in ("pymilvus", "milvus_lite"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # they print the tracebacks of what is raised anyway


class MilvusError(UserError):
    """A server, file or collection that cannot be used; the message says what is wrong with which address."""


def parse_address(address: str) -> tuple[str, str, str]:
    """("FILE.db" or "http://HOST:PORT", collection, search) of "milvus:..."; raises MilvusError."""
    place, _, query = address.removeprefix("milvus:").partition("?")
    search = query.removeprefix("search=") or "fused"
    server = re.fullmatch(r"(https?://[^/]+)/(\w+)", place)
    if search not in SEARCHES or not (server or place.endswith(".db")):
        forms = "milvus:FILE.db or milvus:http://HOST:19530/COLLECTION, with ?search=dense, bm25 or fused if need be"
        raise MilvusError(f"{address!r} is no address of a Milvus collection; it is {forms}")
    return (server[1], server[2], search) if server else (place, "passages", search)


def connect(uri: str, make: bool = False) -> MilvusClient:
    """A client of a server or of a milvus-lite file, which `make` allows to be new; raises MilvusError."""
    if not uri.startswith("http"):
        path = resolve_path(uri)
        if path.is_file() or not (make or path.exists()):
            state = "is no database of milvus-lite, which is a folder" if path.is_file() else "is not there"
            raise MilvusError(f"{path} {state}; make one: searchr1 index milvus CORPUS --to milvus:{uri}")
        path.parent.mkdir(parents=True, exist_ok=True)
        uri = str(path)
    try:
        return MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=SECONDS)
    except MilvusException as error:
        words = f"no Milvus at {uri} within {SECONDS:g} s: {error.message}"
        raise MilvusError(f"{words}; is it started, and its address right?") from None


def load_corpus_into(corpus: Path, address: str, encoder_name: str, batch: int) -> None:
    """Encode and load a corpus, `batch` passages at a time; the same call resumes. Raises MilvusError, CorpusError."""
    client = connect(parse_address(address)[0], make=True)
    corpus, encoder = resolve_path(str(corpus)), load_encoder(encoder_name)
    total = sum(1 for _ in _read(corpus))
    dimension = checked(encoder.encode_queries(["dimension"]), ["a query"], encoder, None).shape[1]
    facts = {"corpus": corpus_checksum(_read(corpus)), "encoder": _identity(encoder), "dimension": str(dimension)}
    with _said(address):
        _load_all(client, corpus, address, encoder, facts | {"batch": str(batch)}, total)
    print(f"{address}: whole, {total:,} passages")
    client.close()


@contextmanager
def _said(address: str) -> Iterator[None]:
    """What Milvus raises becomes a MilvusError."""
    try:
        yield
    except MilvusException as error:
        raise MilvusError(f"{address}: {error.message}; once that is mended, the same command resumes") from error


def _load_all(client: MilvusClient, corpus: Path, address: str, encoder: Encoder, facts: dict, total: int) -> None:
    (_, name, _), batch, dimension = parse_address(address), int(facts["batch"]), int(facts["dimension"])
    if not client.has_collection(name):
        _create(client, name, dimension)
    if "searchr1.corpus" not in client.describe_collection(name).get("properties", {}) and not _count(client, name):
        client.alter_collection_properties(name, {f"searchr1.{key}": value for key, value in facts.items()})
    _check(client, address, name, facts)
    done = _count(client, name) // batch * batch  # the last batch may be there in part, and is loaded again
    with tqdm(total=total, initial=done, unit=" passages", mininterval=1) as bar:
        for passages in in_shards(islice(_read(corpus), done, None), batch):
            _load(client, name, passages, encode(passages, encoder, dimension))
            bar.update(len(passages))
    client.flush(name)
    if (loaded := _count(client, name)) != total:
        raise CorpusError(f"{corpus} has {total:,} passages, but {address} {loaded:,}: some ids are used twice")
    client.alter_collection_properties(name, {"searchr1.passages": str(total)})  # the last thing: it is whole


def _read(corpus: Path) -> Iterator[Passage]:
    """Every passage in order; unlike `read_corpus` it remembers no ids, which for wiki-18 would take gigabytes."""
    return (passage_of(row, where) for where, row in read_rows(corpus, CorpusError, "corpus"))


def _create(client: MilvusClient, name: str, dimension: int) -> None:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=512)
    for field in ("title", "text"):
        schema.add_field(field, DataType.VARCHAR, max_length=LONGEST)
    schema.add_field("quoted", DataType.BOOL)
    stems = {"enable_analyzer": True, "analyzer_params": {"tokenizer": "standard"}}
    schema.add_field("stems", DataType.VARCHAR, max_length=LONGEST, **stems)
    schema.add_field("words", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
    schema.add_function(Function("bm25", FunctionType.BM25, ["stems"], ["words"]))
    indexes, graph = client.prepare_index_params(), {"M": 32, "efConstruction": EF_CONSTRUCTION}
    indexes.add_index("vector", index_type="HNSW", metric_type="IP", params=graph)
    weights = {"bm25_k1": K1, "bm25_b": B}
    indexes.add_index("words", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params=weights)
    client.create_collection(name, schema=schema, index_params=indexes)


def _load(client: MilvusClient, name: str, passages: list[Passage], vectors: Any) -> None:
    stems = tokenize([f"{passage.title}\n{passage.text}" for passage in passages])
    rows = []
    for passage, words, vector in zip(passages, stems, vectors, strict=True):
        row = {field: getattr(passage, field) for field in FIELDS} | {"stems": " ".join(words)}
        if long := next((field for field in ("title", "text", "stems") if len(row[field].encode()) > LONGEST), None):
            raise CorpusError(f"passage {passage.id!r}: its {long} has more than {LONGEST:,} bytes; cut it first")
        rows.append(row | {"vector": vector.tolist()})
    client.upsert(name, rows)


def _count(client: MilvusClient, name: str) -> int:
    rows = client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    return int(rows[0]["count(*)"])


def _identity(encoder: Encoder) -> str:
    """What the collection remembers of the encoder: all but its name, since a folder can be renamed."""
    return json.dumps({key: value for key, value in encoder.identity().items() if key != "name"}, sort_keys=True)


def _check(client: MilvusClient, address: str, name: str, facts: dict[str, str]) -> dict[str, str]:
    """The collection's properties; MilvusError where they are not those of this corpus, encoder and dimension."""
    properties = client.describe_collection(name).get("properties", {})
    for key, value in facts.items():
        if (stated := properties.get(f"searchr1.{key}")) != value:
            advice = "name another collection, or drop this one"
            raise MilvusError(f"{address} does not belong here: its {key} is {stated}, but {value} is needed; {advice}")
    return properties


class MilvusRetriever:
    """Searches a collection that `load_corpus_into` made of exactly this corpus; raises MilvusError if it is not."""

    def __init__(self, address: str, encoder_name: str, checksum: str) -> None:
        uri, self.name, self.kind = parse_address(address)
        self.address, self.client, self.encoder = address, connect(uri), None
        facts = {"corpus": checksum}
        if self.kind != "bm25":
            self.encoder = load_encoder(encoder_name)
            self.dimension = self.encoder.encode_queries(["dimension"]).shape[1]
            facts |= {"dimension": str(self.dimension), "encoder": _identity(self.encoder)}
        with _said(address):
            if not self.client.has_collection(self.name):
                raise MilvusError(f"{address}: there is no such collection; searchr1 index milvus makes one")
            if "searchr1.passages" not in _check(self.client, address, self.name, facts):
                raise MilvusError(f"{address} is not loaded to its end; run searchr1 index milvus again, it resumes")
            self.client.load_collection(self.name)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` passages a query, best first; a blank query finds nothing. Raises RetrievalError."""
        asked = [i for i, query in enumerate(queries) if query.strip()]
        hits: list[list[Hit]] = [[] for _ in queries]
        if not asked:
            return hits
        try:
            for i, rows in zip(asked, self._search([queries[i] for i in asked], k), strict=True):
                passages = [Passage(*(row["entity"][field] for field in FIELDS)) for row in rows]
                scores = [abs(row["distance"]) for row in rows]  # milvus-lite gives BM25's below zero
                hits[i] = list(map(Hit, passages, scores))
        except MilvusException as error:
            raise RetrievalError(f"{self.address}: the search failed: {error.message}") from error
        return hits

    def _search(self, queries: list[str], k: int) -> Any:
        words = [" ".join(stems) for stems in tokenize(queries)]
        graph = {"metric_type": "IP", "params": {"ef": max(EF_SEARCH, DEPTH, k)}}
        if self.kind == "bm25":
            return self.client.search(self.name, words, anns_field="words", limit=k, output_fields=FIELDS)
        names = [f"query {query[:80]!r}" for query in queries]
        vectors = checked(self.encoder.encode_queries(queries), names, self.encoder, self.dimension).tolist()
        if self.kind == "dense":
            options = {"search_params": graph, "limit": k, "output_fields": FIELDS}
            return self.client.search(self.name, vectors, anns_field="vector", **options)
        depth = max(DEPTH, k)
        requests = [AnnSearchRequest(vectors, "vector", graph, depth), AnnSearchRequest(words, "words", {}, depth)]
        return self.client.hybrid_search(self.name, requests, RRFRanker(60), limit=k, output_fields=FIELDS)
