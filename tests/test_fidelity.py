"""FIDELITY.md: the tests that it names exist, and the lines of the original hold what it says stands there."""

import os
import re
from pathlib import Path

import pytest

from searchr1_lite.config import ROOT, load_profile

PAGE = (ROOT / "FIDELITY.md").read_text(encoding="utf-8")
LINE = re.compile(r"`([\w/.-]+\.(?:py|sh|yaml)):(\d+)` `([^`]+)`")


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_point_says_what_holds_it():
    same = PAGE.partition("## The same")[2].partition("## ")[0]
    rows = [line.strip("|").split("|") for line in same.replace(r"\|", "/").splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    assert [row for row in rows if len(row) != 4 or not all(cell.strip() for cell in row)] == []


def test_the_lines_of_the_original():
    checkout = os.environ.get("SEARCH_R1")
    if not checkout:
        pytest.skip("SEARCH_R1 names no checkout of PeterGriffinJin/Search-R1 to compare with")
    found = LINE.findall(PAGE.replace(r"\|", "|"))
    assert len(found) > 40
    for file, number, text in found:
        line = (Path(checkout) / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert text in line, f"{file}:{number} does not hold {text!r}, but {line.strip()!r}"


LIMITS = {  # setting of the real profile: the original's setting and value
    "max_turns": ("max_turns", 4),
    "max_response_tokens": ("data.max_response_length", 500),
    "max_observation_tokens": ("data.max_obs_length", 500),
    "max_prompt_tokens": ("data.max_start_length", 2048),
    "max_context_tokens": ("data.max_prompt_length", 4096),
    "topk": ("retriever.topk", 3),
    "group_size": ("actor_rollout_ref.rollout.n_agent", 5),
    "temperature": ("actor_rollout_ref.rollout.temperature", 1),
    "beta": ("actor_rollout_ref.actor.kl_loss_coef", 0.001),
    "steps": ("trainer.total_training_steps", 1005),
}


def test_the_real_profile_has_the_limits_of_the_original():
    profile = load_profile("qwen2.5-3b-4bit")
    assert {name: getattr(profile, name) for name in LIMITS} == {name: value for name, (_, value) in LIMITS.items()}
    assert (profile.epsilon, profile.entropy_coef, profile.max_grad_norm) == (0.2, 0.001, 1.0)
    assert profile.warmup_steps == round(0.285 * 1005)
    assert profile.masked and profile.chat_template and profile.reward == "exact_match"


def test_those_limits_stand_in_the_original_script():
    checkout = os.environ.get("SEARCH_R1")
    if not checkout:
        pytest.skip("SEARCH_R1 names no checkout of PeterGriffinJin/Search-R1 to compare with")
    script = (Path(checkout) / "scripts/nq_hotpotqa/v0.2/train_grpo.sh").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\s*([\w.]+)=([\d.e-]+)", script, re.MULTILINE))
    assert {name: float(found[name]) for name, _ in LIMITS.values()} == dict(LIMITS.values())
