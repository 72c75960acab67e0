"""The training loop against losses written out by hand, and what goes into and comes out of a run."""

import copy
import dataclasses
import json
import random
from collections import Counter

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from test_dequantize import IDS, adapted, plain_layers

from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.evaluation.rollout_metrics import rollout_metrics
from searchr1_lite.preflight import MemoryFullError, check_settings
from searchr1_lite.rollouts.dequantize import merged_adapter
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy, load_policy, model_to_train
from searchr1_lite.rollouts.trajectory import Trajectory, Turn
from searchr1_lite.tasks.questions import held_out, question_order
from searchr1_lite.training import loop, rewards, steps
from searchr1_lite.training import score as score_module
from searchr1_lite.training.record import Figures, Recorder
from searchr1_lite.training.rewards import group_rewards
from searchr1_lite.training.score import Batch, collate, score, split_rows
from searchr1_lite.training.steps import Rollouts
from searchr1_lite.types import QueryRefusedError, Question

QUESTIONS = [Question(str(n), f"What is {n}?", ("a",), {"hops": 1 + n % 2}) for n in range(4)]
SMALL = {"questions_per_step": 2, "group_size": 4, "micro_batch_tokens": 100_000, "steps": 1, "eval_questions": 2}
SMALL |= {"max_turns": 1, "max_response_tokens": 8, "max_prompt_tokens": 1000, "max_context_tokens": 2500}
SMALL |= {"chat_template": False, "warmup_steps": 0}  # else the first step has learning rate 0
LOSS = {"beta": 0.04, "entropy_coef": 0.01, "temperature": 0.8, "max_grad_norm": 1e9}


def tiny(**overrides):
    return load_profile("tiny", **(SMALL | overrides))


def forged(question: Question, generator: random.Random) -> Trajectory:
    """Two stretches of the model's own tokens around a retrieved one; right or wrong by chance."""
    own, found, last = (generator.randint(2, 9) for _ in range(3))
    ids = [generator.randrange(10, 500) for _ in range(own + found + last)]
    prompt = [generator.randrange(10, 500) for _ in range(int(question.id) * 3 + 5)]
    mask = [1] * own + [0] * found + [1] * last
    turns = (Turn("", "search", "q"), Turn(generator.choice(["<answer>a</answer>", "b"]), "answer"))
    return Trajectory(question, *map(tuple, (prompt, ids, mask, [0.0] * len(ids))), turns, True, "answer")


def failed(trajectory: Trajectory) -> Trajectory:
    return dataclasses.replace(trajectory, stop_reason="search failed", finished=False)


def batch_of_eight() -> list[Trajectory]:
    """Both groups have right and wrong answers; the search of the third failed."""
    generator = random.Random(1)
    made = [forged(question, generator) for question in QUESTIONS[:2] for _ in range(4)]
    made[2] = failed(made[2])
    for start in (0, 4):
        assert len({float("<answer>a" in t.policy_text) for t in made[start : start + 4] if not t.search_failed}) == 2
    return made


class Made:
    """Trajectories made up, in the place of rollouts."""

    cache_hits = None

    def __init__(self, profile, trajectories):
        self.profile, self.trajectories = profile, trajectories

    def __call__(self, step, model):
        return list(self.trajectories)


def a_learner(policy, profile):
    """Its adapter has moved away from the base."""
    learner = loop.Learner(model_to_train(policy, profile), policy, profile)
    move(learner, 0)
    return learner


def move(learner, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in learner.weights.values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def batch_for(learner, made):
    """As `fit` makes it, before the first update."""
    batch = collate(made, group_rewards(made, learner.profile), learner.profile.masked)
    learner.look_back(batch)
    batch.advantages = learner.advantages(batch, learner.profile)
    return batch


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(loss, learner):
    return flat(torch.autograd.grad(loss, list(learner.weights.values())))


def after_update(learner, batch):
    """The gradient and the metrics of an update, and the weights after it."""
    metrics = learner.update(batch)
    weights = learner.weights.values()
    return flat(weight.grad for weight in weights), metrics, flat(weights)


def read(model, t, temperature):
    """Log-probabilities and entropies of a completion's tokens, from the model's own forward and all its logits."""
    whole = torch.tensor([[*t.prompt_ids, *t.completion_ids]])
    logprobs = torch.log_softmax(model(whole).logits[0, len(t.prompt_ids) - 1 : -1] / temperature, dim=-1)
    return logprobs[range(len(t.completion_ids)), t.completion_ids], -(logprobs.exp() * logprobs).sum(-1)


def by_hand(learner, made, old=None):
    """The loss of an update, written out, and its metrics; `old` log-probabilities, or those of now."""
    p, model = learner.profile, learner.model
    groups = torch.tensor(group_rewards(made, p)).view(-1, p.group_size)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    assert len(set(advantages.tolist())) > 2 or len(groups) == 1
    loss, sums = 0.0, Counter()
    for n, t in enumerate(made):
        if t.search_failed:
            continue
        logprobs, entropies = read(model, t, p.temperature)
        with torch.no_grad(), model.disable_adapter():
            reference, _ = read(model, t, p.temperature)
        own = torch.tensor(t.loss_mask)
        mask = own if p.masked else torch.ones_like(own)
        ratio = torch.exp(logprobs - (logprobs.detach() if old is None else old[n]))
        further = reference - logprobs
        kl = torch.exp(further) - further - 1
        policy_loss = -torch.min(ratio * advantages[n], ratio.clamp(1 - p.epsilon, 1 + p.epsilon) * advantages[n])
        loss = loss + ((policy_loss + p.beta * kl - p.entropy_coef * entropies) * mask).sum()
        high, low = (ratio > 1 + p.epsilon) & (advantages[n] > 0), (ratio < 1 - p.epsilon) & (advantages[n] < 0)
        sums.update(own=int(own.sum()), learned=int(mask.sum()), kl=(kl * own).sum().item())
        sums.update(entropy=(entropies * own).sum().item(), clipped=int(((high | low) * mask).sum()))
    metrics = {"kl": sums["kl"] / sums["own"], "entropy": sums["entropy"] / sums["own"]}
    return loss / sums["learned"], metrics | {"clip_ratio": sums["clipped"] / sums["learned"]}


# The loss and its gradient


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("updates", [1, 2])
def test_an_update_is_the_one_written_out_however_memory_splits_it(policy, masked, updates):
    """One part, several, or a row each: the loss, gradient, metrics and new weights of the whole update."""
    learner = a_learner(policy, tiny(masked=masked, updates_per_rollout=updates, **LOSS))
    made = batch_of_eight()
    batch = batch_for(learner, made)
    assert (batch.old_logprobs is None) == (updates == 1)
    old = None
    if updates == 2:
        with torch.no_grad():
            old = [read(learner.model, t, 0.8)[0] for t in made]
        made, batch = made[:4], batch.rows(range(4))
        move(learner, 1)  # so that the ratio is not 1 and some tokens are clipped
    loss, metrics = by_hand(learner, made, old)
    wanted, state = gradient(loss, learner), copy.deepcopy(learner.state())
    assert metrics["kl"] > 1e-3 and (metrics["clip_ratio"] > 0) == (updates == 2) and wanted.abs().max() > 1e-3
    learner.profile = learner.profile.model_copy(update={"masked": not masked})
    other, _ = by_hand(learner, made, old)
    assert (gradient(other, learner) - wanted).abs().max() > 0.1 * wanted.abs().max()
    sizes, ends = [], []
    learner.model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, arguments, output: sizes.append(arguments[0].shape)
    )
    rows = 7 if updates == 1 else 3  # one of them has nothing to learn from
    for tokens, least, most in ((100_000, 1, 1), (100 if updates == 1 else 60, 2, rows - 1), (1, rows, rows)):
        learner.profile = tiny(masked=masked, updates_per_rollout=updates, **LOSS, micro_batch_tokens=tokens)
        learner.load_state(copy.deepcopy(state))
        sizes.clear()
        ours, said, weights = after_update(learner, batch)
        assert least <= len(sizes) <= most and all(rows == 1 or rows * width <= tokens for rows, width in sizes)
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-4)
        assert {name: said[name] for name in metrics} == pytest.approx(metrics, abs=1e-5)
        assert said["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert said["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-4)
        ends.append(weights)
    moved = (ends[0] - flat(state["weights"].values())).norm()
    assert moved > 1e-3 and all((weights - ends[0]).norm() < 1e-2 * moved for weights in ends[1:])


@pytest.mark.parametrize("masked", [True, False])
def test_no_gradient_where_the_model_did_not_write(policy, masked):
    """The last hidden state of a position feeds nothing but that position's prediction."""
    learner = a_learner(policy, tiny(masked=masked, micro_batch_tokens=1, **LOSS))  # one trajectory at a time
    made, states = batch_of_eight(), []
    batch = batch_for(learner, made)

    def keep(module, arguments, output):
        output.retain_grad()
        states.append(output)

    learner.model.get_base_model().model.norm.register_forward_hook(keep)
    learner.update(batch)
    learned = [t for t in made if not t.search_failed]
    learned.sort(key=lambda t: -len(t.prompt_ids) - len(t.completion_ids))
    for t, state in zip(learned, states, strict=True):
        size = state.grad[0].abs().sum(dim=-1)
        own, start = torch.tensor(t.loss_mask).bool(), len(t.prompt_ids) - 1
        assert len(size) == start + 1 + len(own)
        assert (size[:start] == 0).all() and size[-1] == 0  # nothing is learned of the prompt; none follows the last
        predicts = size[start:-1]
        assert (predicts[own] > 0).all()
        assert (predicts[~own] == 0).all() == masked


def test_a_step_that_learns_nothing_changes_no_weights(policy):
    """Not even by the momentum of steps before."""
    learner, made = a_learner(policy, tiny(**LOSS)), batch_of_eight()
    before = flat(learner.weights.values())
    learned = after_update(learner, batch_for(learner, made))[2]
    assert (learned - before).abs().max() > 1e-5
    gradients, metrics, after = after_update(learner, batch_for(learner, [failed(t) for t in made]))
    assert torch.equal(after, learned) and not gradients.any()
    assert metrics["loss"] == metrics["kl"] == metrics["entropy"] == metrics["grad_norm"] == 0.0
    again = after_update(learner, batch_for(learner, made))[2]
    assert not torch.equal(again, after)


def test_groups_whose_rewards_are_equal_can_be_left_out(policy, tmp_path, monkeypatch):
    """Without them an update is that of the other groups alone, their KL and entropy bonus included."""
    made, seen, update = batch_of_eight(), [], loop.Learner.update
    right, wrong = Turn("<answer>a</answer>", "answer"), Turn("b", "answer")
    made = [dataclasses.replace(t, turns=(right if n == 1 else wrong,)) for n, t in enumerate(made)]
    monkeypatch.setattr(loop.Learner, "update", lambda self, batch: seen.append((self, batch)) or update(self, batch))
    for drop in (True, False):
        profile = tiny(drop_equal_groups=drop, **LOSS)
        model = model_to_train(Policy(make_model(544), policy.tokenizer, policy.device), profile)
        loop.fit(model, policy, Made(profile, made), Recorder(profile, tmp_path, str), None, 0)
    (dropping, batch), (_, whole) = seen
    assert not batch.mask[4:].any() and torch.equal(batch.mask[:4], whole.mask[:4]) and whole.mask[4:].any()
    move(dropping, 0)
    one, other, all_of_them = (
        after_update_only_gradient(dropping, part) for part in (batch, batch.rows(range(4)), whole)
    )
    torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)
    assert (one - all_of_them).abs().max() > 0.1 * one.abs().max()


def after_update_only_gradient(learner, batch):
    state = copy.deepcopy(learner.state())
    found = after_update(learner, batch)[0]
    learner.load_state(state)
    return found


def test_two_updates_use_each_row_once(policy, tmp_path, monkeypatch):
    profile, made, seen = tiny(updates_per_rollout=2, **LOSS), batch_of_eight(), []
    update = loop.Learner.update
    monkeypatch.setattr(loop.Learner, "update", lambda self, batch: seen.append(batch) or update(self, batch))
    model = model_to_train(policy, profile)
    loop.fit(model, policy, Made(profile, made), Recorder(profile, tmp_path, str), None, 0)
    assert [len(batch.ids) for batch in seen] == [4, 4]
    ids = [
        (tuple(row[:length]), old[start:length].count_nonzero().item() > 0 or not mask.any())
        for batch in seen
        for row, length, start, old, mask in zip(
            batch.ids.tolist(), batch.lengths, batch.prompts, batch.old_logprobs, batch.mask, strict=True
        )
    ]
    assert sorted(ids) == sorted((t.prompt_ids + t.completion_ids, True) for t in made)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["ratio_max"] > 1.0001  # of the second update, after the first has changed the weights


@given(st.integers(1, 4), st.integers(1, 6))
def test_parts_of_a_batch_hold_every_row_once(updates, size):
    parts = loop.shuffled(updates * size, updates)
    assert [len(part) for part in parts] == [size] * updates
    assert sorted(row for part in parts for row in part) == list(range(updates * size))


def test_several_updates_take_rows_in_random_order():
    assert loop.shuffled(8, 1) == [list(range(8))]
    torch.manual_seed(0)
    drawn = [loop.shuffled(8, 2) for _ in range(3)]
    torch.manual_seed(0)
    assert loop.shuffled(8, 2) == drawn[0] and drawn[0] != drawn[1] != drawn[2]


# How memory is kept


@given(st.lists(st.integers(1, 330), min_size=1, max_size=20), st.integers(1, 2000))
def test_parts_hold_every_row_once_and_no_more_than_fits(lengths, tokens):
    parts = split_rows(lengths, tokens)
    assert sorted(row for rows in parts for row in rows) == list(range(len(lengths)))
    for rows in parts:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= tokens
    order = [lengths[row] for rows in parts for row in rows]
    assert order == sorted(order, reverse=True)
    assert split_rows([10, 5, 32, 5], 19) == [[2], [0], [1, 3]]
    assert split_rows([10, 5, 32, 5], 20) == [[2], [0, 1], [3]]


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore to read")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_memory_for_training_names_the_settings(policy, tmp_path, monkeypatch, checkpointing):
    profile = tiny(micro_batch_tokens=512, gradient_checkpointing=checkpointing)
    model = model_to_train(policy, profile)
    monkeypatch.setattr(policy.model.model, "forward", out_of_memory)
    with pytest.raises(MemoryFullError, match=r"in the training: lower micro_batch_tokens \(it is 512\)") as raised:
        loop.fit(model, policy, Made(profile, batch_of_eight()), Recorder(profile, tmp_path, str), None, 0)
    assert ("gradient_checkpointing is off" in str(raised.value)) != checkpointing
    assert str(raised.value).endswith("(CUDA out of memory. Tried to allocate 2 GiB.)")


def test_no_memory_for_the_rollout_names_the_settings(policy, tmp_path, retriever, monkeypatch):
    says = r"in the rollout: lower rollout_rows \(it is 64\) or max_context_tokens \(it is 2500\)"
    monkeypatch.setattr(policy.model.model, "forward", out_of_memory)
    with pytest.raises(MemoryFullError, match=says):
        Rollouts(tiny(), policy, QUESTIONS, retriever, [], tmp_path)(0, policy.model)
    with pytest.raises(MemoryFullError, match=says):  # of the evaluation
        loop.train(tiny(), tmp_path, questions=QUESTIONS, eval_questions=QUESTIONS, retriever=retriever, policy=policy)


def test_checkpointing_reads_the_layers_twice_to_the_same_gradient(tokenizer):
    found, made = [], batch_of_eight()
    for checkpointing in (False, True):
        profile = tiny(gradient_checkpointing=checkpointing, **LOSS)
        learner = a_learner(Policy(make_model(544), tokenizer, torch.device("cpu")), profile)
        batch, calls = batch_for(learner, made), []
        learner.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, seen=calls: seen.append(1)
        )
        found.append((*after_update(learner, batch), len(calls)))
    (plain, said, _, once), (checkpointed, says, _, twice) = found
    assert (once, twice) == (1, 2) and plain.abs().max() > 1e-3
    torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-5)
    assert says.pop("value_loss") is said.pop("value_loss") is None
    assert says == pytest.approx(said, rel=1e-5)


def test_checkpointing_costs_the_rollout_no_cache(policy, retriever):
    """In training mode a checkpointed model drops its cache, and writes noise."""
    plain = rollout(policy, QUESTIONS[:2], retriever, tiny())
    profile = tiny(gradient_checkpointing=True)
    learner = loop.Learner(model_to_train(policy, profile), policy, profile)
    learner.model.train()
    assert learner.model.get_base_model().is_gradient_checkpointing
    widths = []
    learner.model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, arguments, output: widths.append(arguments[0].shape[1])
    )
    checkpointed = rollout(dataclasses.replace(policy, model=learner.model), QUESTIONS[:2], retriever, tiny())
    assert [t.completion_ids for t in checkpointed] == [t.completion_ids for t in plain]
    assert widths.count(1) > len(widths) / 2 and learner.model.training


def logits_kept(learner, batch):
    """How many tensors autograd keeps of a `score` call that hold the vocabulary for every learned token."""
    shapes, learned = [], int(batch.mask.sum())
    assert learned > 32  # the head's own weight, transposed, is 32 x vocabulary

    def keep(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropies, _ = score(learner.model, batch)
    assert logprobs.requires_grad and entropies.requires_grad and shapes
    return sum(shape[-1:] == (544,) and shape[:-1].numel() >= learned for shape in map(torch.Size, shapes))


def test_training_keeps_no_logits_over_the_vocabulary(policy, monkeypatch):
    learner = a_learner(policy, tiny())
    batch = batch_for(learner, batch_of_eight())
    assert logits_kept(learner, batch) == 0
    monkeypatch.setattr(score_module, "checkpoint", lambda function, *given, use_reentrant: function(*given))
    assert logits_kept(learner, batch) > 0


def test_logits_are_made_a_part_at_a_time_to_the_same_numbers(policy, monkeypatch):
    learner = a_learner(policy, tiny())
    batch = batch_for(learner, batch_of_eight())
    head, sizes, found = learner.model.get_base_model().lm_head, [], []
    head.register_forward_hook(lambda module, arguments, output: sizes.append(len(arguments[0])))
    for limit in (2**25, 544 * 10, 1):  # all tokens together, ten at a time, one
        monkeypatch.setattr(score_module, "LOGITS", limit)
        sizes.clear()
        logprobs, entropies, _ = score(learner.model, batch)
        assert max(sizes) == max(1, min(int(batch.mask.sum()), limit // 544))
        found.append((logprobs, entropies, gradient((logprobs + entropies).sum(), learner)))
    for others in found[1:]:
        for one, other in zip(others, found[0], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


# The model


def test_the_engine_and_score_agree_on_log_probabilities(policy, retriever):
    profile = tiny(temperature=0.7)
    learner = a_learner(policy, profile)
    made = rollout(dataclasses.replace(policy, model=learner.model), QUESTIONS[:2], retriever, profile, group_size=2)
    batch = collate(made, [0.0] * 4, True)
    with torch.no_grad():
        logprobs, _, _ = score(learner.model, batch, 0.7)
    own = batch.own.bool()
    assert own.sum() > 20 and (batch.sampled_logprobs[own] < 0).all()
    torch.testing.assert_close(logprobs[own], batch.sampled_logprobs[own], atol=1e-4, rtol=0)


def test_the_adapter_is_in_32_bits_on_a_4_bit_base():
    """In bfloat16 small updates would be rounded away."""
    profile = tiny(quantization="nf4", dtype="bfloat16")
    four_bits = load_policy(profile)
    if four_bits.quantization != "nf4":
        pytest.skip("bitsandbytes does not work here")
    learner = loop.Learner(model_to_train(four_bits, profile), four_bits, profile)
    assert {weight.dtype for weight in learner.weights.values()} == {torch.float32}
    assert all("lora_" in name for name in learner.weights)
    assert any(weight.dtype == torch.uint8 for weight in learner.model.parameters())


def outcome(policy):
    """Logits, and the gradients of the adapter's weights."""
    policy.model.zero_grad()
    logits = policy.model(input_ids=IDS).logits.float()
    logits.square().mean().backward()
    return logits.detach(), flat(x.grad for name, x in policy.model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_merged_adapter_computes_what_peft_does_and_leaves_nothing(tmp_path, quantization):
    policy = adapted(tmp_path, quantization, "float32")
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    logits, gradients = outcome(policy)
    with torch.no_grad(), policy.model.disable_adapter():
        base = policy.model(input_ids=IDS).logits
    assert gradients.abs().max() > 1e-3 and (logits - base).abs().max() > 0.1
    with merged_adapter(policy.model):
        assert len(plain_layers(policy)) == 14
        merged, others = outcome(policy)
        with torch.no_grad(), policy.model.disable_adapter():  # as the KL's reference is scored
            torch.testing.assert_close(policy.model(input_ids=IDS).logits, base, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), policy.model.disable_adapter(), merged_adapter(policy.model):
        torch.testing.assert_close(policy.model(input_ids=IDS).logits, base, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(others, gradients, atol=1e-6, rtol=1e-4)
    with pytest.raises(KeyError), merged_adapter(policy.model):
        raise KeyError
    assert plain_layers(policy) == []
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert torch.equal(outcome(policy)[0], logits)


def test_a_merged_adapter_follows_its_weights(tmp_path):
    """They are read in each forward: nothing is old after an update."""
    policy = adapted(tmp_path, "none", "float32")
    with merged_adapter(policy.model):
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.data *= 2
        merged = outcome(policy)[0]
    torch.testing.assert_close(merged, outcome(policy)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_not_merged_with_dropout_or_in_16_bits(tmp_path, dtype):
    policy = adapted(tmp_path, "none", dtype)
    if dtype == "float32":
        plain = policy.model.unload()
        policy.model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    with merged_adapter(policy.model):
        assert plain_layers(policy) == []


# What goes in


def test_a_batch_by_hand():
    def one(prompt, completion, own, logprobs, reason="answer"):
        turns = (Turn("", "answer"),)
        return Trajectory(QUESTIONS[0], prompt, completion, own, logprobs, turns, reason == "answer", reason)

    first = one((5,), (6, 7, 8), (1, 0, 1), (-1.0, 0.0, -3.0))
    lost = one((5, 6), (7,), (1,), (-4.0,), "search failed")
    wrote = [[0, 1, 0, 1], [0, 0, 1, 0]]
    for masked, mask in ((True, [0, 1, 0, 1]), (False, [0, 1, 1, 1])):
        batch = collate([first, lost], [0.5, 1.0], masked)
        assert batch.ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 0]]
        assert batch.lengths.tolist() == [4, 3] and batch.prompts.tolist() == [1, 2]
        assert batch.own.tolist() == wrote
        assert batch.mask.tolist() == batch.valued.tolist() == [mask, [0, 0, 0, 0]]  # nothing of the failed search
        assert batch.sampled_logprobs.tolist() == [[0, -1, 0, -3], [0, 0, -4, 0]]
        assert batch.rewards.tolist() == [0.5, 1.0]
    part = batch.rows([1])
    assert part.ids.tolist() == [[5, 6, 7]] and part.own.tolist() == [[0, 0, 1]] and part.rewards.tolist() == [1.0]
    assert part.old_logprobs is None


def test_nothing_is_learned_from_a_search_that_failed(monkeypatch):
    """Its tokens are masked, and the mean of its group is that of the others."""
    four = [forged(QUESTIONS[n // 4], random.Random(n)) for n in range(8)]
    broken = [failed(t) for t in four]
    monkeypatch.setattr(rewards, "trajectory_reward", lambda t, *rest: float(four.index(t) if t in four else 100))
    mixed = [four[0], broken[1], four[2], four[3], *broken[4:]]
    assert group_rewards(mixed, tiny()) == [0.0, 5 / 3, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    for masked in (True, False):
        mask = collate(mixed, [0.0] * 8, masked).mask
        assert [bool(row.any()) for row in mask] == [True, False, True, True, False, False, False, False]


def test_a_step_counts_searches_that_failed_and_those_answered_from_memory(policy, tmp_path, monkeypatch):
    """A rollout whose retriever drops a query goes on; what is written says so."""
    asked = []

    class Drops:
        def search(self, queries, k):
            asked.extend(queries)
            if "lost" in queries:
                raise QueryRefusedError("not this one")
            return [[] for _ in queries]

    def scripted(policy, questions, retriever, profile, group_size, **_):
        kept = []
        for n, question in enumerate(q for q in questions for _ in range(group_size)):
            t = forged(question, random.Random(n))
            try:
                retriever.search(["lost" if n == 1 else f"found {n % 2}"], 3)
            except QueryRefusedError:
                t = failed(t)
            kept.append(t)
        return kept

    monkeypatch.setattr(steps, "rollout", scripted)
    profile = tiny()
    rollouts = Rollouts(profile, policy, QUESTIONS[:2], loop.cached(Drops()), [], tmp_path)
    loop.fit(model_to_train(policy, profile), policy, rollouts, Recorder(profile, tmp_path, str), None, 0)
    assert asked == ["found 0", "lost", "found 1"]
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (row["failed_searches"], row["cache_hits"]) == (1, 5)


def test_a_step_asks_its_own_questions_with_its_own_random_numbers(policy, tmp_path, monkeypatch, retriever):
    calls = []

    def noted(policy, questions, retriever, profile, *, group_size, seed, sampler):
        calls.append(([question.id for question in questions], group_size, seed, torch.rand(1).item()))
        return []

    monkeypatch.setattr(steps, "rollout", noted)
    rollouts = Rollouts(tiny(steps=2, seed=3), policy, QUESTIONS, retriever, [], tmp_path)
    for step in (0, 1, 0):
        rollouts(step, policy.model)
    assert [call[:3] for call in calls[:2]] == [(["0", "1"], 4, 3_000_009), (["2", "3"], 4, 3_000_010)]
    assert calls[2] == calls[0] and calls[0][3] != calls[1][3]
    assert Rollouts(tiny(seed=2**31), policy, QUESTIONS, retriever, [], tmp_path)(0, policy.model) == []


def test_noise_in_training_follows_its_curriculum(policy, tmp_path, monkeypatch, retriever):
    """What the rollout searches at a step is `Noisy`, of that step's share; without noise there is none."""
    used = []
    monkeypatch.setattr(steps, "rollout", lambda p, q, retriever, *_, **__: used.append(retriever) or [])
    monkeypatch.setattr(steps, "load_corpus", lambda source: retriever.passages)
    for noise in ({}, {"noise_start": 0.1, "noise_end": 0.7, "steps": 100}):
        rollouts = Rollouts(tiny(**noise), policy, QUESTIONS * 50, loop.cached(retriever), [], tmp_path)
        for step in (0, 50):
            rollouts(step, policy.model)
    assert [type(one).__name__ for one in used] == ["Cached", "Cached", "Noisy", "Noisy"]
    assert [one.share for one in used[2:]] == pytest.approx([0.1, 0.3])


def test_the_profile_says_what_is_rewarded():
    answer = QUESTIONS[0].golden_answers[0]
    found = Turn(
        "<search>q</search>", "search", "q", (), f"\n\n<information><answer>{answer}</answer></information>\n\n"
    )
    t = dataclasses.replace(forged(QUESTIONS[0], random.Random(0)), turns=(found,))
    wrong = dataclasses.replace(t, turns=(Turn("<answer>x</answer>", "answer"),))
    assert group_rewards([t, wrong], tiny(group_size=2)) == [0.0, 0.0]
    assert group_rewards([t, wrong], tiny(group_size=2, reward_reads_prompt=True)) == [1.0, 0.0]
    assert group_rewards([t, wrong], tiny(group_size=2, reward="format")) == [0.0, 0.1]
    early, late = (group_rewards([t, wrong], tiny(group_size=2, reward="r1_searcher"), done) for done in (0.0, 1.0))
    assert (early, late) == ([0.5, 0.0], [-2.0, -2.0])


def test_question_order():
    profile = tiny(steps=5)
    order = [question.id for question in question_order(QUESTIONS, profile)]
    assert len(order) == 10 and order == [question.id for question in question_order(QUESTIONS, profile)]
    assert sorted(order[:4]) == sorted(order[4:8]) == ["0", "1", "2", "3"]
    assert order != [question.id for question in question_order(QUESTIONS, tiny(steps=5, seed=1))]
    with pytest.raises(ValueError, match="there are only 1"):
        question_order(QUESTIONS[:1], profile)
    with pytest.raises(ValueError, match="share an id"):
        question_order(QUESTIONS + QUESTIONS, profile)


def test_held_out_questions_are_the_same_for_every_seed():
    asked = held_out(tiny(eval_questions=5))
    assert len(set(asked)) == 5 and held_out(tiny(eval_questions=5, seed=7)) == asked
    trained = loop.load_questions("toy", tiny().train_split)
    assert not {question.id for question in asked} & {question.id for question in trained}


# What comes out


def test_kl_and_entropy_are_those_of_the_policys_own_tokens():
    """Of an unmasked run, too: what was retrieved is learned from, and is nobody's sampling."""
    own, mask = torch.tensor([[0.0, 1, 0, 1], [0, 0, 1, 0]]), torch.tensor([[0.0, 1, 1, 1], [0, 0, 0, 0]])
    logprobs = torch.tensor([[0.0, -1, -2, -3], [0, 0, -9, 0]])
    unused, advantages = torch.zeros(2, 4), torch.ones(2)
    batch = Batch(unused, unused, unused, mask, own, mask, unused, unused, advantages)
    batch.old_logprobs = torch.tensor([[0.0, -1, -3, -3], [0, 0, -1, 0]])  # the retrieved token's ratio is e
    batch.reference_logprobs = logprobs + torch.log(torch.tensor([[1.0, 2, 4, 1], [1, 1, 3, 1]]))
    figures = Figures(tiny(masked=False), torch.device("cpu"))
    entropies = torch.tensor([[0.0, 1, 100, 2], [0, 0, 100, 0]])
    figures.add(batch, logprobs, entropies, torch.tensor(0.25), torch.tensor(0.0))
    figures.add(batch, logprobs, entropies, torch.tensor(0.5), torch.tensor(0.0))
    found = figures.means()
    assert found["kl"] == pytest.approx((2 - torch.tensor(2.0).log().item() - 1) / 2)  # k3: 2 - log 2 - 1, and 0
    assert found["entropy"] == pytest.approx(1.5)
    assert found["clip_ratio"] == pytest.approx(1 / 3)  # of what is learned from
    assert found["ratio_max"] == pytest.approx(2.71828, rel=1e-4)
    assert (found["loss"], found["value_loss"]) == (0.75, None)


def test_rollout_metrics_by_hand():
    def one(question, searches, answer, finished=True):
        turns = (Turn("s", "search", "q", (), "o"),) * searches + (Turn(answer, "answer" if finished else "invalid"),)
        return Trajectory(question, (1,), (1, 2, 3), (1, 0, 1), (0.0,) * 3, turns, finished, "answer")

    right, wrong = "<answer>a</answer>", "<answer>b</answer>"
    first, second = QUESTIONS[:2]  # one hop, two hops
    batch = [one(first, 1, right), one(first, 0, wrong), one(second, 2, wrong), one(second, 2, wrong, False)]
    metrics = rollout_metrics(batch, [1.0, 0.0, 0.0, 0.0], 2)
    assert metrics == {
        "reward": 0.25,
        "exact_match": 0.25,
        "exact_match_by_hops": {"1": 0.5, "2": 0.0},
        "searches": 1.25,
        "searches_by_hops": {"1": 0.5, "2": 2.0},
        "ideal_searches": 1.5,
        "invalid_actions": 0.25,
        "response_length": 2.0,
        "retrieved_tokens": 1.0,
        "answer_rate": 0.75,
        "zero_variance_groups": 0.5,
        "failed_searches": 0,
        "repeated_ngrams": 0.0,
        "right_logprob": None,  # all are 0.0: none was recorded
        "wrong_logprob": None,
    }
    lost = failed(one(second, 4, right))
    without = rollout_metrics([*batch[:3], lost], [1.0, 0.0, 0.0, 0.5], 2)
    assert without == rollout_metrics(batch[:3], [1.0, 0.0, 0.0], 3) | {
        "zero_variance_groups": 0.0,
        "failed_searches": 1,
    }


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_real_profile_runs_on_a_shrunken_model(policy, tmp_path):
    """Everything is loaded from what the profile names, as in the real run; only sizes and places differ."""
    base, files = tmp_path / "base", {"questions": tmp_path / "questions.jsonl", "corpus": tmp_path / "corpus.jsonl"}
    policy.model.save_pretrained(base)
    policy.tokenizer.save_pretrained(base)
    asked = [{"id": str(n), "question": f"Who is {n}?", "golden_answers": ["x"], "metadata": {}} for n in range(40)]
    files["questions"].write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    passages = [{"id": str(n), "contents": f'"T{n}"\nword{n} é'} for n in range(9)]
    files["corpus"].write_text("".join(json.dumps(row) + "\n" for row in passages), encoding="utf-8")
    small = {name: SMALL[name] for name in SMALL if name not in ("chat_template", "max_prompt_tokens")}
    settings = small | {key: str(path) for key, path in files.items()} | {"group_size": 2}
    profile = load_profile("qwen2.5-3b-4bit", model=str(base), retriever="bm25", device="cpu", **settings)
    folder = loop.train(profile, tmp_path / "run", progress=lambda line: None)
    left = {"config.yaml", "environment.json", "metrics.jsonl", "trajectories.jsonl.gz", "evaluation.json", "adapter"}
    assert {path.name for path in folder.iterdir()} >= left
    step = rows(folder / "metrics.jsonl")[0]
    assert step["ideal_searches"] is None and step["exact_match_by_hops"] == {}  # these questions name no hops
    assert step["grad_norm"] > 0 and step["learning_rate"] == profile.learning_rate
    assert step["seconds_rollout"] + step["seconds_training"] == pytest.approx(step["seconds"])
    saved = PeftModel.from_pretrained(policy.model, folder / "adapter")
    weights = {name: x for name, x in saved.named_parameters() if "lora_" in name}
    assert all(x.dtype == torch.float32 for x in weights.values())
    assert any(x.abs().max() > 0 for name, x in weights.items() if "lora_B" in name)
    assert str(base) == json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_context_tokens": 4096}, r"max_context_tokens = 4096, but data/tiny-base reads 2048 tokens at most"),
        ({"lora_target": ["q_proj", "w_proj"]}, "'w_proj': no linear layer has this name; there are .*, o_proj, .*"),
        ({"lora_target": ["proj"]}, "lora_target 'proj': no linear layer"),
        ({"lora_target": ["lm_head", "q_proj"]}, "'lm_head': the trainer reads lm_head without its adapter"),
        ({"lora_target": ".*(head|q_proj)"}, "lm_head without"),
        ({"lora_target": "q_proj"}, "no linear layer"),
        ({"rollout_rows": 7}, "rollout_rows = 7 leaves no room for a group of 8"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_model_loads(settings, says, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_policy", lambda profile: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=says):
        loop.train(load_profile("tiny", **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_profile_that_the_card_cannot_hold_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_policy", lambda profile: pytest.fail("the model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1_500_000_000, 2**33))
    with pytest.raises(ConfigError, match=r"needs 2\.5 GB .* 1\.5 GB are free; the largest part is .* rollout_rows="):
        loop.train(load_profile("tiny", device="auto", rollout_rows=480), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "mlp.up_proj"], r".*\.(q|v)_proj"])
def test_the_layers_that_peft_would_find_are_found(target):
    profile = load_profile("tiny", lora_target=target)
    check_settings(profile)
    get_peft_model(
        load_policy(profile.model_copy(update={"quantization": "none"})).model, LoraConfig(target_modules=target)
    )
