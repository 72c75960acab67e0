"""The front of the package, and the one direction of its imports (docs/architecture.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import searchr1_lite
from searchr1_lite.config import ROOT

PACKAGE = ROOT / "searchr1_lite"
# each imports from what stands before it; what stands on one line imports nothing of each other
ORDER = """
errors printable
types files plugins
config
provenance runfolder
tasks
retrieval
rollouts
memory evaluation
preflight
analysis
training
lab
experiments tour
cli
__main__
""".strip().splitlines()
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line.split()}
ANALYSIS_READS = ("errors", "printable", "types", "files", "config", "provenance", "runfolder", "analysis")
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.stem != "__init__")


def imported(module: str) -> Iterator[str]:
    """The package's modules that a file imports anywhere in it, without the package's name."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if (ROOT / node.module.replace(".", "/")).is_dir():  # from searchr1_lite.training import losses
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("searchr1_lite.") for name in names if name.startswith("searchr1_lite."))


def room(module: str) -> str:
    return module.removesuffix(".py").replace("/", ".").split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    here = room(module)
    wrong = [name for name in imported(module) if room(name) != here and RANK[room(name)] >= RANK[here]]
    assert wrong == []


@pytest.mark.parametrize("here", sorted({room(module) for module in MODULES if "/" in module}))
def test_no_room_has_a_circle_of_imports(here):
    within = {
        module.removesuffix(".py").replace("/", "."): {name for name in imported(module) if room(name) == here}
        for module in MODULES
        if room(module) == here
    }
    while free := [name for name, needs in within.items() if not needs & within.keys()]:
        for name in free:
            del within[name]
    assert within == {}


def test_analysis_reads_results_and_judges_answers_and_needs_nothing_else():
    allowed = (*ANALYSIS_READS, "tasks.answers", "evaluation.metrics", "rollouts.protocol")
    for module in (module for module in MODULES if room(module) == "analysis"):
        assert [name for name in imported(module) if name not in allowed and room(name) not in ANALYSIS_READS] == []


@pytest.mark.parametrize("what", ["analysis", "cli"])
def test_reports_and_help_load_no_torch(what):
    names = [f"searchr1_lite.{m.removesuffix('.py').replace('/', '.')}" for m in MODULES if room(m) == what]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_front_has_what_most_people_need():
    from searchr1_lite import load_policy, load_profile, load_questions, load_retriever, load_run, rollout, train

    front = (load_policy, load_profile, load_questions, load_retriever, load_run, rollout, train)
    assert [function.__name__ for function in front] == searchr1_lite.__all__
    assert all(callable(function) and function.__doc__ for function in front)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = searchr1_lite.nonsense


def test_no_other_parser_of_arguments_is_left():
    for module in MODULES:
        text = Path(PACKAGE / module).read_text(encoding="utf-8")
        assert "argparse" not in text and ("typer" not in text or module == "cli.py"), module
