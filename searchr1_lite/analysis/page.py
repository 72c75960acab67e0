"""Trajectories as one HTML file: pick, filter, read closely, compare. It works offline, and runs nothing but itself.

`page.html` beside this file is the page without its data. What models and passages say comes into it as gzipped JSON in
base64, which holds no character of HTML, and is shown as text nodes only; the page's policy lets no other script, style
or address in. The list and the filters read one small part of the data, a trajectory is unpacked when it is looked at.
Scores are those that the file names: nothing is judged here. No torch.
"""

import base64
import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from searchr1_lite.analysis.runs import RunError, read_mapping
from searchr1_lite.analysis.viewer import passages
from searchr1_lite.files import read_rows, write_whole
from searchr1_lite.rollouts.protocol import PROMPTS, render_prompt

Row = dict[str, Any]

TEMPLATE = Path(__file__).with_name("page.html")
ROWS_A_PART = 20  # unpacked together
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)  # as tasks/answers.py reads it
LABEL = ("folder", "strategy", "phase", "decoding")  # what tells groups of rows apart
ALWAYS = ("result", "searches", "format")  # filters that are there even where all rows agree
SETTINGS = ("model", "strategy", "algorithm", "masked", "steps", "retriever", "topk", "questions", "seed")
COUNTS = {"searches": "searches", "invalid_actions": "invalid actions", "response_length": "tokens written"}
COUNTS |= {"retrieved_tokens": "tokens retrieved", "f1": "F1", "substring_match": "substring match", "reward": "reward"}


class _Part(BaseModel):
    """Of a row, what the page reads; a bool is no number, and what may be missing may be null."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Metadata(_Part):
    supporting_ids: list[str | int] | None = None
    gold_ids: list[str | int] | None = None


class _Question(_Part):
    id: str
    question: str
    golden_answers: list[str]
    metadata: _Metadata | None = None


class _Turn(_Part):
    text: str
    action: str
    observation: str
    query: str | None = None
    hit_ids: list[str] | None = None


class _Call(_Part):
    prompt: str
    pieces: list[str]
    logprobs: list[float | None]

    @model_validator(mode="after")
    def _one_each(self) -> "_Call":
        if len(self.pieces) != len(self.logprobs):
            raise ValueError(f"{len(self.pieces)} pieces and {len(self.logprobs)} logprobs")
        return self


class SavedTrajectory(_Part):
    """A row of trajectories.jsonl.gz, as training and evaluation save it."""

    question: _Question
    turns: list[_Turn]
    exact_match: float
    searches: int
    finished: bool
    stop_reason: str
    calls: list[_Call] | None = None
    phase: str | None = None
    strategy: str | None = None
    decoding: str | None = None
    step: int | None = None
    invalid_actions: float | None = None
    response_length: float | None = None
    retrieved_tokens: float | None = None
    f1: float | None = None
    substring_match: float | None = None
    reward: float | None = None


@dataclass(frozen=True)
class Source:
    """Rows of one file, and what is known of them: `about` has settings, the date and the command.

    `where` stands before a row's number in errors.
    """

    name: str
    rows: Sequence[Row]
    about: dict[str, Any] = field(default_factory=dict)
    where: str = "row "


def load_source(path: Path) -> Source:
    """A run folder, an evaluation folder, or a trajectories.jsonl.gz; RunError if it cannot be read."""
    file = path / "trajectories.jsonl.gz" if path.is_dir() else path
    rows = [row for _, row in read_rows(file, RunError, "trajectories")]
    settings = [file.parent / name for name in ("config.yaml", "environment.json")]
    about = {key: value for one in settings if one.is_file() for key, value in read_mapping(one).items()}
    about = {key: about[key] for key in (*SETTINGS, "date", "command") if about.get(key) is not None}
    folder = file.resolve().parent
    name = f"{folder.parent.name}/{folder.name}" if folder.parent.name.startswith("seed") else folder.name
    return Source(name, rows, about, f"{file}:")


def write_page(rows: Sequence[Row] | Source, out: Path, against: Sequence[Row] | Source | None = None) -> Path:
    """Write the page of some rows, as trajectories.jsonl.gz has them, whole or not at all; returns `out`.

    Rows of the same question before and after training are partners, side by side on the page; with `against`, rows of
    the same question and decoding in the two files. Raises RunError, with file and line, for a row that cannot
    be shown.
    """
    given = [rows] if against is None else [rows, against]
    sources = [one if isinstance(one, Source) else Source("trajectories", one) for one in given]
    same = len({one.name for one in sources}) < len(sources)
    names = [one.name + f" ({n})" * same for n, one in enumerate(sources, 1)]
    for source in sources:
        for number, row in enumerate(source.rows, 1):
            try:
                SavedTrajectory.model_validate(row)
            except ValidationError as error:
                problem = error.errors()[0]
                where, what = ".".join(map(str, problem["loc"])), "such rows a run or an evaluation saves"
                raise RunError(f"{source.where}{number}: {where}: {problem['msg']}; {what}") from None
    everything = [(name, row) for name, one in zip(names, sources, strict=True) for row in one.rows]
    if not everything:
        raise RunError("there are no trajectories to show")
    about = [[name, one.about] for name, one in zip(names, sources, strict=True)]
    pairs = _pairs(everything, by_source=against is not None)
    index = _index(everything, pairs) | {"sources": about, "rows_a_part": ROWS_A_PART}
    parts = [everything[start : start + ROWS_A_PART] for start in range(0, len(everything), ROWS_A_PART)]
    data = [pack(index), *(pack([detail(row) for _, row in part]) for part in parts)]
    out = Path(out)
    write_whole(out, _fill(TEMPLATE.read_text(encoding="utf-8"), data))
    return out


def pack(value: Any) -> str:
    """JSON, gzipped, in base64: whatever the texts hold, half a surrogate pair too, this is [A-Za-z0-9+/=]."""
    return base64.b64encode(gzip.compress(json.dumps(value, allow_nan=False).encode("ascii"), 6, mtime=0)).decode()


def detail(row: Row) -> Row:
    """What the page shows of one trajectory when it is chosen."""
    question, calls = row["question"], row.get("calls") or []
    metadata = question.get("metadata") or {}
    supporting = {str(name) for name in metadata.get("supporting_ids") or metadata.get("gold_ids") or []}
    found = supporting & {name for turn in row["turns"] for name in turn.get("hit_ids") or []}
    counts = [[label, row[key]] for key, label in COUNTS.items() if key in row]
    if supporting:
        counts.append(["supporting passages found", f"{len(found)} of {len(supporting)}"])
    strategy = row.get("strategy") or "search_r1"
    known = not calls and strategy in PROMPTS
    answers = ANSWER.findall("".join(turn["text"] for turn in row["turns"] if turn["action"] != "write"))
    return {
        "id": question["id"],
        "golden": question["golden_answers"],
        "answer": answers[-1].strip() if answers else None,
        "stop_reason": row["stop_reason"],
        "counts": counts,
        "rebuilt_prompt": render_prompt(question["question"], strategy) if known else None,
        "turns": [_shown(turn, supporting) for turn in row["turns"]],
        "supporting": sorted(supporting),
        "calls": [call | {"logprobs": [x if x is None else round(x, 4) for x in call["logprobs"]]} for call in calls],
    }


def _shown(turn: Row, supporting: set[str]) -> Row:
    """Without the empty lines around a text, which only the protocol needs."""
    blocks = [[text.strip("\n"), name, name in supporting] for text, name in passages(turn)]
    shown = {"text": turn["text"].strip("\n"), "blocks": [block for block in blocks if block[0]]}
    return {key: turn.get(key) for key in ("action", "query", "hit_ids")} | shown


def facets(source: str, row: Row) -> dict[str, str]:
    """What a row is, for the filters; "" where the row does not say."""
    metadata = row["question"].get("metadata") or {}
    invalid = any(turn["action"] == "invalid" for turn in row["turns"])
    values = {
        "result": "right" if row["exact_match"] else "wrong",
        "hops": metadata.get("hops"),
        "searches": row["searches"],
        "format": "no answer" if not row["finished"] else "invalid actions" if invalid else "well formed",
        "folder": source,
        "strategy": row.get("strategy"),
        "phase": row.get("phase"),
        "step": row.get("step"),
        "decoding": row.get("decoding"),
        "data set": metadata.get("data_source"),
    }
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _index(everything: Sequence[tuple[str, Row]], pairs: Sequence[tuple[int, int]]) -> Row:
    """What the list and the filters need of every row, column by column."""
    described = [facets(source, row) for source, row in everything]
    for first, second in pairs:
        change = f"{described[first]['result']} → {described[second]['result']}"
        described[first]["pair"] = described[second]["pair"] = change
    names = dict.fromkeys(name for one in described for name in one)
    columns = {name: [one.get(name, "") for one in described] for name in names}
    columns = {name: values for name, values in columns.items() if name in ALWAYS or len(set(values)) > 1}
    groups: dict[str, list[bool]] = defaultdict(list)
    for (_, row), one in zip(everything, described, strict=True):
        label = ", ".join(one[name] for name in LABEL if name in columns and one[name])
        groups[label].append(bool(row["exact_match"]))
    return {
        "questions": [row["question"]["question"] for _, row in everything],
        "facets": columns,
        "pairs": pairs,
        "groups": [[label, len(right), sum(right)] for label, right in groups.items()],
    }


def _pairs(everything: Sequence[tuple[str, Row]], by_source: bool) -> list[tuple[int, int]]:
    """Rows that answer the same question the same way, before and after training or in the first and second file.

    An evaluation's rows are as those after training, which itself evaluates greedily. Where a question is asked several
    times the same way, the second time is the partner of the second time.
    """
    sides: dict[Any, dict[tuple, int]] = defaultdict(dict)
    asked: Counter = Counter()
    for number, (source, row) in enumerate(everything):
        phase = row.get("phase") if row.get("phase") in ("before", "train") else "after"
        if phase != "train":
            side, other = (source, phase) if by_source else (phase, row.get("strategy"))
            key = (row["question"]["id"], row.get("decoding", "greedy"), other)
            asked[side, key] += 1
            sides[side][*key, asked[side, key]] = number
    first, second = [*sides.values(), {}, {}][:2] if by_source else (sides["before"], sides["after"])
    return [(number, second[key]) for key, number in first.items() if key in second]


def _fill(template: str, data: Sequence[str]) -> str:
    """The template with the policy, the index before the script and the other parts after it."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(_inside(template, tag).encode()).digest()).decode()
        for tag in ("style", "script")
    }
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    policy += "".join(f"; {tag}-src 'sha256-{digest}'" for tag, digest in hashes.items())
    tags = [f'<script type="text/plain" id="part{n}">{part}</script>\n' for n, part in enumerate(data)]
    head, _, rest = template.partition("<!--policy-->")
    middle, _, rest = rest.partition("<!--index-->\n")
    script, _, end = rest.partition("<!--parts-->\n")
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return "".join([head, meta, middle, tags[0], script, *tags[1:], end])


def _inside(template: str, tag: str) -> str:
    return template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
