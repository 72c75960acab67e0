"""What every notebook must be: executed top to bottom, small, run by parameters, and the same code as the package."""

import ast
import logging
import re
import shutil
from functools import cache
from pathlib import Path

import nbformat
import papermill
import pytest
from synthetic_runs import write_run

from searchr1_lite.config import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST_FOUR = ["01_corpus_indexing", "02_rollout_with_search", "03_masked_grpo_lora", "04_length_and_search_analysis"]
BUILDS_FUNCTIONS = FIRST_FOUR[:3]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def definitions(source: str) -> dict[str, str]:
    """Top-level functions and classes as a dump that ignores layout, comments and where they stand."""
    kinds = ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef
    return {node.name: ast.dump(node) for node in ast.parse(source).body if isinstance(node, kinds)}


@cache
def package_definitions() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "searchr1_lite").rglob("*.py"):
        for name, dump in definitions(path.read_text(encoding="utf-8")).items():
            found.setdefault(name, set()).add(dump)
    return found


def test_the_four_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} >= set(FIRST_FOUR)


@each_notebook
def test_it_is_executed_top_to_bottom_without_error(path):
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [output for cell in cells for output in cell.outputs if output.output_type == "error"] == []


@each_notebook
def test_it_is_small_and_holds_nothing_that_breaks_its_display(path):
    assert path.stat().st_size < 500_000
    metadata = nbformat.read(path, as_version=4).metadata
    assert metadata.kernelspec.name == "python3"
    assert "widgets" not in metadata and "papermill" not in metadata
    assert max(len(cell.source.splitlines()) for cell in code_cells(path)) <= 60


@each_notebook
def test_no_cell_is_kept_from_being_tested(path):
    for cell in code_cells(path):
        marks = re.findall(r"^#\s*(NBVAL_\w+)", cell.source, re.MULTILINE)
        assert set(marks) <= {"NBVAL_CHECK_OUTPUT", "NBVAL_IGNORE_OUTPUT"}
        assert not {"nbval-skip", "raises-exception", "skip-execution"} & set(cell.metadata.get("tags", []))


@each_notebook
def test_chosen_outputs_are_checked(path):
    marked = [cell for cell in code_cells(path) if "# NBVAL_CHECK_OUTPUT" in cell.source.splitlines()]
    assert marked
    assert all(cell.outputs for cell in marked), "a checked cell without output checks nothing"


@each_notebook
def test_its_parameters_are_ones_that_papermill_reads(path, caplog):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assigned = [
        node.targets[0].id if isinstance(node, ast.Assign) else node.target.id
        for node in ast.parse(tagged[0].source).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    with caplog.at_level(logging.WARNING):
        seen = papermill.inspect_notebook(path)
    assert list(seen) == assigned != []
    assert all(parameter["help"] for parameter in seen.values()), "every parameter has a comment that says what it is"


@each_notebook
def test_what_it_defines_is_what_the_package_defines(path):
    source = "\n\n".join(cell.source for cell in code_cells(path))
    shared = {name: dump for name, dump in definitions(source).items() if name in package_definitions()}
    drifted = [name for name, dump in shared.items() if dump not in package_definitions()[name]]
    assert drifted == []
    if path.stem in BUILDS_FUNCTIONS:
        assert shared, "no core function of the package is built here"


def test_the_analysis_reads_one_run_over_questions_without_hops(tmp_path):
    write_run(tmp_path / "one", hops=(), steps=3)
    source, out = ROOT / "notebooks" / "04_length_and_search_analysis.ipynb", tmp_path / "out.ipynb"
    parameters = {"runs": str(tmp_path / "one")}
    papermill.execute_notebook(source, out, parameters, kernel_name="python3", progress_bar=False)
    printed = "".join(output.get("text", "") for cell in code_cells(out) for output in cell.outputs)
    assert "one: masked, seed 0, 3 steps\ntorch in memory: False" in printed
    assert "masked, 1 run: from 0.10 to 0.30" in printed
    assert "there is nothing to compare" in printed


def printed_by(notebook: Path) -> str:
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


def test_the_real_thing_reads_a_run_folder(tmp_path):
    source, out = ROOT / "notebooks" / "05_the_real_thing.ipynb", tmp_path / "out.ipynb"
    parameters = {"source": str(write_run(tmp_path / "one")), "show_excerpts": True}
    papermill.execute_notebook(source, out, parameters, kernel_name="python3", progress_bar=False)
    printed = printed_by(out)
    assert "4 trajectories read from one." in printed
    assert "one, before: exactly one search in 0 of 2" in printed and "one, after: exactly one search in 2" in printed
    assert "one: 2 gained, 0 lost; exact match +1.000" in printed
    shown = "".join(output.get("data", {}).get("text/html", "") for cell in code_cells(out) for output in cell.outputs)
    assert "right (one, after): Where is &lt;b&gt;Ola&lt;/b&gt;? / Rovana" in shown and "<script>" not in shown


def test_the_real_thing_runs_to_the_end_without_the_recording_and_says_so(tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(ROOT / "searchr1_lite", project / "searchr1_lite", ignore=shutil.ignore_patterns("__pycache__"))
    kept = "data/results/recorded_trajectories.json"
    (project / "data/results").mkdir(parents=True)
    shutil.copy(ROOT / kept, project / kept)
    monkeypatch.setenv("PYTHONPATH", str(project))
    source, out = ROOT / "notebooks" / "05_the_real_thing.ipynb", tmp_path / "out.ipynb"
    papermill.execute_notebook(source, out, kernel_name="python3", progress_bar=False)
    printed = printed_by(out)
    assert "The recorded trajectories are not here" in printed and kept in printed
    assert "-p source data/results/runs/tiny-masked-seed0" in printed
    told = [
        cell for cell in code_cells(source) if "# NBVAL_CHECK_OUTPUT" in cell.source and "FIDELITY" not in cell.source
    ]
    assert len(told) > 5
    assert all("".join(output.text for output in cell.outputs) in printed for cell in told), "other numbers than saved"
