"""What is read off a trajectory."""

import json

import pytest

from searchr1_lite.rollouts.rows import trajectory_to_row
from searchr1_lite.rollouts.trajectory import Trajectory, Turn
from searchr1_lite.types import Hit, Passage, Question

QUESTION = Question("q7", "Who?", ("she",))


def make(**changes) -> Trajectory:
    turns = (
        Turn("<search>a</search>", "search", "a", (), "[a]"),
        Turn("hm", "invalid", None, (), "[no]"),
        Turn("<search>b</search>", "search"),
    )
    fields = {
        "question": QUESTION,
        "prompt_ids": (1, 2),
        "completion_ids": (3, 4, 5, 6),
        "loss_mask": (1, 0, 1, 1),
        "logprobs": (-0.5, 0.0, -1.0, -2.0),
        "turns": turns,
        "finished": False,
        "stop_reason": "turns",
    }
    return Trajectory(**{**fields, **changes})


def test_what_is_counted():
    trajectory = make()
    assert trajectory.searches == 1  # the last one was not executed
    assert trajectory.invalid_actions == 1
    assert trajectory.response_length == 3
    assert trajectory.response == "<search>a</search>[a]hm[no]<search>b</search>"
    assert trajectory.policy_text == "<search>a</search>hm<search>b</search>"


@pytest.mark.parametrize("field", ["completion_ids", "loss_mask", "logprobs"])
def test_unequal_lengths_are_refused(field):
    with pytest.raises(ValueError, match="question q7: completion_ids, loss_mask and logprobs must be equally long"):
        make(**{field: (1, 0)})


def test_row_is_plain_json_with_extras_first():
    hit = Hit(Passage("p9", "Ōtsu", "a city"), 1.5)
    turns = (Turn("<search>Ōtsu</search>", "search", "Ōtsu", (hit,), "[Ōtsu]"), Turn("<answer>she</answer>", "answer"))
    question = Question("q7", "Who?", ("she",), {"hops": 1})
    trajectory = make(question=question, turns=turns, finished=True, stop_reason="answer")
    row = trajectory_to_row(trajectory, step=3, phase="train")
    assert json.loads(json.dumps(row)) == row
    assert list(row)[:2] == ["step", "phase"]
    assert row["question"] == {
        "id": "q7",
        "question": "Who?",
        "golden_answers": ["she"],
        "metadata": {"hops": 1},
    }
    assert (row["searches"], row["finished"], row["stop_reason"], row["response_length"]) == (1, True, "answer", 3)
    assert row["turns"][0] == {
        "text": "<search>Ōtsu</search>",
        "action": "search",
        "query": "Ōtsu",
        "observation": "[Ōtsu]",
        "hit_ids": ["p9"],
    }
    assert row["turns"][1]["query"] is None
