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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
BLOCK = 2**25  # postings that are put in order in memory at once: 0.3 GB, however large the corpus


def tokenize(texts: list[str]) -> list[list[str]]:
    """Stems of the words (two characters or more) of each text, in lower case, without 33 English stopwords."""
    return _analyse(texts, return_ids=False)


def _analyse(texts: list[str], return_ids: bool) -> Any:
    stemmer = Stemmer.Stemmer(SETTINGS["stemmer"])
    return bm25s.tokenize(
        texts, stopwords=SETTINGS["stopwords"], stemmer=stemmer, return_ids=return_ids, show_progress=False
    )


def _field(passage: Passage) -> str:
    return f"{passage.title}\n{passage.text}"


def _idf(having: int, passages: int) -> float:
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
        words = tokenize([_field(passage) for passage in passages])
        if not any(words):
            raise _nothing(passages)
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
        only those that still can are looked up in the postings (long ones, by then) of the other words.
        """
        postings = self._postings(words)
        left = sum(most for *_, most in postings)
        touched, seen, among = [np.zeros(0, dtype=np.int32)], 0, None  # passages with a score; the ones to look up
        for rows, gains, times, most in postings:
            if among is None and k <= seen < 4 * len(rows):  # where selecting costs less than adding
                touched = [np.concatenate(touched)]
                sums = scores[touched[0]]
                least = np.partition(sums, seen - k)[seen - k]
                among = np.sort(touched[0][sums >= least - left]) if least > left else None
            if among is not None:
                at = np.searchsorted(rows, among)
                at = at[rows[np.minimum(at, len(rows) - 1)] == among]
                rows, gains = rows[at], gains[at]
            before = scores[rows]
            if among is None:
                touched.append(rows[before == 0])
                seen += len(touched[-1])
            scores[rows] = before + times * gains
            left -= most
        touched = np.concatenate(touched)
        among = np.sort(touched) if among is None else among
        best = among[best_first(scores[among], k)] if seen else among
        hits = [Hit(self.passages[i], float(scores[i])) for i in best.tolist()]
        scores[touched] = 0
        return hits

    def _postings(self, words: list[str]) -> list[tuple[np.ndarray, np.ndarray, int, float]]:
        """Of each word the index has, rare ones first: the passages, what it adds to each, how often it is asked for,
        and more than it can add to any (its idf: the factor beside it is below 1).
        """
        pointers, number = self.index.scores["indptr"], self.index.vocab_dict
        spans = {word: (pointers[number[word]], pointers[number[word] + 1]) for word in words if word in number}
        times, total = Counter(words), len(self.passages)
        return [
            (
                self.index.scores["indices"][start:stop],
                self.index.scores["data"][start:stop],
                times[word],
                1.001 * times[word] * _idf(stop - start, total),  # 1.001: sums are rounded
            )
            for word, (start, stop) in sorted(spans.items(), key=lambda item: (item[1][1] - item[1][0], item[0]))
        ]


def write_bm25(
    passages: Sequence[Passage], work: Path, folder: Path, shard: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Write bm25s' index of the passages into `folder`; the same files whatever the shard, also when done again.

    Memory holds one shard, one block of postings, the vocabulary and a number for each passage; the disk holds as much
    in `work` (8 bytes a posting) as in `folder`. The counts of a shard that are in `work` are taken as they are, so
    `work` must belong to these passages. Raises CorpusError where there is no word to index. Returns SETTINGS.
    """
    total, begun, made, shards = len(passages), time.perf_counter(), 0, []
    for start in range(0, total, shard):
        stop = min(start + shard, total)
        shards.append(work / f"{start}-{stop}")
        if not _file(shards[-1], "words.npz").exists():
            _count_words(passages[start:stop], start, shards[-1])
            made += stop - start
            rate = made / (time.perf_counter() - begun)
            left = (total - stop) / rate
            progress(f"words of {stop:,} of {total:,} passages counted, {rate:,.0f} a second, {left:.0f} s left")
    vocabulary, having, lengths = _merge(shards)
    if not vocabulary:
        raise _nothing(passages)
    pointers = np.concatenate([[0], np.cumsum(having)])
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    nothing = np.zeros(0)  # bm25s writes the small files; the two large ones come after, block by block
    index.scores = {"data": nothing, "indices": nothing, "indptr": pointers, "num_docs": total}
    index.vocab_dict = vocabulary | {"": len(vocabulary)}  # as bm25s has it, for a text without words
    index.nonoccurrence_array = None
    index.save(folder, show_progress=False)
    del vocabulary, index.vocab_dict
    idf = _idf(having, total).astype(np.float32)
    norms = K1 * ((1 - B) + B * lengths / lengths.mean())
    with (folder / "data.csc.index.npy").open("wb") as data, (folder / "indices.csc.index.npy").open("wb") as indices:
        for file, kind in ((data, "<f4"), (indices, "<i4")):
            shape = (int(pointers[-1]),)
            np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        for first, last in _blocks(pointers):
            scores, rows = _block(first, last, shards, pointers, idf, norms)
            data.write(scores)
            indices.write(rows)
            progress(f"scores of {pointers[last]:,} of {pointers[-1]:,} postings")
    return dict(SETTINGS)


def _nothing(passages: Sequence[Passage]) -> CorpusError:
    return CorpusError(f"nothing to index: {len(passages)} passages without a single searchable word")


def _file(shard: Path, name: str) -> Path:
    return shard.with_name(f"bm25-{shard.name}-{name}")


def _write(file: Path, save: Callable[..., None], *args: Any, **arrays: Any) -> None:
    """`save` (of numpy) into a file that is there whole or not at all."""
    beside = file.with_name(file.name + ".new")
    with beside.open("wb") as opened:
        save(opened, *args, **arrays)
    os.replace(beside, file)


def _count_words(passages: list[Passage], start: int, shard: Path) -> None:
    """Write a shard's postings (passage and count, in order of word and passage), then its words and lengths."""
    texts, vocabulary = _analyse([_field(passage) for passage in passages], return_ids=True)
    words = sorted(vocabulary)  # bm25s numbers them by a set's order, which is another in each process
    rank = np.zeros(len(words), dtype=np.int64)
    rank[np.fromiter(map(vocabulary.get, words), dtype=np.int64)] = np.arange(len(words))
    lengths = np.array([len(text) for text in texts])
    flat = rank[np.fromiter(chain.from_iterable(texts), dtype=np.int64)]
    keys, counts = np.unique(flat * len(texts) + np.repeat(np.arange(len(texts)), lengths), return_counts=True)
    word, row = np.divmod(keys, len(texts))
    _write(_file(shard, "postings.npy"), np.save, np.stack([start + row, counts]).astype(np.int32))
    blob = np.frombuffer("\n".join(words).encode(), dtype=np.uint8)
    having = np.bincount(word, minlength=len(words))
    _write(_file(shard, "words.npz"), np.savez, words=blob, having=having, lengths=lengths)


def _merge(shards: list[Path]) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """Number the words of all shards, in order of the alphabet; in how many passages each stands; all lengths.

    So a block of words is one slice of every shard. Writes each shard's table: number, postings, first posting.
    """
    words: set[str] = set()
    for shard in shards:
        words.update(_words(shard))
    number = {word: i for i, word in enumerate(sorted(words))}
    del words
    total, lengths = np.zeros(len(number), dtype=np.int64), []
    for shard in shards:
        numbers = np.fromiter(map(number.__getitem__, _words(shard)), dtype=np.int64)
        with np.load(_file(shard, "words.npz")) as stored:
            having = stored["having"]
            lengths.append(stored["lengths"])
        total[numbers] += having
        _write(_file(shard, "table.npy"), np.save, np.stack([numbers, having, np.cumsum(having) - having]))
    return number, total, np.concatenate(lengths) if lengths else np.zeros(0)


def _words(shard: Path) -> list[str]:
    with np.load(_file(shard, "words.npz")) as stored:
        return stored["words"].tobytes().decode().split()


def _blocks(pointers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of words with at most BLOCK postings together, or of one word."""
    first = 0
    while first < len(pointers) - 1:
        last = int(np.searchsorted(pointers, pointers[first] + BLOCK, side="right")) - 1
        yield first, max(last, first + 1)
        first = max(last, first + 1)


def _block(
    first: int, last: int, shards: list[Path], pointers: np.ndarray, idf: np.ndarray, norms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (float32) and passages (int32) of the postings of words `first` to `last`: by word, then by passage."""
    heads = pointers[first:last] - pointers[first]  # where the next posting of each word goes
    scores = np.empty(pointers[last] - pointers[first], dtype="<f4")
    rows = np.empty(len(scores), dtype="<i4")
    for shard in shards:
        table = np.load(_file(shard, "table.npy"), mmap_mode="r")
        numbers, having, starts = table[:, slice(*np.searchsorted(table[0], [first, last]))]
        if not len(numbers):
            continue
        start, stop = starts[0], starts[-1] + having[-1]
        row, count = np.load(_file(shard, "postings.npy"), mmap_mode="r")[:, start:stop]
        spots = np.repeat(heads[numbers - first] - starts, having) + np.arange(start, stop)
        scores[spots] = np.repeat(idf[numbers], having) * (count / (norms[row] + count))
        rows[spots] = row
        heads[numbers - first] += having
    return scores, rows
