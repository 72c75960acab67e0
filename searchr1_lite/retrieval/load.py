"""From a profile to the retriever it names: `load_retriever` is the one call for indexes, controls and services."""

from pathlib import Path

from searchr1_lite.config import Profile
from searchr1_lite.retrieval.build import load_retriever as _old
from searchr1_lite.retrieval.controls import Empty, Oracle, Random
from searchr1_lite.retrieval.corpus import load_corpus
from searchr1_lite.types import Passage, Retriever


def load_retriever(
    profile: Profile, passages: list[Passage] | None = None, cache_dir: str | Path | None = None
) -> Retriever:
    passages = passages or load_corpus(profile.corpus)
    name = profile.retriever
    if name == "empty":
        return Empty()
    if name == "random":
        return Random(passages, profile.seed)
    if name == "oracle":
        return Oracle(_old(profile.model_copy(update={"retriever": "bm25"}), passages), passages)
    return _old(profile, passages, cache_dir)
