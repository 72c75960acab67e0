"""The ways to answer side by side: one table of a comparison, with intervals, tests and the paper's numbers beside it.

A comparison is FOLDER/seed<number>/<way>/, each an evaluation folder (evaluation/evaluate.py says what is in it), with
FOLDER/seed<number>/<way>-training/ where the way was trained. Every answer is judged anew from its saved text; what
the row or evaluation.json says otherwise is an error. Made are a .md, a .csv, a .tex, a .png, and a .json that holds
every score of every question, from which `statistics` makes every cell again.

Names of ways, models and data sets come from files and are escaped for each format. Reads files only, no torch; how
the ways answer is said in evaluation/strategies.py.
"""

import re
from collections.abc import Sequence
from itertools import combinations, pairwise
from math import isnan
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from searchr1_lite.analysis.figures import DPI, save
from searchr1_lite.analysis.runs import RunError, read_mapping
from searchr1_lite.config import ROOT
from searchr1_lite.evaluation.metrics import bootstrap_interval, holm, mean, paired_p, smallest_difference
from searchr1_lite.files import read_rows, write_json, write_whole
from searchr1_lite.printable import printable
from searchr1_lite.provenance import command
from searchr1_lite.tasks.answers import exact_match, f1, substring_match

Record = dict[str, Any]

PAPER = ROOT / "data/results/paper.json"
# In the order of the paper's main table; other ways follow by name.
METHODS = ("direct", "cot", "ircot", "search_o1", "rag", "inter", "sft", "r1_base", "r1_instruct")
METHODS += ("rejection_sampling", "search_r1_base", "search_r1_instruct")
SCORES = {"exact_match": exact_match, "f1": f1, "substring_match": substring_match}
COUNTS = ("finished", "searches", "response_length", "retrieved_tokens")
ALIKE = ("retriever", "encoder", "reranker", "corpus", "topk", "quantization", "temperature")  # in every way
MARKS = {
    "greedy": {"fmt": "o", "color": "black", "markersize": 5},
    "sampled": {"fmt": "s", "color": "#777777", "markerfacecolor": "white", "markersize": 5},
}
PAPER_MARKS = {"3B": {"marker": "^", "color": "#777777"}, "7B": {"marker": "D", "color": "black"}}


# Reading


def find_evaluations(folders: Sequence[Path]) -> dict[str, dict[int, Path]]:
    """The evaluation folder of each way and seed. Raises RunError where a way lacks a seed that another has."""
    found: dict[str, dict[int, Path]] = {}
    parents: dict[int, Path] = {}
    for parent in sorted(path for folder in folders for path in folder.glob("seed*") if path.name[4:].isdecimal()):
        seed = int(parent.name[4:])
        parents[seed] = parent
        for path in sorted(parent.iterdir()):
            if not (path / "config.yaml").is_file() or path.name.endswith("-training"):
                continue
            if seed in found.setdefault(path.name, {}):
                raise RunError(f"{found[path.name][seed]} and {path} are the same way and seed; give one of them")
            found[path.name][seed] = path
    if not found:
        raise RunError(f"{', '.join(map(str, folders))}: no comparison is here (no seed<number>/<way>/config.yaml)")
    for way, its in found.items():
        for seed in sorted(parents.keys() - its.keys()):
            raise RunError(f"{parents[seed]}: the way {way!r} is missing, which other seeds have; make it here too")
    order = sorted(found, key=lambda way: (METHODS.index(way) if way in METHODS else len(METHODS), way))
    return {way: dict(sorted(found[way].items())) for way in order}


def judge(row: Record, where: str) -> Record:
    """The scores of a saved row, made anew from what the model wrote, and its counts; RunError where it says other."""
    text, golden = "".join(turn["text"] for turn in row["turns"]), row["question"]["golden_answers"]
    scores = {name: score(text, golden) for name, score in SCORES.items()}
    for name, value in scores.items():
        if not abs(row.get(name, value) - value) < 1e-6:  # also where it is not a number
            identity = f"{where}: question {row['question']['id']!r}"
            raise RunError(f"{identity}: {name} is {row[name]} in the file, but its answer, judged anew, gets {value}")
    failed = row["stop_reason"].startswith("search ")  # failed or refused: what it would have come to is not known
    return scores | {name: row.get(name) for name in COUNTS} | {"failed": failed}


def read_evaluation(folder: Path) -> Record:
    """What an evaluation folder says: `about` (evaluation.json), `config`, `questions` and, by decoding, `scores`."""
    if not (folder / "evaluation.json").is_file():
        raise RunError(f"{folder}: evaluation.json is missing; the evaluation is not finished, start it again")
    about, config = read_mapping(folder / "evaluation.json"), read_mapping(folder / "config.yaml")
    if lacking := [key for key in ("date", "machine", "versions", "model") if key not in about]:
        raise RunError(f"{folder}: evaluation.json lacks {', '.join(lacking)}")
    questions: dict[str, Record] = {}
    scores: dict[str, dict[str, Record]] = {name: {} for name in MARKS if name in about}
    for where, row in read_rows(folder / "trajectories.jsonl.gz", RunError, "trajectories"):
        try:
            question, its = row["question"], scores[row["decoding"]]
            if question["id"] in its:
                raise RunError(f"{where}: question {question['id']!r} is there twice")
            its[question["id"]] = judge(row, where)
        except RunError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise RunError(f"{where}: this is no evaluated answer ({type(problem).__name__}: {problem})") from None
        if questions.setdefault(question["id"], question) != question:
            raise RunError(f"{where}: question {question['id']!r} is another than before in this file")
    for decoding, its in scores.items():
        if its.keys() != questions.keys():
            raise RunError(f"{folder}: {len(its)} of {len(questions)} questions were answered {decoding}")
        for name in SCORES:
            said, made = about[decoding].get(name), [one[name] for one in its.values() if not one["failed"]]
            if said is not None and made and not abs(said - mean(made)) < 1e-6:
                raise RunError(f"{folder}: {decoding} {name} is {said} in evaluation.json, {mean(made)} by its rows")
    return {"about": about, "config": config, "questions": questions, "scores": scores}


def make_record(folders: Sequence[Path], typed: str) -> Record:
    """Everything that the table says and shows, as it is written to the .json file; `typed` is the command.

    Raises RunError where the evaluations are not of the same questions, settings and versions.
    """
    paths = find_evaluations(folders)
    read = {way: {seed: read_evaluation(path) for seed, path in its.items()} for way, its in paths.items()}
    flat = {paths[way][seed]: one for way, its in read.items() for seed, one in its.items()}
    _check_alike("questions", {path: one["questions"] for path, one in flat.items()})
    _check_alike("decodings", {path: list(one["scores"]) for path, one in flat.items()})
    _check_alike("versions", {path: one["about"]["versions"] for path, one in flat.items()})
    for key in ALIKE:
        _check_alike(f"settings of {key}", {path: one["config"].get(key) for path, one in flat.items()})
    for its in paths.values():
        _check_alike("models", {path: flat[path]["about"]["model"] for path in its.values()})
        for key in set().union(*(flat[path]["config"] for path in its.values())) - {"name", "seed"}:
            _check_alike(f"settings of {key}", {path: flat[path]["config"].get(key) for path in its.values()})
    newest = max((one["about"] for one in flat.values()), key=lambda about: about["date"])
    first = next(iter(flat.values()))
    tables = [its for one in flat.values() for its in one["scores"].values()]
    left_out = {key for its in tables for key, row in its.items() if row["failed"]}
    questions = [question for key, question in first["questions"].items() if key not in left_out]
    if not questions:
        raise RunError("every question has a way whose search failed; there is nothing to compare")
    machines = list({str(one["about"]["machine"]): one["about"]["machine"] for one in flat.values()}.values())
    record = {"date": newest["date"], "machines": machines, "versions": newest["versions"]}
    record |= {"command": typed, "seeds": sorted(next(iter(paths.values()))), "decodings": list(first["scores"])}
    record |= {"questions": [question["id"] for question in questions], "left_out": sorted(left_out)}
    record["groups"] = {name: _pack(indices) for name, indices in _groups(questions).items()}
    record["ways"] = {way: _way_entry(way, paths[way], its, record) for way, its in read.items()}
    record["paper"] = _paper(read)
    return record | {"statistics": statistics(record)}


def _check_alike(what: str, values: dict[Path, Any]) -> None:
    (first, expected), *others = values.items()
    for path, value in others:
        if value != expected:
            raise RunError(f"{first} and {path} have different {what}; a table compares like with like")


def _groups(questions: Sequence[Record]) -> dict[str, list[int]]:
    """Positions of the questions of each hop count and, where there are several, each data set."""
    hops: dict[int, list[int]] = {}
    sets: dict[str, list[int]] = {}
    for position, question in enumerate(questions):
        metadata = question.get("metadata") or {}
        if metadata.get("hops") is not None:
            hops.setdefault(int(metadata["hops"]), []).append(position)
        sets.setdefault(f"on {metadata.get('data_source', 'others')}", []).append(position)
    return {f"{count} hop": hops[count] for count in sorted(hops)} | (sets if len(sets) > 1 else {})


def _pack(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)  # one line of the file in place of one a question


def _way_entry(way: str, paths: dict[int, Path], its: dict[int, Record], record: Record) -> Record:
    about = next(iter(its.values()))["about"]
    trained = any(path.with_name(f"{way}-training").is_dir() for path in paths.values()) or bool(about.get("adapter"))
    model = str(about["model"])
    entry = {"model": Path(model).name if Path(model).is_absolute() else model, "strategy": about.get("strategy")}
    entry |= {"trained": trained, "commands": [one["about"].get("command") for one in its.values()]}
    entry["seconds"], entry["calls"], entry["scores"] = {}, {}, {}  # a question, by seed
    for decoding in record["decodings"]:
        spent = [one["about"][decoding].get("seconds") for one in its.values()]
        asked = len(next(iter(its.values()))["questions"])
        entry["seconds"][decoding] = None if None in spent else [round(value / asked, 6) for value in spent]
        called = [one["about"][decoding].get("retriever_calls") for one in its.values()]
        entry["calls"][decoding] = None if None in called else [round(value / asked, 6) for value in called]
        entry["scores"][decoding] = {}
        for name in (*SCORES, *COUNTS):
            columns = [[one["scores"][decoding][key][name] for key in record["questions"]] for one in its.values()]
            missing = any(value is None for column in columns for value in column)
            entry["scores"][decoding][name] = None if missing else list(map(_pack, columns))
    return entry


def _paper(ways: Sequence[str]) -> Record:
    paper = read_mapping(PAPER)
    shown = {size: {way: row["average"] for way, row in rows.items()} for size, rows in paper["exact_match"].items()}
    names = {way: paper["names"].get(way, way) for way in ways}
    return {"source": paper["source"], "notes": paper["notes"], "names": names, "average": shown}


# Computing


def statistics(record: Record) -> Record:
    """Every cell, test and comparison of orders, computed from the scores that the record holds."""
    result: Record = {"cells": {}, "pairs": {}}
    for decoding in record["decodings"]:
        scores = {way: _unpacked(entry["scores"][decoding]) for way, entry in record["ways"].items()}
        cells = {way: _cells(scores[way], way, decoding, record) for way in scores}
        pairs = []
        for one, other in combinations(scores, 2):
            p = paired_p(scores[one]["exact_match"], scores[other]["exact_match"])
            pair = {"first": one, "second": other, "p": p}
            pair["difference"] = round(cells[one]["exact_match"] - cells[other]["exact_match"], 6)
            (low, high), (other_low, other_high) = cells[one]["interval"], cells[other]["interval"]
            pairs.append(pair | {"intervals_apart": low > other_high or other_low > high})
        for pair, adjusted in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
            pair["holm"] = adjusted
        result["cells"][decoding], result["pairs"][decoding] = cells, pairs
    decoding, total = record["decodings"][0], len(record["questions"])
    result["orders"] = {size: _order(result, decoding, row) for size, row in record["paper"]["average"].items()}
    least = smallest_difference(total)
    result["power"] = {"questions": total, "disagreement": 0.5, "smallest_difference": least if least < 1 else None}
    return result


def _unpacked(columns: Record) -> dict[str, np.ndarray | None]:
    """Each column as (seeds, questions)."""
    return {name: packed and np.array([line.split() for line in packed], float) for name, packed in columns.items()}


def _cells(columns: dict[str, np.ndarray | None], way: str, decoding: str, record: Record) -> Record:
    correct, trained = columns["exact_match"], record["ways"][way]["trained"]

    def estimate(values: np.ndarray) -> list[float]:
        return [round(float(x), 6) for x in (values.mean(), *bootstrap_interval(values, trained))]

    average, *interval = estimate(correct)
    result: Record = {"exact_match": average, "interval": interval}
    result["by_seed"] = [round(float(x), 6) for x in correct.mean(axis=1)]
    places = {name: np.array(packed.split(), int) for name, packed in record["groups"].items()}
    result["groups"] = {name: estimate(correct[:, indices]) for name, indices in places.items()}
    for name in ("f1", "substring_match", *COUNTS):
        result[name] = None if columns[name] is None else round(float(columns[name].mean()), 6)
    spent = {"seconds": record["ways"][way]["seconds"][decoding], "calls": record["ways"][way]["calls"][decoding]}
    return result | {name: values and round(mean(values), 6) for name, values in spent.items()}


def _order(result: Record, decoding: str, paper: dict[str, float]) -> Record | None:
    """Kendall's tau-b between the order here and the paper's, and the pairs that stand the other way round here."""
    ours = {way: cells["exact_match"] for way, cells in result["cells"][decoding].items() if way in paper}
    tau = float(kendalltau([*ours.values()], [paper[way] for way in ours]).statistic) if len(ours) > 1 else float("nan")
    if isnan(tau):
        return None
    swapped = []
    for pair in result["pairs"][decoding]:
        one, other = pair["first"], pair["second"]
        if one in ours and other in ours and pair["difference"] * (paper[one] - paper[other]) < 0:
            better = (one, other) if pair["difference"] > 0 else (other, one)
            swapped.append({"better_here": better[0], "better_in_paper": better[1], "holm": pair["holm"]})
    return {"tau": round(tau, 6), "ways": len(ours), "swapped": swapped}


# Showing


def table_frame(record: Record, decoding: str | None = None) -> pd.DataFrame:
    """A row a way, in the table's order, numbers unrounded; `decoding` is the first of the record's if not given."""
    rows = []
    for way, cells in record["statistics"]["cells"][decoding or record["decodings"][0]].items():
        entry, paper = record["ways"][way], record["paper"]["average"]
        model = entry["model"].rstrip("/").rsplit("/", 1)[-1] + (", trained" if entry["trained"] else "")
        row = {"way": record["paper"]["names"][way], "model": model, "exact match": cells["exact_match"]}
        row |= dict(zip(("low", "high"), cells["interval"], strict=True))
        row |= {name: share for name, (share, _, _) in cells["groups"].items()}
        row |= {"F1": cells["f1"], "substring": cells["substring_match"], "answered": cells["finished"]}
        row |= {
            "searches": cells["searches"],
            "retriever calls": cells["calls"],
            "tokens written": cells["response_length"],
        }
        row |= {"tokens retrieved": cells["retrieved_tokens"], "seconds": cells["seconds"]}
        rows.append(row | {f"paper {size}": averages.get(way) for size, averages in paper.items()})
    return pd.DataFrame(rows)


def _text_rows(record: Record, decoding: str) -> list[list[str]]:
    """Heading and rows as people read them, not escaped: digits cut, the interval in the cell of its share."""
    frame = table_frame(record, decoding)
    digits = {"searches": 2, "retriever calls": 2, "tokens written": 0, "tokens retrieved": 0}
    rows = [[name for name in frame if name not in ("low", "high")]]
    for row in frame.to_dict("records"):
        shown = {name: _cell(value, digits.get(name, 3)) for name, value in row.items()}
        shown["exact match"] += f" ({shown.pop('low')}, {shown.pop('high')})"
        rows.append(list(shown.values()))
    return rows


def _cell(value: str | float | None, digits: int) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None or isnan(value) else f"{value:.{digits}f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def neighbours(record: Record, decoding: str) -> list[list[str]]:
    """Heading and rows: the ways from best to worst, each against the next."""
    cells, names = record["statistics"]["cells"][decoding], record["paper"]["names"]
    pairs = {frozenset((pair["first"], pair["second"])): pair for pair in record["statistics"]["pairs"][decoding]}
    rows = [["better", "than", "by", "p", "p, Holm", "intervals apart"]]
    for one, other in pairwise(sorted(cells, key=lambda way: -cells[way]["exact_match"])):
        pair = pairs[frozenset((one, other))]
        shown = [_p(pair["p"]), _p(pair["holm"]), "yes" if pair["intervals_apart"] else "no"]
        rows.append([names[one], names[other], f"{abs(pair['difference']):.3f}", *shown])
    return rows


def notes(record: Record) -> list[str]:
    """What must be said under the table, as plain sentences."""
    result, names, paper = record["statistics"], record["paper"]["names"], record["paper"]
    total, least = len(record["questions"]), result["power"]["smallest_difference"]
    said = [
        f"{total} questions; mean over the seeds {', '.join(map(str, record['seeds']))}; counts are a question's. A "
        "query asked before costs no call of the retriever. Intervals: 95 %, bootstrap over questions and, for a "
        "trained way, over seeds, which are different models."
    ]
    for name, pairs in result["pairs"].items():
        differ = sum(pair["holm"] < 0.05 for pair in pairs)
        said.append(f"{name}: {differ} of {len(pairs)} pairs of ways differ in exact match (p < 0.05).")
    said.append(
        "Tests: sign flips of paired questions, Holm's correction over all pairs of a decoding. They say what these "
        "models would do on other questions, not what other trainings would come to."
    )
    shown = f"differences of {least:.3f} and more" if least else "no difference"
    said.append(
        f"Power: where two ways disagree on half of the questions, {total} of them show {shown} in exact match "
        "(80 % power at 5 %); where they disagree on fewer, smaller ones."
    )
    for size, order in result["orders"].items():
        if order:
            swapped = ", ".join(_swap(pair, names) for pair in order["swapped"]) or "none"
            said.append(
                f"Order ({record['decodings'][0]}) against the paper's {size}: Kendall's tau {order['tau']:.2f} over "
                f"{order['ways']} ways. The other way round here (* p < 0.05): {swapped}."
            )
    if record["left_out"]:
        said.append(f"Left out of every way, since a search of it failed in one: {len(record['left_out'])} questions.")
    if len(record["machines"]) > 1:
        said.append(f"Made on {len(record['machines'])} different machines: seconds cannot be compared.")
    return [*said, f"Paper: {paper['source']}. {' '.join(paper['notes'])}"]


def _swap(pair: Record, names: dict[str, str]) -> str:
    return f"{names[pair['better_here']]} above {names[pair['better_in_paper']]}{'*' * (pair['holm'] < 0.05)}"


def in_one_line(text: str) -> str:
    return " ".join(printable(text).split())


def markdown(text: str) -> str:
    """Text that stays text, in one cell: whatever could mean something to Markdown or HTML becomes a numeric entity."""
    return re.sub(r"[^\w .,;:'=+%()/-]|_|:(?=/)", lambda found: f"&#{ord(found[0])};", in_one_line(text))


def latex(text: str) -> str:
    """The same for LaTeX; `[` and `*` because they would mean something after a row's end."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
    named |= {">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "*": "{*}"}
    return re.sub(r"[\\~^<>|\[*&%$#_{}]", lambda found: named.get(found[0], "\\" + found[0]), in_one_line(text))


def spreadsheet(text: str) -> str:
    """The same for a CSV cell of text, which a spreadsheet must not take for a formula."""
    line = in_one_line(text)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def to_markdown(record: Record) -> str:
    parts = []
    for decoding in record["decodings"]:
        parts += [f"**{decoding}**", _markdown_rows(_text_rows(record, decoding), 2)]
    decoding = record["decodings"][0]
    parts += [f"From best to worst, {decoding}:", _markdown_rows(neighbours(record, decoding), 2)]
    parts += ["\n".join(f"- {markdown(sentence)}" for sentence in notes(record))]
    made = f"Made {record['date']} by `{in_one_line(record['command']).replace('`', ' ')}`."
    return "\n\n".join([*parts, made]) + "\n"


def _markdown_rows(rows: list[list[str]], text_columns: int) -> str:
    heading, *body = [[markdown(cell) for cell in row] for row in rows]
    rule = ["---" if number < text_columns else "--:" for number in range(len(heading))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *body))


def to_latex(record: Record) -> str:
    parts = []
    for decoding in record["decodings"]:
        rows = _text_rows(record, decoding)
        heading, *body = [" & ".join(map(latex, row)) + r" \\" for row in rows]
        columns = "ll" + "r" * (len(rows[0]) - 2)
        lines = [f"% {decoding}", rf"\begin{{tabular}}{{{columns}}}", r"\hline", heading, r"\hline", *body, r"\hline"]
        parts.append("\n".join([*lines, r"\end{tabular}"]))
    return "\n\n".join([f"% Made {record['date']} by {in_one_line(record['command'])}", *parts]) + "\n"


def to_csv(record: Record) -> str:
    """Numbers unrounded; one table, with the decoding as first column."""
    frames = [table_frame(record, decoding).assign(decoding=decoding) for decoding in record["decodings"]]
    frame = pd.concat(frames).map(lambda cell: spreadsheet(cell) if isinstance(cell, str) else cell)
    frame.insert(0, "decoding", frame.pop("decoding"))
    return frame.rename(columns=spreadsheet).to_csv(index=False, lineterminator="\n")


def draw(record: Record, here: Axes, paper: Axes) -> None:
    """Exact match by way, ways from top to bottom in the table's order: measured here, and as the paper prints."""
    names, cells = record["paper"]["names"], record["statistics"]["cells"]
    ways = list(record["ways"])
    for number, decoding in enumerate(record["decodings"]):
        rows = [place + (number - (len(cells) - 1) / 2) * 0.3 for place in range(len(ways))]
        shares = np.array([cells[decoding][way]["exact_match"] for way in ways])
        reach = np.abs(np.array([cells[decoding][way]["interval"] for way in ways]).T - shares)
        here.errorbar(shares, rows, xerr=reach, label=decoding, capsize=2.5, linewidth=1, **MARKS[decoding])
    for size, averages in record["paper"]["average"].items():
        known = [(averages[way], place) for place, way in enumerate(ways) if way in averages]
        paper.plot(*zip(*known, strict=True) if known else ([], []), linestyle="", label=size, **PAPER_MARKS[size])
    here.set_yticks(range(len(ways)), [in_one_line(names[way]) for way in ways], parse_math=False)
    here.set_ylim(len(ways) - 0.5, -0.5)
    here.set_xlabel(
        f"exact match, mean of {len(record['seeds'])} seed{'s' * (len(record['seeds']) > 1)}, 95 % interval"
    )
    here.set_title(f"here ({len(record['questions'])} questions)", fontsize="medium")
    paper.set_xlabel("exact match, average of seven sets")
    paper.set_title("in the paper (Qwen2.5)", fontsize="medium")
    for axes in (here, paper):
        axes.grid(alpha=0.3)
        axes.legend(loc="best", frameon=True, fontsize="small")
    here.set_xlim(-0.02, 1.02)
    paper.set_xlim(left=0)


def picture(record: Record) -> Figure:
    height = 1.4 + 0.36 * len(record["ways"])
    figure, (here, paper) = plt.subplots(
        1, 2, figsize=(9, height), dpi=DPI, layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    draw(record, here, paper)
    return figure


def write_table(record: Record, out: Path) -> list[Path]:
    """`out` with .json, .md, .csv, .tex and .png added, each written whole or not at all."""
    paths = {kind: out.with_name(f"{out.name}.{kind}") for kind in ("json", "md", "csv", "tex", "png")}
    write_json(paths["json"], record)
    for kind, make in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
        write_whole(paths[kind], make(record))
    save(picture(record), paths["png"])
    return list(paths.values())


def report_table(folders: Sequence[Path], out: Path) -> None:
    """`searchr1 report table`: write the files, and say the first decoding's rows and the notes."""
    record = make_record(folders, command())
    paths = write_table(record, out)
    for decoding in record["decodings"]:
        rows = _text_rows(record, decoding)[1:]
        print(*(f"{decoding:8} {in_one_line(row[0]):22} {row[2]}" for row in rows), sep="\n")
    print(*map(in_one_line, notes(record)), *paths, sep="\n")
