"""What is read off a trajectory."""

import pytest

from searchr1_lite.rollout.trajectory import Trajectory, Turn
from searchr1_lite.types import Question

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
