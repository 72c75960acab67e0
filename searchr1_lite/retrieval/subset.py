"""A corpus that fits a laptop, cut out of a big one: the passages that a question set needs, and distractors.

`searchr1 index subset CORPUS QUESTIONS --out FOLDER` streams the corpus three or four times and never holds it in
memory. A question needs the passages that its metadata names by id, and all those of the articles that it names by
title. For one that names none (NQ, TriviaQA, PopQA, Bamboogle) the passages stand in that hold a golden answer and
share most with the question. That is a guess, and a first hop that does not hold the answer is not looked for;
`subset.json` says what was found for each question, and for which nothing was. The questions stand beside the corpus,
with their splits, so that a run asks those that its corpus was made for.
"""

import gzip
import heapq
import html
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from searchr1_lite.config import load_profile, resolve_path
from searchr1_lite.files import append_rows, read_rows, write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval.corpus import CorpusError, corpus_checksum, load_corpus, passage_of
from searchr1_lite.retrieval.dense import check_agreement, stored_vectors
from searchr1_lite.retrieval.encoders import load_encoder
from searchr1_lite.retrieval.index import build_index, default_folder, load_retriever
from searchr1_lite.tasks.questions import QuestionError, load_questions, read_questions
from searchr1_lite.types import Passage, Question

E5 = "intfloat/e5-base-v2"  # the encoder of Search-R1's index
WORD = re.compile(r"\w+")
BLANKED = bytes(byte if re.match(rb"\w", bytes([byte])) else 32 for byte in range(256))
ARTICLES = {"a", "an", "the"}  # exact match does not count them either


def words_of(text: str) -> list[str]:
    r"""The words (`\w+`) of a text in order, in lower case."""
    text = text.lower()
    # most passages are pure ASCII, and cutting those at blanks is four times as fast
    return text.encode().translate(BLANKED).decode().split() if text.isascii() else WORD.findall(text)


def content_words(text: str) -> list[str]:
    return [word for word in words_of(text) if word not in ARTICLES]


def title_key(title: str) -> str:
    """The same for titles that differ in case, quotes or HTML escapes, as HotpotQA's and wiki-18's do."""
    return " ".join(html.unescape(title).replace('"', " ").casefold().split())


def things_needed(question: Question) -> list[str]:
    """What the metadata names, as "id 4" or "title neil peart"; ["answers"] if nothing.

    Titles: `supporting_titles`, or where FlashRAG's HotpotQA and 2WikiMultihopQA, and its MuSiQue, have them.
    """
    data = question.metadata
    facts = data.get("supporting_facts") or {}
    titles = (facts.get("title") or []) if isinstance(facts, dict) else [title for title, *_ in facts]
    hops = data.get("question_decomposition") or []
    titles = [*(data.get("supporting_titles") or titles), *(hop["support_paragraph"]["title"] for hop in hops)]
    ids = [f"id {key}" for key in data.get("supporting_ids") or data.get("gold_ids") or []]
    return ids + [f"title {title_key(title)}" for title in titles] or ["answers"]


def stream(corpus: Path, doing: str, total: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_rows` with progress."""
    return tqdm(read_rows(corpus, CorpusError, "corpus"), doing, total, unit=" passages", mininterval=1)


def passages_of(corpus: Path, doing: str, total: int) -> Iterator[Passage]:
    """Every passage in order; unlike `read_corpus` it remembers no ids, which for wiki-18 would take gigabytes."""
    return (passage_of(row, where) for where, row in stream(corpus, doing, total))


def word_weights(passages: Iterable[Passage], total: int, questions: list[Question]) -> dict[str, float]:
    """log(passages / passages with the word), for each word of the questions and answers that the corpus has."""
    vocabulary = {word for q in questions for text in (q.question, *q.golden_answers) for word in content_words(text)}
    counts = Counter()
    for passage in passages:
        counts.update(vocabulary.intersection(words_of(f"{passage.title}\n{passage.text}")))
    return {word: math.log(total / count) for word, count in counts.items()}


class AnswerSearch:
    """For each question, the best `keep` passages that hold a golden answer as whole words.

    Best are those with the greatest weight of words shared with the question, at least one; then the earlier ones.
    """

    def __init__(self, questions: list[Question], weights: dict[str, float], keep: int) -> None:
        self.weights, self.keep = weights, keep
        self.best: list[list[tuple[float, int]]] = [[] for _ in questions]  # heaps of (score, -row)
        self.asked = [
            sorted(weights.keys() & content_words(q.question), key=lambda w: (weights[w], w)) for q in questions
        ]
        self.telling = [frozenset(words) for words in self.asked]  # a passage with none of them is not among the best
        self.by_word = defaultdict(list)  # an answer is looked at only where its rarest word stands
        for i, question in enumerate(questions):
            for words in map(content_words, question.golden_answers):
                if words and weights.keys() >= set(words):
                    entry = (i, frozenset(words), f" {' '.join(words)} " if len(words) > 1 else "")
                    self.by_word[max(words, key=weights.__getitem__)].append(entry)

    def look(self, row: int, passage: Passage) -> None:
        words = words_of(f"{passage.title}\n{passage.text}")
        present, plain, held = set(words), "", set()
        for word in self.by_word.keys() & present:
            for i, answer, phrase in self.by_word[word]:
                if self.telling[i].isdisjoint(present) or not answer <= present:
                    continue
                if phrase:
                    plain = plain or f" {' '.join([word for word in words if word not in ARTICLES])} "
                if phrase in plain:
                    held.add(i)
        for i in held:
            self._add(i, sum([self.weights[word] for word in self.asked[i] if word in present]), row)

    def _add(self, i: int, score: float, row: int) -> None:
        heap = self.best[i]
        if score <= 0 or (len(heap) == self.keep and score <= heap[0][0]):
            return
        (heapq.heappush if len(heap) < self.keep else heapq.heapreplace)(heap, (score, -row))
        if len(heap) == self.keep:  # the lightest words that even together do not beat the worst of the best
            sums = accumulate(self.weights[word] for word in self.asked[i])
            self.telling[i] = frozenset(self.asked[i][sum(total <= heap[0][0] for total in sums) :])


def find_needed(corpus: Path, total: int, questions: list[Question], per_question: int) -> list[dict[str, list[int]]]:
    """For each question, the rows (from 0) of each thing that it needs; none for what the corpus lacks."""
    needs = [{thing: [] for thing in things_needed(question)} for question in questions]
    rows_of = defaultdict(list)
    for its in needs:
        for thing, rows in its.items():
            rows_of[thing].append(rows)
    asked = [question for question, its in zip(questions, needs, strict=True) if "answers" in its]
    weights = word_weights(passages_of(corpus, "weighing words", total), total, asked) if asked else {}
    search = AnswerSearch(asked, weights, per_question)
    for row, passage in enumerate(passages_of(corpus, "finding passages", total)):
        for thing in (f"id {passage.id}", f"title {title_key(passage.title)}"):
            for rows in rows_of.get(thing, ()):
                rows.append(row)
        if asked:
            search.look(row, passage)
    for rows, best in zip(rows_of["answers"], search.best, strict=True):
        rows.extend(-row for _, row in sorted(best, reverse=True))
    return needs


def sample_rest(total: int, needed: set[int], number: int, seed: int) -> list[int]:
    """`number` rows (all, where there are fewer) of those that are not needed, each as likely as any other."""
    drawn = random.Random(seed).sample(range(total), min(total, number + len(needed)))
    return [row for row in drawn if row not in needed][:number]


def write_rows(corpus: Path, total: int, chosen: set[int], out: Path) -> list[Passage]:
    """Write the chosen rows, as they are and in corpus order, to the .jsonl.gz file `out`; the passages in it."""
    fresh = out.with_name(f"new-{out.name}")
    with gzip.GzipFile(fresh, "wb", 6, mtime=0) as file:
        for number, (_, row) in enumerate(stream(corpus, "writing", total)):
            if number in chosen:
                file.write(json.dumps(row).encode() + b"\n")
    passages = load_corpus(str(fresh))
    os.replace(fresh, out)
    return passages


def chosen_questions(source: str, splits: str | None, limit: int | None, seed: int) -> list[Question]:
    """`limit` questions, drawn, of each split ("train+test"); without splits of a whole file or of "test"."""
    if splits is None and resolve_path(source).is_file():
        return draw(read_questions(resolve_path(source)), limit, seed)
    pairs = [
        (split, q) for split in (splits or "test").split("+") for q in draw(load_questions(source, split), limit, seed)
    ]
    if len({question.id for _, question in pairs}) != len(pairs):
        raise QuestionError(f"{source}: splits {splits} share ids; make a subset of each")
    return [replace(question, metadata=question.metadata | {"split": split}) for split, question in pairs]


def draw(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """So many of the questions, in order, each as likely as any other: sets joined one after another are all met."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def write_questions(questions: list[Question], out: Path) -> None:
    """A .jsonl.gz file that `read_questions` reads, put in place when it is whole."""
    fresh = out.with_name(f"new-{out.name}")
    fresh.unlink(missing_ok=True)
    append_rows(fresh, (asdict(question) for question in questions))
    os.replace(fresh, out)


def cut(
    corpus: Path,
    questions: str,
    out: Path,
    split: str | None,
    limit: int | None,
    per_question: int,
    distractors: int,
    seed: int,
    index: Path | None,
    encoder: str | None,
) -> None:
    """`searchr1 index subset`: write corpus, questions, index (where `load_retriever` looks for it), `subset.json`."""
    chosen = chosen_questions(questions, split, limit, seed)
    encoder = encoder or (E5 if index else None)
    model = load_encoder(encoder) if index else None  # if it is not here, say so before the long work
    total = sum(1 for _ in stream(corpus, "counting"))
    stored = stored_vectors(index, total) if index else None
    needs = find_needed(corpus, total, chosen, per_question)
    needed = {row for things in needs for rows in things.values() for row in rows}
    rows = sorted(needed.union(sample_rest(total, needed, distractors, seed)))
    out.mkdir(parents=True, exist_ok=True)
    (out / "subset.json").unlink(missing_ok=True)  # it is written last, and tells that the rest is whole
    passages = write_rows(corpus, total, set(rows), out / "corpus.jsonl.gz")
    write_questions(chosen, out / "questions.jsonl.gz")
    kind = "flat" if encoder else "bm25"
    folder = default_folder(kind, encoder or "", passages)
    if stored is not None and not folder.exists():
        check_agreement(stored[rows], passages, model.encode_passages)
        vectors = out / "vectors.npy"
        np.save(vectors, stored[rows])
        build_index(passages, folder, "flat", model, vectors=vectors)
        vectors.unlink()
    load_retriever(load_profile("tiny", retriever=kind, encoder=encoder), passages)
    ids = {row: passage.id for row, passage in zip(rows, passages, strict=True)}
    of_questions = {
        question.id: {thing: [ids[row] for row in things[thing]] for thing in things}
        for question, things in zip(chosen, needs, strict=True)
    }
    record = provenance(["faiss-cpu", "bm25s"]) | {
        "checksum": corpus_checksum(passages),
        "corpus_passages": total,
        "passages": len(rows),
        "needed": len(needed),
        "distractors": len(rows) - len(needed),
        "questions": len(chosen),
        "met_by_answers": sum("answers" in things for things in needs),
        "partly_met": [key for key, its in of_questions.items() if any(its.values()) and not all(its.values())],
        "nothing_found": [key for key, its in of_questions.items() if not any(its.values())],
        "needs": of_questions,
    }
    write_json(out / "subset.json", record)
    for key in ("passages", "needed", "distractors", "questions", "met_by_answers", "partly_met", "nothing_found"):
        print(f"{key}: {len(record[key]) if isinstance(record[key], list) else record[key]:,}")
