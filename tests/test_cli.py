"""The one command: its help, its settings, its exits, and that no input of a user ends in a traceback."""

import os
import signal
import subprocess
import sys
import time
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.main import get_command

from searchr1_lite import cli
from searchr1_lite.config import ROOT, Profile
from searchr1_lite.errors import UserError

VERBS = ["train", "evaluate", "ask", "experiment", "index", "serve", "report", "export", "memory", "tour"]
INDEX = ["build", "documents", "wiki18", "subset", "measure", "milvus"]
REPORT = ["page", "table", "findings", "runs"]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)
folders = count()


def run(*arguments: str) -> int:
    """The exit code; anything else that is raised is a fault of ours, and fails the test."""
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        if isinstance(stop.code, str):
            assert stop.code.startswith("error: ") and "Traceback" not in stop.code
            return 1
        return int(stop.code or 0)
    return 0


def test_the_verbs_are_these():
    command = get_command(cli.app)
    assert sorted(command.commands) == sorted(VERBS)
    assert sorted(command.commands["index"].commands) == sorted(INDEX)
    assert sorted(command.commands["report"].commands) == sorted(REPORT)


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS), *(["index", v] for v in INDEX), ["report", "page"]])
def test_every_verb_explains_itself(verb, capsys):
    assert run(*verb, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(" ".join(["Usage: searchr1", *verb]))
    sentence = shown.split("\n\n")[1].strip()
    assert len(sentence) > 20 and sentence.endswith(".")


def test_every_option_and_argument_has_a_help_or_says_it_by_its_name():
    command = get_command(cli.app)
    groups = [command, command.commands["index"], command.commands["report"]]
    parameters = [p for group in groups for verb in group.commands.values() for p in verb.params]
    silent = {p.name for p in parameters if not getattr(p, "help", None)}
    assert silent <= {"seed", "port", "install_completion", "show_completion", "help"}


def test_the_shell_can_complete():
    environment = os.environ | {"_SEARCHR1_COMPLETE": "complete_bash", "COMP_WORDS": "searchr1 exp", "COMP_CWORD": "1"}
    program = [sys.executable, "-c", "from searchr1_lite.cli import main; main()"]
    shown = subprocess.run(program, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert shown.stdout.split() == ["experiment", "export"], shown.stderr


def test_settings_are_yaml_and_numbers_a_list():
    values = cli.parse_settings(["seed=3", "learning_rate=1.0e-3", "masked=false", "lora_target=[q_proj]", "model=a=b"])
    assert values == {"seed": 3, "learning_rate": 0.001, "masked": False, "lora_target": ["q_proj"], "model": "a=b"}
    assert cli.parse_settings(None) == {} and cli.parse_numbers("0,12") == [0, 12] and cli.parse_numbers(None) == []
    for wrong in (["seed"], ["=3"], ["seed=[1"]):
        with pytest.raises(UserError):
            cli.parse_settings(wrong)
    with pytest.raises(UserError, match="as 0,1,2"):
        cli.parse_numbers("0 1")


def test_exits_say_who_is_to_act():
    assert run("memory") == 0
    with pytest.raises(SystemExit, match=r"^error: (.|\n)*did you mean seed\?"):
        cli.main(["memory", "sed=3"])
    assert run("memory", "--no-such-option") == 2
    assert run("nonsense") == 2


def test_a_fault_of_ours_shows_its_traceback(monkeypatch):
    def broken(name, **values):
        raise KeyError("a fault")

    monkeypatch.setattr("searchr1_lite.config.load_profile", broken)
    with pytest.raises(KeyError):
        cli.main(["memory"])


def test_ctrl_c_says_that_the_command_goes_on_later(tmp_path):
    command = [sys.executable, "-m", "searchr1_lite", "train", "--out", str(tmp_path / "run"), "steps=500"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(Profile.model_fields)), TEXT, max_size=3))
def test_no_settings_end_in_a_traceback(values):
    assert run("memory", *(f"{name}={value}" for name, value in values.items())) in (0, 1)


@FUZZ
@given(st.sampled_from(["retriever", "reward", "lora_target", "questions", "corpus", "model", "encoder"]), TEXT)
def test_no_named_thing_ends_in_a_traceback(tmp_path, name, value):
    """Each is looked up before anything long begins; the training itself is not what this tests."""
    arguments = ["evaluate", "--out", str(tmp_path / str(next(folders))), "eval_questions=1", "--decoding", "greedy"]
    assert run(*arguments, f"{name}={value}") in (0, 1)


@FUZZ
@given(st.binary(max_size=60) | TEXT.map(str.encode), st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".parquet", ""]))
def test_no_file_ends_in_a_traceback(tmp_path, content, ending):
    out = str(tmp_path / f"out{next(folders)}")
    file = tmp_path / f"file{next(folders)}{ending}"
    file.write_bytes(content)
    for arguments in (
        ["index", "build", str(file), "--out", out],
        ["index", "documents", str(file), "--out", out],
        ["index", "subset", str(file), str(file), "--out", out],
        ["index", "measure", str(file), str(file), "--out", out],
        ["export", str(file), "--out", out],
        ["report", "page", str(file), "--out", out],
        ["report", "table", str(file), "--out", out],
        ["report", "findings", str(file), "--out", out],
        ["report", "runs", str(file), "--out", out],
        ["experiment", str(file)],
        ["memory", "--profile", str(file)],
        ["ask", "Who?", "--adapter", str(file)],
        ["serve", str(file)],
    ):
        assert run(*arguments) in (1, 2), arguments
