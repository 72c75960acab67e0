"""An encoder that costs nothing: unit vectors from a text's checksum, in clusters by its first word."""

from zlib import crc32

import numpy as np

from searchr1_lite.retrieval.encoders import Encoder
from searchr1_lite.types import Passage

CLUSTERS = 40


class HashModel:
    def __init__(self, dimension: int = 32, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.centres = draw.normal(size=(CLUSTERS, dimension))
        self.own = draw.normal(size=(1 << 15, dimension))
        self.texts: list[str] = []

    def encode_document(self, texts: list[str], **_) -> np.ndarray:
        self.texts += texts
        clusters = [crc32(text.split()[0].strip('"').encode()) % CLUSTERS for text in texts]
        vectors = self.centres[clusters] + 0.5 * self.own[[crc32(text.encode()) % (1 << 15) for text in texts]]
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_query = encode_document


def hash_encoder(dimension: int = 32, seed: int = 0, name: str = "hash") -> Encoder:
    return Encoder(name, f"weights-{dimension}-{seed}", HashModel(dimension, seed))


def made_passages(number: int) -> list[Passage]:
    return [Passage(f"id{i}", f"topic{i % CLUSTERS}", f"it is number {i}", i % 3 > 0) for i in range(number)]


QUERIES = [f"topic{i % CLUSTERS} question {i}" for i in range(60)]
