"""One trajectory as people read it: text for a terminal, HTML for a notebook. `page.py` makes a page of many.

Works on rows of trajectories.jsonl.gz. All text of the model and of the passages is escaped: what a passage says is
shown, never rendered. Token by token, with the mask under it, a trajectory is drawn in notebook 02.
"""

import re
from html import escape
from typing import Any

from searchr1_lite.printable import printable

Row = dict[str, Any]

DOC = re.compile(r"(?:^|(?<=<information>))Doc (\d+)\(Title: ", re.MULTILINE)  # protocol.render_observation writes it


def headline(row: Row) -> str:
    """What came of it, in one line."""
    verdict = "right" if row["exact_match"] else "wrong"
    searches = f"{row['searches']} search" + ("" if row["searches"] == 1 else "es")
    ending = "" if row["finished"] else f", no answer (stopped: {row['stop_reason']})"
    written = f", {row['response_length']} tokens written" if "response_length" in row else ""
    return f"{verdict}, {searches}{written}{ending}"


def trajectory_text(row: Row) -> str:
    """The whole trajectory as text that is safe to print; what was put in by the environment is set in with a bar."""
    lines = [f"Q: {row['question']['question']}", f"   [{headline(row)}]"]
    for turn in row["turns"]:
        lines += turn["text"].strip().splitlines()
        lines += [f"  | {line}" for line in turn["observation"].strip().splitlines()]
    return printable("\n".join(lines))


def trajectory_html(row: Row) -> str:
    """The turns, one block each: what the model wrote, and set in and grey what came back."""
    blocks = []
    for turn in row["turns"]:
        blocks.append(f'<div style="white-space:pre-wrap"><b>{_lines(turn["text"])}</b></div>')
        if turn["observation"].strip():
            style = "white-space:pre-wrap;color:#666;border-left:3px solid #bbb;padding-left:.6em;margin:.3em 0"
            blocks.append(f'<blockquote style="{style}">{_lines(turn["observation"])}</blockquote>')
    return f"<p><i>{escape(headline(row))}</i></p>" + "".join(blocks)


def side_by_side(before: Row, after: Row, names: tuple[str, str] = ("before training", "after training")) -> str:
    """The same question answered twice, as an HTML table of two columns."""
    if before["question"]["id"] != after["question"]["id"]:
        raise ValueError(f"two questions, {before['question']['id']!r} and {after['question']['id']!r}, side by side")
    question = before["question"]
    answers = escape(" / ".join(question["golden_answers"]))
    cell = '<td style="vertical-align:top;text-align:left;width:50%;padding:.4em .8em">'
    return (
        f"<p><b>{escape(question['question'])}</b> (answer: {answers})</p>"
        f'<table style="width:100%"><tr><th>{escape(names[0])}</th><th>{escape(names[1])}</th></tr>'
        f"<tr>{cell}{trajectory_html(before)}</td>{cell}{trajectory_html(after)}</td></tr></table>"
    )


def passages(turn: Row) -> list[tuple[str, str | None]]:
    """An observation cut into its passages, each with its id, and what stands around them, with None.

    The pieces joined are the observation. It stays whole where its numbers are not 1, 2, … up to the number of hits at
    most: it shows no passages, or one of them holds what looks like the head of the next.
    """
    text, ids = turn["observation"], turn.get("hit_ids") or []
    heads = list(DOC.finditer(text))
    if not heads or [int(head[1]) for head in heads] != list(range(1, len(heads) + 1)) or len(heads) > len(ids):
        return [(text, None)] if text else []
    end = text.rfind("</information>")
    end = end if end > heads[-1].start() else len(text)
    cuts = [head.start() for head in heads] + [end]
    found = [(text[start:stop], name) for start, stop, name in zip(cuts, cuts[1:], ids, strict=False)]
    return [(text[: cuts[0]], None), *found, (text[end:], None)]


def _lines(text: str) -> str:
    return escape(text.strip()).replace("\n", "<br>")
