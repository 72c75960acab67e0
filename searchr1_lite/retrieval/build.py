"""From a profile to the retriever it names: built once, then loaded from its folder."""

import re
import time
from pathlib import Path

from searchr1_lite.config import ROOT, Profile
from searchr1_lite.retrieval.corpus import corpus_checksum
from searchr1_lite.retrieval.manifest import MANIFEST
from searchr1_lite.types import Passage, Retriever


def load_retriever(profile: Profile, passages: list[Passage], cache_dir: str | Path | None = None) -> Retriever:
    """The retriever that `profile.retriever` (and `profile.encoder`) names, over these passages.

    Loads the index in the folder `cache_dir` if there is one, otherwise builds it and saves it there; prints which.
    The default folder is data/cache/<kind>-<first 12 digits of the corpus checksum>. An index in it that belongs to
    another corpus or encoder raises IndexMismatchError: it is never used, and never overwritten unasked.
    """
    folder = Path(cache_dir) if cache_dir else default_folder(profile, passages)
    start = time.perf_counter()
    exists = (folder / MANIFEST).is_file()
    retriever = _load(profile, passages, folder) if exists else _build(profile, passages)
    if not exists:
        retriever.save(folder)
    did = "loaded" if exists else "built and saved"
    where = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder
    print(
        f"{profile.retriever} index of {len(passages):,} passages {did} in {time.perf_counter() - start:.1f} s: {where}"
    )
    return retriever


def default_folder(profile: Profile, passages: list[Passage]) -> Path:
    kind = profile.retriever
    if kind == "dense":
        kind += "-" + re.sub(r"[^A-Za-z0-9.]+", "-", profile.encoder).strip("-")
    return ROOT / "data/cache" / f"{kind}-{corpus_checksum(passages)[:12]}"


def _build(profile: Profile, passages: list[Passage]):
    # the two kinds are imported where they are used: BM25 needs neither torch nor faiss
    if profile.retriever == "bm25":
        from searchr1_lite.retrieval.sparse import BM25Retriever

        return BM25Retriever.build(passages)
    from searchr1_lite.retrieval.dense import DenseRetriever
    from searchr1_lite.retrieval.encoders import load_encoder

    return DenseRetriever.build(passages, load_encoder(profile.encoder, _device(profile)))


def _load(profile: Profile, passages: list[Passage], folder: Path):
    if profile.retriever == "bm25":
        from searchr1_lite.retrieval.sparse import BM25Retriever

        return BM25Retriever.load(folder, passages)
    from searchr1_lite.retrieval.dense import DenseRetriever
    from searchr1_lite.retrieval.encoders import load_encoder

    return DenseRetriever.load(folder, passages, load_encoder(profile.encoder, _device(profile)))


def _device(profile: Profile) -> str | None:
    return None if profile.device == "auto" else profile.device
