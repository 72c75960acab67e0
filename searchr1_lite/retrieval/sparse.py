"""BM25 search with bm25s: English stems, a short stopword list, title and text as one field.

k1, b and the stopwords are Pyserini's defaults, because Search-R1's BM25 is Pyserini's. Two things differ from its
analyser: the stemmer is Porter's second (Snowball English), and single characters are no words. How near that comes to
Anserini's published figures is in data/results/retrieval/scifact.json. Other languages, fields with weights and query
expansion are left out.

bm25s builds its index in memory. `write_bm25` makes the same files shard by shard, for a corpus that does not fit; the
search reads the postings of the query's words only, so that an index stays on disk.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer

from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.types import Hit, Passage

K1 = 0.9  # Pyserini, LuceneSearcher.set_bm25
B = 0.4
SETTINGS = {"k1": K1, "b": B, "stemmer": "english", "stopwords": "en"}  # the stopwords are Lucene's 33
LIBRARIES = ["bm25s", "PyStemmer", "numpy"]
BLOCK = 2**23  # postings that are put in order in memory at once, if one word has not more
NOTHING = "nothing to index: {} passages without a single searchable word"


def tokenize(texts: list[str], return_ids: bool = False) -> Any:
    """Stems of the words (two characters or more) of each text, in lower case, without 33 English stopwords.

    With `return_ids` numbers instead of stems, and a dict that says which stem has which.
    """
    stemmer = Stemmer.Stemmer(SETTINGS["stemmer"])
    return bm25s.tokenize(
        texts, stopwords=SETTINGS["stopwords"], stemmer=stemmer, return_ids=return_ids, show_progress=False
    )


def _texts(passages: Sequence[Passage]) -> list[str]:
    return [f"{passage.title}\n{passage.text}" for passage in passages]


def _idf(having: int | np.ndarray, passages: int) -> float | np.ndarray:
    """What a word weighs that stands in `having` of the passages (Lucene's formula)."""
    return np.log(1 + (passages - having + 0.5) / (having + 0.5))


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
    def build(cls, passages: list[Passage]) -> "BM25Retriever":
        """Index title and text of every passage in memory; raises CorpusError where there is no word to index."""
        passages = list(passages)
        words = tokenize(_texts(passages))
        if not any(words):
            raise CorpusError(NOTHING.format(len(passages)))
        index = bm25s.BM25(k1=K1, b=B, method="lucene")
        index.index(words, show_progress=False)
        return cls(passages, index)

    @classmethod
    def open(cls, folder: str | Path, passages: Sequence[Passage]) -> "BM25Retriever":
        """The index that `write_bm25` (or bm25s) wrote of exactly these passages, memory-mapped.

        Whether it is whole and belongs to them is for the caller to know (`build.open_index`).
        """
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
        scores = np.zeros(len(self.passages), dtype=np.float32)  # one for the batch: all zero again after each query
        return [self._search_one(words, k, scores) for words in tokenize(list(queries))]

    def _search_one(self, words: list[str], k: int, scores: np.ndarray) -> list[Hit]:
        """Adds up the postings, the rare words' first, until no new passage can come among the best `k`: from then on
        the few that still can are looked up in the postings of the other words (which are long, the common words').
        """
        stored, number = self.index.scores, self.index.vocab_dict
        times = Counter(word for word in words if word in number)
        if not times:
            return []
        first = {word: stored["indptr"][number[word]] for word in times}
        having = {word: stored["indptr"][number[word] + 1] - first[word] for word in times}
        # more than a word can add: its idf (the factor beside it is below 1), and a little for rounding
        most = {word: 1.001 * times[word] * _idf(having[word], len(scores)) for word in times}
        left = total = sum(most.values())
        added, seen, among = [], 0, None  # the passages of the words so far; how many; those to look up
        for word in sorted(times, key=lambda word: (having[word], word)):
            span = slice(first[word], first[word] + having[word])
            rows, gains = stored["indices"][span], stored["data"][span]
            if among is None and k <= seen < 2 * len(rows) and 2 * left < total:  # else it would seldom pay
                among = _able(scores, added, k, left)
                among = among if among is not None and 8 * len(among) < len(rows) else None
            if among is None:
                added.append(rows)
                seen += len(rows)
            else:
                at = np.searchsorted(rows, among)
                at = at[rows[np.minimum(at, len(rows) - 1)] == among]
                rows, gains = rows[at], gains[at]
            np.add.at(scores, rows, times[word] * gains)
            left -= most[word]
        among = _able(scores, added, k, 0) if among is None else among
        hits = [Hit(self.passages[i], float(scores[i])) for i in among[best_first(scores[among], k)].tolist()]
        for rows in added if 8 * seen < len(scores) else [slice(None)]:
            scores[rows] = 0
        return hits


def _able(scores: np.ndarray, added: list[np.ndarray], k: int, more: float) -> np.ndarray | None:
    """The passages that can be among the best `k` when each sum may yet grow by less than `more`, in order.

    None where a passage of none of the words so far can be among them.
    """
    few = 8 * sum(map(len, added)) < len(scores)
    rows = np.concatenate(added) if few else None
    sums = scores[rows] if few else scores
    wanted = k * len(added) if few else k  # a passage can be there once for each word
    # the best of each of many stretches: the last that is wanted of these is no better than that of all, and quicker
    tops = np.maximum.reduceat(sums, np.arange(0, len(sums), 1 + len(sums) // (64 * wanted)))
    least = np.partition(tops, len(tops) - wanted)[len(tops) - wanted] if len(tops) >= wanted else 0
    if least < more:
        return None
    able = np.flatnonzero(sums >= least - more)
    able = np.sort(rows[able]) if few else able
    return able[np.diff(able, prepend=-1) > 0]


def write_bm25(
    passages: Sequence[Passage], work: Path, folder: Path, shard: int, progress: Callable[[str], Any]
) -> dict[str, Any]:
    """Write bm25s' index of the passages into `folder`: the same bytes whatever the shard, and when done again.

    Memory holds one shard, one block of postings, the vocabulary and a few numbers for each passage; the disk holds as
    much in `work` (8 bytes a posting) as in `folder`. A shard's counts that are in `work` are taken as they are, so
    `work` must belong to these passages. Raises CorpusError where there is no word to index. Returns SETTINGS.
    """
    total, begun, made = len(passages), time.perf_counter(), 0
    spans = {
        work / f"bm25-{i}-{min(i + shard, total)}": slice(i, min(i + shard, total)) for i in range(0, total, shard)
    }
    for part, span in spans.items():
        if not part.with_suffix(".words.npz").exists():
            _count_words(passages[span], span.start, part)
            made += span.stop - span.start
            rate = made / (time.perf_counter() - begun)
            left = timedelta(seconds=round((total - span.stop) / rate))
            progress(f"words: {span.stop:,} of {total:,} passages, {rate:,.0f} a second, {left} left")
    vocabulary, having, lengths = _merge(list(spans))
    if not vocabulary:
        raise CorpusError(NOTHING.format(total))
    pointers = np.concatenate([[0], np.cumsum(having)])
    _write_small_files(folder, vocabulary, pointers, total)
    del vocabulary
    idf = _idf(having, total).astype(np.float32)
    norms = K1 * ((1 - B) + B * lengths / lengths.mean())
    bounds = np.unique([*np.searchsorted(pointers, np.arange(0, pointers[-1], BLOCK)), len(having)]).tolist()
    with (folder / "data.csc.index.npy").open("wb") as data, (folder / "indices.csc.index.npy").open("wb") as indices:
        for file, kind in ((data, "<f4"), (indices, "<i4")):
            header = {"descr": kind, "fortran_order": False, "shape": (int(pointers[-1]),)}
            np.lib.format.write_array_header_1_0(file, header)
        for first, last in pairwise(bounds):
            rows, counts, words = _block(first, last, list(spans), pointers)
            data.write((idf[words] * (counts / (norms[rows] + counts))).astype("<f4"))
            indices.write(rows)
            progress(f"scores: {pointers[last]:,} of {pointers[-1]:,}")
    return dict(SETTINGS)


def _write_small_files(folder: Path, vocabulary: dict[str, int], pointers: np.ndarray, total: int) -> None:
    """What bm25s writes itself; of the two large files it writes empty ones."""
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    vocabulary[""] = len(vocabulary)  # as bm25s has it, for a query without words
    index.vocab_dict, index.nonoccurrence_array = vocabulary, None
    index.scores = {"data": np.zeros(0), "indices": np.zeros(0), "indptr": pointers, "num_docs": total}
    index.save(folder, show_progress=False)


def _count_words(passages: list[Passage], start: int, part: Path) -> None:
    """Write a shard's postings (passage and count, in order of word and passage), then its words and lengths."""
    texts, vocabulary = tokenize(_texts(passages), return_ids=True)
    words = sorted(vocabulary)  # bm25s numbers them by a set's order, which is another in each process
    rank = np.zeros(len(words), dtype=np.int64)
    rank[np.fromiter(map(vocabulary.get, words), dtype=np.int64)] = np.arange(len(words))
    lengths = np.array([len(text) for text in texts])
    flat = rank[np.fromiter(chain.from_iterable(texts), dtype=np.int64)]
    keys, counts = np.unique(flat * len(texts) + np.repeat(np.arange(len(texts)), lengths), return_counts=True)
    word, row = np.divmod(keys, len(texts))
    having, blob = np.bincount(word, minlength=len(words)), np.frombuffer("\n".join(words).encode(), dtype=np.uint8)
    _save(part.with_suffix(".npy"), np.stack([start + row, counts]).astype(np.int32))
    np.savez(part.with_suffix(".new.npz"), words=blob, having=having, lengths=lengths)
    os.replace(part.with_suffix(".new.npz"), part.with_suffix(".words.npz"))  # there when the shard is whole


def _save(file: Path, array: np.ndarray) -> None:
    """Opened for writing alone, `np.save` (2.4) would not notice that the disk is full at its end."""
    with file.open("w+b") as out:
        np.save(out, array)


def _merge(parts: list[Path]) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """Number the words of all shards; in how many passages each stands; the passages' lengths.

    In order of the alphabet, so that a range of words is one slice of every shard. Writes each shard's table: the
    number of each of its words, how many postings it has, and which is the first.
    """
    words: set[str] = set()
    for part in parts:
        words.update(_words(part)[0])
    number = {word: i for i, word in enumerate(sorted(words))}
    del words
    total, lengths = np.zeros(len(number), dtype=np.int64), [np.zeros(0)]
    for part in parts:
        words, having, its = _words(part)
        numbers = np.fromiter(map(number.get, words), dtype=np.int64)
        total[numbers] += having
        lengths.append(its)
        _save(part.with_suffix(".table.npy"), np.stack([numbers, having, np.cumsum(having) - having]))
    return number, total, np.concatenate(lengths)


def _words(part: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    with np.load(part.with_suffix(".words.npz")) as stored:
        return stored["words"].tobytes().decode().split(), stored["having"], stored["lengths"]


def _block(first: int, last: int, parts: list[Path], pointers: np.ndarray) -> tuple[np.ndarray, ...]:
    """Passage, count and word of each posting of the words from `first` to `last`, in order of word and passage."""
    heads = pointers[first:last] - pointers[first]  # where the next posting of each word goes
    rows, counts = np.empty((2, pointers[last] - pointers[first]), dtype="<i4")
    for part in parts:
        table = np.load(part.with_suffix(".table.npy"), mmap_mode="r")
        numbers, having, starts = table[:, slice(*np.searchsorted(table[0], [first, last]))]
        if len(numbers):
            start, stop = starts[0], starts[-1] + having[-1]
            spots = np.repeat(heads[numbers - first] - starts, having) + np.arange(start, stop)
            rows[spots], counts[spots] = np.load(part.with_suffix(".npy"), mmap_mode="r")[:, start:stop]
            heads[numbers - first] += having
    return rows, counts, np.repeat(np.arange(first, last), np.diff(pointers[first : last + 1]))
