"""retrieval/sparse.py: BM25 scores against the formula, what no-match means, saved indexes."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.config import load_profile
from searchr1_lite.retrieval.build import load_retriever
from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.manifest import IndexMismatchError
from searchr1_lite.retrieval.sparse import BM25Retriever, best_first, tokenize
from searchr1_lite.types import Hit, Passage

PASSAGES = [
    Passage("0", "Oslo", "Oslo is the capital of Norway."),
    Passage("1", "Bergen", "Bergen is a city in Norway. The rain in Bergen is famous."),
    Passage("2", "Malmö", "Malmö is a Swedish city."),
    Passage("3", "Rain", "Rain falls from clouds."),
]


def ids(rows: list[list[Hit]]) -> list[list[str]]:
    return [[hit.passage.id for hit in row] for row in rows]


def slow_bm25(query: str, documents: list[list[str]], k1: float = 0.9, b: float = 0.4) -> list[float]:
    """The formula, word by word, on words that stemming and stopwords leave as they are."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        counts, score = Counter(words), 0.0
        for word in query.split():
            having = sum(word in other for other in documents)
            if not having:
                continue
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            tf = counts[word]
            score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
        scores.append(score)
    return scores


WORDS = st.lists(st.sampled_from(["lamp", "fox", "river", "stone", "moon"]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS, min_size=1, max_size=6), WORDS, st.integers(1, 8))
def test_scores_order_and_number_of_hits_follow_the_formula(documents, query, k) -> None:
    passages = [Passage(str(i), words[0], " ".join(words[1:])) for i, words in enumerate(documents)]
    [hits] = BM25Retriever.build(passages).search([" ".join(query)], k)
    scores = slow_bm25(" ".join(query), documents)
    assert len(hits) == min(k, sum(score > 0 for score in scores))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert hit.score == pytest.approx(scores[int(hit.passage.id)], rel=1e-5)
    if hits:  # nothing that was left out is better than the worst hit
        left = set(range(len(passages))) - {int(hit.passage.id) for hit in hits}
        assert all(scores[i] <= hits[-1].score + 1e-5 for i in left)


def test_one_score_by_hand() -> None:
    # "capital" stands once in one of 4 passages. Words without stopwords: Oslo Oslo capital Norway = 4,
    # Bergen Bergen city Norway rain Bergen famous = 7, Malmö Malmö Swedish city = 4, Rain Rain falls from clouds = 5
    idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
    by_hand = idf * 1 / (1 + 0.9 * (1 - 0.4 + 0.4 * 4 / 5))
    [[hit]] = BM25Retriever.build(PASSAGES).search(["capital"], 3)
    assert hit.passage.id == "0" and hit.score == pytest.approx(by_hand, rel=1e-5)


def test_batch_title_stems_case_and_unicode() -> None:
    retriever = BM25Retriever.build(PASSAGES)
    queries = ["capitals of NORWAY", "malmö", "raining cloud"]
    assert ids(retriever.search(queries, 1)) == [["0"], ["2"], ["3"]]
    assert retriever.search(queries, 2) == [retriever.search([query], 2)[0] for query in queries]
    titled = BM25Retriever.build([Passage("t", "Zanzibar", "An island."), *PASSAGES])
    assert ids(titled.search(["Zanzibar"], 3)) == [["t"]]


@pytest.mark.parametrize("query", ["", "   ", "the of is", "xylophone", "?!", "a"])
def test_a_query_without_a_known_word_finds_nothing(query: str) -> None:
    assert ids(BM25Retriever.build(PASSAGES).search([query, "Oslo"], 3)) == [[], ["0"]]


def test_words_are_snowballs_english_stems() -> None:
    # Porter's first stemmer makes "gener" and "dy" of them; single characters and stopwords are no words
    words = ["generous", "lit", "ray", "die", "citi", "ölpreis"]
    assert tokenize(["The generously lit X-rays of 3 dying cities, Ölpreise"]) == [words]


def test_unknown_words_change_nothing() -> None:
    retriever = BM25Retriever.build(PASSAGES)
    assert retriever.search(["xylophone rain in Bergen"], 3) == retriever.search(["rain in Bergen"], 3)


def test_ties_come_in_corpus_order() -> None:
    same = [Passage(str(i), "Fox", "a red fox") for i in range(50)]
    assert ids(BM25Retriever.build(same).search(["fox"], 7)) == [[str(i) for i in range(7)]]
    mixed = np.arange(300, dtype=np.float32) % 3  # scores 0 1 2 0 1 2 ...: 100 twos, then the first 20 of the ones
    assert best_first(mixed, 120).tolist() == [*range(2, 300, 3), *range(1, 60, 3)]


def test_k_and_empty_batches() -> None:
    retriever = BM25Retriever.build(PASSAGES)
    assert retriever.search([], 3) == []
    assert sorted(ids(retriever.search(["Oslo Bergen Malmö clouds"], 99))[0]) == ["0", "1", "2", "3"]
    for k in (0, -1):
        with pytest.raises(ValueError, match="k must be at least 1"):
            retriever.search(["Oslo"], k)


@pytest.mark.parametrize("passages", [[], [Passage("0", "?", "a I !")]])
def test_nothing_to_index_is_an_error(passages: list[Passage]) -> None:
    with pytest.raises(CorpusError, match="nothing to index"):
        BM25Retriever.build(passages)


def test_saved_and_loaded_it_finds_the_same(tmp_path: Path) -> None:
    built = BM25Retriever.build(PASSAGES)
    queries = ["rain city", "Norway", "", "nothing known"]
    for _ in range(2):  # the second time replaces the first
        built.save(tmp_path / "index")
    assert BM25Retriever.load(tmp_path / "index", PASSAGES).search(queries, 4) == built.search(queries, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]  # no temporary folders stay


def test_foreign_and_broken_indexes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    with pytest.raises(IndexMismatchError, match=r"manifest\.json is missing"):
        BM25Retriever.load(folder, PASSAGES)
    BM25Retriever.build(PASSAGES).save(folder)
    for other in (PASSAGES[::-1], PASSAGES[:3], [Passage("0", "Oslo", "Another text."), *PASSAGES[1:]]):
        with pytest.raises(IndexMismatchError, match="corpus_checksum"):
            BM25Retriever.load(folder, other)
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in (("kind", "dense"), ("format", 0), ("k1", 1.2)):
        (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(IndexMismatchError, match=f"its {key} is {value!r}"):
            BM25Retriever.load(folder, PASSAGES)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(IndexMismatchError, match="not JSON"):
        BM25Retriever.load(folder, PASSAGES)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = folder / "data.csc.index.npy"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(IndexMismatchError, match=r"not whole: data\.csc\.index\.npy is \d+ bytes instead of"):
        BM25Retriever.load(folder, PASSAGES)
    data.unlink()
    with pytest.raises(IndexMismatchError, match=r"data\.csc\.index\.npy is missing"):
        BM25Retriever.load(folder, PASSAGES)


def test_saving_never_removes_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no index"):
        BM25Retriever.build(PASSAGES).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_load_retriever_builds_once_then_loads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    profile = load_profile("tiny", retriever="bm25")
    first = load_retriever(profile, PASSAGES, tmp_path / "index")
    second = load_retriever(profile, PASSAGES, tmp_path / "index")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "4 passages built and saved" in said[0] and "4 passages loaded" in said[1]
    assert first.search(["rain"], 2) == second.search(["rain"], 2)
    with pytest.raises(IndexMismatchError):
        load_retriever(profile, PASSAGES[:2], tmp_path / "index")
