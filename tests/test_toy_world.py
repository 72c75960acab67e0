"""The generated world: known answers, disjoint names, disjoint chains, the same bytes every time."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.config import ROOT
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.tasks.toy_world import MIX, WORDS, ToyWorld, write_world

worlds = st.builds(ToyWorld, st.integers(0, 10_000), st.integers(5, 60), st.sampled_from(["world", "pretraining"]))


@settings(max_examples=15, deadline=None)
@given(worlds)
def test_every_link_of_a_question_stands_in_its_supporting_passage(world):
    passages = {passage.id: passage for passage in world.passages()}
    for split in ("train", "test"):
        for question in world.questions(split):
            chain, ids = question.metadata["chain"], question.metadata["supporting_ids"]
            assert question.golden_answers == (chain[-1],)
            assert question.metadata["hops"] == len(ids) == len(chain) - 1
            assert chain[0] in question.question and not any(name in question.question for name in chain[1:])
            for id, (subject, value) in zip(ids, pairwise(chain), strict=True):
                assert passages[id].title == subject
                assert value in passages[id].text


@settings(max_examples=15, deadline=None)
@given(worlds)
def test_train_and_test_questions_share_no_link(world):
    def links(split):
        return {link for question in world.questions(split) for link in pairwise(question.metadata["chain"])}

    assert links("train") and links("test")
    assert not links("train") & links("test")


def test_a_company_called_note_is_no_note():
    world = ToyWorld(896, 23, "world")  # has one, "Note Works"
    assert any(passage.title == "Note Works" for passage in world.passages())
    assert world.questions("train")


def test_pretraining_worlds_share_no_name_with_other_worlds():
    names = {
        half: {e.name for seed in range(12) for e in ToyWorld(seed, 40, names=half).entities}
        for half in ("world", "pretraining")
    }
    assert len(names["world"]) > 1000
    assert not names["world"] & names["pretraining"]


def test_questions_come_in_the_stated_proportions_and_several_wordings():
    questions = ToyWorld(0).questions("test")
    for hops, share in MIX.items():
        assert sum(q.metadata["hops"] == hops for q in questions) / len(questions) == pytest.approx(share, abs=0.01)
    openings = {q.question.split()[0] for q in questions if q.metadata["kind"] == "author"}
    assert {"Who", "By"} <= openings
    assert all(len(tellings) >= 3 for tellings in WORDS["tellings"].values())


def test_an_ideal_reader_finds_each_link_with_one_search():
    world = ToyWorld(0)
    retriever = BM25Retriever.build(world.passages())
    facts = list(world.facts.values())
    found = retriever.search([f"{fact.relation} of {fact.subject.name}" for fact in facts], 3)
    missed = [f for f, hits in zip(facts, found, strict=True) if f.subject.name not in {h.passage.title for h in hits}]
    assert len(missed) <= 0.01 * len(facts)


def test_the_default_world_is_remade_byte_for_byte(tmp_path):
    write_world(tmp_path, seed=0, size=150)
    for name in ("corpus.jsonl", "questions.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data/toy" / name).read_bytes()
    row = json.loads((tmp_path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(row) == {"id", "contents"} and row["contents"].startswith('"')


def test_another_seed_is_another_world():
    assert ToyWorld(0).passages() == ToyWorld(0).passages()
    assert not {p.text for p in ToyWorld(0).passages()} & {p.text for p in ToyWorld(1).passages()}


def test_a_world_too_small_or_a_split_that_is_none_is_refused():
    with pytest.raises(ValueError, match="at least 5, got 2"):
        ToyWorld(0, size=2)
    with pytest.raises(ValueError, match="'dev'"):
        ToyWorld(0, size=5).questions("dev")
