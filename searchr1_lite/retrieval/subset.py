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
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from searchr1_lite.config import load_profile, resolve_path
from searchr1_lite.files import read_rows, write_json, write_whole
from searchr1_lite.provenance import provenance
from searchr1_lite.retrieval.corpus import CorpusError, corpus_checksum, load_corpus, passage_of
from searchr1_lite.retrieval.dense import stored_vectors
from searchr1_lite.retrieval.encoders import load_encoder
from searchr1_lite.retrieval.index import build_index, default_folder, load_retriever
from searchr1_lite.tasks.questions import QuestionError, load_questions, read_questions
from searchr1_lite.types import Passage, Question

E5 = "intfloat/e5-base-v2"  # the encoder of Search-R1's index
ARTICLES = {"a", "an", "the"}  # exact match does not count them either


def content_words(text: str) -> list[str]:
    r"""The words (`\w+`) of a text in order, in lower case, without articles."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ARTICLES]


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


def passages_of(corpus: Path) -> Iterator[Passage]:
    """Every passage in order, with progress; unlike `read_corpus` it remembers no ids, gigabytes for wiki-18."""
    rows = tqdm(read_rows(corpus, CorpusError, "corpus"), "reading", unit=" passages", mininterval=1)
    return (passage_of(row, where) for where, row in rows)


def word_weights(passages: Iterable[Passage], total: int, questions: list[Question]) -> dict[str, float]:
    """log(`total` / passages with the word), for each word of the questions and answers that the corpus has."""
    vocabulary = {word for q in questions for text in (q.question, *q.golden_answers) for word in content_words(text)}
    counts = Counter()
    for passage in passages:
        counts.update(vocabulary.intersection(content_words(f"{passage.title}\n{passage.text}")))
    return {word: math.log(total / count) for word, count in counts.items()}


class AnswerSearch:
    """For each question, the best `keep` passages that hold a golden answer as whole words.

    Best are those with the greatest weight of words shared with the question, at least one; then the earlier ones.
    """

    def __init__(self, questions: list[Question], weights: dict[str, float], keep: int) -> None:
        self.weights, self.keep = weights, keep
        self.best: list[list[tuple[float, int]]] = [[] for _ in questions]  # heaps of (score, -row)
        self.words = [sorted(weights.keys() & content_words(q.question), key=weights.get) for q in questions]
        self.by_word = defaultdict(list)  # an answer is looked at only where its rarest word stands
        for i, question in enumerate(questions):
            for words in map(content_words, question.golden_answers):
                if words and weights.keys() >= set(words):
                    self.by_word[max(words, key=weights.get)].append((i, f" {' '.join(words)} "))

    def look(self, row: int, passage: Passage) -> None:
        words = content_words(f"{passage.title}\n{passage.text}")
        present, text = set(words), f" {' '.join(words)} "
        for i in {i for word in self.by_word.keys() & present for i, answer in self.by_word[word] if answer in text}:
            if (score := sum(self.weights[word] for word in self.words[i] if word in present)) > 0:
                heapq.heappush(self.best[i], (score, -row))
                if len(self.best[i]) > self.keep:
                    heapq.heappop(self.best[i])


def find_needed(corpus: Path, total: int, questions: list[Question], per_question: int) -> list[dict[str, list[int]]]:
    """For each question, the rows (from 0) of each thing that it needs; none for what the corpus lacks."""
    needs = [{thing: [] for thing in things_needed(question)} for question in questions]
    rows_of = defaultdict(list)  # of each thing, the lists of rows that are filled with it
    for things in needs:
        for thing, rows in things.items():
            rows_of[thing].append(rows)
    unnamed = [question for question, things in zip(questions, needs, strict=True) if "answers" in things]
    weights = word_weights(passages_of(corpus), total, unnamed) if unnamed else {}
    search = AnswerSearch(unnamed, weights, per_question)
    for row, passage in enumerate(passages_of(corpus)):
        for thing in (f"id {passage.id}", f"title {title_key(passage.title)}"):
            for rows in rows_of.get(thing, ()):
                rows.append(row)
        if unnamed:
            search.look(row, passage)
    for rows, best in zip(rows_of["answers"], search.best, strict=True):
        rows.extend(-row for _, row in sorted(best, reverse=True))
    return needs


def sample_rest(total: int, needed: set[int], number: int, seed: int) -> list[int]:
    """`number` rows (all, where there are fewer) of those that are not needed, each as likely as any other."""
    drawn = random.Random(seed).sample(range(total), min(total, number + len(needed)))
    return [row for row in drawn if row not in needed][:number]


def write_rows(rows: Iterable[dict], out: Path) -> None:
    """A .jsonl.gz file, whole or not at all, and the same bytes on any day."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(out, gzip.compress(text.encode(), 6, mtime=0))


def chosen_questions(source: str, splits: str | None, limit: int | None, seed: int) -> list[Question]:
    """`limit` questions, drawn, of each split ("train+test"); without splits of a whole file or of "test"."""

    def draw(questions: list[Question]) -> list[Question]:
        """In order; each is as likely as any other, so that sets joined one after another are all met."""
        chosen = random.Random(seed).sample(range(len(questions)), min(limit or len(questions), len(questions)))
        return [questions[i] for i in sorted(chosen)]

    if splits is None and resolve_path(source).is_file():
        return draw(read_questions(resolve_path(source)))
    pairs = [(split, q) for split in (splits or "test").split("+") for q in draw(load_questions(source, split))]
    if len({question.id for _, question in pairs}) != len(pairs):
        raise QuestionError(f"{source}: splits {splits} share ids; make a subset of each")
    return [replace(question, metadata=question.metadata | {"split": split}) for split, question in pairs]


def cut(
    corpus: Path,
    questions: str,
    out: Path,
    split: str | None = None,
    limit: int | None = None,
    per_question: int = 10,
    distractors: int = 100_000,
    seed: int = 0,
    index: Path | None = None,
    encoder: str | None = None,
) -> None:
    """Write corpus, questions, index (where `load_retriever` looks for it) and `subset.json`, and print the counts.

    Raises CorpusError, QuestionError, EncoderError.
    """
    chosen = chosen_questions(questions, split, limit, seed)
    encoder = encoder or (E5 if index else None)
    if index:
        load_encoder(encoder)  # if it is not here, say so before the long work
    total = sum(1 for _ in passages_of(corpus))
    vectors = stored_vectors(index, total) if index else None
    needs = find_needed(corpus, total, chosen, per_question)
    needed = {row for things in needs for rows in things.values() for row in rows}
    rows = sorted(needed.union(sample_rest(total, needed, distractors, seed)))
    (out / "subset.json").unlink(missing_ok=True)  # it is written last, and tells that the rest is whole
    lines, wanted = enumerate(read_rows(corpus, CorpusError, "corpus")), set(rows)
    write_rows([row for number, (_, row) in lines if number in wanted], out / "corpus.jsonl.gz")
    write_rows(map(asdict, chosen), out / "questions.jsonl.gz")
    passages = load_corpus(str(out / "corpus.jsonl.gz"))
    make_index(passages, out, encoder, None if vectors is None else vectors[rows])
    ids = {row: passage.id for row, passage in zip(rows, passages, strict=True)}
    found = [{thing: [ids[row] for row in things[thing]] for thing in things} for things in needs]
    record = {"corpus_passages": total, "passages": len(rows), "needed": len(needed)}
    record |= {"distractors": len(rows) - len(needed)} | summarise(chosen, found)
    for key in [key for key in record if key != "needs"]:
        print(f"{key}: {len(record[key]) if isinstance(record[key], list) else record[key]:,}")
    record |= provenance(["faiss-cpu", "bm25s"]) | {"checksum": corpus_checksum(passages)}
    write_json(out / "subset.json", record)


def summarise(questions: list[Question], needs: list[dict[str, list[str]]]) -> dict[str, Any]:
    """What subset.json says of what the questions need: passage ids by thing, and where some or all are missing."""
    found = {question.id: things for question, things in zip(questions, needs, strict=True)}
    return {
        "questions": len(questions),
        "met_by_answers": sum("answers" in things for things in needs),
        "partly_met": [key for key, things in found.items() if any(things.values()) and not all(things.values())],
        "nothing_found": [key for key, things in found.items() if not any(things.values())],
        "needs": found,
    }


def make_index(passages: list[Passage], out: Path, name: str | None, vectors: np.ndarray | None) -> None:
    """The subset's index; raises CorpusError if the encoder gives the passages other vectors than those stored."""
    profile = load_profile("tiny", retriever="flat" if name else "bm25", encoder=name)
    folder = default_folder(profile, passages)
    if vectors is not None and not folder.exists():
        np.save(out / "vectors.npy", vectors)
        build_index(passages, folder, "flat", load_encoder(name), vectors=out / "vectors.npy")
        (out / "vectors.npy").unlink()
    load_retriever(profile, passages)
