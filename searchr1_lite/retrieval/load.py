"""From a profile to the retriever it names: the one call for indexes, controls, services and what is put on top.

Indexes over the profile's corpus are built once and then opened from their folder. What only some runs need (vectors,
fusing, reranking, the network) is imported when it is asked for.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from searchr1_lite.config import PLUGIN, ROOT, ConfigError, Profile, resolve_path, retriever_parts
from searchr1_lite.plugins import make_retriever
from searchr1_lite.retrieval.build import build_index, open_index
from searchr1_lite.retrieval.controls import Empty, Oracle, Random
from searchr1_lite.retrieval.corpus import corpus_checksum, load_corpus
from searchr1_lite.retrieval.manifest import MANIFEST
from searchr1_lite.types import Passage, Retriever

TOKEN = "SEARCHR1_TOKEN"  # the environment variable with the token of a service; its value is never shown


def load_retriever(
    profile: Profile, passages: Sequence[Passage] | None = None, cache_dir: str | Path | None = None
) -> Retriever:
    """The retriever that `profile.retriever` names (config.py has the grammar), reranked if `profile.reranker` says so.

    `passages` are those of `profile.corpus`, read here if they are needed and not given. An index that has to be built
    goes into `cache_dir`, or data/cache/indexes/<kind>-<first 12 digits of the corpus checksum>; each print says
    which. One that is there and belongs to another corpus or encoder raises IndexMismatchError: it is never used, and
    never overwritten unasked.
    """
    retriever = _named(profile, passages, cache_dir)
    if profile.reranker:
        with _optional("dev"):
            from searchr1_lite.retrieval.rerank import Reranked, load_reranker

            retriever = Reranked(retriever, load_reranker(profile.reranker, _device(profile)))
    return retriever


@contextmanager
def _optional(extra: str) -> Iterator[None]:
    """What a setting asks for and cannot be had is a ConfigError, whichever module says so."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'searchr1_lite[{extra}]'") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def default_folder(profile: Profile, passages: Sequence[Passage]) -> Path:
    """Where the index of a profile that names one kind is kept."""
    named = [profile.retriever] + [profile.encoder] * (profile.retriever != "bm25") + [corpus_checksum(passages)[:12]]
    return ROOT / "data/cache/indexes" / "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") for name in named)


def _named(profile: Profile, passages: Sequence[Passage] | None, cache_dir: str | Path | None) -> Retriever:
    name = profile.retriever
    if name == "empty":
        return Empty()
    if name.startswith("http"):
        with _optional("service"):
            from searchr1_lite.retrieval.remote import RemoteRetriever

            return RemoteRetriever(name, token=os.environ.get(TOKEN))
    parts = retriever_parts(name)
    if passages is None and not all(part.startswith("index:") or PLUGIN.fullmatch(part) for part in parts):
        passages = load_corpus(profile.corpus)
    if name == "random":
        return Random(passages, profile.seed)
    if name == "oracle":
        return Oracle(_index(profile, "bm25", passages, cache_dir), passages)
    if len(parts) == 1:
        return _index(profile, name, passages, cache_dir)
    from searchr1_lite.retrieval.hybrid import Hybrid

    folders = [cache_dir and Path(cache_dir) / re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in parts]
    return Hybrid([_index(profile, part, passages, folder) for part, folder in zip(parts, folders, strict=True)])


def _index(profile: Profile, kind: str, passages: Sequence[Passage] | None, cache_dir: str | Path | None) -> Retriever:
    """Opened from its folder, after having been built there if need be; one process builds, others wait for it."""
    if PLUGIN.fullmatch(kind):
        return make_retriever(kind, profile)
    began, did = time.perf_counter(), "opened"
    if kind.startswith("index:"):
        folder = resolve_path(kind.removeprefix("index:"))
        retriever = open_index(folder)
    else:
        encoder = None if kind == "bm25" else _encoder(profile)
        profile = profile.model_copy(update={"retriever": kind})
        folder = Path(cache_dir) if cache_dir else default_folder(profile, passages)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / MANIFEST).is_file():
                did = "built"
                build_index(passages, folder, kind, encoder, progress=print if len(passages) > 5000 else str)
        expected = {"kind": kind, "corpus_checksum": corpus_checksum(passages)}
        # the passages are in memory already, where reading them is faster than from the index's file
        retriever = replace(open_index(folder, encoder, expected=expected), passages=passages)
    where = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder
    seconds = time.perf_counter() - began
    print(f"{kind} index of {len(retriever.passages):,} passages {did} in {seconds:.1f} s: {where}")
    return retriever


def _encoder(profile: Profile):
    from searchr1_lite.retrieval.encoders import load_encoder

    return load_encoder(profile.encoder, _device(profile))


def _device(profile: Profile) -> str | None:
    return None if profile.device == "auto" else profile.device
