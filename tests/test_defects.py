"""Each known defect changes what it says it changes, by values worked out by hand, and nothing else."""

import json
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from synthetic_runs import write_run
from test_engine import QUESTIONS, biased_policy, check_logprobs

from searchr1_lite.analysis.runs import RunError, by_mask, load_run
from searchr1_lite.config import ROOT, ConfigError, Profile, load_profile, save_config
from searchr1_lite.evaluation import evaluate as evaluation
from searchr1_lite.experiments.plan import load_experiment
from searchr1_lite.experiments.run import train_run
from searchr1_lite.lab import defects
from searchr1_lite.lab.defects import broken, train_broken
from searchr1_lite.lab.profile import BrokenProfile, Defect, load_broken
from searchr1_lite.rollouts import engine
from searchr1_lite.rollouts.dequantize import merged_adapter
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.protocol import INVALID_ACTION, render_observation
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.runfolder import RunFolderError, check_same_run
from searchr1_lite.training import loop, losses
from searchr1_lite.training.losses import group_advantages
from searchr1_lite.training.score import collate, score
from searchr1_lite.types import Hit, Passage, Question

OBSERVATION = '\n\n<information>Doc 1(Title: "Belmar") Belmar is the capital of Rovana.</information>\n\n'


PPO = {"algorithm": "ppo", "group_size": 1, "questions_per_step": 4, "updates_per_rollout": 2, "gae_lambda": 0.9}
SMALL = {"questions_per_step": 2, "group_size": 5, "steps": 1, "eval_questions": 2, "max_prompt_tokens": 1000}
SMALL |= {"max_turns": 1, "max_response_tokens": 8, "max_context_tokens": 2500, "chat_template": False, "beta": 0.04}


def having(*names, **settings) -> BrokenProfile:
    """A small profile with these defects."""
    return load_broken("tiny", **SMALL | (PPO if "unmasked_values" in names else {}) | settings, defects=list(names))


def trajectory(parts) -> Trajectory:
    """Of (1, ids) the model wrote and (0, ids) it was given."""
    ids = tuple(i for _, part in parts for i in part)
    mask = tuple(own for own, part in parts for _ in part)
    logprobs = tuple(-0.5 * own for own in mask)
    return Trajectory(Question("q", "Who?", ("a",)), (1, 2), ids, mask, logprobs, (), True, "answer")


def some(prompts=((1, 2), (3, 4, 5))) -> list[Trajectory]:
    """Two trajectories with a retrieved stretch of 3 and of 1 tokens between the model's own, 2 + 1 and 1 + 2."""
    own = [[(1, (7, 8)), (0, (9, 10, 11)), (1, (12,))], [(1, (13,)), (0, (14,)), (1, (15, 16))]]
    return [replace(trajectory(parts), prompt_ids=prompt) for parts, prompt in zip(own, prompts, strict=True)]


def spelled(tokenizer, *pieces: str) -> list[int]:
    """Ids of the pieces, each of which is one token or encoded on its own."""
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]


# retokenised_text


def test_retokenising_changes_the_ids_that_are_not_what_the_tokenizer_writes(tokenizer):
    # "Belmar" in pieces where the tokenizer has one; ">\n\n" ends a turn with line breaks that are cut off
    query = spelled(tokenizer, "<search", "> capital", " of", " B", "el", "mar", " </search>\n\n")
    seen = spelled(tokenizer, OBSERVATION)
    answer = spelled(tokenizer, "<answer> Belmar </answer>")
    sampled = trajectory([(1, query), (0, seen), (1, answer)])
    learned = defects.retokenised(sampled, tokenizer)
    again = tokenizer.encode("<search> capital of Belmar </search>")
    assert (len(query), len(again)) == (13, 8) and again[-1] != query[-1]
    assert learned.completion_ids == (*again, *seen, *answer)
    assert learned.loss_mask == (*[1] * len(again), *[0] * len(seen), *[1] * len(answer))
    assert all(map(math.isnan, learned.logprobs[: len(again)]))
    assert learned.logprobs[len(again) :] == sampled.logprobs[len(query) :]
    assert (learned.prompt_ids, learned.turns, learned.finished) == (sampled.prompt_ids, sampled.turns, True)
    with broken(having("retokenised_text"), tokenizer):
        batch = loop.collate([sampled], [1.0], True)
    assert batch.ids[0].tolist() == [*sampled.prompt_ids, *learned.completion_ids]
    assert batch.mask[0].tolist() == [0, 0, *learned.loss_mask] and batch.lengths.tolist() == [batch.ids.size(1)]


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


def test_a_mask_from_text_is_shifted_where_two_tokens_would_be_one(tokenizer):
    query = spelled(tokenizer, "<search> capital of Rovana </search>")  # ends with ">"
    seen, answer = spelled(tokenizer, OBSERVATION), spelled(tokenizer, "<answer> Belmar </answer>")
    assert (len(query), len(seen)) == (8, 21)
    assert tokenizer.convert_ids_to_tokens(seen)[:3] == ["Ċ", "Ċ", "<information"]
    # Written in one go, ">" and the two line breaks are one token: what comes before <information> has 8 tokens, not
    # 10. The block itself has 19, so 8 to 26 are left out and the block's last two, 27 and 28, are learned from.
    sampled = trajectory([(1, query), (0, seen), (1, answer)])
    with broken(having("mask_by_text"), tokenizer):
        batch = loop.collate([sampled], [1.0], True)
    assert batch.mask[0].tolist() == [0, 0, *[1] * 8, *[0] * 19, 1, 1, *[1] * len(answer)]
    assert batch.ids.equal(collate([sampled], [1.0], True).ids)
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


def advantages(profile, rewards):
    return loop.losses.ALGORITHMS["grpo"][0](replace(collate(some(), [0, 0], True), rewards=rewards), profile)


def test_groups_of_one_have_their_reward_as_advantage():
    rewards, profile = torch.tensor([1.0, 0, 0, 1, 1, 1]), having("groups_of_one", group_size=3)
    with broken(profile):
        assert advantages(profile, rewards).tolist() == [1, 0, 0, 1, 1, 1]
    assert advantages(profile, rewards).equal(group_advantages(rewards, 3))


def test_colliding_questions_are_compared_with_each_other():
    profile = having("colliding_ids", group_size=2)
    rewards = torch.tensor([1.0, 1, 0, 0])  # an easy question beside a hard one: no difference within either
    assert advantages(profile, rewards).tolist() == pytest.approx([0, 0, 0, 0])
    with broken(profile):
        found = advantages(profile, rewards)
    size = 0.5 / (math.sqrt(1 / 3) + 1e-4)  # mean 1/2, squares 4 x 1/4 over 3
    assert found.tolist() == pytest.approx([size, size, -size, -size])


# ratio_over_retrieved


def learned(profile, logprobs, **fields):
    """The loss of `some` trajectories, as the loop puts it together, and its gradient by token."""
    batch = loop.collate(some(), [0.0, 0.0], True)
    for name, value in fields.items():
        setattr(batch, name, value)
    logprobs = logprobs.clone().requires_grad_()
    token_losses = losses.ALGORITHMS[profile.algorithm][1]
    weighed = token_losses(logprobs, torch.zeros_like(logprobs), batch, profile) * losses.loss_weights(batch.mask)
    return weighed.sum().item(), torch.autograd.grad(weighed.sum(), logprobs)[0]


def test_a_ratio_over_retrieved_tokens_learns_from_them_though_the_mask_is_right():
    profile, right = having("ratio_over_retrieved"), collate(some(), [0.0, 0.0], True)
    logprobs, pay = torch.full((2, 8), -1.0), torch.tensor([1.0, -2.0])
    with broken(profile):
        batch = loop.collate(some(), [0.0, 0.0], True)
        leaky, push = learned(profile, logprobs, advantages=pay)
    assert batch.mask.equal(right.mask)
    assert batch.valued.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 0]]  # so that all are scored
    usual, own = learned(profile, logprobs, advantages=pay)
    assert leaky == pytest.approx(usual)  # the ratio is 1 either way; its gradient is not
    torch.testing.assert_close(own, -pay[:, None] * right.mask / 6)  # a mean over 6 own tokens
    # 3 of 6 completion tokens are the model's, and 3 of 4: each of all gets that share of what an own token gets
    torch.testing.assert_close(push, -pay[:, None] * batch.valued * torch.tensor([[3 / 6], [3 / 4]]) / 6)


def test_a_ratio_over_retrieved_tokens_is_the_geometric_mean_of_all():
    profile, old = having("ratio_over_retrieved", epsilon=0.9), torch.full((2, 8), -1.0)
    moved = old.clone()
    moved[0, 4:7] += math.log(1.5)  # retrieved tokens alone, three of six
    fields = {"advantages": torch.tensor([1.0, 0.0]), "old_logprobs": old}
    assert learned(profile, moved, **fields)[0] == pytest.approx(-3 / 6)  # ratio 1
    with broken(profile):
        assert learned(profile, moved, **fields)[0] == pytest.approx(-3 / 6 * 1.5**0.5)


# kl_sign


def test_the_kl_term_pulls_the_other_way():
    profile = having("kl_sign")
    logprobs = torch.linspace(-3, -1, 16).view(2, 8)
    fields = {"advantages": torch.tensor([0.5, -1.0]), "reference_logprobs": logprobs - 0.3}
    right, pull = learned(profile, logprobs, **fields)
    none, without = learned(profile.model_copy(update={"beta": 0.0}), logprobs, **fields)
    with broken(profile):
        wrong, off = learned(profile, logprobs, **fields)
    assert right - none == pytest.approx(0.04 * (math.exp(-0.3) + 0.3 - 1), rel=1e-3)
    assert wrong - none == pytest.approx(none - right, rel=1e-3)
    torch.testing.assert_close(off - without, without - pull)
    assert (pull - without).abs().max() > 1e-3


# unmasked_values


def test_values_and_whitening_run_over_retrieved_tokens(policy):
    profile = having("unmasked_values")
    learner = loop.Learner(loop.model_to_train(policy, profile), policy, profile)
    torch.nn.init.normal_(learner.value_head.linear.weight, std=0.1)
    retrieved = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0]]).bool()

    def looked_at():
        batch = loop.collate(some(), [1.0, 0.0], True)
        learner.look_back(batch)
        batch.advantages = learner.advantages(batch, profile)
        return batch

    with broken(profile):
        wrong = looked_at()
    right = looked_at()
    assert wrong.mask.equal(right.mask) and right.valued.equal(right.mask)
    assert wrong.valued.equal(right.mask + retrieved)
    assert (wrong.old_values[retrieved] != 0).all() and (right.old_values[retrieved] == 0).all()
    assert (wrong.returns[retrieved] != 0).all() and (right.advantages[retrieved] == 0).all()
    for batch, counted in ((wrong, wrong.valued.bool()), (right, right.mask.bool())):
        assert batch.advantages[counted].mean().item() == pytest.approx(0, abs=1e-5)
        assert batch.advantages[counted].std().item() == pytest.approx(1, abs=1e-4)
    own = right.mask.bool()
    assert (wrong.advantages - right.advantages)[own].abs().max() > 0.05
    # one value through the passages: with lambda 0.9 and gamma 1, by hand from the last token back
    logprobs, [value] = (wrong.old_logprobs, wrong.reference_logprobs), wrong.old_values[:1]
    earned = losses.token_rewards(wrong.rewards, wrong.mask, *logprobs, profile.beta)
    running = 0.0
    for place in reversed(range(2, 8)):
        after = value[place + 1].item() if place < 7 else 0.0
        running = earned[0, place].item() + after - value[place].item() + 0.9 * running
        assert wrong.returns[0, place].item() == pytest.approx(running + value[place].item(), abs=1e-5)


def test_a_trajectory_whose_search_failed_has_no_values_either():
    with broken(having("unmasked_values")):
        batch = loop.collate([some()[0], replace(some()[1], stop_reason="search failed")], [1.0, 0.0], True)
    assert batch.valued.sum(dim=1).tolist() == [6, 0]


# bf16_lora


def test_the_adapter_is_in_bfloat16_and_training_works_with_it(policy):
    profile = having("bf16_lora")
    with broken(profile):
        learner = loop.Learner(loop.model_to_train(policy, profile), policy, profile)
    assert {weight.dtype for weight in learner.weights.values()} == {torch.bfloat16}
    for weight in learner.weights.values():
        torch.nn.init.normal_(weight, std=0.1)
    batch = loop.collate(some(), [1.0, 0.0], True)
    with merged_adapter(learner.model):
        merged = score(learner.model, batch, 1.0)[0]
    plain = score(learner.model, batch, 1.0)[0]
    with learner.model.disable_adapter():
        base = score(learner.model, batch, 1.0)[0]
    assert (merged - plain).abs().max() < 0.05 < 0.2 < (plain - base).abs().max()  # the same but for rounding
    learner.look_back(batch)
    batch.advantages = torch.tensor([1.0, -1.0])
    state = {name: weight.clone() for name, weight in learner.state()["weights"].items()}
    saved = learner.state() | {"weights": state}
    assert learner.update(batch)["grad_norm"] > 0
    assert any((weight != state[name]).any() for name, weight in learner.weights.items())
    learner.load_state(saved)
    assert all(weight.dtype == torch.bfloat16 and weight.equal(state[name]) for name, weight in learner.weights.items())


# truncated_closing_tag


def test_a_cut_observation_loses_its_closing_tag(tokenizer):
    text = render_observation([Hit(Passage("1", "Belmar", "Belmar is the capital of Rovana. " * 5), 1.0)])
    ids = tokenizer.encode(text)
    with broken(having("truncated_closing_tag")):
        assert engine.encode_observation(tokenizer, text, len(ids)) == ids  # nothing to cut
        assert engine.encode_observation(tokenizer, text, len(ids) - 1) == ids[:-1]
        assert "</information>" not in tokenizer.decode(engine.encode_observation(tokenizer, text, 40))
    assert "</information>" in tokenizer.decode(engine.encode_observation(tokenizer, text, 40))


def test_the_rollout_shows_cut_observations(tokenizer, retriever, profile):
    profile, policy = profile.model_copy(update={"max_observation_tokens": 16}), biased_policy(tokenizer)

    def shown() -> list[str]:
        made = rollout(policy, QUESTIONS, retriever, profile, group_size=4)
        return [turn.observation for one in made for turn in one.turns if turn.hits]

    with broken(having("truncated_closing_tag")):
        cut = shown()
    assert cut and not any("</information>" in text for text in cut)
    seen = shown()
    assert seen and all(text.endswith("</information>\n\n") for text in seen)


# no_stop_at_tag, top_p_sampling


def written(policy, profile, retriever, greedy=False, *names):
    """Rollouts with these defects, and the sampler that made them."""
    samplers = []
    with broken(having(*names)), pytest.MonkeyPatch.context() as patch:
        kind = engine.LocalSampler

        class Seen(kind):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                samplers.append(self)

        patch.setattr(engine, "LocalSampler", Seen)
        found = rollout(policy, QUESTIONS, retriever, profile, group_size=6, greedy=greedy)
    return found, samplers[0]


def test_what_follows_the_tag_is_written_and_thrown_away(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    healthy, usual = written(policy, profile, retriever, True)
    late, sampler = written(policy, profile, retriever, True, "no_stop_at_tag")
    assert isinstance(sampler, defects.SamplerPastTags) and not isinstance(usual, defects.SamplerPastTags)
    assert [t.completion_ids for t in late] == [t.completion_ids for t in healthy]
    assert [t.turns for t in late] == [t.turns for t in healthy]
    for one, other in zip(late, healthy, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    ends = policy.tokenizer.eos_token_id
    own = [(t, *edges) for t in healthy for edges in defects.stretches(t.loss_mask) if t.loss_mask[edges[0]]]
    turns = [t.completion_ids[start:stop] for t, start, stop in own]
    short = [turn for turn in turns if len(turn) < profile.max_response_tokens and turn[-1] != ends]
    # a turn goes on to the limit, unless an end token comes first
    assert 0 < sampler.thrown_away <= sum(profile.max_response_tokens - len(turn) for turn in short)


def test_sampled_turns_end_at_the_tag_all_the_same(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    late, sampler = written(policy, profile, retriever, False, "no_stop_at_tag")
    assert sampler.thrown_away > 0 and any(t.searches for t in late)
    check_logprobs(policy, late, 1.0)  # what was thrown away has left no trace in the cache
    usual = written(policy, profile, retriever)[0]  # whose later turns have other random numbers
    assert [t.turns[0].text for t in late] == [t.turns[0].text for t in usual]


def test_the_nucleus_is_the_smallest_set_that_reaches_the_share():
    logprobs = torch.log(torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.97, 0.01, 0.01, 0.01]]))
    assert defects.in_nucleus(logprobs, 0.75).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert defects.in_nucleus(logprobs, 0.81)[0].sum() == 3
    assert defects.in_nucleus(logprobs, 1.0).all()


def test_the_tail_is_never_sampled_and_log_probabilities_do_not_know(policy):
    probabilities = torch.tensor([0.02, 0.5, 0.3, 0.16, 0.02])  # the nucleus of 0.95: 0.5 + 0.3 + 0.16
    sampler = defects.NucleusSampler(policy, 1, 20)
    sampler.streams = {0: np.random.default_rng(0)}
    logits = probabilities.log().expand(1, -1)
    drawn = [sampler._sample(logits, [0]) for _ in range(2000)]
    counts = np.bincount([int(token) for token, _ in drawn], minlength=5) / 2000
    assert counts[[0, 4]].sum() == 0
    assert counts[1:4] == pytest.approx(np.array([0.5, 0.3, 0.16]) / 0.96, abs=0.04)
    for token, logprob in drawn[:50]:
        assert logprob.item() == pytest.approx(math.log(probabilities[int(token)]), abs=1e-5)


def test_recorded_log_probabilities_are_the_full_softmaxs(tokenizer, retriever, profile):
    policy = biased_policy(tokenizer)
    hot = profile.model_copy(update={"temperature": 1.3})
    found, sampler = written(policy, hot, retriever, False, "top_p_sampling")
    assert isinstance(sampler, defects.NucleusSampler)
    check_logprobs(policy, found, 1.3)
    assert [t.completion_ids for t in found] != [t.completion_ids for t in written(policy, hot, retriever)[0]]
    both, sampler = written(policy, hot, retriever, False, "top_p_sampling", "no_stop_at_tag")
    assert sampler.thrown_away > 0 and [t.turns[0].text for t in both] == [t.turns[0].text for t in found]
    check_logprobs(policy, both, 1.3)


# What goes with what


def test_stale_updates_are_ten_from_a_batch_that_divides():
    assert load_broken("tiny", group_size=5, defects=["stale_updates"]).updates_per_rollout == 10
    with pytest.raises(ConfigError, match="must be a multiple of updates_per_rollout = 10"):
        load_broken("tiny", group_size=5, questions_per_step=3, defects=["stale_updates"])


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
        ("ratio_over_retrieved", {"policy_loss": "cispo"}, "neither CISPO nor LLDS"),
        ("ratio_over_retrieved", {"llds_coef": 0.1}, "neither CISPO nor LLDS"),
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
        load_broken("tiny", defects=[defect], **settings)
    assert load_broken("tiny", **settings).defects == []


def test_two_wrong_groupings_at_once_are_refused():
    for names, says in ((["groups_of_one", "colliding_ids"], "no groups_of_one"), (["no_such_defect"], "defects")):
        with pytest.raises(ConfigError, match=f"profile 'tiny' cannot be used:\n- .*{says}"):
            load_broken("tiny", defects=names)
    with pytest.raises(ConfigError, match="trainer = loop"):
        load_broken("tiny", defects=["bf16_lora"], trainer="trl")
    with pytest.raises(ConfigError, match=r"defects: there is no such setting; .* searchr1_lite\.lab"):
        load_profile("tiny", defects=["kl_sign"])


# Switching on and off


def in_place() -> dict:
    """What stands where `broken` may change it."""
    places = (loop, "collate"), (loop, "model_to_train"), (losses, "group_advantages")
    places += (engine, "encode_observation"), (engine, "LocalSampler")
    table = {f"losses of {name}": row[1] for name, row in losses.ALGORITHMS.items()}
    return {name: getattr(module, name) for module, name in places} | table


@pytest.mark.parametrize(
    ("defect", "changed"),
    [
        ("groups_of_one", {"group_advantages"}),
        ("colliding_ids", {"group_advantages"}),
        ("kl_sign", {"losses of grpo"}),
        ("ratio_over_retrieved", {"losses of grpo"}),
        ("no_stop_at_tag", {"LocalSampler"}),
        ("top_p_sampling", {"LocalSampler"}),
        ("truncated_closing_tag", {"encode_observation"}),
        ("bf16_lora", {"model_to_train"}),
        *((name, set()) for name in ("retokenised_text", "mask_by_text", "unmasked_values", "stale_updates")),
    ],
)
def test_afterwards_everything_is_as_before(defect, changed):
    before = in_place()
    with pytest.raises(KeyboardInterrupt), broken(having(defect)):
        during = in_place()
        raise KeyboardInterrupt
    assert {name for name in before if during[name] is not before[name]} == changed | {"collate"}
    assert in_place() == before


def test_the_rest_of_the_package_knows_nothing_of_defects():
    """But for `load_profile`'s hint at where they are."""
    package = ROOT / "searchr1_lite"
    files = [*(package / "rollout").rglob("*.py"), *(package / "training").rglob("*.py")]
    assert len(files) > 10
    assert [file for file in files if "defect" in file.read_text(encoding="utf-8").lower()] == []
    assert "defects" not in Profile.model_fields


# Run folders


def trained(profile, folder, policy, retriever, train=train_broken):
    options = {"policy": policy, "retriever": retriever, "questions": QUESTIONS, "eval_questions": QUESTIONS[:2]}
    return train(profile, folder, progress=str, **options)


@pytest.mark.parametrize("defect", get_args(Defect))
def test_a_training_with_each_says_so_and_is_no_healthy_one(policy, retriever, tmp_path, defect):
    profile, before = having(defect), in_place()
    trained(profile, tmp_path / "run", policy, retriever)
    assert in_place() == before
    [row] = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert math.isfinite(row["loss"]) and row["grad_norm"] >= 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["defects"] == [defect]
    weights = load_file(tmp_path / "run/adapter/adapter_model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16 if defect == "bf16_lora" else torch.float32}
    trained(profile, tmp_path / "run", policy, retriever)  # finished already: nothing to do
    healthy = load_profile("tiny", **profile.model_dump(exclude={"defects", "name"}))
    with pytest.raises(RunFolderError, match="defects"):
        trained(healthy, tmp_path / "run", policy, retriever, loop.train)


def test_a_healthy_runs_folder_takes_no_defects_and_an_empty_list_of_them_is_healthy(tmp_path):
    healthy, without, wrong = load_profile("tiny", **SMALL), having(), having("kl_sign")
    save_config(healthy, tmp_path / "config.yaml")
    check_same_run(tmp_path, without, {})
    with pytest.raises(RunFolderError, match=r"defects: \[\] there, \['kl_sign'\] asked for"):
        check_same_run(tmp_path, wrong, {})
    save_config(without, tmp_path / "config.yaml")  # as older runs have it
    check_same_run(tmp_path, healthy, {})


def test_runs_with_defects_are_not_averaged_with_healthy_ones(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    config = runs[0] / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(settings | {"defects": []}))  # an older run
    assert len(by_mask([load_run(folder) for folder in runs])["masked"]) == 2
    config.write_text(yaml.safe_dump(settings | {"defects": ["kl_sign"]}))
    with pytest.raises(RunError, match="runs that differ in defects are not averaged"):
        by_mask([load_run(folder) for folder in runs])


@pytest.mark.parametrize("names", [[], ["kl_sign"]])
def test_what_was_trained_with_defects_can_be_evaluated(tmp_path, names):
    save_config(having(*names, topk=5), tmp_path / "config.yaml")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "data/tiny-base"}')
    profile, adapter = evaluation.resolve_model(None, tmp_path, {"seed": 3})
    assert profile == load_profile("tiny", **SMALL, topk=5, seed=3) and adapter == tmp_path / "adapter"
    with pytest.raises(ConfigError, match="defects: there is no such setting"):
        evaluation.resolve_model(None, tmp_path, {"defects": ["kl_sign"]})


# Commands and experiments


def test_an_experiments_arms_with_defects_are_trained_with_them(tmp_path, monkeypatch):
    runs = load_experiment("bugs", [0]).runs()
    kinds = {arm: profile.defects if isinstance(profile, BrokenProfile) else [] for arm, profile in runs.values()}
    assert (len(kinds), sum(map(bool, kinds.values()))) == (15, 10)
    assert kinds["stronger KL, kl_sign"] == ["kl_sign"] and kinds["stronger KL"] == []
    assert {"base-seed0", "defects=[bf16_lora]-seed0", "beta=0.05,defects=[kl_sign]-seed0"} <= runs.keys()
    made = []
    monkeypatch.setattr(loop, "train", lambda profile, *_, **__: made.append(("healthy", profile)))
    monkeypatch.setattr(defects, "train_broken", lambda profile, *_, **__: made.append(("broken", profile)))
    (tmp_path / "logs").mkdir()
    for name in ("base-seed0", "defects=[bf16_lora]-seed0"):
        train_run(runs[name][1], tmp_path / name, {})
    assert made == [("healthy", runs["base-seed0"][1]), ("broken", runs["defects=[bf16_lora]-seed0"][1])]
