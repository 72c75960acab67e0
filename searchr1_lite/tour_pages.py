"""The tour's pages: every notebook as one HTML file, and an index. Self-contained: no script, nothing fetched."""

import base64
import io
from collections.abc import Sequence
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
from searchr1_lite.analysis.runs import Run, by_mask

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
