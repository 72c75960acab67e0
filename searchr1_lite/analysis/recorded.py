"""Trajectories read closely: how a model searches, how often, how long, and where it fails. Counts only, no text.

Reads trajectories of the released Search-R1 checkpoints, one line each with question, response and golden answers, as
GaurisankarJ/reason_over_search recorded them, or the trajectories of a run folder. Judging an answer is
`tasks/answers.py`'s work; notebook 05 draws, and puts intervals around what is counted here. No torch.

python -m searchr1_lite.analysis.recorded --source ../shared/data/wiki18/trajectories.jsonl.gz \
  --out data/results/recorded_trajectories.json
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from searchr1_lite.analysis.runs import RunError
from searchr1_lite.files import read_rows
from searchr1_lite.rollout.protocol import INVALID_ACTION, parse_action
from searchr1_lite.tasks.answers import exact_match, f1, normalize_answer, substring_match
from searchr1_lite.training.rewards import TAG, answer_was_retrieved

Row = dict[str, Any]

OUTCOMES = ("right", "near miss", "misread", "not found", "no answer")  # a trajectory has exactly one
QUERIES = ("copied", "shortened", "reworded")  # and so does a query
OBSERVATION = re.compile(f"({re.escape(INVALID_ACTION)}|\n\n<information>.*?</information>\n\n)", re.DOTALL)
TOTALS = ["answered", "searches", "repeated_queries", "invalid_actions", "found", "made_up", "made_up_unanswered"]
QUANTILES = [0.1, 0.25, 0.5, 0.75, 0.9]


def read_trajectories(source: Path) -> list[Row]:
    """Rows with `dataset`, `run`, `question` and `turns`, the last two as `trajectory_to_row` writes them.

    A source is a recorded file, a run folder or its trajectories.jsonl.gz; a run folder's dataset is its name, and its
    runs are the phases of training. Raises RunError, with file and line where a row cannot be used.
    """
    path = source / "trajectories.jsonl.gz" if source.is_dir() else source
    rows = []
    for where, row in read_rows(path, RunError, "trajectories"):
        try:
            if "response" in row:
                run = "chat template" if row["prompt"].startswith("<|im_start|>") else "no template"
                turns = split_turns(row["response"])
                row = {"dataset": row["dataset"], "run": run, "question": row, "turns": turns}
            rows.append({"dataset": path.resolve().parent.name, "run": row.get("phase", "all")} | row)
            measure(rows[-1])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
            raise RunError(f"{where}: this is no trajectory ({type(problem).__name__}: {problem})") from None
    return rows


def split_turns(response: str) -> list[Row]:
    """A whole response cut after each text that only the environment writes.

    An `<information>` block that the model made up stays in its turn, unless it has the empty lines around it too.
    """
    pieces = [*OBSERVATION.split(response), ""]
    turns = []
    for text, observation in zip(pieces[::2], pieces[1::2], strict=True):
        action, content = parse_action(text)
        query = content if action == "search" and observation else None
        turns.append({"text": text, "action": action, "query": query, "observation": observation})
    return turns


def outcome(row: Row) -> str:
    """The one of OUTCOMES that a trajectory is: the first, as they are asked for here, that holds.

    A near miss is an answer that holds a golden answer, or has F1 >= 0.5 with one. Misread is a golden answer that
    stands in what was retrieved, letter by letter after normalisation, wherever it stands and whatever it means there.
    """
    golden, written = row["question"]["golden_answers"], _written(row)
    if exact_match(written, golden):
        return "right"
    if row["turns"][-1]["action"] != "answer":
        return "no answer"
    if substring_match(written, golden) or f1(written, golden) >= 0.5:
        return "near miss"
    return "misread" if _found(row) else "not found"


def query_kind(question: str, query: str) -> str:
    """Copied: the question itself. Shortened: only words of the question. Reworded: other words too."""
    asked, searched = normalize_answer(question), normalize_answer(query)
    if asked == searched:
        return "copied"
    return "shortened" if set(searched.split()) <= set(asked.split()) else "reworded"


def measure(row: Row) -> Row:
    """One trajectory as numbers and names, none of them its text; a list has a value a query or an answer.

    Words written before a search or an answer are those of its turn outside tags and outside the query or answer.
    `made_up`: the model wrote an `<information>` tag itself. `repeated_queries` were asked before, word for word.
    """
    question, turns, made_up = row["question"], row["turns"], "<information>" in _written(row)
    searches = [turn for turn in turns if turn["query"] is not None]
    answers = [turn for turn in turns if turn["action"] == "answer"]
    words = set(normalize_answer(question["question"]).split())
    kept = [len(words & set(normalize_answer(turn["query"]).split())) / max(1, len(words)) for turn in searches]
    return {
        **{"dataset": row["dataset"], "run": row["run"], "id": question["id"], "outcome": outcome(row)},
        "f1": f1(_written(row), question["golden_answers"]),
        "answered": bool(answers),
        "searches": len(searches),
        "repeated_queries": len(searches) - len({turn["query"] for turn in searches}),
        "invalid_actions": sum(turn["action"] == "invalid" for turn in turns),
        "found": _found(row),
        "made_up": made_up,
        "made_up_unanswered": made_up and not answers,
        "queries": [query_kind(question["question"], turn["query"]) for turn in searches],
        "words_kept": kept,
        "words_before_search": [_words_around_action(turn["text"]) for turn in searches],
        "words_before_answer": [_words_around_action(turn["text"]) for turn in answers],
    }


def _written(row: Row) -> str:
    return "".join(turn["text"] for turn in row["turns"])


def _found(row: Row) -> bool:
    return any(answer_was_retrieved(turn["observation"], row["question"]["golden_answers"]) for turn in row["turns"])


def _words_around_action(text: str) -> int:
    return len(TAG.sub(" ", text).split()) - len(parse_action(text).content.split())


def summarise(rows: Sequence[Row]) -> Row:
    """What notebook 05 shows, all of it counts: an entry for each data set and run, and one for each comparison.

    `words_before_…` are QUANTILES. A comparison is of the first and the last run of a data set that ask no question
    twice, on the questions of both: how many went from which outcome to which.
    """
    table = pd.DataFrame([measure(row) for row in rows])
    runs, comparisons = [], []
    for (dataset, run), group in table.groupby(["dataset", "run"], sort=False):
        entry = {"dataset": dataset, "run": run, "trajectories": len(group)}
        entry |= {name: int(group[name].sum()) for name in TOTALS} | {"f1": round(group["f1"].sum(), 4)}
        entry["outcomes"] = {name: int((group["outcome"] == name).sum()) for name in OUTCOMES}
        entry["by_searches"] = {str(n): int((group["searches"] == n).sum()) for n in range(group["searches"].max() + 1)}
        entry["queries"] = {name: int((group["queries"].explode() == name).sum()) for name in QUERIES}
        entry["words_kept"] = round(group["words_kept"].explode().sum(), 4)
        for name in ("words_before_search", "words_before_answer"):
            entry[name] = group[name].explode().astype(float).quantile(QUANTILES).round(1).dropna().tolist()
        runs.append(entry)
    for dataset, group in table.groupby("dataset", sort=False):
        once = [(run, one.set_index("id")) for run, one in group.groupby("run", sort=False) if one["id"].is_unique]
        if len(once) > 1:
            (first, before), (last, after) = once[0], once[-1]
            moves = pd.crosstab(before["outcome"], after["outcome"]).to_dict("index")
            comparisons.append({"dataset": dataset, "first": first, "last": last, "moves": moves})
    return {"trajectories": len(table), "runs": runs, "comparisons": comparisons}
