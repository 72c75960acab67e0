"""The tour on stand-in notebooks: its table, its pages, and how it ends when a notebook fails."""

import re

import matplotlib
import nbformat
import pytest
from synthetic_runs import write_run

from searchr1_lite import tour as module
from searchr1_lite.analysis.runs import load_runs
from searchr1_lite.errors import UserError
from searchr1_lite.tour import write_notebook_page

matplotlib.use("Agg")


def write_notebook(path, *sources, text="# A title"):
    cells = [nbformat.v4.new_markdown_cell(text), *(nbformat.v4.new_code_cell(source) for source in sources)]
    if len(sources) > 1:
        cells[1].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def runs(tmp_path):
    for masked in (True, False):
        write_run(tmp_path / "runs" / ("masked" if masked else "unmasked"), masked=masked)
    return load_runs(tmp_path / "runs")


def test_the_closing_table_by_hand(runs):
    rows = module.result_rows(runs)
    assert rows[0] == ["held-out questions", "before", "after, masked", "after, unmasked"]
    assert rows[1] == ["exact match (100 questions)", "0.10", "0.60", "0.10"]
    assert ["  2-hop questions", "0.10", "0.60", "0.10"] in rows
    assert ["searches, 2-hop (ideal: 2)", "2.00", "2.00", "2.00"] in rows
    assert ["response length (tokens written)", "40", "40", "40"] in rows
    assert rows[-1] == ["exact match without search", "0.02", "", ""]
    times = module.time_rows({"01_a": 3.4, "03_b": 60.2}, runs)
    expected = [
        ["01_a", "3"],
        ["03_b", "60"],
        ["  6 steps, masked", "15"],
        ["  6 steps, unmasked", "15"],
        ["all", "64"],
    ]
    assert times[1:] == expected


def test_columns_are_aligned():
    assert module.as_text([["a", "n"], ["bcd", "10"]]) == "a     n\n-------\nbcd  10"


def test_a_tour_from_notebooks_to_pages(tmp_path, runs, monkeypatch, capsys):
    notebooks, out = tmp_path / "notebooks", tmp_path / "out"
    notebooks.mkdir()
    write_notebook(notebooks / "01_index.ipynb", "print('<script>alert(1)</script>')", text="Half is $\\frac{1}{2}$.")
    copy = f"import shutil; shutil.copytree({str(tmp_path / 'runs')!r}, run_folder)"
    write_notebook(notebooks / "03_train.ipynb", "run_folder: str = ''", copy)
    write_notebook(notebooks / "06_later.ipynb", "1 / 0")
    monkeypatch.setattr(module, "NOTEBOOKS", notebooks)
    out.mkdir()
    (out / "old.html").write_text("of an earlier tour")
    module.tour(out)
    printed = capsys.readouterr().out
    assert re.search(r"exact match \(100 questions\) +0\.10 +0\.60 +0\.10\n", printed)
    assert str(out / "index.html") in printed
    assert not (out / "old.html").exists()
    pages = {path.name: path.read_text() for path in out.glob("*.html")}
    assert set(pages) == {"index.html", "01_index.html", "03_train.html"}
    assert set(re.findall(r'href="([^"#]+)"', pages["index.html"])) == {"01_index.html", "03_train.html"}
    assert "<script" not in "".join(pages.values()) and "&lt;script&gt;" in pages["01_index.html"]
    assert "<mfrac>" in pages["01_index.html"]
    assert re.findall(r'src="(?!data:)|url\(|@import|https?://(?!www\.w3\.org/)', "".join(pages.values())) == []


def test_a_failing_notebook_ends_the_tour_and_is_named(tmp_path, monkeypatch):
    write_notebook(tmp_path / "02_fails.ipynb", "raise ValueError('what went wrong')")
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path)
    with pytest.raises(UserError, match=r"(?s)02_fails.ipynb failed: .*what went wrong.*out/02_fails.ipynb"):
        module.tour(tmp_path / "out")


def test_a_picture_beside_the_notebook_is_put_into_its_page(tmp_path):
    write_notebook(tmp_path / "a.ipynb", text="![dot](dot.png)")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "dot.png").write_bytes(b"\x89PNG")
    page = write_notebook_page(tmp_path / "a.ipynb", tmp_path / "pictures").read_text()
    assert 'src="data:image/png;base64,' in page
