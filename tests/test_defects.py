"""Each known defect changes what it says it changes, by values worked out by hand, and nothing else."""

import math
from itertools import groupby

import numpy as np
import pytest
import torch
from test_engine import QUESTIONS, biased_policy, check_logprobs
from test_trainer import an_update, gradient, tiny
from test_trainer import forge as _forge

from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.rollout.engine import rollout
from searchr1_lite.rollout.protocol import INVALID_ACTION, encode_observation, render_observation
from searchr1_lite.rollout.trajectory import Trajectory
from searchr1_lite.training import defects
from searchr1_lite.training import trainer as training
from searchr1_lite.training.objective import group_advantages
from searchr1_lite.types import Hit, Passage, Question

forge = _forge  # a fixture
OBSERVATION = '\n\n<information>Doc 1(Title: "Belmar") Belmar is the capital of Rovana.</information>\n\n'


def broken(profile, *names, **settings):
    return profile.model_copy(update={"defects": list(names), **settings})


def trajectory(parts) -> Trajectory:
    """Of (1, ids) the model wrote and (0, ids) it was given."""
    ids = tuple(i for _, part in parts for i in part)
    mask = tuple(own for own, part in parts for _ in part)
    logprobs = tuple(-0.5 * own for own in mask)
    return Trajectory(Question("q", "Who?", ("a",)), (1, 2), ids, mask, logprobs, (), True, "answer")


def spelled(tokenizer, *pieces: str) -> list[int]:
    """Ids of the pieces, each of which is one token or encoded on its own."""
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]


# retokenised_text


def test_retokenising_changes_the_ids_that_are_not_what_the_tokenizer_writes(tokenizer, profile):
    # "Belmar" in pieces where the tokenizer has one; ">\n\n" ends a turn with line breaks that are cut off
    query = spelled(tokenizer, "<search", "> capital", " of", " B", "el", "mar", " </search>\n\n")
    seen = spelled(tokenizer, OBSERVATION)
    answer = spelled(tokenizer, "<answer> Belmar </answer>")
    sampled = trajectory([(1, query), (0, seen), (1, answer)])
    learned = defects.as_learned(sampled, tokenizer, broken(profile, "retokenised_text"))
    again = tokenizer.encode("<search> capital of Belmar </search>")
    assert (len(query), len(again)) == (13, 8) and again[-1] != query[-1]
    assert learned.completion_ids == (*again, *seen, *answer)
    assert learned.loss_mask == (*[1] * len(again), *[0] * len(seen), *[1] * len(answer))
    assert all(map(math.isnan, learned.logprobs[: len(again)]))
    assert learned.logprobs[len(again) :] == sampled.logprobs[len(query) :]
    assert (learned.prompt_ids, learned.turns, learned.finished) == (sampled.prompt_ids, sampled.turns, True)


def test_retokenising_drops_the_end_token_and_leaves_the_usual_ids(tokenizer):
    said = spelled(tokenizer, "I know nothing.")
    observed = spelled(tokenizer, INVALID_ACTION)
    plain = trajectory([(1, said), (0, observed), (1, said)])
    assert defects.retokenised(plain, tokenizer) == plain
    ended = trajectory([(1, [*said, tokenizer.eos_token_id]), (0, observed), (1, said)])
    assert defects.retokenised(ended, tokenizer).completion_ids == plain.completion_ids


def test_a_search_wins_over_an_answer_before_it_in_the_text():
    assert defects.cut_at_tag("<answer>a</answer> <search>b</search> c") == "<answer>a</answer> <search>b</search>"
    assert defects.cut_at_tag("x <answer>a</answer> y") == "x <answer>a</answer>"
    assert defects.cut_at_tag("neither </think>") == "neither </think>"


# mask_by_text


def test_a_mask_from_text_is_shifted_where_two_tokens_would_be_one(tokenizer, profile):
    query = spelled(tokenizer, "<search> capital of Rovana </search>")  # ends with ">"
    seen, answer = spelled(tokenizer, OBSERVATION), spelled(tokenizer, "<answer> Belmar </answer>")
    assert (len(query), len(seen)) == (8, 21)
    assert tokenizer.convert_ids_to_tokens(seen)[:3] == ["Ċ", "Ċ", "<information"]
    # Written in one go, ">" and the two line breaks are one token: what comes before <information> has 8 tokens, not
    # 10. The block itself has 19, so 8 to 26 are left out and the block's last two, 27 and 28, are learned from.
    sampled = trajectory([(1, query), (0, seen), (1, answer)])
    learned = defects.as_learned(sampled, tokenizer, broken(profile, "mask_by_text"))
    assert learned.loss_mask == (*[1] * 8, *[0] * 19, 1, 1, *[1] * len(answer))
    assert learned.completion_ids == sampled.completion_ids and learned.logprobs == sampled.logprobs
    # A second search has the same seam before it, so its mask is four early: 35 to 53 in place of 39 to 57. The last
    # two tokens of the model's own query are not learned from, the last four of the block are.
    twice = trajectory([(1, query), (0, seen), (1, query), (0, seen), (1, answer)])
    wrong = np.array(defects.mask_by_text(twice.completion_ids, tokenizer)) - np.array(twice.loss_mask)
    expected = {27: 1, 28: 1, 35: -1, 36: -1, 54: 1, 55: 1, 56: 1, 57: 1}
    assert {place: int(change) for place, change in enumerate(wrong) if change} == expected


def test_a_mask_from_text_learns_the_remark_on_an_invalid_action_and_trusts_the_models_own_tags(tokenizer):
    said, remark = spelled(tokenizer, "no tag"), spelled(tokenizer, INVALID_ACTION)
    mask = defects.mask_by_text(trajectory([(1, said), (0, remark), (1, said)]).completion_ids, tokenizer)
    assert mask == (1,) * (2 * len(said) + len(remark))
    made_up = tokenizer.encode("<information> a </information> b")  # by the model itself
    assert defects.mask_by_text(made_up, tokenizer) == (*[0] * (len(made_up) - 1), 1)
    unclosed = spelled(tokenizer, OBSERVATION.replace("</information>\n\n", ""))
    assert defects.mask_by_text(unclosed, tokenizer) == (1,) * len(unclosed)  # a block without its end is no block


# groups_of_one, colliding_ids


def test_groups_of_one_have_their_reward_as_advantage(profile):
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    grouped = broken(profile, "groups_of_one", group_size=3)
    assert defects.regrouped_advantages(rewards, grouped).tolist() == [1, 0, 0, 1, 1, 1]


def test_colliding_questions_are_compared_with_each_other(profile):
    rewards = torch.tensor([1.0, 1, 0, 0])  # an easy question beside a hard one: no difference within either
    assert group_advantages(rewards, 2).tolist() == pytest.approx([0, 0, 0, 0])
    found = defects.regrouped_advantages(rewards, broken(profile, "colliding_ids", group_size=2))
    size = 0.5 / (math.sqrt(1 / 3) + 1e-4)  # mean 1/2, squares 4 x 1/4 over 3
    assert found.tolist() == pytest.approx([size, size, -size, -size])


# ratio_over_retrieved


def test_a_sequence_ratio_is_a_geometric_mean_over_what_is_counted():
    logprobs = torch.log(torch.tensor([[0.2, 0.4, 0.9]]))
    old = torch.log(torch.tensor([[0.1, 0.1, 0.9]]))
    assert defects.sequence_ratio(logprobs, old, torch.tensor([[1, 0, 0]])).item() == pytest.approx(2)
    assert defects.sequence_ratio(logprobs, old, torch.tensor([[1, 1, 0]])).item() == pytest.approx(8**0.5)
    assert defects.sequence_ratio(logprobs, old, torch.tensor([[1, 1, 1]])).item() == pytest.approx(2)


def test_a_ratio_over_retrieved_tokens_learns_from_them_though_the_mask_is_right():
    logprobs = torch.full((2, 4), -1.0, requires_grad=True)
    mask, completion = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    advantages = torch.tensor([1.0, -2.0])
    usual_gradient = -advantages.unsqueeze(1) * mask / 4  # first update: ratio 1, mean over the 4 own tokens
    change = defects.leak(logprobs, logprobs.detach(), advantages, mask, completion, 0.2)
    assert change.item() == pytest.approx(0)  # the ratio is 1 either way; its gradient is not
    [gradient] = torch.autograd.grad(change, logprobs)
    # own tokens, 2 of 4 and 2 of 3 that count: each of these gets 2/4 and 2/3 of what an own token gets
    spread = -advantages.unsqueeze(1) * completion * torch.tensor([[2 / 4], [2 / 3]]) / 4
    torch.testing.assert_close(gradient + usual_gradient, spread)
    # counted over the model's own tokens only, it would be the usual loss
    [gradient] = torch.autograd.grad(defects.leak(logprobs, logprobs.detach(), advantages, mask, mask, 0.2), logprobs)
    assert gradient.abs().max() < 1e-7


# truncated_closing_tag


def test_a_cut_observation_loses_its_closing_tag(tokenizer):
    text = render_observation([Hit(Passage("1", "Belmar", "Belmar is the capital of Rovana. " * 5), 1.0)])
    ids = tokenizer.encode(text)
    assert encode_observation(tokenizer, text, len(ids), False) == ids  # nothing to cut
    assert encode_observation(tokenizer, text, len(ids) - 1, False) == ids[:-1]
    assert "</information>" in tokenizer.decode(encode_observation(tokenizer, text, 40))
    assert "</information>" not in tokenizer.decode(encode_observation(tokenizer, text, 40, False))


def test_the_rollout_shows_cut_observations(tokenizer, retriever, profile):
    profile = profile.model_copy(update={"max_observation_tokens": 16})
    policy = biased_policy(tokenizer)
    healthy, cut = (
        [t for t in rollout(policy, QUESTIONS, retriever, p, group_size=4) if t.searches]
        for p in (profile, broken(profile, "truncated_closing_tag"))
    )
    assert healthy and cut
    seen = [turn.observation for one in healthy for turn in one.turns if turn.hits]
    assert seen and all(text.endswith("</information>\n\n") for text in seen)
    seen = [turn.observation for one in cut for turn in one.turns if turn.hits]
    assert seen and not any("</information>" in text for text in seen)


# no_stop_at_tag, top_p_sampling


def written(policy, profile, retriever, greedy=False, *names):
    profile = broken(profile, *names)
    writer = defects.faulty_writer(policy, profile, 24)
    if writer and greedy:
        writer.pick = lambda logits, rows: (logits.argmax(-1), logits.log_softmax(-1).max(-1).values)
    found = rollout(policy, QUESTIONS, retriever, profile, group_size=6, greedy=greedy, writer=writer)
    return found, writer


def test_what_follows_the_tag_is_written_and_thrown_away(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    healthy, none = written(policy, profile, retriever, True)
    late, writer = written(policy, profile, retriever, True, "no_stop_at_tag")
    assert none is None
    assert [t.completion_ids for t in late] == [t.completion_ids for t in healthy]
    assert [t.turns for t in late] == [t.turns for t in healthy]
    for one, other in zip(late, healthy, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    ends = policy.tokenizer.eos_token_id
    turns = [
        list(run)
        for t in healthy
        for own, run in groupby(zip(t.loss_mask, t.completion_ids, strict=True), key=lambda pair: pair[0])
        if own
    ]
    short = [turn for turn in turns if len(turn) < profile.max_response_tokens and turn[-1][1] != ends]
    # a turn goes on to the limit, unless an end token comes first
    assert 0 < writer.thrown_away <= sum(profile.max_response_tokens - len(turn) for turn in short)


def test_sampled_turns_end_at_the_tag_all_the_same(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    late, writer = written(policy, profile, retriever, False, "no_stop_at_tag")
    assert writer.thrown_away > 0 and any(t.searches for t in late)
    check_logprobs(policy, late, 1.0)  # what was thrown away has left no trace in the cache
    first = [t.turns[0].text for t in late]
    assert first == [
        t.turns[0].text for t in written(policy, profile, retriever)[0]
    ]  # later ones: other random numbers


def test_the_nucleus_is_the_smallest_set_that_reaches_the_share():
    logprobs = torch.log(torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.97, 0.01, 0.01, 0.01]]))
    assert defects.in_nucleus(logprobs, 0.75).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert defects.in_nucleus(logprobs, 0.81)[0].sum() == 3
    assert defects.in_nucleus(logprobs, 1.0).all()


def test_the_tail_is_never_sampled_and_log_probabilities_do_not_know(policy, profile):
    probabilities = torch.tensor([0.02, 0.5, 0.3, 0.16, 0.02])  # the nucleus of 0.95: 0.5 + 0.3 + 0.16
    writer = defects.faulty_writer(policy, broken(profile, "top_p_sampling"), 1)
    writer.streams = {0: np.random.default_rng(0)}
    logits = probabilities.log().expand(1, -1)
    drawn = [writer._sample(logits, [0]) for _ in range(2000)]
    counts = np.bincount([int(token) for token, _ in drawn], minlength=5) / 2000
    assert counts[[0, 4]].sum() == 0
    assert counts[1:4] == pytest.approx(np.array([0.5, 0.3, 0.16]) / 0.96, abs=0.04)
    for token, logprob in drawn[:50]:
        assert logprob.item() == pytest.approx(math.log(probabilities[int(token)]), abs=1e-5)


def test_recorded_log_probabilities_are_the_full_softmaxs(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    found, _ = written(policy, profile.model_copy(update={"temperature": 1.3}), retriever, False, "top_p_sampling")
    check_logprobs(policy, found, 1.3)


# What goes with what


def test_no_defect_is_on_by_default(profile, tokenizer, policy):
    assert profile.defects == []
    one = trajectory([(1, spelled(tokenizer, "a ", "b"))])
    assert defects.as_learned(one, tokenizer, profile) is one
    assert defects.faulty_writer(policy, profile, 4) is None


def test_stale_updates_are_ten_from_a_batch_that_divides():
    assert load_profile("tiny", group_size=5, defects=["stale_updates"]).updates_per_rollout == 10
    with pytest.raises(ConfigError, match="must be a multiple of updates_per_rollout = 10"):
        load_profile("tiny", group_size=5, questions_per_step=3, defects=["stale_updates"])


@pytest.mark.parametrize(
    ("defect", "settings", "needed"),
    [
        ("unmasked_values", {}, "algorithm ppo"),
        ("groups_of_one", {"algorithm": "reinforce"}, "algorithm grpo"),
        ("colliding_ids", {"questions_per_step": 3}, "an even questions_per_step"),
        ("colliding_ids", {"algorithm": "ppo"}, "algorithm grpo"),
        ("kl_sign", {"beta": 0.0}, "beta above 0"),
        ("kl_sign", {"algorithm": "ppo"}, "whose KL is a reward"),
        ("mask_by_text", {"masked": False}, "masked true"),
        ("ratio_over_retrieved", {"masked": False}, "masked true"),
        ("truncated_closing_tag", {"strategy": "r1"}, "strategy search_r1"),
        ("no_stop_at_tag", {"sampler": "vllm"}, "sampler local"),
        ("top_p_sampling", {"sampler": "vllm"}, "sampler local"),
        ("retokenised_text", {"sampler": "vllm"}, "sampler local"),
        ("bf16_lora", {"lora_r": 0, "quantization": "none"}, "lora_r above 0"),
        ("kl_sign", {"algorithm": "sft"}, "rollouts"),
    ],
)
def test_a_defect_of_something_that_is_not_there_is_refused(defect, settings, needed):
    with pytest.raises(ConfigError, match=f"{defect} needs .*{needed}"):
        load_profile("tiny", defects=[defect], **settings)
    assert load_profile("tiny", **settings).defects == []


def test_two_wrong_groupings_at_once_are_refused():
    with pytest.raises(ConfigError, match="no groups_of_one"):
        load_profile("tiny", defects=["groups_of_one", "colliding_ids"])
    with pytest.raises(ConfigError, match="defects"):
        load_profile("tiny", defects=["no_such_defect"])


# Where training switches them on


def learned_rows(policy, tmp_path, *names, **settings):
    """The rows of a first update, and of each the forged trajectory that it was."""
    profile = tiny(defects=list(names), **settings)
    trainer, inputs = an_update(policy, tmp_path, profile)
    mask = inputs["completion_mask"].bool()
    return trainer, inputs, [row[seen].tolist() for row, seen in zip(inputs["completion_ids"], mask, strict=True)]


def made_of(row, made):
    return next(n for n, t in enumerate(made) if row[: len(t.completion_ids)] == list(t.completion_ids))


@pytest.mark.parametrize("defect", ["groups_of_one", "colliding_ids"])
def test_training_takes_the_wrong_advantages(policy, tmp_path, forge, defect):
    _, inputs, rows = learned_rows(policy, tmp_path, defect)
    rewards = torch.tensor([float("<answer>a" in t.policy_text) for t in forge])
    assert 0 < rewards.mean() < 1
    expected = rewards if defect == "groups_of_one" else group_advantages(rewards, 8)
    for row, advantage in zip(rows, inputs["advantages"].tolist(), strict=True):
        assert advantage == pytest.approx(expected[made_of(row, forge)].item(), abs=1e-6)


def test_training_takes_the_mask_from_text(policy, tmp_path, forge):
    _, inputs, rows = learned_rows(policy, tmp_path, "mask_by_text")
    for row, mask in zip(rows, inputs["tool_mask"].tolist(), strict=True):
        own = forge[made_of(row, forge)].completion_ids
        assert mask[: len(own)] == list(defects.mask_by_text(own, policy.tokenizer))
        assert 0 in forge[made_of(row, forge)].loss_mask and mask[: len(own)] == [1] * len(own)  # there are no tags


def test_training_takes_the_ids_of_the_text(policy, tmp_path, forge):
    _, _, rows = learned_rows(policy, tmp_path, "retokenised_text")
    end = policy.tokenizer.eos_token_id
    texts = sorted([*defects.retokenised(t, policy.tokenizer).completion_ids, end] for t in forge)
    assert sorted(rows) == texts
    assert texts != sorted([*t.completion_ids, end] for t in forge)


def test_the_kl_term_pulls_the_other_way(policy, tmp_path, forge):
    trainer, inputs, _ = learned_rows(policy, tmp_path, "kl_sign", beta=0.04)
    found = {}
    for beta in (trainer.beta, 0.0, -trainer.beta):
        trainer.beta = beta
        loss = trainer.compute_loss(trainer.model, inputs)
        found[beta] = loss.item(), gradient(loss, trainer)
    (wrong, off), (none, without), (right, healthy) = found.values()
    assert list(found) == [-0.04, 0.0, 0.04]
    assert right - none == pytest.approx(none - wrong, abs=1e-6) and right > none
    torch.testing.assert_close(off - without, without - healthy, atol=1e-6, rtol=1e-3)
    assert (healthy - without).abs().max() > 1e-3


def test_training_leaks_through_the_ratio(policy, tmp_path, forge):
    trainer, inputs, _ = learned_rows(policy, tmp_path, "ratio_over_retrieved", beta=0.0)
    leaky = trainer.compute_loss(trainer.model, inputs)
    trainer.settings = tiny(beta=0.0)
    usual = trainer.compute_loss(trainer.model, inputs)
    assert leaky.item() == pytest.approx(usual.item(), abs=1e-6)  # first update: all ratios are 1
    one, other = gradient(leaky, trainer), gradient(usual, trainer)
    assert (one - other).abs().max() > 0.1 * other.abs().max()


def test_the_adapter_stays_in_bfloat16(policy, tmp_path, forge):
    trainer, inputs, _ = learned_rows(policy, tmp_path, "bf16_lora")
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert torch.isfinite(trainer.compute_loss(trainer.model, inputs))


@pytest.mark.parametrize("names", [(), ("top_p_sampling",)])
def test_training_writes_with_the_faulty_writer_where_asked(policy, tmp_path, monkeypatch, names):
    writers = []

    def stub(*arguments, writer, **options):
        writers.append(writer)
        raise StopIteration

    monkeypatch.setattr(training, "rollout", stub)
    with pytest.raises(StopIteration):
        learned_rows(policy, tmp_path, *names)
    assert [type(writer) for writer in writers] == [defects.FaultyWriter if names else type(None)]
