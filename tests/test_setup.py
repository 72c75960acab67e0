"""What a newcomer installs: versions written down once, everywhere the same, and really those that run here."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from searchr1_lite.config import ROOT, load_profile, profile_names

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL, *DEV = EXTRAS["dev"]  # whoever develops has what is optional to others
LINES = [
    *PROJECT["dependencies"],
    *(line for name in ("service", "milvus", "documents") for line in EXTRAS[name]),
    *DEV,
]
CHOSEN = [Requirement(line) for line in LINES]


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines), "a package is named twice"
    return {canonicalize_name(name): pin for name, pin in pins.items()}


def test_every_chosen_version_is_exact_and_that_of_the_constraints():
    for requirement in CHOSEN:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert constraints()[canonicalize_name(requirement.name)] == specifier.version, requirement


def test_developers_have_the_extras():
    assert OPTIONAL == "searchr1_lite[service,documents,milvus]"


@pytest.mark.parametrize("module", ["training.loop", "retrieval.index"])
def test_extras_are_imported_by_nothing_else(module):
    """A run without a service needs neither FastAPI nor an HTTP client of ours, and BM25 no FAISS."""
    code = f"import sys, searchr1_lite.{module}; print(*sorted(set(sys.modules) & set(sys.argv[1:])))"
    optional = ["fastapi", "uvicorn", "prometheus_client", "semchunk", "trafilatura"]
    names = ("server", "remote", "online", "documents", "rerank", "milvus")
    optional += [f"searchr1_lite.retrieval.{name}" for name in names]
    optional += ["faiss"] if module == "retrieval.index" else []
    found = subprocess.run([sys.executable, "-c", code, *optional], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_the_versions_installed_are_the_pinned_ones():
    """Of the constraints, other systems may lack a few; the chosen packages must all be there."""
    installed = {canonicalize_name(one.name): one.version.split("+")[0] for one in distributions()}
    wrong = {
        name: installed[name] for name, pin in constraints().items() if name in installed and installed[name] != pin
    }
    assert wrong == {}
    assert {canonicalize_name(requirement.name) for requirement in CHOSEN} <= set(installed)


def test_conda_installs_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert pip == "pip"
    constraint, *pins, project = packages["pip"]
    assert constraint == "--constraint constraints.txt" and project == "--editable ."
    assert sorted(pins) == sorted(str(requirement) for requirement in CHOSEN)
    least = tuple(map(int, re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"]).groups()))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= least


def test_make_installs_from_the_same_files_and_torch_first():
    installs = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line and "$(PY)" in line
    ]
    assert [line.rsplit("--constraint ", 1)[1] for line in installs] == [
        "constraints.txt torch",
        "constraints.txt --editable '.[dev]'",
    ]


def test_the_environment_is_made_again_when_a_version_changes():
    rule = re.search(r"^\$\(READY\): (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(rule[1].split()) == {"pyproject.toml", "constraints.txt"}


def test_ci_runs_what_a_reader_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().strip().endswith("make test")


def test_every_profile_loads():
    assert "tiny" in profile_names()
    for name in profile_names():
        assert load_profile(name).name == name


def committed_files() -> list[Path]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).exists()]


def test_no_committed_file_names_a_folder_of_one_machine():
    folders = [str(ROOT.parent) + "/", str(Path.home()) + "/"]
    patterns = [re.escape(folder).encode() for folder in folders if len(folder) > 2]
    pattern = re.compile(rb"/(?:home|Users)/\w+/|" + b"|".join(patterns))
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in committed_files()
        if (match := pattern.search(path.read_bytes()))
    }
    assert {name: text for name, text in found.items() if name != "tests/test_setup.py"} == {}


def test_no_committed_file_is_large():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in committed_files()}
    large = {name: size for name, size in sizes.items() if size > 3_000_000 and not name.endswith(".safetensors")}
    assert large == {}
