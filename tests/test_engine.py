"""The rollout engine against a slow, obvious one: no cache, one row at a time, everything read again for each token."""

import dataclasses
import time
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OverlapRetriever, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from searchr1_lite.config import ConfigError
from searchr1_lite.rollouts.decoding import LocalSampler, Stops, _alike, _Cache
from searchr1_lite.rollouts.decoding import greedy as likeliest
from searchr1_lite.rollouts.engine import PromptTooLongError, rollout
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import (
    INVALID_ACTION,
    encode_observation,
    encode_prompt,
    parse_action,
    render_observation,
)
from searchr1_lite.rollouts.trajectory import Trajectory, Turn
from searchr1_lite.types import QueryRefusedError, Question, RetrievalError

QUESTIONS = [
    Question("q0", "What is the capital of Rovana?", ("Belmar",)),
    Question("q1", "Where is Ōtsu", ("here",)),
    Question("q2", "Which language do the people of the country whose capital is Belmar speak?", ("Rovan",)),
    Question("q3", "Who?", ("nobody",)),
]


class BiasedModel(nn.Module):
    """A random Qwen2 whose logits are pushed, by `push(history, logits) -> logits`, towards tokens a test wants.

    The history of a row is read back from an extra layer of the key-value cache, so a wrong cache gives a wrong push.
    """

    def __init__(self, base, push) -> None:
        super().__init__()
        self.base, self.push = base, push
        self.config, self.generation_config = base.config, base.generation_config

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **options):
        output = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **options,
        )
        ids, positions = input_ids, position_ids
        if past_key_values is not None:
            extra = len(self.base.model.layers)
            ids, positions = past_key_values.update(
                input_ids[:, None, :, None].double(), position_ids[:, None, :, None].double(), extra
            )
            ids, positions = ids[:, 0, :, 0].long(), positions[:, 0, :, 0].long()
        logits = output.logits.clone()
        for row in range(len(ids)):
            real = slice(None) if attention_mask is None else attention_mask[row, 0, -1]  # what the last token sees
            history = tuple(ids[row][real].tolist())
            if positions is not None:
                assert positions[row][real].tolist() == list(range(len(history)))
            if past_key_values is None:  # one plain forward: every position
                for n in range(1, len(history) + 1):
                    logits[row, n - 1] = self.push(history[:n], logits[row, n - 1])
            else:
                logits[row, -1] = self.push(history, logits[row, -1])
        return SimpleNamespace(logits=logits)


def bigram_push(tokenizer, strength: float = 9.0):
    """Favours the pairs of tokens of some well and badly formed turns."""
    texts = [
        "<search> capital of Rovana </search>",
        "<search>Ōtsu</search>\n\n",
        "<think> people </think>\n<search> Rovana </search>",
        "<answer> Belmar </answer>",
        "<answer>Rovan</answer>\n",
        "I know. </answer>",
        "nothing here<|im_end|>",
    ]
    pairs = {}
    for text in texts:
        ids = tokenizer.encode("assistant\n" + text)
        for left, right in pairwise(ids):
            pairs.setdefault(left, []).append(right)
    starts = [tokenizer.encode(text)[0] for text in texts]

    def push(history, logits):
        likely = pairs.get(history[-1], starts)
        bias = torch.zeros_like(logits)
        bias[likely] = strength
        return logits + bias

    return push


def biased_policy(tokenizer, seed: int = 0, push=None) -> Policy:
    model = BiasedModel(make_model(544, seed), push or bigram_push(tokenizer))
    return Policy(model.eval(), tokenizer, torch.device("cpu"))


def plain_logprobs(policy: Policy, trajectory: Trajectory, temperature: float) -> torch.Tensor:
    """Log-probabilities of all completion tokens by one forward over the final sequence."""
    ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
    with torch.no_grad():
        logprobs = (policy.model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
    start = len(trajectory.prompt_ids)
    return logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


def check_logprobs(policy: Policy, trajectories: list[Trajectory], temperature: float) -> None:
    for trajectory in trajectories:
        mask = torch.tensor(trajectory.loss_mask).bool()
        kept = torch.tensor(trajectory.logprobs)
        plain = plain_logprobs(policy, trajectory, temperature)
        assert torch.allclose(kept[mask], plain[mask], atol=1e-5, rtol=0)
        assert (kept[~mask] == 0).all()


@pytest.mark.parametrize(("seed", "temperature"), [(0, 1.0), (1, 0.7), (2, 1.3)])
def test_logprobs_equal_one_plain_forward(tokenizer, retriever, profile, seed, temperature):
    profile = profile.model_copy(update={"temperature": temperature, "max_turns": 3, "max_response_tokens": 16})
    policy = biased_policy(tokenizer, seed)
    trajectories = rollout(policy, QUESTIONS, retriever, profile, group_size=6, seed=seed)
    assert len({trajectory.stop_reason for trajectory in trajectories}) >= 2
    assert {turn.action for t in trajectories for turn in t.turns} == {"search", "answer", "invalid"}
    assert len({len(trajectory.turns) for trajectory in trajectories}) >= 2
    check_logprobs(policy, trajectories, temperature)


def test_order_and_groups(tokenizer, retriever, profile):
    trajectories = rollout(biased_policy(tokenizer), QUESTIONS, retriever, profile, group_size=2)
    assert [t.question.id for t in trajectories] == ["q0", "q0", "q1", "q1", "q2", "q2", "q3", "q3"]
    assert rollout(biased_policy(tokenizer), [], retriever, profile) == []


def test_same_seed_same_result(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    runs = [rollout(policy, QUESTIONS, retriever, profile, group_size=2, seed=seed) for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0].completion_ids != runs[0][1].completion_ids  # the copies of a question differ


def test_greedy_does_not_depend_on_neighbours(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer, seed=3, push=bigram_push(tokenizer, 1.0))
    together = rollout(policy, QUESTIONS, retriever, profile, greedy=True, group_size=2)
    for index, question in enumerate(QUESTIONS):
        alone = rollout(policy, [question], retriever, profile, greedy=True, seed=9)[0]
        for other in together[2 * index : 2 * index + 2]:
            assert (other.completion_ids, other.turns) == (alone.completion_ids, alone.turns)
            assert other.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    check_logprobs(policy, together, 1.0)


class Script:
    """Pushes the next token that a script wants just above all others, so that log-probabilities stay ordinary."""

    def __init__(self) -> None:
        self.wanted: dict[tuple[int, ...], int] = {}

    def __call__(self, history, logits):
        if history not in self.wanted:
            return logits
        logits = logits.clone()
        logits[self.wanted[history]] = logits.max() + 0.1
        return logits


def reference(policy: Policy, question, retriever, profile, script: Script, turns: list[list[int]]) -> Trajectory:
    """One question, greedily, the model saying `turns` (then token 100 for ever), as plainly as it can be written."""
    tokenizer, ids = policy.tokenizer, []
    prompt = encode_prompt(tokenizer, question.question, profile.chat_template)
    mask, logprobs, said, reason = [], [], [], "turns"
    for turn in range(profile.max_turns + 1):
        new = []
        while len(new) < profile.max_response_tokens:
            history = tuple(prompt + ids + new)
            script.wanted[history] = turns[turn][len(new)] if turn < len(turns) and len(new) < len(turns[turn]) else 100
            with torch.no_grad():
                logits = script(history, policy.model.base(input_ids=torch.tensor([history])).logits[0, -1])
            new.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1)[new[-1]]))
            text = tokenizer.decode(new, skip_special_tokens=True)
            if new[-1] == tokenizer.eos_token_id or "</search>" in text or "</answer>" in text:
                break
        ids, mask = ids + new, mask + [1] * len(new)
        action = parse_action(text)
        if action.kind == "answer":
            said.append(Turn(text, "answer"))
            reason = "answer"
            break
        if turn == profile.max_turns:
            said.append(Turn(text, action.kind))
            break
        query, hits, observation = None, (), INVALID_ACTION
        if action.kind == "search":
            query, hits = action.content, tuple(retriever.search([action.content], profile.topk)[0])
            observation = render_observation(hits)
        chunk = encode_observation(tokenizer, observation, profile.max_observation_tokens)
        if len(prompt) + len(ids) + len(chunk) + profile.max_response_tokens > profile.max_context_tokens:
            said.append(Turn(text, action.kind, query, hits))
            reason = "context"
            break
        said.append(Turn(text, action.kind, query, hits, tokenizer.decode(chunk, skip_special_tokens=True)))
        ids, mask, logprobs = ids + chunk, mask + [0] * len(chunk), logprobs + [0.0] * len(chunk)
    return Trajectory(
        question, tuple(prompt), tuple(ids), tuple(mask), tuple(logprobs), tuple(said), reason == "answer", reason
    )


PIECES = [
    "<search> Rovana </search>",
    "<search>Ōtsu</search>\n\n",
    "<search>zzz</search> ",
    "<answer> Belmar </answer>",
    "<answer>x</answer>\n\n",
    "</search>",
    "</answer>\n",
    "<think> a > b </think>\n",
    "<|im_end|>",
    "<search> never closed",
    "<information>made up</information>\n\n",
    "é静",
]
TURN = st.one_of(
    st.sampled_from(PIECES),
    st.lists(st.sampled_from(PIECES), max_size=3).map("".join),
    st.lists(st.integers(0, 543), max_size=8),
)
BUDGETS = st.fixed_dictionaries(
    {
        "max_turns": st.integers(0, 3),
        "max_response_tokens": st.integers(1, 12),
        "max_observation_tokens": st.integers(12, 80),
        "max_context_tokens": st.integers(240, 420),
        "topk": st.integers(1, 3),
        "rollout_rows": st.integers(1, 5),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts=st.lists(st.lists(TURN, max_size=4), min_size=1, max_size=4), budgets=BUDGETS, seed=st.integers(0, 99))
def test_equals_the_obvious_implementation(tokenizer, retriever, profile, scripts, budgets, seed):
    profile = profile.model_copy(update={**budgets, "max_prompt_tokens": 240, "chat_template": False})
    script = Script()
    policy = biased_policy(tokenizer, seed, script)
    questions = QUESTIONS[: len(scripts)]
    expected = [
        reference(policy, question, retriever, profile, script, [_ids(tokenizer, turn) for turn in turns])
        for question, turns in zip(questions, scripts, strict=True)
    ]
    # Recorded steps have fixed shapes, rows too many and entries too many; here "recorded" is simply run again.
    recorded = LocalSampler(
        policy, profile.rollout_rows, profile.max_response_tokens, likeliest, record=lambda step: step
    )
    for sampler in (None, recorded):
        answered = rollout(policy, questions, retriever, profile, greedy=True, sampler=sampler)
        for got, wanted in zip(answered, expected, strict=True):
            assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
            assert dataclasses.replace(got, logprobs=wanted.logprobs) == wanted


def _ids(tokenizer, turn) -> list[int]:
    return tokenizer.encode(turn) if isinstance(turn, str) else turn


def scripted_rollout(tokenizer, retriever, profile, turns: list, question=QUESTIONS[0], **options) -> Trajectory:
    """What the engine makes of a model that says exactly these turns."""
    script = Script()
    policy = biased_policy(tokenizer, 0, script)
    turns = [_ids(tokenizer, turn) for turn in turns]
    reference(policy, question, OverlapRetriever(retriever.passages), profile, script, turns)  # fills in the script
    return rollout(policy, [question], retriever, profile, greedy=True, **options)[0]


def test_search_invalid_answer_by_hand(tokenizer, retriever, profile):
    said = ["<search> capital Rovana </search>", "hm</search>", "<answer> Belmar </answer>"]
    trajectory = scripted_rollout(tokenizer, retriever, profile, said)
    first = render_observation(retriever.search(["capital Rovana"], 3)[0])
    assert [turn.action for turn in trajectory.turns] == ["search", "invalid", "answer"]
    assert [turn.text for turn in trajectory.turns] == said
    assert [turn.observation for turn in trajectory.turns] == [first, INVALID_ACTION, ""]
    assert [turn.query for turn in trajectory.turns] == ["capital Rovana", None, None]
    written = [tokenizer.encode(text) for text in (said[0], first, said[1], INVALID_ACTION, said[2])]
    assert list(trajectory.completion_ids) == list(chain(*written))
    assert list(trajectory.loss_mask) == list(chain(*([1 - i % 2] * len(ids) for i, ids in enumerate(written))))
    assert (trajectory.finished, trajectory.stop_reason) == (True, "answer")
    assert tokenizer.decode(trajectory.completion_ids) == trajectory.response


def test_the_last_turn_does_not_search(tokenizer, retriever, profile):
    profile = profile.model_copy(update={"max_turns": 1})
    trajectory = scripted_rollout(
        tokenizer, retriever, profile, ["<search>Rovana</search>", "<search> Belmar </search>"]
    )
    assert retriever.calls == [["Rovana"]]
    assert [(turn.action, turn.query) for turn in trajectory.turns] == [("search", "Rovana"), ("search", None)]
    assert (trajectory.turns[-1].observation, trajectory.stop_reason, trajectory.searches) == ("", "turns", 1)
    assert trajectory.loss_mask[-1] == 1


def test_no_hits_make_an_empty_block_and_few_are_shown(tokenizer, retriever, profile):
    trajectory = scripted_rollout(tokenizer, retriever, profile, ["<search>zzz</search>", "<search>speak</search>"])
    assert trajectory.turns[0].observation == "\n\n<information></information>\n\n"
    assert trajectory.turns[0].hits == ()
    assert [hit.passage.id for hit in trajectory.turns[1].hits] == ["2"]  # one hit where three were asked for
    assert trajectory.searches == len([turn for turn in trajectory.turns if turn.query is not None])


@pytest.mark.parametrize("tail", ["", "\n\n", "\n", " "])
def test_tags_whose_end_merges_with_what_follows(tokenizer, retriever, profile, tail):
    said = tokenizer.encode("<search>Rovana</search>" + tail)
    overhang = tokenizer.decode(said[-1:])
    trajectory = scripted_rollout(tokenizer, retriever, profile, [[*said, 100, 100, 100]])
    cut = said if tail != " " else said[:-1]  # a space is a token of its own: the turn ends before it
    assert list(trajectory.completion_ids[: len(cut)]) == cut
    assert trajectory.loss_mask[: len(cut) + 1] == (1,) * len(cut) + (0,)
    assert trajectory.turns[0].action == "search"
    if tail == "\n\n":
        assert overhang == ">\n\n"  # otherwise this tokenizer tests nothing
        assert trajectory.turns[0].text.endswith("</search>\n\n")


def test_end_token_stays_and_counts_as_written(tokenizer, retriever, profile):
    end = tokenizer.eos_token_id
    trajectory = scripted_rollout(tokenizer, retriever, profile, [[100, 101, end, 102]])
    assert trajectory.completion_ids[:3] == (100, 101, end)
    assert trajectory.loss_mask[:4] == (1, 1, 1, 0)
    assert trajectory.logprobs[2] < 0
    assert trajectory.turns[0].observation == INVALID_ACTION


def test_long_observation_keeps_its_closing_tag(tokenizer, retriever, profile):
    profile = profile.model_copy(update={"max_observation_tokens": 20})
    trajectory = scripted_rollout(tokenizer, retriever, profile, ["<search>Rovana</search>"])
    assert trajectory.turns[0].observation.endswith("</information>\n\n")
    shown = trajectory.loss_mask[len(tokenizer.encode("<search>Rovana</search>")) :].index(1)
    assert shown == 20


def test_context_ends_a_row_before_it_overflows(tokenizer, retriever, profile):
    question, said = QUESTIONS[0], "<search>Rovana</search>"
    hits = retriever.search(["Rovana"], profile.topk)[0]
    parts = [
        len(encode_prompt(tokenizer, question.question, False)),
        len(tokenizer.encode(said)),
        len(tokenizer.encode(render_observation(hits))),
        profile.max_response_tokens,
    ]
    fits = profile.model_copy(update={"max_context_tokens": sum(parts)})
    assert len(scripted_rollout(tokenizer, retriever, fits, [said]).turns) == 2
    tight = profile.model_copy(update={"max_context_tokens": sum(parts) - 1})
    trajectory = scripted_rollout(tokenizer, retriever, tight, [said])
    assert trajectory.turns == (Turn(said, "search", "Rovana", tuple(hits)),)
    assert (trajectory.stop_reason, trajectory.finished) == ("context", False)
    assert len(trajectory.completion_ids) == parts[1]


def test_the_models_own_context_counts_too(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    policy.model.config.max_position_embeddings = 300
    trajectories = rollout(policy, QUESTIONS, retriever, profile, group_size=2)
    assert "context" in {trajectory.stop_reason for trajectory in trajectories}
    assert max(len(t.prompt_ids) + len(t.completion_ids) for t in trajectories) <= 300


def test_prompt_too_long_names_the_question(policy, retriever, profile):
    questions = [QUESTIONS[0], Question("far-too-long", "why " * 900, ("x",))]
    with pytest.raises(PromptTooLongError, match=r"far-too-long.*max_prompt_tokens = 1000"):
        rollout(policy, questions, retriever, profile)


def test_a_group_needs_room(policy, retriever, profile):
    few = profile.model_copy(update={"rollout_rows": 2})
    with pytest.raises(ConfigError, match="rollout_rows = 2 leaves no room for a group of 3"):
        rollout(policy, QUESTIONS, retriever, few, group_size=3)


class Broken:
    def __init__(self, answer) -> None:
        self.answer = answer

    def search(self, queries, k):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ConnectionError("index is gone"), "1 queries .'Rovana'.: index is gone"),
        ([], "0 lists of hits for 1 queries .'Rovana'"),
        ([[], []], "2 lists of hits for 1 queries"),
        ([["a", "b", "c", "d"]], "4 hits for 'Rovana' where 3"),
    ],
)
def test_a_broken_retriever_is_one_clear_error(tokenizer, retriever, profile, answer, message):
    script = Script()
    policy = biased_policy(tokenizer, 0, script)
    policy.model.train()
    reference(policy, QUESTIONS[0], retriever, profile, script, [tokenizer.encode("<search>Rovana</search>")])
    with pytest.raises(RetrievalError, match=message) as caught:
        rollout(policy, QUESTIONS[:1], Broken(answer), profile, greedy=True)
    assert caught.value.__cause__ is (answer if isinstance(answer, Exception) else None)
    assert policy.model.training  # restored after an error, too


def say(policy: Policy, retriever, profile, script: Script, said: dict[str, list[str]]) -> None:
    """Have the model say these turns for these questions."""
    quiet = OverlapRetriever(retriever.passages)
    for question in QUESTIONS:
        if question.id in said:
            turns = [_ids(policy.tokenizer, turn) for turn in said[question.id]]
            reference(policy, question, quiet, profile, script, turns)


class Gated(OverlapRetriever):
    """Answers only when `until()` is true: a search that must overlap with something, or the test fails."""

    def __init__(self, passages, until) -> None:
        super().__init__(passages)
        self.until = until

    def search(self, queries, k):
        deadline = time.monotonic() + 10
        while not self.until():
            assert time.monotonic() < deadline, "nothing went on beside the search"
            time.sleep(0.001)
        return super().search(queries, k)


def test_others_write_on_while_a_row_searches(tokenizer, retriever, profile):
    script = Script()
    policy = biased_policy(tokenizer, 0, script)
    words = "<think> " + "people " * 9 + "</think>"
    say(policy, retriever, profile, script, {"q0": ["<search>Rovana</search>"], "q1": [words], "q3": [words]})
    forwards, forward = [], policy.model.forward
    policy.model.forward = lambda input_ids, **options: forwards.append(len(input_ids)) or forward(input_ids, **options)
    begun = []  # forwards that had been made when the first search began

    def three_more() -> bool:
        begun.append(len(forwards))
        return len(forwards) >= begun[0] + 3

    asked = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[3]]
    trajectories = rollout(policy, asked, Gated(retriever.passages, three_more), profile, greedy=True)
    assert trajectories[0].turns[0].query == "Rovana"
    assert set(forwards[begun[0] : begun[0] + 3]) == {2}  # the other two rows, and they alone


class Fails(OverlapRetriever):
    """Gives up on the queries of `broken` alone, with the error it is given."""

    def __init__(self, passages, broken: dict[str, Exception]) -> None:
        super().__init__(passages)
        self.broken = broken

    def search(self, queries, k):
        for query in queries:
            if query in self.broken:
                raise self.broken[query]
        return super().search(queries, k)


@pytest.mark.parametrize("error", [ConnectionError("no answer"), QueryRefusedError("too long")])
def test_a_search_that_fails_ends_its_own_row(tokenizer, retriever, profile, error):
    """The rows that search at other times are as they were; a refused query does not touch those asked with it."""
    script = Script()
    policy = biased_policy(tokenizer, 0, script)
    waits = "people people " if isinstance(error, ConnectionError) else ""
    turns = {"q0": ["<search>Rovana</search>", "<answer>x</answer>"], "q1": [f"{waits}<search>gone</search>"]}
    say(policy, retriever, profile, script, turns)
    whole = rollout(policy, QUESTIONS[:1], retriever, profile, greedy=True)
    with pytest.warns(UserWarning, match="1 of 2 trajectories ended because a search failed"):
        found, failed = rollout(policy, QUESTIONS[:2], Fails(retriever.passages, {"gone": error}), profile, greedy=True)
    assert (found.turns, found.search_failed) == (whole[0].turns, False)
    reason = "search failed" if isinstance(error, ConnectionError) else "search refused"
    assert (failed.stop_reason, failed.finished, failed.search_failed) == (reason, False, True)
    assert failed.turns[-1] == Turn(f"{waits}<search>gone</search>", "search", "gone")
    assert sum(failed.loss_mask) == len(failed.completion_ids)


def test_a_retriever_that_is_gone_ends_the_rollout(tokenizer, retriever, profile):
    """After as many failures in a row as rows are written at a time, whatever was found before."""
    script = Script()
    policy = biased_policy(tokenizer, 0, script)
    asked = [Question(f"r{n}", f"Who is number {n}?", ("x",)) for n in range(6)]
    quiet = OverlapRetriever(retriever.passages)
    for n, question in enumerate(asked):
        said = _ids(tokenizer, "<search>Rovana</search>" if n < 2 else "<search>gone</search>")
        reference(policy, question, quiet, profile, script, [said])
    two = profile.model_copy(update={"rollout_rows": 2})
    ready, gone = [], Fails(retriever.passages, {"gone": ConnectionError("no answer")})
    with pytest.raises(RetrievalError, match="no answer"):
        rollout(policy, asked, gone, two, greedy=True, done=ready.append)
    assert len(ready) < 4


def test_how_long_searches_take_changes_nothing(tokenizer, retriever, profile):
    class Slow(OverlapRetriever):
        def search(self, queries, k):
            time.sleep(0.002 * (len(self.calls) * 7 % 5))
            return super().search(queries, k)

    policy, few = biased_policy(tokenizer), profile.model_copy(update={"rollout_rows": 5})
    for settings_ in (profile, few):
        at_once = rollout(policy, QUESTIONS, retriever, settings_, group_size=2, seed=3)
        assert rollout(policy, QUESTIONS, Slow(retriever.passages), settings_, group_size=2, seed=3) == at_once
    assert max(trajectory.searches for trajectory in at_once) >= 2


def test_rows_that_wait_take_the_place_of_those_that_are_done(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    asked = [Question(f"{one.id}-{n}", one.question, one.golden_answers) for n in range(4) for one in QUESTIONS]
    whole = rollout(policy, asked, retriever, profile, seed=2, group_size=2)
    rows, forward, ready = [], policy.model.forward, []
    policy.model.forward = lambda input_ids, **options: rows.append(len(input_ids)) or forward(input_ids, **options)
    few = profile.model_copy(update={"rollout_rows": 6})
    refilled = rollout(policy, asked, retriever, few, seed=2, group_size=2, done=ready.append)
    for one, other in zip(refilled, whole, strict=True):
        assert (one.completion_ids, one.turns) == (other.completion_ids, other.turns)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert ready == refilled
    assert max(rows) == 6
    assert np.mean(rows) > 3.5  # full most of the time, not only at first


def test_every_token_is_read_once_and_no_other_row_is_computed(tokenizer, retriever, profile):
    """A prompt once for its group; of a row its own tokens, but for the last that it wrote, which nothing follows."""
    policy, pad = biased_policy(tokenizer), tokenizer.pad_token_id
    read, forward = [], policy.model.forward

    def count(input_ids, **options):
        read.append(int((input_ids != pad).sum()))
        if input_ids.shape[1] == 1:
            written.append(len(input_ids))
        return forward(input_ids=input_ids, **options)

    policy.model.forward, written = count, []
    trajectories = rollout(policy, QUESTIONS, retriever, profile, group_size=3, seed=4)
    assert not any(pad in one.completion_ids for one in trajectories)
    prompts = sum(len(one.prompt_ids) for one in trajectories[::3])
    assert sum(read) == prompts + sum(len(one.completion_ids) - 1 for one in trajectories)
    # in forwards of one token a row, every token that was written but each turn's last
    turns = sum(len(one.turns) for one in trajectories)
    assert sum(written) == sum(one.response_length for one in trajectories) - turns


def test_what_is_read_together_pads_little_and_is_bounded():
    texts = {row: [0] * length for row, length in enumerate([10, 12, 13, 100, 110, 4000, 4100, 9000])}
    fresh = dict.fromkeys(texts, 0)
    assert list(_alike(list(texts), texts, fresh)) == [[0, 1, 2], [3, 4], [5], [6], [7]]
    assert list(_alike(list(texts), texts, fresh | {1: 40_000})) == [[0], [1], [2], [3, 4], [5], [6], [7]]
    many = {row: [0] * 10 for row in range(900)}
    parts = list(_alike(list(many), many, dict.fromkeys(many, 0)))
    assert [len(part) for part in parts] == [819, 81]  # 8,192 tokens


def test_few_steps_are_recorded_and_repeated(tokenizer, retriever, profile):
    policy, recorded, repeated = biased_policy(tokenizer), [], []

    def record(step):
        recorded.append(step)
        return lambda: repeated.append(step) or step()

    profile = profile.model_copy(update={"max_response_tokens": 40})
    sampler = LocalSampler(policy, 12, 40, record=record)
    trajectories = rollout(policy, QUESTIONS, retriever, profile, group_size=3, seed=4, sampler=sampler)
    plain = rollout(policy, QUESTIONS, retriever, profile, group_size=3, seed=4)
    assert [one.completion_ids for one in trajectories] == [one.completion_ids for one in plain]
    assert len(repeated) >= max(one.response_length for one in trajectories) - 5
    assert len(recorded) <= 2 * 5  # 8 or 12 rows; a few sizes of the cache


def test_the_cache_grows_rarely_and_keeps_what_it_holds():
    cache, ones = _Cache(2), torch.ones((1, 1, 1, 4))
    grown = set()
    for place in range(700):
        cache.reach(place + 1)
        cache.aim(slice(1, 2), torch.tensor([[place]]), place + 1)
        keys, values = cache.update(ones * place, -ones * place, 0)
        grown.add(cache.entries)
        assert cache.entries > place + 1 - (cache.entries == 0)
    assert keys[0, 0, :, 0].tolist() == list(range(700)) and torch.equal(values, -keys)
    assert len(grown) == 3
    cache.move([1, 0], [0, 1], 700)
    assert cache.keys[0][0, 0, :700, 0].tolist() == list(range(700)) and not cache.keys[0][1].any()


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_checkpointing_does_no_harm(policy, retriever, profile, training):
    expected = rollout(policy, QUESTIONS, retriever, profile, seed=1)
    policy.model.gradient_checkpointing_enable()
    policy.model.train(training)
    assert rollout(policy, QUESTIONS, retriever, profile, seed=1) == expected
    assert policy.model.training is training


def test_an_end_token_without_a_tag_sign_ends_a_turn(policy):
    """Models may name several end tokens; none of them needs to hold the '>' that makes the engine look closer."""
    end = policy.tokenizer.convert_tokens_to_ids("a")
    policy.model.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, end]
    stops = Stops(policy)
    assert stops.ended([5, end]) and not stops.ended([end, 5])
    assert end not in stops.worth_a_look
