"""BM25 search with bm25s: English stems, a short stopword list, title and text as one field.

k1, b and the stopwords are Pyserini's defaults, because Search-R1's BM25 is Pyserini's. Two things differ from its
analyser: the stemmer is Porter's second (Snowball English), and single characters are no words. How near that comes to
Anserini's published figures is in data/results/retrieval/scifact.json. Other languages, fields with weights, query
expansion, and corpora whose index does not fit into memory are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.types import Hit, Passage

K1 = 0.9  # Pyserini, LuceneSearcher.set_bm25
B = 0.4
SETTINGS = {"k1": K1, "b": B, "stemmer": "english", "stopwords": "en"}  # the stopwords are Lucene's 33
LIBRARIES = ["bm25s", "PyStemmer", "numpy"]


def tokenize(texts: list[str]) -> list[list[str]]:
    """Stems of the words (two characters or more) of each text, in lower case, without 33 English stopwords."""
    stemmer = Stemmer.Stemmer(SETTINGS["stemmer"])
    stopwords = SETTINGS["stopwords"]
    return bm25s.tokenize(texts, stopwords=stopwords, stemmer=stemmer, return_ids=False, show_progress=False)


def best_first(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the `k` highest scores (fewer where fewer are above zero), best first; equal scores in order."""
    k = min(k, len(scores))
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]


@dataclass(frozen=True)
class BM25Retriever:
    passages: Sequence[Passage]
    index: bm25s.BM25

    @classmethod
    def build(cls, passages: Sequence[Passage]) -> "BM25Retriever":
        """Index title and text of every passage; raises CorpusError where there is no word to index."""
        words = tokenize([f"{passage.title}\n{passage.text}" for passage in passages])
        if not any(words):
            raise CorpusError(f"nothing to index: {len(words)} passages without a single searchable word")
        index = bm25s.BM25(k1=K1, b=B, method="lucene")
        index.index(words, show_progress=False)
        return cls(passages, index)

    @classmethod
    def open(cls, folder: Path, passages: Sequence[Passage]) -> "BM25Retriever":
        """The index that bm25s saved of exactly these passages, memory-mapped."""
        index = bm25s.BM25.load(str(folder), mmap=True)
        for name in ("data", "indices", "indptr"):  # plain views of the mapped files: slicing a np.memmap is slow
            index.scores[name] = np.asarray(index.scores[name])
        return cls(passages, index)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` passages a query, best first; passages of equal score in corpus order.

        Only passages that share a word with the query are hits, so a query that is empty, or has no word that the
        corpus has, finds nothing. A word that stands twice in a query counts twice.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return [self._search_one(words, k) for words in tokenize(list(queries))]

    def _search_one(self, words: list[str], k: int) -> list[Hit]:
        if not (known := [word for word in words if word in self.index.vocab_dict]):
            return []
        scores = self.index.get_scores(known)
        return [Hit(self.passages[i], float(scores[i])) for i in best_first(scores, k).tolist()]
