"""The ways side by side: what each is made of, and the command end to end with next to no training."""

import json

import pytest

from searchr1_lite.analysis import table
from searchr1_lite.config import load_profile
from searchr1_lite.evaluation.strategies import STRATEGIES
from searchr1_lite.experiments import methods
from searchr1_lite.experiments.methods import METHODS, instruct_model, profile_of, run_ten_ways
from searchr1_lite.rollouts.protocol import PROMPTS

SMALL = {"quantization": "none", "eval_questions": 3, "steps": 1, "questions_per_step": 2, "group_size": 2, "lora_r": 2}


def test_every_strategy_is_a_way_and_the_table_knows_their_order():
    assert tuple(METHODS) == table.METHODS
    assert {way.strategy for way in METHODS.values()} == {*STRATEGIES, *PROMPTS}
    trained = {name for name, way in METHODS.items() if way.training is not None}
    assert trained == {"sft", "r1_base", "r1_instruct", "rejection_sampling", "search_r1_base", "search_r1_instruct"}
    assert all(METHODS[name].strategy in PROMPTS for name in trained)  # only one trajectory can be trained


def test_a_way_changes_its_own_settings_and_no_others():
    profile = load_profile("tiny", topk=5, seed=4)
    for name, way in METHODS.items():
        its = profile_of(way, profile, "data/tiny-instruct")
        changed = {key for key, value in its.model_dump().items() if value != profile.model_dump()[key]}
        assert changed <= {"strategy", "model", *(way.training or {})}, name
        assert its.model == ("data/tiny-instruct" if name in ("direct", "rag", "r1_instruct") else its.model)
    assert profile_of(METHODS["rejection_sampling"], profile, "x").group_size == 5
    assert profile_of(METHODS["search_r1_base"], profile, "x") == profile


def test_the_instruct_model_has_the_name_of_its_base():
    assert instruct_model("data/tiny-base") == "data/tiny-instruct"
    assert instruct_model("Qwen/Qwen2.5-3B") == "Qwen/Qwen2.5-3B-Instruct"


def test_the_command_trains_asks_and_goes_on(tmp_path, monkeypatch, capsys):
    evaluate, left = methods.evaluate_into, 3

    def dies(*given):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return evaluate(*given)

    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(methods, "evaluate_into", dies)
        run_ten_ways(tmp_path, [0, 1], ["rag", "sft"], **SMALL)
    made = {path: path.read_bytes() for path in tmp_path.rglob("evaluation.json")}
    assert len(made) == 5  # three ways asked, and two trainings
    capsys.readouterr()
    run_ten_ways(tmp_path, [0, 1], ["rag", "sft"], **SMALL)
    said = capsys.readouterr().out
    assert said.count("finished already, nothing to do") == 5 and "seed 1, 2 of 2: sft, exact match greedy" in said
    assert {path: path.read_bytes() for path in made} == made
    for seed in (0, 1):
        result = json.loads((tmp_path / f"seed{seed}/sft/evaluation.json").read_text())
        assert result["adapter"] == str(tmp_path / f"seed{seed}/sft-training/adapter")
        assert (result["strategy"], result["seed"], result["model"]) == ("direct", seed, "data/tiny-base")
        assert result["greedy"]["questions"] == result["sampled"]["questions"] == 3
    record = table.make_record([tmp_path], "")
    assert {way: entry["trained"] for way, entry in record["ways"].items()} == {"rag": False, "sft": True}
    assert record["ways"]["rag"]["model"] == "data/tiny-instruct"
