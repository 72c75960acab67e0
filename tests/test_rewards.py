"""Rewards against hand-made cases, an independent statement of their rules, and recorded Search-R1 trajectories."""

import gzip
import json
import re
from pathlib import Path

import pytest
from conftest import chatml, original
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.config import ROOT
from searchr1_lite.rollouts.protocol import INVALID_ACTION, render_prompt
from searchr1_lite.rollouts.trajectory import Trajectory, Turn
from searchr1_lite.tasks.answers import exact_match, f1, last_answer, normalize_answer, substring_match
from searchr1_lite.training.rewards import format_reward, has_valid_format, read_with_prompt, trajectory_reward
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
        ("<answer></answer>", ["The", ""], 0.0),  # nothing never counts as right ...
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
def test_scores_equal_what_was_recorded_of_search_r1():
    """Exact match (from the response alone, and from prompt and response) and F1 on all 2,250 rows; substring match on
    all whose golden answers are words: the recorder finds "" (of golden answers such as "---") in every answer.
    """
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 2250
    with_nothing_to_find = 0
    for row in rows:
        response, golden, recorded = row["response"], row["golden_answers"], row["metric_score"]
        assert exact_match(response, golden) == recorded["em"], row["id"]
        assert exact_match(read_with_prompt(response, row["prompt"]), golden) == recorded["em"], row["id"]
        assert f1(response, golden) == pytest.approx(recorded["f1"]), row["id"]
        if all(normalize_answer(one) for one in golden):
            assert substring_match(response, golden) == recorded["acc"], row["id"]
        else:
            with_nothing_to_find += 1
    assert with_nothing_to_find < 20


@pytest.mark.parametrize(
    ("answer", "golden", "score"),
    [
        ("Oslo", ["Oslo"], 1.0),
        ("the city of Oslo", ["Oslo"], 0.5),  # 1 of 3 words right ("the" is dropped), 1 of 1 found: 2 x 1 / (3 + 1)
        ("Oslo Oslo", ["Oslo"], 2 / 3),  # a word counts as often as it is wanted
        ("big old Oslo", ["old Oslo", "big"], 0.8),  # the best golden answer
        ("Lund", ["Oslo"], 0.0),
        ("yes it is", ["yes"], 0.0),  # yes and no are right or wrong
        ("yes", ["yes it is"], 0.0),
        ("no", ["No."], 1.0),
        ("", ["Oslo"], 0.0),
    ],
)
def test_f1(answer, golden, score):
    assert f1(f"<answer>{answer}</answer>", golden) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "golden", "score"),
    [
        ("in Oslo, Norway", ["oslo"], 1.0),
        ("Oslo", ["Oslo, Norway"], 0.0),  # the golden answer in what was said, not the other way round
        ("Oslo", ["Bergen", "Slo"], 1.0),  # letters, not words, as in the original
        ("many", ["---"], 0.0),
        ("many", ["Oslo", ""], 0.0),  # a data set may hold a blank alias, which nothing matches
        ("", ["Oslo"], 0.0),
    ],
)
def test_substring_match(answer, golden, score):
    assert substring_match(f"<answer>{answer}</answer>", golden) == score


WORDS = st.lists(st.sampled_from(["oslo", "Lund", "a", "the", "yes", "no", "x.", "1"]), max_size=5).map(" ".join)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_f1_word_by_word_and_the_order_of_scores(answer, golden):
    """F1 as stated: of each golden answer's words, cross out those said; and no score without the weaker ones."""
    response = f"<answer>{answer}</answer>"
    best = 0.0
    for one in golden:
        said, wanted = (normalize_answer(text) or text.strip().lower() for text in (answer, one))
        left, shared = wanted.split(), 0
        for word in said.split():
            if word in left:
                left.remove(word)
                shared += 1
        if not said or not shared or (said != wanted and (said in ("yes", "no") or wanted in ("yes", "no"))):
            continue
        precision, found = shared / len(said.split()), shared / len(wanted.split())
        best = max(best, 2 * precision * found / (precision + found))
    assert f1(response, golden) == pytest.approx(best)
    if exact_match(response, golden):
        assert f1(response, golden) == 1.0
        assert substring_match(response, golden) == 1.0


PROMPT = render_prompt("Where?")


@pytest.mark.parametrize(
    "response", ["<answer>Oslo</answer>", "Oslo", "", "<answer>Lund</answer><answer>Oslo</answer>"]
)
def test_with_its_own_prompt_the_original_reading_gives_the_same(response):
    assert exact_match(read_with_prompt(response, PROMPT), ["Oslo"]) == exact_match(response, ["Oslo"])


def test_another_prompt_changes_the_original_reading():
    """The trap (Search-R1 qa_em.py, extract_solution): the prompt's example is one of the two spans that it wants."""
    no_example, two_examples = "Question: Where?\n", PROMPT + "For example, <answer> Oslo </answer>.\n"
    assert exact_match(read_with_prompt("<answer>Oslo</answer>", no_example), ["Oslo"]) == 0.0
    assert exact_match(read_with_prompt("nothing", two_examples), ["Oslo"]) == 1.0
    assert exact_match("nothing", ["Oslo"]) == 0.0


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
    assert format_reward(wrong, ["---"], retrieval=0.1) == pytest.approx(0.2)


@pytest.mark.parametrize("response", [GOOD, "\n" + GOOD + "\n", SEARCHED + GOOD, SEARCHED * 3 + GOOD])
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
VALID = st.sampled_from([SEARCHED, GOOD, "<think>a < b</think>", "<answer>b</answer>", "x"])  # mostly
# Where each tag may stand and where it leads (Search-R1 qa_em_format.py, is_valid_sequence)
NEXT_STATE = {
    ("start", "<think>"): "in think",
    ("in think", "</think>"): "after think",
    ("after think", "<search>"): "in search",
    ("in search", "</search>"): "after search",
    ("after search", "<information>"): "in information",
    ("in information", "</information>"): "start",
    ("after think", "<answer>"): "in answer",
    ("in answer", "</answer>"): "end",
}


@given((st.lists(PIECES | st.just("<"), max_size=14) | st.lists(VALID, max_size=6)).map("".join))
def test_format_is_what_the_originals_states_say(response):
    state = "start"
    for piece in re.split("(</?(?:think|search|information|answer)>)", response):
        if piece.startswith("<") and piece.endswith(">"):
            state = NEXT_STATE.get((state, piece), "invalid")
        elif piece.strip() and not state.startswith("in "):
            state = "invalid"
    assert has_valid_format(response) == (state == "end")


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


FOUND = Turn("<think>a</think><search>q</search>", "search", "q", (), "\n\n<information>Oslo is</information>\n\n")


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory(Question("1", "Where?", ("Oslo",)), (1,), (2,), (1,), (0.0,), turns, True, "answer")


def test_a_passage_cannot_earn_the_reward():
    told = Turn("<search>q</search>", "search", "q", (), "\n\n<information><answer>Oslo</answer></information>\n\n")
    assert trajectory_reward(trajectory(told), "exact_match") == 0.0
    assert trajectory_reward(trajectory(told), "format") == 0.0


def test_reading_as_the_original_does_scores_passages_too():
    told = Turn("<search>q</search>", "search", "q", (), "\n\n<information><answer>Oslo</answer></information>\n\n")
    assert trajectory_reward(trajectory(told), "exact_match", reads_prompt=True) == 1.0
    assert trajectory_reward(trajectory(Turn("Oslo", "invalid")), "exact_match", reads_prompt=True) == 0.0
    think = "\n\n<information>a <think> b</information>\n\n"
    found = Turn("<think>a</think><search>q</search>", "search", "q", (), think)
    answer = Turn("<think>b</think><answer>Oslo</answer>", "answer")
    assert trajectory_reward(trajectory(found, answer), "format") == 1.0
    assert trajectory_reward(trajectory(found, answer), "format", reads_prompt=True) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("kind", "reward"),
    [("exact_match", 0.0), ("f1", 2 / 3), ("substring_match", 1.0), ("format", 0.2), ("retrieval", 0.3)],
)
@pytest.mark.parametrize("reads_prompt", [False, True])
def test_every_kind_of_reward(kind, reward, reads_prompt):
    answer = Turn("<think>b</think><answer>Oslo Norway</answer>", "answer")
    assert trajectory_reward(trajectory(FOUND, answer), kind, reads_prompt) == pytest.approx(reward)


def answered(text: str, think: str = "b") -> Turn:
    return Turn(f"<think>{think}</think><answer>{text}</answer>", "answer")


@pytest.mark.parametrize(
    ("turns", "reward"),
    [
        ((FOUND, answered("Oslo")), 1.0),
        ((FOUND, answered("Oslo Norway")), 2 / 3),  # F1 where there is any
        ((answered("Lund"),), 0.1),  # wrong, in right format
        ((answered(""),), 0.0),  # no answer
        ((Turn("<answer>Oslo</answer>", "answer"),), 0.0),  # right, in bad format
        ((FOUND, Turn("<think>b</think>", "invalid")), 0.0),
    ],
)
def test_research_pays_nothing_out_of_format(turns, reward):
    assert trajectory_reward(trajectory(*turns), "research") == pytest.approx(reward)


@pytest.mark.parametrize(
    ("turns", "first", "second"),
    [
        ((FOUND, answered("Lund")), 1.0, 0.0),  # the first stage does not ask whether it is right
        ((FOUND, answered("Oslo Norway")), 1.0, 2 / 3),
        ((answered("Oslo")), 0.5, 1.0),  # format alone
        ((FOUND, Turn("<answer>Oslo</answer>", "answer")), 0.5, -1.0),  # search alone; then F1 1 less 2
        ((Turn("<answer>Lund</answer>", "answer")), 0.0, -2.0),
        ((Turn("<think>a</think><search></search>", "invalid")), 0.0, -2.0),  # no search that was executed
    ],
)
def test_r1_searcher_pays_for_searching_first_and_for_answers_then(turns, first, second):
    one = trajectory(*(turns if isinstance(turns, tuple) else (turns,)))
    for progress in (0.0, 0.33):
        assert trajectory_reward(one, "r1_searcher", progress=progress) == pytest.approx(first)
    for progress in (0.34, 1.0):
        assert trajectory_reward(one, "r1_searcher", progress=progress) == pytest.approx(second)


@pytest.mark.parametrize(
    ("turns", "reward"),
    [
        ((FOUND, answered("Oslo Norway")), 2 / 3),
        ((FOUND, answered("Lund", think="It is OSLO.")), 0.1),
        ((FOUND, answered("Lund", think="It is Bergen.")), 0.0),  # the passage alone, which says Oslo, earns nothing
        ((answered("Lund", think="Oslo"),), 0.0),  # nothing was retrieved that could be refined
        ((Turn("<think>Oslo</think><search>q</search>", "search", "q", (), FOUND.observation), answered("Lund")), 0.0),
        ((FOUND, Turn("<refine>Oslo</refine><answer>Lund</answer>", "answer")), 0.1),
        ((FOUND, Turn("<think>Oslo</think><refine>x</refine><answer>Lund</answer>", "answer")), 0.0),  # refine counts
        ((FOUND, FOUND, Turn("<think>Oslo", "invalid")), 0.0),  # a thought that never ended
    ],
)
def test_autorefine_pays_for_what_was_refined(turns, reward):
    assert trajectory_reward(trajectory(*turns), "autorefine") == pytest.approx(reward)


@pytest.mark.parametrize("kind", ["research", "r1_searcher", "autorefine"])
def test_passages_earn_nothing_from_the_other_rewards_either(kind):
    """A passage with an answer, a thought and a refine step in it, and a model that says nothing."""
    text = "\n\n<information><think>Oslo</think><refine>Oslo</refine><answer>Oslo</answer></information>\n\n"
    told = Turn("<think>a</think><search>q</search>", "search", "q", (), text)
    assert trajectory_reward(trajectory(told, Turn("", "invalid")), kind) <= 0


GOLDEN = st.lists(st.sampled_from(["Oslo", "the Oslo", "x", "Oslo x"]), min_size=1, max_size=3)


@given(st.lists(PIECES | st.sampled_from(["Oslo", "Lund", SEARCHED, GOOD]), max_size=10).map("".join), GOLDEN)
def test_scores_are_those_of_the_original_itself(response, golden):
    """Beside the functions of a Search-R1 checkout. Golden answers without a word in them are the stated difference."""
    compare_with_original(response, golden)


@pytest.mark.skipif(not RECORDED.is_file(), reason=f"no recorded trajectories at shared/data/{RECORDED.name}")
def test_recorded_trajectories_earn_what_the_original_pays():
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if golden := [one for one in row["golden_answers"] if normalize_answer(one)]:
                compare_with_original(row["response"], golden)


def compare_with_original(response: str, golden: list[str]) -> None:
    em, graded = original("verl/utils/reward_score/qa_em.py"), original("verl/utils/reward_score/qa_em_format.py")
    whole, target = chatml(PROMPT) + response, {"target": golden}
    assert exact_match(read_with_prompt(response, PROMPT), golden) == em.compute_score_em(whole, target)
    assert substring_match(read_with_prompt(response, PROMPT), golden) == em.compute_score_subem(whole, target)
    theirs = graded.compute_score_em(
        whole, target, structure_format_score=0.2, final_format_score=0.1, retrieval_score=0.1
    )
    assert format_reward(response, golden, retrieval=0.1, prompt=PROMPT) == pytest.approx(theirs)


def test_an_invalid_action_breaks_the_format():
    invalid = Turn("<think>a</think>", "invalid", None, (), INVALID_ACTION)
    answer = Turn("<think>b</think><answer>Oslo</answer>", "answer")
    assert trajectory_reward(trajectory(invalid, answer), "format") == pytest.approx(0.8)
