"""What is put on top of retrievers: a cross-encoder that orders anew, and fusion of several by reciprocal rank.

A cross-encoder reads query and passage together. Fusion (Cormack, Clarke and Büttcher, SIGIR 2009) counts ranks alone,
so that BM25's scores and cosines need no common scale. Weights and other ways to fuse are left out, as are rerankers
that generate their verdict (Qwen3-Reranker) or read many passages at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import fsum
from pathlib import Path
from typing import Any

from searchr1_lite.errors import UserError
from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.encoders import EncoderError, _folder
from searchr1_lite.types import Hit, Passage, Retriever

ARCHITECTURE = "ForSequenceClassification"  # how the class names of all cross-encoders end


class RerankerError(UserError):
    """A reranker that cannot be loaded, or whose scores order nothing."""


@dataclass(frozen=True)
class Reranked:
    """Asks `retriever` for `depth` passages (`k` of a search, where that is more) and returns the model's best."""

    retriever: Retriever
    model: Any  # sentence_transformers.CrossEncoder
    depth: int = 50

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` passages a query by the model's score; equal scores in the first retriever's order.

        The model reads title and text, as the text often says "he" or "the river" where the title has the name, but
        not the quotes around the title, which belong to wiki-18 and which no published cross-encoder was trained on.
        What exceeds its length is cut off. All pairs of a call go through the model together, long ones with long
        ones (`predict` sorts them). Raises RerankerError for a score that is not a number.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found = self.retriever.search(list(queries), max(k, self.depth))
        pairs = [
            (query, f"{hit.passage.title}\n{hit.passage.text}")
            for query, hits in zip(queries, found, strict=True)
            for hit in hits
        ]
        scores = iter(self.model.predict(pairs, show_progress_bar=False).tolist() if pairs else [])
        return [_best([Hit(hit.passage, next(scores)) for hit in hits], k) for hits in found]


def _best(hits: list[Hit], k: int) -> list[Hit]:
    for hit in hits:
        if hit.score != hit.score:
            raise RerankerError(f"the reranker's score for passage {hit.passage.id!r} is not a number: {hit.score}")
    return sorted(hits, key=lambda hit: -hit.score)[:k]


@cache
def load_reranker(name: str, device: str | None = None) -> Any:
    """A sentence-transformers CrossEncoder by hub name or folder, loaded once a process; its scores are logits.

    (A sigmoid, the library's default, would make ties of what it rounds to 1.) Raises RerankerError, also for an
    encoder, to which the library would add a last layer of random weights.
    """
    try:
        folder = _folder(name)
    except EncoderError as error:
        reason = f"{type(error.__cause__).__name__}: {str(error.__cause__).partition(chr(10))[0]}"
        raise RerankerError(
            f"reranker {name!r}: neither a folder here nor a hub model that could be fetched ({reason}); offline, "
            "give a folder"
        ) from error
    config = Path(folder) / "config.json"
    built = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    if not built or not built[0].endswith(ARCHITECTURE):
        raise RerankerError(
            f"{name!r} is no cross-encoder: its config.json says {built or 'no architecture'}, not ...{ARCHITECTURE}; "
            "an example of one is cross-encoder/ms-marco-MiniLM-L6-v2"
        )
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device=device, activation_fn=torch.nn.Identity())
    if model.num_labels != 1:
        raise RerankerError(f"{name!r} gives {model.num_labels} numbers a pair; to order passages it must be one")
    return model


@dataclass(frozen=True)
class Hybrid:
    """Fuses the `depth` best passages of each retriever; `c` is the k of the paper, which found 60 to serve well."""

    retrievers: Sequence[Retriever]
    depth: int = 100  # passages that each retriever is asked for (`k` of a search, where that is more)
    c: int = 60

    def __post_init__(self) -> None:
        if not self.retrievers or self.depth < 1 or self.c < 0:
            raise ValueError(f"fusion needs a retriever, depth >= 1 and c >= 0, got {self}")

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` passages a query by the sum of 1 / (c + rank), rank from 1, over the retrievers that found them.

        Equal sums: the better best rank first, then the earlier retriever's. Passages are the same by id. That the
        retrievers search one corpus is checked on what they find: CorpusError where an id has two texts.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found = [retriever.search(list(queries), max(k, self.depth)) for retriever in self.retrievers]
        return [self._fuse(lists, k) for lists in zip(*found, strict=True)]

    def _fuse(self, lists: Sequence[list[Hit]], k: int) -> list[Hit]:
        passages: dict[str, Passage] = {}
        ranks: dict[str, list[tuple[int, int]]] = {}  # of each passage: rank and retriever
        for retriever, hits in enumerate(lists):
            for rank, passage in enumerate((hit.passage for hit in hits), 1):
                known = passages.setdefault(passage.id, passage)
                if (known.title, known.text) != (passage.title, passage.text):
                    raise CorpusError(
                        f"passage {passage.id!r} is {known.title!r} to one retriever and {passage.title!r}, or another "
                        "text of that title, to a second; retrievers to be fused must search the same corpus"
                    )
                ranks.setdefault(passage.id, []).append((rank, retriever))
        scores = {key: fsum(1 / (self.c + rank) for rank, _ in ranks[key]) for key in ranks}
        best = sorted(scores, key=lambda key: (-scores[key], min(ranks[key])))
        return [Hit(passages[key], scores[key]) for key in best[:k]]
