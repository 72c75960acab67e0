"""See it all in one go: run the first five notebooks, print what came of it, leave pages to open. `make tour`.

Papermill runs the notebooks as they are, with the tiny profile that is their default; only the folder of the runs is
given, so that the tour stands apart from what a reader tries in JupyterLab. A failing notebook ends the tour. A page
has no script, and fetches nothing.
"""

import base64
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
from jinja2 import Environment, pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from searchr1_lite.analysis.figures import learning_curves
from searchr1_lite.analysis.runs import Run, by_mask, load_runs
from searchr1_lite.config import ROOT
from searchr1_lite.errors import UserError

NOTEBOOKS = ROOT / "notebooks"
OUT = ROOT / "runs" / "tour"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre, code { font: 13px/1.45 ui-monospace, monospace; } pre { overflow-x: auto; margin: 0; white-space: pre-wrap; }
.jp-InputPrompt, .jp-OutputPrompt, .prompt, .anchor-link { display: none; }
.highlight { background: #f6f8fa; padding: .6rem .8rem; border-radius: 4px; }
.jp-OutputArea-output, .output_subarea { padding: .3rem .8rem; overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.first { white-space: pre; } img { max-width: 100%; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>{{ style|safe }}</style></head><body>
{{ body|safe }}
</body></html>
"""

INDEX = """<h1>Search-R1 on a laptop</h1>
<p>A small language model learned to search: these are the notebooks as they ran here, and what came of it.</p>
<ol>{% for name in names %}<li><a href="{{ name }}.html">{{ name[3:].replace("_", " ") }}</a></li>{% endfor %}</ol>
<img alt="Mean reward over training, masked and unmasked" src="data:image/png;base64,{{ picture }}">
{% for rows in tables %}<table>
<tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}<tr>{% for cell in row %}<td{% if loop.first %} class="first"{% endif %}>{{ cell }}</td>
{% endfor %}</tr>{% endfor %}</table>{% endfor %}
"""

TEMPLATES = Environment(autoescape=True)


def run_notebook(source: Path, out: Path, parameters: Mapping[str, object]) -> float:
    """Execute one notebook into `out/<name>.ipynb`, with a bar of its cells; returns the seconds it took."""
    import papermill  # heavy, and needed here only

    began = time.monotonic()
    print(source.stem, flush=True)
    quiet = {"kernel_name": "python3", "cwd": NOTEBOOKS, "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    try:
        papermill.execute_notebook(source, out / source.name, dict(parameters), **quiet)
    except papermill.exceptions.PapermillExecutionError as error:
        where = f"The notebook as far as it came: {out / source.name}"
        raise UserError(f"{source.name} failed: {error}\n{where}") from None
    return time.monotonic() - began


def result_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The closing table, first row its head: before training, and after it with and without the mask."""
    runs = sorted((run for run in runs if run.evaluation), key=lambda run: not run.masked)
    columns = [runs[0].evaluation["before"], *(run.evaluation["after"] for run in runs)]
    head = ["held-out questions", "before"] + [f"after, {'masked' if run.masked else 'unmasked'}" for run in runs]
    rows = [
        [f"exact match ({columns[0]['questions']} questions)"] + [f"{column['exact_match']:.2f}" for column in columns]
    ]
    for hops in columns[0]["exact_match_by_hops"]:
        values = [f"{column['exact_match_by_hops'][hops]:.2f}" for column in columns]
        rows.append([f"  {hops}-hop questions", *values])
    for hops in columns[0]["mean_searches_by_hops"]:
        values = [f"{column['mean_searches_by_hops'][hops]:.2f}" for column in columns]
        rows.append([f"searches, {hops}-hop (ideal: {hops})", *values])
    rows.append(["response length (tokens written)"] + [f"{column['response_length']:.0f}" for column in columns])
    rows.append(["exact match without search", f"{runs[0].evaluation['closed_book']:.2f}"] + [""] * len(runs))
    return [head, *rows]


def time_rows(seconds: Mapping[str, float], runs: Sequence[Run]) -> list[list[str]]:
    """What took how long: every notebook, and in 03 every training run."""
    rows = [["step", "seconds"]]
    for name, passed in seconds.items():
        rows.append([name, f"{passed:.0f}"])
        if name.startswith("03"):
            rows += [[f"  {len(run.metrics)} steps, {run.name}", f"{run.metrics['seconds'].sum():.0f}"] for run in runs]
    return [*rows, ["all", f"{sum(seconds.values()):.0f}"]]


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, a line under the head."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


class MathRenderer(IPythonRenderer):
    """Formulas as MathML, which browsers set without a script."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


class PageExporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        path = context["resources"]["metadata"]["path"]
        renderer = MathRenderer(escape=False, embed_images=True, path=path, exclude_anchor_links=True)
        return MarkdownWithMath(renderer=renderer).render(source)


def write_notebook_page(notebook: Path, pictures: Path) -> Path:
    """An executed notebook as a page beside it; pictures that its text names are looked up from the folder given."""
    cells = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(pictures)}}
    body, _ = PageExporter(template_name="basic").from_notebook_node(cells, resources)
    style = STYLE + HtmlFormatter().get_style_defs(".highlight")
    return _write(notebook.with_suffix(".html"), notebook.stem, body, style)


def write_index(
    out: Path, tables: Sequence[Sequence[Sequence[str]]], names: Sequence[str], runs: Sequence[Run]
) -> Path:
    """`out/index.html`: links to the notebooks' pages, the learning curves, the tables."""
    body = TEMPLATES.from_string(INDEX).render(names=names, tables=tables, picture=_picture(runs))
    return _write(out / "index.html", "Search-R1 on a laptop", body, STYLE)


def _picture(runs: Sequence[Run]) -> str:
    figure, file = learning_curves(by_mask(runs)), io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _write(path: Path, title: str, body: str, style: str) -> Path:
    path.write_text(TEMPLATES.from_string(PAGE).render(title=title, body=body, style=style), encoding="utf-8")
    return path


def tour(out: Path = OUT) -> None:
    """Run everything into `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    training = out / "training"
    parameters = {"03": {"run_folder": str(training)}, "04": {"runs": str(training)}}
    print(f"Five notebooks, some minutes on two cores. Results: {out}")
    seconds: dict[str, float] = {}
    for source in [path for number in "12345" for path in sorted(NOTEBOOKS.glob(f"0{number}_*.ipynb"))]:
        seconds[source.stem] = run_notebook(source, out, parameters.get(source.stem[:2], {}))
        write_notebook_page(out / source.name, NOTEBOOKS)
    runs = load_runs(training)
    tables = [result_rows(runs), time_rows(seconds, runs)]
    index = write_index(out, tables, list(seconds), runs)
    print("\n" + "\n\n".join(as_text(rows) for rows in tables))
    print(f"\nThe notebooks as pages: {index}")
