"""See it all in one go: run the first five notebooks, print what came of it, leave pages to open. `make tour`.

Papermill runs the notebooks as they are, with the tiny profile that is their default; only the folder of the runs is
given, so that the tour stands apart from what a reader tries in JupyterLab. A failing notebook ends the tour.
"""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from searchr1_lite.analysis.runs import Run, load_runs
from searchr1_lite.config import ROOT
from searchr1_lite.tour_pages import write_index, write_notebook_page

NOTEBOOKS = ROOT / "notebooks"
OUT = ROOT / "runs" / "tour"


class LastLine:
    """A stream for a notebook's printed text, of which the terminal shows the last line and the seconds passed."""

    def __init__(self, name: str, terminal: TextIO) -> None:
        self.name = name
        self.terminal = terminal
        self.started = time.monotonic()

    def write(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines and self.terminal.isatty():
            width = shutil.get_terminal_size().columns - 1
            line = f"  {self.name} {time.monotonic() - self.started:4.0f} s  {lines[-1]}"[:width]
            self.terminal.write(f"\r\033[K{line}")
            self.terminal.flush()

    def flush(self) -> None:
        pass

    def close(self) -> float:
        """Replace the line by the result; returns the seconds passed."""
        seconds = time.monotonic() - self.started
        clear = "\r\033[K" if self.terminal.isatty() else ""
        print(f"{clear}  {self.name:32} {seconds:5.0f} s", file=self.terminal, flush=True)
        return seconds


def notebooks() -> list[Path]:
    """The notebooks of the tour, in order."""
    return [path for number in "12345" for path in sorted(NOTEBOOKS.glob(f"0{number}_*.ipynb"))]


def run_notebook(source: Path, out: Path, parameters: Mapping[str, object]) -> float:
    """Execute one notebook into `out/<name>.ipynb`; returns the seconds it took. Raises papermill's error."""
    import papermill  # heavy, and needed here only

    status = LastLine(source.stem, sys.stdout)
    print(f"  {source.stem} …", end="" if sys.stdout.isatty() else "\n", flush=True)
    papermill.execute_notebook(
        source,
        out / source.name,
        parameters=dict(parameters),
        kernel_name="python3",
        cwd=NOTEBOOKS,
        progress_bar=False,
        stdout_file=status,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    return status.close()


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def tour(out: Path = OUT) -> None:
    """Run everything into `out`, which is emptied first."""
    from papermill.exceptions import PapermillExecutionError

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    training = out / "training"
    parameters = {"03": {"run_folder": str(training)}, "04": {"runs": str(training)}}
    seconds: dict[str, float] = {}
    print(f"Five notebooks, about ten minutes on two cores. Results: {out}")
    for source in notebooks():
        try:
            seconds[source.stem] = run_notebook(source, out, parameters.get(source.stem[:2], {}))
        except PapermillExecutionError as error:
            sys.exit(f"\n{source.name} failed: {error}\nThe notebook as far as it came: {out / source.name}")
        write_notebook_page(out / source.name, NOTEBOOKS)
    runs = load_runs(training)
    tables = [result_rows(runs), time_rows(seconds, runs)]
    index = write_index(out, tables, list(seconds), runs)
    print("\n" + "\n\n".join(as_text(rows) for rows in tables))
    print(f"\nThe notebooks as pages: {index}")
