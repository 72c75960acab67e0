"""The training command: settings from the shell, each mistake one message."""

import pytest
from conftest import searchr1

from searchr1_lite.config import ROOT
from searchr1_lite.provenance import command as command_typed
from searchr1_lite.provenance import provenance
from searchr1_lite.training import loop


def test_settings_are_read_as_yaml_and_reach_the_profile(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(loop, "train", lambda profile, folder: given.update(profile=profile, folder=folder))
    searchr1("train", "--out", tmp_path, "seed=3", "masked=false", "learning_rate=0.01")
    assert given["folder"] == tmp_path
    assert (given["profile"].seed, given["profile"].masked, given["profile"].learning_rate) == (3, False, 0.01)


@pytest.mark.parametrize(("setting", "message"), [("sead=3", "did you mean seed"), ("seed=three", "seed")])
def test_a_setting_that_cannot_be_is_one_message(monkeypatch, tmp_path, setting, message):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("training started"))
    with pytest.raises(SystemExit, match=message):
        searchr1("train", "--out", tmp_path, setting)


def test_what_a_user_can_put_right_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    (tmp_path / "environment.json").write_text('{"inputs": {}}')
    with pytest.raises(SystemExit, match=r"^error: .*holds another run \("):
        searchr1("train", "--out", tmp_path)
    with pytest.raises(SystemExit, match=r"^error: no questions called 'nowhere'"):
        searchr1("train", "--out", tmp_path, "questions=nowhere")


def test_a_word_without_a_value_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="'masked' is not of the form name=value"):
        searchr1("train", "--out", tmp_path, "masked")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (ROOT / "searchr1_lite/__main__.py", "searchr1 seed=3"),
        (ROOT / ".venv/bin/searchr1", "searchr1 seed=3"),
        (ROOT / "benchmarks/rollout.py", "python benchmarks/rollout.py seed=3"),
        (ROOT / "data/tiny-base/measure.py", "python data/tiny-base/measure.py seed=3"),
        ("/elsewhere/ipykernel_launcher.py", "a notebook"),
        ("/elsewhere/bin/pytest", "pytest seed=3"),
    ],
)
def test_the_command_kept_with_a_run_is_one_that_can_be_typed(monkeypatch, program, said):
    monkeypatch.setattr("sys.argv", [str(program), "seed=3"])
    assert command_typed() == said


def test_a_result_says_how_many_threads_it_had(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert provenance(["torch", "no-such-package"])["machine"]["threads"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    made = provenance(["torch", "no-such-package"])
    assert made["machine"]["threads"] == "all" and made["versions"]["no-such-package"] is None
