"""Rewards against hand-made cases, an independent statement of their rules, and recorded Search-R1 trajectories."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.config import ROOT
from searchr1_lite.rollout.trajectory import Trajectory, Turn
from searchr1_lite.training.rewards import (
    exact_match,
    format_reward,
    has_valid_format,
    last_answer,
    normalize_answer,
    trajectory_reward,
)
from searchr1_lite.types import Question

RECORDED = Path(ROOT).parent / "shared/data/wiki18/trajectories.jsonl.gz"
GOOD = "<think>a</think> <answer>Oslo</answer>"
SEARCHED = "<think>a</think><search>q</search>\n\n<information>Oslo is</information>\n\n"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles", "beatles"),
        ("a cat, an owl & the dog!", "cat owl dog"),
        ("Theatre", "theatre"),  # an article inside a word stays
        ("U.S.A.", "usa"),
        ("Éire\n1\t", "éire 1"),
        ("The The", ""),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("response", "golden", "score"),
    [
        ("<answer> Oslo </answer>", ["Oslo"], 1.0),
        ("<answer>Oslo</answer>", "Oslo", 1.0),  # one string is one answer, not four letters
        ("<answer>O</answer>", "Oslo", 0.0),
        ("<answer>Oslo</answer> <answer>Lund</answer>", ["Oslo"], 0.0),  # the last one counts
        ("<answer>Lund</answer> <answer>the oslo.</answer>", ["Bergen", "Oslo"], 1.0),  # any golden answer
        ("<answer>in Oslo</answer>", ["Oslo"], 0.0),  # exact, not contained
        ("Oslo", ["Oslo"], 0.0),
        ("<answer>Oslo", ["Oslo"], 0.0),
        ("<answer>\nOslo\n</answer>", ["Oslo"], 1.0),  # over lines
        ("<answer></answer>", ["The"], 0.0),  # nothing never counts as right ...
        ("<answer>the</answer>", ["The"], 1.0),  # ... though the article alone may be the answer
        ("", ["Oslo"], 0.0),
    ],
)
def test_exact_match(response, golden, score):
    assert exact_match(response, golden) == score


def test_exact_match_needs_a_golden_answer():
    with pytest.raises(ValueError, match="at least one golden answer"):
        exact_match("<answer>Oslo</answer>", [])


@pytest.mark.skipif(not RECORDED.is_file(), reason=f"no recorded trajectories at shared/data/{RECORDED.name}")
def test_exact_match_equals_what_was_recorded_of_search_r1():
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    different = [
        (row["run"], row["id"])
        for row in rows
        if exact_match(row["response"], row["golden_answers"]) != row["metric_score"]["em"]
    ]
    assert len(rows) == 2250
    assert different == []


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (GOOD, 1.0),
        ("<answer>Oslo</answer>", 0.8),  # right, but no thinking before it
        ("<think>a</think><answer>Lund</answer>", 0.2),
        ("<answer>Lund</answer>", 0.1),
        ("<think>a</think>", 0.0),
        ("Oslo", 0.0),
    ],
)
def test_format_reward_outcomes(response, reward):
    assert format_reward(response, ["Oslo"]) == pytest.approx(reward)


def test_format_reward_for_retrieving_the_answer():
    wrong = SEARCHED + "<think>b</think><answer>Lund</answer>"
    assert format_reward(wrong, ["Oslo"], retrieval=0.1) == pytest.approx(0.3)
    assert format_reward(wrong, ["Bergen"], retrieval=0.1) == pytest.approx(0.2)
    assert format_reward(wrong, ["Oslo"]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "response",
    [
        GOOD,
        "\n" + GOOD + "\n",
        SEARCHED + GOOD,
        SEARCHED * 3 + GOOD,
    ],
)
def test_valid_formats(response):
    assert has_valid_format(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "hm " + GOOD,
        GOOD + " indeed",
        GOOD + GOOD,
        SEARCHED,
        SEARCHED + "<answer>Oslo</answer>",  # no thinking after what was found
        "<think>a</think> so <answer>Oslo</answer>",
        "<think>a<answer>Oslo</answer></think>",
        "<think>a</think><search>q</search><answer>Oslo</answer>",
        "<think>a</think><answer>Oslo",
    ],
)
def test_invalid_formats(response):
    assert not has_valid_format(response)


PIECES = st.sampled_from(
    [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")] + [" ", "x"]
)
BLOCK = "<think>[^<]*</think>\\s*"
WHOLE = re.compile(
    rf"\s*({BLOCK}<search>[^<]*</search>\s*<information>[^<]*</information>\s*)*{BLOCK}<answer>[^<]*</answer>\s*"
)


@given(st.lists(PIECES, max_size=14).map("".join))
def test_format_is_what_one_regular_expression_says(response):
    assert has_valid_format(response) == bool(WHOLE.fullmatch(response))


@given(
    st.lists(st.sampled_from([SEARCHED, "<think>a</think>", " ", "<answer>b</answer>", "x"]), max_size=6).map("".join)
)
def test_format_agrees_on_mostly_valid_responses(response):
    assert has_valid_format(response) == bool(WHOLE.fullmatch(response))


@given(st.lists(PIECES | st.sampled_from(["Oslo", "Lund"]), max_size=10).map("".join))
def test_format_reward_ranks_as_stated(response):
    right, valid = exact_match(response, ["Oslo"]) == 1, has_valid_format(response)
    expected = {(True, True): 1.0, (True, False): 0.8, (False, True): 0.2}.get((right, valid))
    if expected is None:
        expected = 0.0 if last_answer(response) is None else 0.1
    assert format_reward(response, ["Oslo"]) == pytest.approx(expected)


@given(st.text(max_size=30).filter(lambda text: "<" not in text), st.text(max_size=30))
def test_an_answer_matches_itself_and_what_stands_before_it_does_not_matter(answer, before):
    if answer.strip():
        assert exact_match(f"{before}<answer>{answer}</answer>", [answer]) == 1.0


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory(Question("1", "Where?", ("Oslo",)), (1,), (2,), (1,), (0.0,), turns, True, "answer")


def test_a_passage_cannot_earn_the_reward():
    told = Turn("<search>q</search>", "search", "q", (), "\n\n<information><answer>Oslo</answer></information>\n\n")
    assert trajectory_reward(trajectory(told), "exact_match") == 0.0
    assert trajectory_reward(trajectory(told), "format") == 0.0


def test_tags_in_a_passage_do_not_break_the_format():
    told = Turn(
        "<think>a</think><search>q</search>", "search", "q", (), "\n\n<information>a <think> b</information>\n\n"
    )
    answer = Turn("<think>b</think><answer>Oslo</answer>", "answer")
    assert trajectory_reward(trajectory(told, answer), "format") == 1.0


def test_an_invalid_action_breaks_the_format():
    text = (
        "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>.\n"
    )
    invalid = Turn("<think>a</think>", "invalid", None, (), text)
    answer = Turn("<think>b</think><answer>Oslo</answer>", "answer")
    assert trajectory_reward(trajectory(invalid, answer), "format") == pytest.approx(0.8)
