"""Reranking with scores that are known, and with a tiny cross-encoder against its forward pass written by hand."""

import numpy as np
import pytest
import torch
from tiny_e5 import WORDS, make_tiny_e5
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from searchr1_lite.retrieval.rerank import Reranked, RerankerError, load_reranker
from searchr1_lite.types import Hit, Passage

PASSAGES = [
    Passage("1", "fox", "a red fox"),
    Passage("2", "den", "the old house tree wind " * 20),  # longer than the model reads
    Passage("3", "river", "cold river stone"),
    Passage("4", "moon", "green lamp bird"),
]


class First:
    """Finds all passages in order; for a query that is blank, none."""

    asked = 0

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        self.asked = k
        return [[Hit(passage, 0.0) for passage in PASSAGES[:k]] if query.strip() else [] for query in queries]


class Known:
    """A model whose score for a pair is looked up by query and first line of the passage."""

    def __init__(self, scores: dict[tuple[str, str], float]) -> None:
        self.scores = scores
        self.calls: list[list[tuple[str, str]]] = []

    def predict(self, pairs: list[tuple[str, str]], show_progress_bar: bool) -> np.ndarray:
        self.calls.append(pairs)
        return np.array([self.scores.get((query, text.split("\n")[0]), 0.0) for query, text in pairs], np.float32)


def make_cross_encoder(folder, labels: int = 1):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
        num_labels=labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def ids(hits: list[Hit]) -> str:
    return "".join(hit.passage.id for hit in hits)


def test_known_scores_decide_and_ties_keep_the_first_order():
    model = Known({("q", "river"): 2.5, ("q", "fox"): -1.0, ("r", "moon"): 7.0})
    first, second, nothing = Reranked(First(), model).search(["q", "r", " "], 3)
    assert ids(first) == "324" and [hit.score for hit in first] == [2.5, 0.0, 0.0]
    assert ids(second) == "412"
    assert nothing == []
    assert ids(Reranked(First(), Known({})).search(["q"], 4)[0]) == "1234"


def test_all_pairs_go_through_the_model_in_one_call_without_the_titles_quotes():
    model = Known({})
    Reranked(First(), model, depth=2).search(["q", "", "r"], 1)
    assert model.calls == [[(query, f"{p.title}\n{p.text}") for query in "qr" for p in PASSAGES[:2]]]
    assert Reranked(First(), model).search(["", " "], 1) == [[], []] and Reranked(First(), model).search([], 1) == []
    assert len(model.calls) == 1


def test_a_passage_is_found_only_within_the_depth():
    first, model = First(), Known({("q", "moon"): 9.0})
    assert ids(Reranked(first, model, depth=3).search(["q"], 1)[0]) == "1"
    assert ids(Reranked(first, model, depth=4).search(["q"], 1)[0]) == "4"
    assert ids(Reranked(first, model, depth=1).search(["q"], 4)[0]) == "4123" and first.asked == 4


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(RerankerError, match=r"passage '3' is not a number"):
        Reranked(First(), Known({("q", "river"): float("nan")})).search(["q"], 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        Reranked(First(), Known({})).search(["q"], 0)


def test_a_folders_model_scores_as_its_forward_pass(tmp_path):
    folder = make_cross_encoder(tmp_path / "tiny")
    queries = ["red fox", "a cold river and the moon"]
    found = Reranked(First(), load_reranker(str(folder), "cpu")).search(queries, 4)
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(folder).eval(),
        BertTokenizer.from_pretrained(folder),
    )
    for query, hits in zip(queries, found, strict=True):
        logits = {}
        for passage in PASSAGES:  # one by one, so without padding
            text = f"{passage.title}\n{passage.text}"
            inputs = tokenizer(query, text, return_tensors="pt", truncation=True, max_length=32)
            with torch.no_grad():
                logits[passage.id] = model(**inputs).logits.item()
        assert ids(hits) == "".join(sorted(logits, key=lambda key: -logits[key]))
        np.testing.assert_allclose([hit.score for hit in hits], sorted(logits.values(), reverse=True), rtol=1e-4)
    assert load_reranker(str(folder), "cpu") is load_reranker(str(folder), "cpu")


def test_what_is_no_reranker_is_refused(tmp_path):
    with pytest.raises(RerankerError, match=r"'.*e5' is no cross-encoder: its config.json says \['BertModel'\]"):
        load_reranker(str(make_tiny_e5(tmp_path / "e5")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RerankerError, match="no architecture"):
        load_reranker(str(tmp_path / "empty"))
    with pytest.raises(RerankerError, match="gives 3 numbers a pair"):
        load_reranker(str(make_cross_encoder(tmp_path / "three", labels=3)), "cpu")
    with pytest.raises(RerankerError, match=r"(?s)'nobody/no-reranker': neither a folder .*offline, give a folder$"):
        load_reranker("nobody/no-reranker")
