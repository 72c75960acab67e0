"""Alarms against made-up and committed runs: each sign alone, no looking ahead, silence on healthy runs."""

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.analysis import health
from searchr1_lite.analysis.health import Alarm, alarms, health_view
from searchr1_lite.analysis.runs import load_run
from searchr1_lite.config import ROOT
from searchr1_lite.evaluation.rollout_metrics import repeated_ngrams, rollout_metrics

COMMITTED = Path(ROOT) / "data/results/runs"
STEADY = {"exact_match": 0.2, "reward": 0.2, "kl": 0.01, "entropy": 0.3, "answer_rate": 1.0}
STEADY |= {"response_length": 40.0, "searches": 1.0}


def made_up(steps=8, **later):
    """A steady run in which columns take other values, listed from step 4 on."""
    rows = [{"step": step} | STEADY for step in range(1, steps + 1)]
    for column, values in later.items():
        for row, value in zip(rows[3:], values, strict=False):
            row[column] = value
    return rows


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ({}, []),
        ({"kl": [0.7]}, [(4, "collapse")]),  # over 2 x 0.3, and nothing learned
        ({"kl": [0.59] * 5}, []),
        (
            {"kl": [0.0, 0.7, 0.0, 0.7], "exact_match": [0.4] * 5, "reward": [0.4] * 5},
            [(7, "collapse")],
        ),  # two of three
        ({"kl": [0.0, 0.0, 0.7, 0.0, 0.0], "exact_match": [0.4] * 5, "reward": [0.4] * 5}, []),  # one, while it learns
        ({"entropy": [0.9, 0.9]}, [(5, "collapse")]),  # (.3 + .9 + .9) / 3 = .7, over 2 x .3
        ({"entropy": [0.59] * 5}, []),
        ({"answer_rate": [0.0, 0.4]}, [(5, "collapse")]),  # (1 + 0 + .4) / 3 = .47
        ({"answer_rate": [0.0, 0.6]}, []),  # .53
        ({"response_length": [80, 81, 82]}, [(6, "length blow-up")]),  # 81 a step over 2 x 40
        ({"response_length": [120] * 5, "searches": [2.0] * 5}, []),  # 40 tokens a turn against 20: not over twice
        ({"searches": [0.0, 0.4]}, [(5, "search abandonment")]),  # .47 of 1
        (
            {"searches": [2.0, 2.0, 2.0, 0.9, 0.9, 0.9]},
            [(9, "search abandonment")],
        ),  # .9 of 2, the most so far; the start had 1
        ({"reward": [0.6, 0.6, 0.6]}, [(5, "reward gaming")]),  # (.2 + .6 + .6) / 3 = .47, .27 more than at first
        ({"reward": [0.6] * 5, "exact_match": [0.5] * 5}, []),
    ],
)
def test_each_sign_alone(later, expected):
    assert [(alarm.step, alarm.kind) for alarm in alarms(made_up(9, **later))] == expected


def test_there_is_no_alarm_before_the_third_step():
    wild = {"step": 1} | STEADY | {"kl": 99.0, "answer_rate": 0.0}
    assert alarms([wild, wild | {"step": 2}]) == []
    assert alarms([wild, wild | {"step": 2}, wild | {"step": 3}])[0].step == 3


def test_columns_that_a_run_lacks_raise_nothing():
    rows = [{"step": row["step"], "exact_match": 0.1, "kl": None} for row in made_up()]
    assert alarms(rows) == []
    only = [{"step": row["step"], "answer_rate": row["answer_rate"]} for row in made_up(answer_rate=[0.0] * 5)]
    assert [alarm.kind for alarm in alarms(only)] == ["collapse"]


def test_a_message_names_the_cause_and_what_to_try():
    (alarm,) = alarms(made_up(searches=[0.0] * 5))
    assert alarm == Alarm(5, "search abandonment", alarm.message)
    assert "Likely:" in alarm.message
    assert "retriever" in alarm.message
    for kind, cause in health.CAUSES.values():
        assert kind in ("collapse", "length blow-up", "search abandonment", "reward gaming")
        assert "Likely: " in cause


VALUES = st.floats(0, 5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(STEADY, VALUES)), min_size=4, max_size=9), st.data())
def test_what_comes_later_changes_no_alarm(rows, data):
    """Nothing looks ahead: up to any step the alarms are those of the whole run that are not later."""
    rows = [row | {"step": step} for step, row in enumerate(rows, start=1)]
    until = data.draw(st.integers(1, len(rows)))
    assert alarms(rows[:until]) == [alarm for alarm in alarms(rows) if alarm.step <= until]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_committed_runs_warned_by_the_fall_or_not_at_all(seed):
    """The fall is taken from the file by hand: the first mean of three steps that is 0.1 below the highest one."""
    for mask in ("masked", "unmasked"):
        folder = COMMITTED / f"tiny-{mask}-seed{seed}"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        first = next((step for step in range(1, len(rows) + 1) if alarms(rows[:step])), None)
        if mask == "masked":
            assert first is None
            continue
        scores = [row["exact_match"] for row in rows]
        means = {step: sum(scores[step - 3 : step]) / 3 for step in range(3, len(scores) + 1)}
        top = max(means, key=means.get)
        fall = next(step for step in means if step > top and means[step] <= means[top] - 0.1 + 1e-9)
        assert first <= fall  # of the three, one before it: KL is over the model's own tokens


def test_the_view_draws_what_there_is_and_marks_alarms_at_their_step():
    figure = health_view(load_run(COMMITTED / "tiny-unmasked-seed0"))
    drawn = [axes for axes in figure.axes if axes.has_data()]
    titles = [axes.get_title() for axes in drawn]
    assert "Entropy" in titles
    assert "Repeated 4-grams in thinking" in titles
    found = alarms(load_run(COMMITTED / "tiny-unmasked-seed0").metrics)
    for axes in drawn:
        dashed = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
        assert dashed == [alarm.step for alarm in found]
        assert axes.get_ylabel()
    assert f"A: collapse (step {found[0].step})" in figure.get_suptitle()
    searches = next(axes for axes in drawn if axes.get_title() == "Searches")
    lines = [line for line in searches.lines if len(set(line.get_xdata())) > 1]
    assert len({str(line.get_linestyle()) for line in lines}) == len(lines) > 2  # apart without colour
    assert "no alarm" in health_view(load_run(COMMITTED / "tiny-masked-seed0")).get_suptitle()


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("<think> a b c </think>", 0.0),  # no run of four
        ("<think> a b c d e </think>", 0.0),
        ("<think> a b c d a b c d </think>", 0.2),  # abcd bcda cdab dabc abcd: one of five again
        ("<think> x x x x x x </think><answer> y </answer>", 2 / 3),
        ("<think> a b c d </think><search> a b c d </search><think> a b c d </think>", 0.2),  # queries are left out
        ("x x x x x x", 2 / 3),  # without tags all is thinking
    ],
)
def test_repeated_ngrams_by_hand(text, share):
    assert repeated_ngrams(text) == pytest.approx(share)


def test_likelihood_of_right_and_wrong_answers_by_hand():
    from searchr1_lite.rollouts.trajectory import Trajectory, Turn
    from searchr1_lite.types import Question

    def one(answer, logprobs):
        turn = Turn(f"<answer>{answer}</answer>", "answer")
        ids = tuple(range(len(logprobs)))
        mask = tuple(int(value is not None) for value in logprobs)
        values = tuple(value or 0.0 for value in logprobs)
        return Trajectory(Question("1", "q", ("a",)), (1,), ids, mask, values, (turn,), True, "answer")

    batch = [one("a", [-1.0, None, -2.0]), one("a", [-3.0]), one("b", [-0.5, -0.7])]
    metrics = rollout_metrics(batch, [1.0, 1.0, 0.0], 3)
    assert metrics["right_logprob"] == pytest.approx(-2.0)  # three tokens; the retrieved one is not the model's
    assert metrics["wrong_logprob"] == pytest.approx(-0.6)
    assert rollout_metrics(batch[2:], [0.0], 1)["right_logprob"] is None


def test_metrics_as_a_table_or_as_rows_are_the_same():
    rows = made_up(searches=[0.0] * 5, kl=[9.0])
    assert alarms(rows) == alarms(pd.DataFrame(rows).set_index("step"))
    assert len(alarms(rows)) == 2
