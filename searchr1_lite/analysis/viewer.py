"""One trajectory as people read it: text for a terminal, HTML for a notebook or a page.

Works on rows of trajectories.jsonl.gz. All text of the model and of the passages is escaped: what a passage says is
shown, never rendered. Token by token, with the mask under it, a trajectory is drawn in notebook 02.
"""

from html import escape
from typing import Any

Row = dict[str, Any]


def headline(row: Row) -> str:
    """What came of it, in one line."""
    verdict = "right" if row["exact_match"] else "wrong"
    searches = f"{row['searches']} search" + ("" if row["searches"] == 1 else "es")
    ending = "" if row["finished"] else f", no answer (stopped: {row['stop_reason']})"
    written = f", {row['response_length']} tokens written" if "response_length" in row else ""
    return f"{verdict}, {searches}{written}{ending}"


def trajectory_text(row: Row) -> str:
    """The whole trajectory as plain text; what was put in by the environment is set in with a bar."""
    lines = [f"Q: {row['question']['question']}", f"   [{headline(row)}]"]
    for turn in row["turns"]:
        lines += turn["text"].strip().splitlines()
        lines += [f"  | {line}" for line in turn["observation"].strip().splitlines()]
    return "\n".join(lines)


def trajectory_html(row: Row) -> str:
    """The turns, one block each: what the model wrote, and set in and grey what came back."""
    blocks = []
    for turn in row["turns"]:
        blocks.append(f'<div style="white-space:pre-wrap"><b>{_lines(turn["text"])}</b></div>')
        if turn["observation"].strip():
            style = "white-space:pre-wrap;color:#666;border-left:3px solid #bbb;padding-left:.6em;margin:.3em 0"
            blocks.append(f'<blockquote style="{style}">{_lines(turn["observation"])}</blockquote>')
    return f"<p><i>{escape(headline(row))}</i></p>" + "".join(blocks)


def side_by_side(before: Row, after: Row) -> str:
    """The same question before and after training, as an HTML table of two columns."""
    if before["question"]["id"] != after["question"]["id"]:
        raise ValueError(f"two questions, {before['question']['id']!r} and {after['question']['id']!r}, side by side")
    question = before["question"]
    answers = escape(" / ".join(question["golden_answers"]))
    cell = '<td style="vertical-align:top;text-align:left;width:50%;padding:.4em .8em">'
    return (
        f"<p><b>{escape(question['question'])}</b> (answer: {answers})</p>"
        '<table style="width:100%"><tr><th>before training</th><th>after training</th></tr>'
        f"<tr>{cell}{trajectory_html(before)}</td>{cell}{trajectory_html(after)}</td></tr></table>"
    )


def _lines(text: str) -> str:
    return escape(text.strip()).replace("\n", "<br>")
