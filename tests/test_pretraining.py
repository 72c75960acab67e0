"""What the tiny base is made from: honest shares of habits, ids as a rollout makes them, tags as ordinary text."""

import random
from collections import Counter

import pytest
from pretrain import TOKENS_PER_BATCH, Examples, Mix, encode_segments
from tokenizer import train_tokenizer
from transcripts import HABITS, Writer

from searchr1_lite.config import ROOT
from searchr1_lite.retrieval.bm25 import BM25Retriever
from searchr1_lite.rollouts.protocol import parse_action
from searchr1_lite.tasks.answers import exact_match
from searchr1_lite.tasks.toy_world import ToyWorld


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def writer():
    world = ToyWorld(3, 16, names="pretraining")
    return Writer(world, BM25Retriever.build(world.passages()), 3, random.Random(0))


def policy_text(segments):
    return "".join(segment.text for segment in segments if segment.by_policy)


def test_good_searching_is_a_minority_and_the_shares_make_one():
    assert sum(HABITS.values()) == pytest.approx(1)
    assert HABITS["hop by hop"] < 0.2


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_each_habit_does_what_its_name_says(writer, hops):
    facts = writer.chains[hops][0]
    right, searches = {}, {}
    for habit in HABITS:
        segments = writer.transcript_about(facts, habit)[1]
        right[habit] = exact_match(policy_text(segments), [facts[-1].value])
        searches[habit] = sum(parse_action(s.text).kind == "search" for s in segments if s.by_policy)
    assert right["hop by hop"] == 1 and searches["hop by hop"] == hops
    assert right["one search"] == (hops == 1) and searches["one search"] == 1
    assert right["guess"] == 0 and searches["guess"] == 0
    assert right["useless query"] == 0 and searches["useless query"] == 1


def test_a_malformed_turn_has_no_action_and_is_told_so(writer):
    for facts in writer.chains[2][:20]:
        _, (broken, told, *_) = writer.transcript_about(facts, "malformed")
        assert parse_action(broken.text).kind == "invalid"
        assert "My previous action is invalid" in told.text and not told.by_policy


def test_only_what_the_policy_wrote_is_learned_from_in_transcripts(tokenizer, writer):
    segments = writer.transcript_about(writer.chains[2][0], "hop by hop")[1]
    ids, learned = encode_segments(tokenizer, segments, learn_all=False)
    expected = "".join(s.text + "<|im_end|>" * s.ends for s in segments if s.by_policy)
    assert tokenizer.decode([i for i, one in zip(ids, learned, strict=True) if one]) == expected
    assert tokenizer.decode(ids) == "".join(s.text + "<|im_end|>" * s.ends for s in segments)


def test_batches_keep_their_size_and_stages(tokenizer):
    batches = list(Examples(tokenizer, 0, 40, Mix(drills_only=0.1, short_prompt=0.2)))
    assert all(ids.numel() <= TOKENS_PER_BATCH for ids, _ in batches)

    def prompts(some):
        texts = [tokenizer.decode(row) for ids, _ in some for row in ids]
        return Counter("full" if "You must conduct" in t else "short" if "Question:" in t else "none" for t in texts)

    assert set(prompts(batches[:4])) == {"none"}  # drills first
    assert set(prompts(batches[-8:])) == {"none", "full"}  # the full prompt last


@pytest.mark.parametrize("tag", ["think", "search", "information", "answer"])
def test_tags_are_ordinary_text_of_several_tokens(tokenizer, tag):
    for text in (f"<{tag}>", f"</{tag}>"):
        assert tokenizer.tokenize(text)[1:] == [tag, ">"]
    assert tokenizer.tokenize(f"</{tag}>\n\n")[-1] == ">ĊĊ"  # merges past the tag, as Qwen2.5's does


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Ünïcode 東京 🙂 12,345\t\n\n <|x|> </search >"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_committed_tokenizer_is_the_one_this_code_makes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data/tiny-base" / name).read_bytes()
