"""A cross-encoder that reads query and passage together and orders anew what a first retriever found.

Rerankers that generate their verdict (Qwen3-Reranker) or read many passages at once are left out.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from searchr1_lite.errors import UserError
from searchr1_lite.retrieval.encoders import EncoderError, _folder
from searchr1_lite.types import Hit, Retriever

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
