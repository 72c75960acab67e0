"""What the tiny instruct model is tuned on: the prompts of later, what passages hold, habits in their shares."""

import random
from collections import Counter

import pytest
from instructions import HABITS, SHARES, Instructions, Teacher
from pretrain import Mix
from transcripts import Writer
from transformers import AutoTokenizer

from searchr1_lite.config import ROOT
from searchr1_lite.evaluation.strategies import STRATEGIES, Search, Write
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.rollouts.protocol import PROMPTS, encode_prompt, parse_action
from searchr1_lite.tasks.answers import exact_match
from searchr1_lite.tasks.toy_world import ToyWorld, ask


@pytest.fixture(scope="module")
def writer():
    world = ToyWorld(3, 16, names="pretraining")
    return Writer(world, BM25Retriever.build(world.passages()), 3, random.Random(0))


def taught(writer, strategy, facts, habit):
    """All that the teacher is asked and says, and the text that holds the answer."""
    teacher = Teacher(writer, facts)
    teacher.habit = habit
    steps = STRATEGIES[strategy](ask(facts, writer.rng), Instructions.profile)
    want, said = next(steps), []
    while True:
        if isinstance(want, Search):
            came = tuple(writer.search(want.query))
        else:
            came = teacher.answer(strategy, want)
            said.append((want, came))
        try:
            want = steps.send(came)
        except StopIteration as end:
            return said, end.value


def test_shares_make_one_and_every_strategy_is_taught():
    assert sum(SHARES.values()) == pytest.approx(1) == sum(HABITS.values())
    assert set(SHARES) == {*STRATEGIES, *PROMPTS}
    assert HABITS["hop by hop"] < HABITS["one search"]  # what reinforcement is to find is not the rule


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_searching_follows_the_habit(writer, hops):
    for facts in writer.chains[hops][:10]:
        for habit, searches in (("guess", 0), ("one search", 1), ("hop by hop", hops)):
            said, last = taught(writer, "search_o1", facts, habit)
            assert sum(parse_action(text).kind == "search" for _, text in said) == searches
            assert exact_match(last, [facts[-1].value]) == float(searches == hops), (habit, last)


@pytest.mark.parametrize("strategy", ["rag", "ircot", "inter"])
def test_nothing_is_said_that_the_passages_do_not_hold(writer, strategy):
    """A fact is stated only where its passage is in the message; so the teacher is right just when all are there."""
    right = Counter()
    for hops in (1, 2, 3):
        for facts in writer.chains[hops][:15]:
            said, last = taught(writer, strategy, facts, "one search")
            for want, text in said:
                for fact in facts:
                    if f"is {fact.value}" in text and text.startswith("The "):
                        assert f'(Title: "{fact.subject.name}")' in want.message
            there = all(f'(Title: "{fact.subject.name}")' in said[-1][0].message for fact in facts)
            assert exact_match(last, [facts[-1].value]) == there or not there
            right[hops] += there
    assert right[1] == 15  # one search finds the first link
    assert strategy == "rag" or right[2] > 1  # and these find some second ones


def test_a_chain_is_read_up_to_the_first_link_that_is_missing(writer):
    facts = writer.chains[3][0]
    heads = [f'Doc {n}(Title: "{fact.subject.name}") text' for n, fact in enumerate(facts, 1)]
    teacher = Teacher(writer, facts)
    assert teacher._readable("\n".join(heads), facts) == facts
    assert teacher._readable(f"{heads[0]}\n{heads[2]}", facts) == facts[:1]
    assert teacher._readable(f"{heads[1]}\n{heads[2]}", facts) == []


def test_pieces_are_the_prompts_of_later_and_only_answers_are_learned(writer):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")
    examples = Instructions(tokenizer, 0, 10, Mix(0.0, 0.1))
    seen = Counter()
    for _ in range(150):
        for ids, learned in examples.pieces(writer, 1.0):
            assert len(ids) == len(learned) and learned[-1] == 1 and learned[0] == 0
            assert tokenizer.decode(ids).startswith("<|im_start|>system")
            seen[tokenizer.decode(ids)[60:150]] += 1
            if learned.count(1) and "Answer the given question directly" in tokenizer.decode(ids):
                text = tokenizer.decode([one for one, own in zip(ids, learned, strict=True) if own])
                assert text.startswith("<answer> ") and text.endswith(" </answer><|im_end|>")
    assert len(seen) >= 7
    question = ask(writer.chains[1][0], writer.rng)
    pair = examples._pair(Write(PROMPTS["direct"].format(question=question)), "<answer> x </answer>")
    prompt = encode_prompt(tokenizer, question, True, "direct")
    assert pair[0][: len(prompt)] == prompt and pair[1][: len(prompt)] == [0] * len(prompt)
    assert tokenizer.decode(pair[0][len(prompt) :]) == "<answer> x </answer><|im_end|>"
