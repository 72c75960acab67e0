"""How fast the trajectory page opens and scrolls with thousands of trajectories, in headless Chromium, from disk.

    python benchmarks/page.py --out data/results/benchmarks/page.json

The rows are those of the committed runs, again and again, each with a call made up for it: its prompt, its text in
pieces of a tokenizer's size, and a random log-probability for each piece of the model's. They are random so that they
compress no better than real ones; that the questions come again makes the page's data smaller than it would be. Times
are from the start of the navigation, each in a browser of its own, which has never seen the page: `list` until the list
stands in the document and could be painted, `trajectory` until the chosen one does too.
"""

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from searchr1_lite.analysis.page import Source, load_source, write_page
from searchr1_lite.config import ROOT
from searchr1_lite.files import write_json
from searchr1_lite.provenance import provenance
from searchr1_lite.rollouts.protocol import render_prompt

TARGET = 3.0  # seconds from navigation to the list
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PIECE = re.compile(r" ?\w{1,5}| ?[^\w\s]{1,2}|\s+")
SEEN = """
window.opened = {};
const look = () => {
  const list = document.querySelector(".row") && document.querySelector("#count").textContent;
  if (list) opened.list ??= performance.now();
  if (document.querySelector(".columns")) opened.trajectory ??= performance.now(); else requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""
SCROLL = """async () => {
  const list = document.querySelector("#list"), frames = [], end = list.scrollHeight - list.clientHeight;
  let before = await new Promise(requestAnimationFrame);
  for (let step = 1; step <= 60; step++) {
    list.scrollTop = end * step / 60;
    const now = await new Promise(requestAnimationFrame);
    frames.push(now - before);
    before = now;
  }
  return [frames, document.querySelectorAll(".row").length];
}"""
KEYS = """async () => {
  const times = [];
  for (let step = 0; step < 60; step++) {
    const before = document.querySelector(".columns"), start = performance.now();
    dispatchEvent(new KeyboardEvent("keydown", { key: step % 20 ? "j" : step % 40 ? "End" : "Home" }));
    for (let n = 0; n < 60 && document.querySelector(".columns") === before; n++)
      await new Promise(requestAnimationFrame);
    if (step % 20) times.push(performance.now() - start);
  }
  return times;
}"""


def made_up_call(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    pieces, logprobs = [], []
    for turn in row["turns"]:
        for text, ours in ((turn["text"], True), (turn["observation"], False)):
            found = PIECE.findall(text)
            pieces += found
            logprobs += [-rng.expovariate(5) if ours else None for _ in found]
    return {"prompt": render_prompt(row["question"]["question"]), "pieces": pieces, "logprobs": logprobs}


def many_rows(count: int, seed: int) -> list[dict[str, Any]]:
    folders = sorted((ROOT / "data/results/runs").glob("*/trajectories.jsonl.gz"))
    rng, real = random.Random(seed), [row for file in folders for row in load_source(file).rows]
    rows = list(islice(cycle(real), count))
    return [row | {"calls": [made_up_call(row, rng)]} for row in rows]


def open_once(playwright: Any, browser: str, file: Path, within: float) -> dict[str, Any]:
    """One visit of a fresh browser: seconds, megabytes of JavaScript heap, frames while scrolling and moving."""
    running = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--enable-precise-memory-info"])
    tab = running.new_page(viewport={"width": 1300, "height": 900})
    tab.add_init_script(SEEN)
    start = time.perf_counter()
    tab.goto(file.as_uri(), wait_until="commit")
    while not (seen := tab.evaluate("window.opened ?? {}")).get("trajectory") and time.perf_counter() - start < within:
        tab.wait_for_timeout(20)
    client = tab.context.new_cdp_session(tab)
    client.send("Performance.enable")
    tab.wait_for_load_state()

    def heap() -> float:
        client.send("HeapProfiler.collectGarbage")
        figures = {one["name"]: one["value"] for one in client.send("Performance.getMetrics")["metrics"]}
        return figures["JSHeapUsedSize"] / 1e6

    opened = heap()
    frames, rows = tab.evaluate(SCROLL)
    keys = tab.evaluate(KEYS)
    result = {f"{name}_seconds": seen[name] / 1000 for name in ("list", "trajectory")}
    result |= {"heap_mb": opened, "heap_mb_after_moving": heap(), "rows_in_document": rows}
    result |= {"scroll_frame_ms": median(frames), "longest_scroll_frame_ms": max(frames)}
    result |= {"next_trajectory_ms": median(keys), "longest_next_trajectory_ms": max(keys)}
    running.close()
    return result


def measure(rows: int, visits: int, seed: int, folder: Path) -> dict[str, Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("error: playwright is not installed: pip install -e '.[dev]'")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: no browser is here; looked for {', '.join(BROWSERS)}")
    made, start = many_rows(rows, seed), time.perf_counter()
    file = write_page(Source("benchmark", made), folder / "page.html")
    written = time.perf_counter() - start
    pieces = sum(len(row["calls"][0]["pieces"]) for row in made) / len(made)
    seen = []
    with sync_playwright() as playwright:
        for number in range(visits):
            seen.append(open_once(playwright, browser, file, within=60.0))
            print(f"visit {number + 1} of {visits}: list after {seen[-1]['list_seconds']:.2f} s", flush=True)
        version = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        name = f"Chromium {version.version}"
        version.close()
    figures = {key: round(median(one[key] for one in seen), 3) for key in seen[0]}
    slowest = max(one["list_seconds"] for one in seen)
    return {
        "what": "medians of the visits; the two cores were shared with other work, so that idle ones would be faster",
        "browser": name,
        "trajectories": rows,
        "tokens_a_trajectory": round(pieces, 1),
        "seed": seed,
        "visits": visits,
        "file_mb": round(file.stat().st_size / 1e6, 2),
        "write_seconds": round(written, 2),
        **figures,
        "slowest_list_seconds": round(slowest, 3),
        "target_seconds": TARGET,
        "holds": slowest < TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--visits", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON file to write; without it the figures are printed only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given.rows, given.visits, given.seed, Path(folder))
    for key, value in result.items():
        print(f"{key}: {value}")
    if given.out:
        write_json(given.out, provenance(["playwright"]) | result)


if __name__ == "__main__":
    main()
