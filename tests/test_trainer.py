"""TRL's loss and gradient against the hand-written ones, and what goes into and comes out of a training run."""

import dataclasses
import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from trl import GRPOTrainer

from searchr1_lite.config import ConfigError, load_profile
from searchr1_lite.rollout.engine import rollout
from searchr1_lite.rollout.policy import load_policy
from searchr1_lite.rollout.trajectory import Trajectory, Turn
from searchr1_lite.training import masked_trainer
from searchr1_lite.training import trainer as trainer_module
from searchr1_lite.training.objective import (
    group_advantages,
    grpo_loss,
    k3_kl,
    masked_mean,
    token_entropies,
    token_logprobs,
)
from searchr1_lite.training.recording import Recorder, rollout_metrics
from searchr1_lite.types import QueryRefusedError, Question

QUESTIONS = [Question(str(n), f"What is {n}?", ("a",), {"hops": 1 + n % 2}) for n in range(4)]
SMALL = {
    "questions_per_step": 2,
    "group_size": 4,
    "micro_batch_tokens": 100_000,
    "steps": 1,
    "eval_questions": 2,
    "max_turns": 1,
    "max_response_tokens": 8,
    "max_prompt_tokens": 1000,
    "max_context_tokens": 2500,
    "chat_template": False,
}


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


@pytest.fixture
def forge(monkeypatch):
    """Rollouts are made up, so that the loss can be computed beside the trainer; they are left in the list."""
    made = []

    def rollout(policy, questions, retriever, profile, *, group_size, seed, writer):
        generator = random.Random(1)
        made.extend(forged(question, generator) for question in questions for _ in range(group_size))
        return list(made)

    monkeypatch.setattr(trainer_module, "rollout", rollout)
    return made


def an_update(policy, tmp_path, profile):
    """A trainer whose adapter has moved away from the base, and the rows of its first update."""
    trainer = trainer_module.build_trainer(profile, tmp_path, policy, QUESTIONS[:2], None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    move(trainer, 0)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer, inputs


def move(trainer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter(trainer):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def adapter(trainer):
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def gradient(loss, trainer):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, adapter(trainer))])


def by_hand(trainer, inputs, made, profile, metrics=None):
    """The loss of the same update from the trajectories, full logits and objective.py; its means into `metrics`."""
    advantages = group_advantages(torch.tensor([float("<answer>a" in t.policy_text) for t in made]), 4)
    assert len(set(advantages.tolist())) > 2
    logits, ids, mask, chosen, old, reference = ([] for _ in range(6))
    for row, completion in enumerate(inputs["completion_ids"].tolist()):
        index = next(n for n, t in enumerate(made) if completion[: len(t.completion_ids)] == list(t.completion_ids))
        t, width = made[index], len(completion)
        chosen.append(advantages[index])
        whole = torch.tensor([[*t.prompt_ids, *completion]])
        seen = slice(len(t.prompt_ids) - 1, -1)
        logits.append(trainer.model(whole).logits[0, seen] / profile.temperature)
        with torch.no_grad(), trainer.model.disable_adapter():
            base = trainer.model(whole).logits[0, seen] / profile.temperature
        ids.append(torch.tensor(completion))
        reference.append(token_logprobs(base, ids[-1]))
        trained_on = t.loss_mask if profile.masked else [1] * len(t.loss_mask)
        mask.append(torch.tensor([*trained_on, *[0] * (width - len(trained_on))]))
        if "old_per_token_logps" in inputs:
            old.append(inputs["old_per_token_logps"][row])
    logits, ids, mask, chosen, reference = (torch.stack(x) for x in (logits, ids, mask, chosen, reference))
    old = torch.stack(old) if old else None
    if metrics is not None:
        logprobs = token_logprobs(logits, ids)
        ratio, sign = (logprobs - (logprobs if old is None else old)).exp(), chosen.unsqueeze(1)
        clipped = ((ratio < 1 - profile.epsilon) & (sign < 0)) | ((ratio > 1 + profile.epsilon) & (sign > 0))
        metrics["kl"] = masked_mean(k3_kl(logprobs, reference), mask).item()
        metrics["entropy"] = masked_mean(token_entropies(logits), mask).item()
        metrics["clip_ratio/region_mean"] = masked_mean(clipped.float(), mask).item()
    options = {"epsilon": profile.epsilon, "beta": profile.beta, "entropy_coef": profile.entropy_coef}
    return grpo_loss(logits, ids, mask, chosen, old, reference, **options)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("updates", [1, 2])
def test_trl_computes_the_hand_written_loss_and_gradient(policy, tmp_path, forge, masked, updates):
    profile = tiny(masked=masked, updates_per_rollout=updates, beta=0.04, entropy_coef=0.01, temperature=0.8)
    trainer, inputs = an_update(policy, tmp_path, profile)
    assert ("old_per_token_logps" in inputs) == (updates == 2)
    move(trainer, 1)  # so that with old log-probabilities the ratio is not 1 and some tokens are clipped
    loss, expected = trainer.compute_loss(trainer.model, inputs), by_hand(trainer, inputs, forge, profile)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    one, other = gradient(loss, trainer), gradient(expected, trainer)
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    without = by_hand(trainer, inputs, forge, profile.model_copy(update={"masked": not masked}))
    assert (gradient(without, trainer) - one).abs().max() > 0.1 * one.abs().max()


@pytest.mark.parametrize("masked", [True, False])
def test_no_gradient_where_the_model_did_not_write(policy, tmp_path, forge, masked):
    """The last hidden state of a position feeds nothing but that position's prediction."""
    alone = tiny(masked=masked, micro_batch_tokens=1)  # a state holds one trajectory, trimmed to its length
    trainer, inputs = an_update(policy, tmp_path, alone)
    states = []
    norm = trainer.model.get_base_model().model.norm
    handle = norm.register_forward_hook(lambda module, args, output: states.append(output))
    loss = trainer.compute_loss(trainer.model, inputs)
    handle.remove()
    lengths = inputs["completion_mask"].sum(dim=1).tolist()
    seen = [row[:length].tolist() for row, length in zip(inputs["completion_ids"], lengths, strict=True)]
    batch = [next(t for t in forge if ids == [*t.completion_ids, policy.tokenizer.eos_token_id]) for ids in seen]
    batch.sort(key=lambda t: -len(t.prompt_ids) - len(t.completion_ids))
    for t, gradient in zip(batch, torch.autograd.grad(loss, states), strict=True):
        size = gradient[0, len(t.prompt_ids) - 1 :].abs().sum(dim=-1)  # of the states that predict the completion
        own = torch.tensor(t.loss_mask).bool()
        size, end = size[: len(own)], size[len(own) :]
        assert (size[own] > 0).all()
        assert (size[~own] == 0).all() == masked
        assert (end == 0).all()  # the end token, which nobody wrote, and what comes after it


def test_trimming_changes_nothing_that_counts(policy, tmp_path, forge):
    trainer, inputs = an_update(policy, tmp_path, tiny())
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    ids, attention = (torch.nn.functional.pad(x, (3, 5)) for x in (ids, attention))
    counts = torch.nn.functional.pad(inputs["completion_mask"], (0, 5)).bool()
    for tokens in (1, 100, 100_000):
        trainer.settings = tiny(micro_batch_tokens=tokens)
        arguments = (trainer.model, ids, attention, counts.shape[1])
        ours = trainer._get_per_token_logps_and_entropies(*arguments, compute_entropy=True)
        theirs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, *arguments, compute_entropy=True)
        for one, other in zip(ours[:2], theirs[:2], strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one[counts], other[counts], atol=1e-5, rtol=1e-5)


def test_what_prompts_share_is_read_once_to_the_same_loss_and_gradient(policy, tmp_path, forge, monkeypatch):
    monkeypatch.setattr(masked_trainer, "LEAST_SHARED", 10**9)
    common, single = tuple(range(20, 60)), forged
    prompts = {"0": 2, "1": 7}  # tokens of its own that each question's prompt has

    def with_a_common_beginning(question, generator):
        own = tuple(range(100, 100 + prompts[question.id]))
        return dataclasses.replace(single(question, generator), prompt_ids=common + own)

    monkeypatch.setitem(globals(), "forged", with_a_common_beginning)
    trainer, inputs = an_update(policy, tmp_path, tiny(beta=0.04, entropy_coef=0.01))
    expected = by_hand(trainer, inputs, forge, trainer.settings)
    whole, wanted = trainer.compute_loss(trainer.model, inputs), gradient(expected, trainer)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(masked_trainer, "LEAST_SHARED", 16)
    read = []
    embed = trainer.model.get_base_model().model.embed_tokens
    handle = embed.register_forward_hook(lambda module, arguments, output: read.append(tuple(arguments[0].shape)))
    shared = trainer.compute_loss(trainer.model, inputs)
    handle.remove()
    width = inputs["prompt_ids"].size(1) + inputs["completion_ids"].size(1)
    assert read == [(1, 41), (8, width - 41)]  # the 40 and the first of each question's own
    torch.testing.assert_close(shared, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient(shared, trainer), wanted, atol=1e-6, rtol=1e-4)


@given(st.data())
def test_shared_prefix_is_what_all_rows_begin_with(data):
    keep = data.draw(st.integers(1, 3))
    size = st.lists(st.integers(1, 3), min_size=1, max_size=6)
    rows = data.draw(st.lists(size, min_size=1, max_size=4))
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row + [9] * keep for row in rows])
    mask = (ids > 0).long()
    common = 0
    while len(rows) > 1 and all(common < len(row) - 1 and row[common] == rows[0][common] for row in rows):
        common += 1
    assert masked_trainer.shared_prefix(ids, mask, keep) == common


@pytest.mark.parametrize("updates", [1, 2])
def test_how_memory_is_split_does_not_change_what_is_learned(policy, tmp_path, forge, updates):
    """One part, several, or a row each: the loss, gradient and metrics of the whole update."""
    settings = {"updates_per_rollout": updates, "beta": 0.04, "entropy_coef": 0.01, "max_grad_norm": 1e9}
    trainer, inputs = an_update(policy, tmp_path, tiny(**settings))
    assert len(inputs["completion_ids"]) == 8 // updates
    move(trainer, 1)
    trainer._prepare_inputs = lambda batch: batch
    metrics = {}
    expected = by_hand(trainer, inputs, forge, trainer.settings, metrics)
    assert metrics["kl"] > 1e-3 and (metrics["clip_ratio/region_mean"] > 0) == (updates == 2)
    wanted = gradient(expected, trainer)
    sizes = []
    handle = trainer.model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, arguments, output: sizes.append(arguments[0].shape)
    )
    for tokens, least, most in ((100_000, 1, 1), (100, 2, 3), (1, 8 // updates, 8 // updates)):
        trainer.settings = tiny(**settings, micro_batch_tokens=tokens)
        trainer._metrics["train"].clear()
        trainer.model.zero_grad()
        sizes.clear()
        loss = trainer.training_step(trainer.model, inputs)
        assert least <= len(sizes) <= most and all(rows == 1 or rows * width <= tokens for rows, width in sizes)
        torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-5)
        ours = torch.cat([parameter.grad.flatten() for parameter in adapter(trainer)])
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-4)
        noted = trainer._metrics["train"]
        assert {name: [pytest.approx(value, abs=1e-6)] for name, value in metrics.items()} == {
            name: noted[name] for name in metrics
        }
    handle.remove()
    assert trainer._step == 3


def test_nothing_to_learn_from_is_no_gradient(policy, tmp_path, forge):
    trainer, inputs = an_update(policy, tmp_path, tiny(micro_batch_tokens=80))
    trainer._prepare_inputs = lambda batch: batch | {"tool_mask": torch.zeros_like(batch["tool_mask"])}
    assert trainer.training_step(trainer.model, inputs) == 0
    assert all((parameter.grad == 0).all() for parameter in adapter(trainer))
    assert trainer._metrics["train"]["kl"] == trainer._metrics["train"]["entropy"] == [0.0]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 300)), min_size=1, max_size=20), st.integers(1, 2000))
def test_parts_hold_every_row_once_and_no_more_than_fits(lengths, tokens):
    prompts, completions = zip(*lengths, strict=True)
    parts = masked_trainer.split_rows(prompts, completions, tokens)
    assert sorted(row for rows in parts for row in rows) == list(range(len(lengths)))
    for rows in parts:
        width = max(prompts[row] for row in rows) + max(completions[row] for row in rows)
        assert len(rows) == 1 or len(rows) * width <= tokens
    order = [sum(lengths[row]) for rows in parts for row in rows]
    assert order == sorted(order, reverse=True)


def test_parts_by_hand():
    assert masked_trainer.split_rows([2, 2, 2, 2], [8, 3, 30, 3], 19) == [[2], [0], [1, 3]]
    assert masked_trainer.split_rows([2, 2, 2, 2], [8, 3, 30, 3], 20) == [[2], [0, 1], [3]]
    assert masked_trainer.split_rows([1, 9], [9, 1], 20) == [[0], [1]]  # together they would be 18 wide


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore to read")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_memory_for_training_names_the_settings(policy, tmp_path, forge, monkeypatch, checkpointing):
    profile = tiny(micro_batch_tokens=512, gradient_checkpointing=checkpointing)
    trainer = trainer_module.build_trainer(profile, tmp_path, policy, QUESTIONS[:2], None)
    monkeypatch.setattr(policy.model.model, "forward", out_of_memory)
    with pytest.raises(
        masked_trainer.MemoryFullError, match=r"in the training: lower micro_batch_tokens \(it is 512\)"
    ) as raised:
        trainer.train()
    assert ("gradient_checkpointing is off" in str(raised.value)) != checkpointing
    assert str(raised.value).endswith("(CUDA out of memory. Tried to allocate 2 GiB.)")


def test_no_memory_for_the_rollout_names_the_settings(policy, tmp_path, retriever, monkeypatch):
    says = r"in the rollout: lower rollout_rows \(it is 64\) or max_context_tokens \(it is 2500\)"
    trainer = trainer_module.build_trainer(tiny(), tmp_path, policy, QUESTIONS[:2], retriever)
    monkeypatch.setattr(policy.model.model, "forward", out_of_memory)
    with pytest.raises(masked_trainer.MemoryFullError, match=says):
        trainer.train()
    with pytest.raises(masked_trainer.MemoryFullError, match=says):  # of the evaluation
        trainer_module.train(
            tiny(), tmp_path, questions=QUESTIONS, eval_questions=QUESTIONS, retriever=retriever, policy=policy
        )


def test_checkpointing_costs_the_rollout_no_cache(policy, tmp_path, retriever):
    """In training mode a checkpointed model drops its cache, and writes noise."""
    plain = rollout(policy, QUESTIONS[:2], retriever, tiny())
    trainer = trainer_module.build_trainer(tiny(), tmp_path, policy, QUESTIONS[:2], retriever)
    trainer.model.get_base_model().gradient_checkpointing_enable()  # as the trainer does when it starts
    trainer.model.train()
    widths = []
    handle = trainer.model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, arguments, output: widths.append(arguments[0].shape[1])
    )
    checkpointed = rollout(dataclasses.replace(policy, model=trainer.model), QUESTIONS[:2], retriever, tiny())
    handle.remove()
    assert [t.completion_ids for t in checkpointed] == [t.completion_ids for t in plain]
    assert widths.count(1) > len(widths) / 2 and trainer.model.training


def test_training_makes_no_logits_over_the_vocabulary(policy, tmp_path, forge):
    trainer, inputs = an_update(policy, tmp_path, tiny())
    called = []
    trainer.model.get_base_model().lm_head.register_forward_hook(lambda *_: called.append(1))
    trainer.compute_loss(trainer.model, inputs).backward()
    assert not called


def test_the_engine_and_the_trainer_agree_on_log_probabilities(policy, tmp_path, retriever):
    profile = tiny(temperature=0.7)
    trainer = trainer_module.build_trainer(profile, tmp_path, policy, QUESTIONS[:2], retriever)
    move(trainer, 0)
    trajectories = rollout(dataclasses.replace(policy, model=trainer.model), QUESTIONS[:2], retriever, profile)
    for t in trajectories:
        ids = torch.tensor([[*t.prompt_ids, *t.completion_ids]])
        with torch.no_grad():
            scored = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), len(t.completion_ids)
            )[0][0]
        own = torch.tensor(t.loss_mask).bool()
        torch.testing.assert_close(scored[own], torch.tensor(t.logprobs)[own], atol=1e-4, rtol=0)


def test_the_adapter_is_in_32_bits_on_a_4_bit_base(tmp_path):
    """TRL casts it to bfloat16 there, in which small updates are rounded away."""
    profile = tiny(quantization="nf4")
    four_bits = load_policy(profile)
    if four_bits.quantization != "nf4":
        pytest.skip("bitsandbytes does not work here")
    trainer = trainer_module.build_trainer(profile, tmp_path, four_bits, QUESTIONS[:2], None)
    assert {parameter.dtype for parameter in adapter(trainer)} == {torch.float32}
    assert any(parameter.dtype == torch.uint8 for parameter in trainer.model.parameters())


def test_columns_for_trl():
    t = forged(QUESTIONS[0], random.Random(0))
    unfinished = dataclasses.replace(t, finished=False, stop_reason="turns")
    masked = trainer_module.trl_columns([t, unfinished], True, 7)
    unmasked = trainer_module.trl_columns([t, unfinished], False, 7)
    assert masked["completion_ids"] == [[*t.completion_ids, 7], list(t.completion_ids)]
    assert masked["env_mask"] == [[*t.loss_mask, 0], list(t.loss_mask)]
    assert unmasked["env_mask"] == [[1] * len(t.loss_mask) + [0], [1] * len(t.loss_mask)]
    assert [len(x) for x in masked["logprobs"]] == [len(x) for x in masked["completion_ids"]]


def test_nothing_is_learned_from_a_search_that_failed(monkeypatch):
    """Its tokens are masked, and the mean of its group is that of the others."""
    four = [forged(QUESTIONS[n // 4], random.Random(n)) for n in range(8)]
    failed = [dataclasses.replace(t, stop_reason="search failed", finished=False) for t in four]
    monkeypatch.setattr(trainer_module, "_reward", lambda t, *rest: float(four.index(t) if t in four else 100))
    mixed = [four[0], failed[1], four[2], four[3], *failed[4:]]
    assert trainer_module.group_rewards(mixed, tiny()) == [0.0, 5 / 3, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    for masked in (True, False):
        columns = trainer_module.trl_columns(mixed, masked, 7)
        assert [any(row) for row in columns["env_mask"]] == [True, False, True, True, False, False, False, False]


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
                t = dataclasses.replace(t, stop_reason="search failed", finished=False)
            kept.append(t)
        return kept

    monkeypatch.setattr(trainer_module, "rollout", scripted)
    recorder = Recorder(tiny(), tmp_path)
    roll = trainer_module.make_rollout_func(tiny(), policy, QUESTIONS[:2], Drops(), recorder)
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=0),
        model=policy.model,
        accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=True),
    )
    columns = roll([q.id for q in QUESTIONS[:2] for _ in range(4)], trainer)
    assert asked == ["found 0", "lost", "found 1"]
    assert (recorder.rollouts["failed_searches"], recorder.rollouts["cache_hits"]) == (1, 5)
    assert [any(row) for row in columns["env_mask"]] == [True, False, *[True] * 6]


def test_noise_in_training_follows_its_curriculum(policy, tmp_path, monkeypatch, retriever):
    """What the rollout searches at a step is `Noisy`, of that step's share; without noise there is none."""
    used = []
    batch = [forged(question, random.Random(1)) for question in QUESTIONS[:2] for _ in range(4)]
    monkeypatch.setattr(trainer_module, "rollout", lambda p, q, retriever, *_, **__: used.append(retriever) or batch)
    monkeypatch.setattr(trainer_module, "load_corpus", lambda source: retriever.passages)
    for noise in ({}, {"noise_start": 0.1, "noise_end": 0.7, "steps": 100}):
        roll = trainer_module.make_rollout_func(
            tiny(**noise), policy, QUESTIONS[:2], retriever, Recorder(tiny(), tmp_path)
        )
        for step in (0, 50):
            accelerator = SimpleNamespace(autocast=nullcontext, is_main_process=True)
            state = SimpleNamespace(global_step=step)
            trainer = SimpleNamespace(state=state, model=policy.model, accelerator=accelerator)
            roll([q.id for q in QUESTIONS[:2] for _ in range(4)], trainer)
    assert [type(one).__name__ for one in used] == ["Cached", "Cached", "Noisy", "Noisy"]
    assert [one.share for one in used[2:]] == pytest.approx([0.1, 0.3])


def test_the_profile_says_what_is_rewarded():
    answer = QUESTIONS[0].golden_answers[0]
    found = Turn(
        "<search>q</search>", "search", "q", (), f"\n\n<information><answer>{answer}</answer></information>\n\n"
    )
    t = dataclasses.replace(forged(QUESTIONS[0], random.Random(0)), turns=(found,))
    assert trainer_module._reward(t, tiny()) == 0.0
    assert trainer_module._reward(t, tiny(reward_reads_prompt=True)) == 1.0
    assert (
        trainer_module._reward(
            dataclasses.replace(t, turns=(Turn("<answer>x</answer>", "answer"),)), tiny(reward="format")
        )
        == 0.1
    )


def test_question_order():
    profile = tiny(steps=5)
    order = [question.id for question in trainer_module.question_order(QUESTIONS, profile)]
    assert len(order) == 10 and order == [question.id for question in trainer_module.question_order(QUESTIONS, profile)]
    assert sorted(order[:4]) == sorted(order[4:8]) == ["0", "1", "2", "3"]
    assert order != [question.id for question in trainer_module.question_order(QUESTIONS, tiny(steps=5, seed=1))]
    with pytest.raises(ValueError, match="there are only 1"):
        trainer_module.question_order(QUESTIONS[:1], profile)
    with pytest.raises(ValueError, match="share an id"):
        trainer_module.question_order(QUESTIONS + QUESTIONS, profile)


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
    failed = dataclasses.replace(one(second, 4, right), stop_reason="search failed", finished=False)
    without = rollout_metrics([*batch[:3], failed], [1.0, 0.0, 0.0, 0.5], 2)
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
    profile = load_profile(
        "qwen2.5-3b-4bit",
        model=str(base),
        retriever="bm25",
        device="cpu",
        steps=1,
        warmup_steps=0,  # else the first step has learning rate 0
        questions_per_step=2,
        group_size=2,
        max_turns=1,
        max_response_tokens=8,
        max_context_tokens=2500,
        eval_questions=2,
        **{key: str(path) for key, path in files.items()},
    )
    folder = trainer_module.train(profile, tmp_path / "run", progress=lambda line: None)
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "trajectories.jsonl.gz",
        "evaluation.json",
        "adapter",
    }
    step = rows(folder / "metrics.jsonl")[0]
    assert step["ideal_searches"] is None and step["exact_match_by_hops"] == {}  # these questions name no hops
    assert step["grad_norm"] > 0 and step["seconds_rollout"] < step["seconds"]
    saved = PeftModel.from_pretrained(policy.model, folder / "adapter")
    weights = {name: x for name, x in saved.named_parameters() if "lora_" in name}
    assert all(x.dtype == torch.float32 for x in weights.values())
    assert any(x.abs().max() > 0 for name, x in weights.items() if "lora_B" in name)
    assert str(base) == json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_context_tokens": 4096}, r"max_context_tokens = 4096, but data/tiny-base reads 2048 tokens at most"),
        (
            {"lora_target": ["q_proj", "w_proj"]},
            "'w_proj': no linear layer has this name; there are .*, o_proj, .*",
        ),
        ({"lora_target": ["proj"]}, "lora_target 'proj': no linear layer"),
        (
            {"lora_target": ["lm_head", "q_proj"]},
            "'lm_head': the trainer reads lm_head without its adapter",
        ),
        ({"lora_target": ".*(head|q_proj)"}, "lm_head without"),
        ({"lora_target": "q_proj"}, "no linear layer"),
        ({"rollout_rows": 7}, "rollout_rows = 7 leaves no room for a group of 8"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_model_loads(settings, says, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "load_policy", lambda profile: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=says):
        trainer_module.train(load_profile("tiny", **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_profile_that_the_card_cannot_hold_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "load_policy", lambda profile: pytest.fail("the model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1_500_000_000, 2**33))
    with pytest.raises(ConfigError, match=r"needs 2\.5 GB .* 1\.5 GB are free; the largest part is .* rollout_rows="):
        trainer_module.train(load_profile("tiny", device="auto", rollout_rows=480), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "mlp.up_proj"], r".*\.(q|v)_proj"])
def test_the_layers_that_peft_would_find_are_found(target):
    profile = load_profile("tiny", lora_target=target)
    trainer_module.check_settings(profile)
    get_peft_model(
        load_policy(profile.model_copy(update={"quantization": "none"})).model, LoraConfig(target_modules=target)
    )
