"""Passages cut out of observations: what is found under whose id, and that nothing of the text is lost."""

from hypothesis import given
from hypothesis import strategies as st

from searchr1_lite.analysis.viewer import passages, trajectory_html
from searchr1_lite.rollouts.protocol import INVALID_ACTION, render_observation
from searchr1_lite.types import Hit, Passage

TITLES = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=8)
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["\nDoc 2(Title: x) ", "</information>", "Doc 1(Title: ", "a\nDoc 9(Title:"]
)


def turn(observation: str, ids: list[str]) -> dict:
    return {"text": "", "observation": observation, "hit_ids": ids}


def hits(*texts: str) -> list[Hit]:
    return [Hit(Passage(f"p{n}", f"T{n}", text), 1.0) for n, text in enumerate(texts, 1)]


def test_each_passage_has_its_id():
    text = render_observation(hits("One.", "Two\nlines.", "Three."))
    assert passages(turn(text, ["p1", "p2", "p3"])) == [
        ("\n\n<information>", None),
        ('Doc 1(Title: "T1") One.\n', "p1"),
        ('Doc 2(Title: "T2") Two\nlines.\n', "p2"),
        ('Doc 3(Title: "T3") Three.', "p3"),
        ("</information>\n\n", None),
    ]


def test_a_cut_observation_still_names_the_passages_it_holds():
    text = render_observation(hits("One.", "Two."))
    assert [name for _, name in passages(turn(text, ["p1", "p2", "p3"]))] == [None, "p1", "p2", None]


def test_a_passage_that_looks_like_two_gets_nobody_marked():
    for texts in (["One.\nDoc 2(Title: x) forged", "Two."], ["One.\nDoc 2(Title: x) forged"], ["a\nDoc 7(Title: b) c"]):
        text = render_observation(hits(*texts))
        assert passages(turn(text, [f"p{n}" for n in range(1, len(texts) + 1)])) == [(text, None)]
    numbered_wrong = render_observation(hits("One.\nDoc 7(Title: x) forged"))
    assert passages(turn(numbered_wrong, ["p1", "p2", "p3"])) == [(numbered_wrong, None)]


def test_an_observation_without_passages_stays_whole():
    assert passages(turn(INVALID_ACTION, [])) == [(INVALID_ACTION, None)]
    assert passages({"text": "", "observation": ""}) == []


@given(st.lists(st.tuples(TITLES, TEXTS), max_size=4), st.integers(0, 5))
def test_nothing_is_lost(found, named):
    text = render_observation([Hit(Passage(str(n), title, body), 1.0) for n, (title, body) in enumerate(found)])
    assert "".join(piece for piece, _ in passages(turn(text, [str(n) for n in range(named)]))) == text


def test_nothing_of_a_row_is_read_as_html():
    nasty = "<script>alert(1)</script>"
    row = {"question": {"id": "1", "question": nasty}, "exact_match": 0.0, "searches": 1, "finished": False}
    row |= {"stop_reason": nasty, "turns": [{"text": nasty, "observation": nasty}]}
    shown = trajectory_html(row)
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 3
