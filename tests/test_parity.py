"""benchmarks/parity.py: recorded rankings made by hand with a tiny e5, planted differences, and the real ones."""

import gzip
import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny_e5 import WORDS, make_tiny_e5, mean_pooled

from searchr1_lite.config import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import parity
from parity import TIE, why_missing

WIKI = Path(ROOT).parent / "shared/data/wiki18"
NOUNS = WORDS[4:]


@pytest.fixture(scope="module")
def e5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_e5(tmp_path_factory.mktemp("model") / "tiny-e5-v2")


@pytest.fixture(scope="module")
def ranked(e5_folder: Path) -> tuple[list[dict], list[dict], np.ndarray]:
    """A corpus, rows of queries with the right top three, and all scores. Its passages 0 and 1 are the same text.

    Only queries whose first four scores lie further apart than ties do are kept, except those that find the twins.
    """
    draw = random.Random(3)
    texts = [f'"{draw.choice(NOUNS)}"\n{" ".join(draw.choices(NOUNS, k=draw.randint(1, 6)))}' for _ in range(40)]
    queries = [" ".join(draw.choices(NOUNS, k=draw.randint(1, 3))) for _ in range(800)]
    asked = mean_pooled(e5_folder, [f"query: {query}" for query in queries])
    stored = mean_pooled(e5_folder, [f"passage: {text}" for text in texts])
    often_first = int(np.bincount((asked @ stored.T).argmax(1)).argmax())
    order = [often_first, *range(len(texts))]
    order[1], order[often_first + 1] = often_first, 0
    corpus = [{"id": f"id{i}", "contents": texts[j]} for i, j in enumerate(order)]
    scores = asked @ stored[order].T
    rows, kept = [], []
    for query, its in zip(queries, scores, strict=True):
        best = np.argsort(-its, kind="stable")[:4]
        clear = all(its[a] - its[b] > 2 * TIE or {a, b} == {0, 1} for a, b in pairwise(best))
        if clear and query not in {row["query"] for row in rows}:
            rows.append({"query": query, "top3": [f"id{i}" for i in best[:3]], "run": "v1/a", "dataset": "toy"})
            kept.append(its)
    return corpus, rows, np.array(kept)


def write(path: Path, rows: list[dict]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def check(e5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command; gives its exit status (or message) and what it recorded."""

    def run(corpus: list[dict], rows: list[dict], encoder: str = str(e5_folder)) -> tuple[object, dict | None]:
        out = tmp_path / "parity.json"
        paths = write(tmp_path / "corpus.jsonl.gz", corpus), write(tmp_path / "recorded.jsonl.gz", rows)
        given = ("--corpus", paths[0], "--recorded", paths[1], "--encoder", encoder, "--out", out)
        monkeypatch.setattr(sys, "argv", ["parity", *map(str, given)])
        status = None
        try:
            parity.main()
        except SystemExit as end:
            status = end.code
        return status, json.loads(out.read_text()) if out.exists() else None

    return run


def with_top(row: dict, *order: int, run: str = "v1/a") -> dict:
    return row | {"top3": [row["top3"][i] for i in order], "run": run}


def test_rankings_by_hand_are_equal(ranked, check, capsys: pytest.CaptureFixture) -> None:
    corpus, rows, _ = ranked
    rows = [row for row in rows if "id0" not in row["top3"]]  # twins may change places: computed in batches
    assert len(rows) > 7 and len({tuple(row["top3"]) for row in rows}) > 5
    status, record = check(corpus, rows)
    assert (status, record["all"], record["not equal"]) == (0, {"equal": len(rows)}, [])
    assert capsys.readouterr().out.splitlines()[-1] == f"exact index: {len(rows)} queries, {len(rows)} equal"


def test_planted_differences_are_found(ranked, check) -> None:
    corpus, rows, scores = ranked
    rows = [row for row in rows if "id0" not in row["top3"]][:7]
    scores = {row["query"]: its for row, its in zip(ranked[1], scores, strict=True)}
    swapped, other = with_top(rows[2], 1, 0, 2), dict(rows[5])
    worst = int(scores[other["query"]].argmin())
    other["top3"] = [*other["top3"][:2], f"id{worst}"]
    status, record = check(corpus, [*rows[:2], swapped, *rows[3:5], other, *rows[6:]])
    assert status == 1 and record["all"] == {"equal": 5, "other order": 1, "other passages": 1}
    first, second = record["not equal"]
    assert (first["line"], first["recorded"], first["found"]) == (3, swapped["top3"], rows[2]["top3"])
    its = scores[swapped["query"]]
    a, b = (int(key[2:]) for key in rows[2]["top3"][:2])
    assert first["verdict"] == "other order" and first["gap"] == pytest.approx(its[a] - its[b], abs=1e-5)
    its = scores[other["query"]]
    assert second["gap"] == pytest.approx(its[int(rows[5]["top3"][2][2:])] - its[worst], abs=1e-5)
    assert "query" not in first and (second["line"], second["verdict"]) == (6, "other passages")


def test_a_swap_of_equal_scores_is_a_tie_and_not_equal(ranked, check) -> None:
    corpus, rows, _ = ranked
    twins = next(row for row in rows if row["top3"][:2] == ["id0", "id1"])
    status, record = check(corpus, [twins, with_top(twins, 1, 0, 2)])
    assert (status, record["exact index"]) == (0, {"equal": 1, "tie": 1})
    assert record["not equal"][0]["gap"] < 1e-6
    third = twins | {"top3": [twins["top3"][0], twins["top3"][2], twins["top3"][1]]}  # a twin and the third: no tie
    assert check(corpus, [third])[1]["all"] == {"other order": 1}


def test_only_an_exact_index_must_agree(ranked, check, capsys: pytest.CaptureFixture) -> None:
    corpus, rows, _ = ranked
    rows = [row for row in rows if "id0" not in row["top3"]][:3]
    status, record = check(corpus, [rows[0], with_top(rows[1], 2, 1, 0, run="v0/b"), rows[2]])
    assert status == 0 and record["queries"] == {"all": 3, "exact index": 2}
    assert record["all"] == {"equal": 2, "other order": 1} and record["exact index"] == {"equal": 2}
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "all: 3 queries, 2 equal, 1 other order",
        "exact index: 2 queries, 2 equal",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top3": ["id0", "id1"]}, "'top3' must be the ids of three passages"),
        ({"top3": ["id0", "id1", "id99"]}, "'top3' must be the ids of three passages"),
        ({"top3": None}, "'top3' must be the ids of three passages"),
        ({"query": None}, "'query' must be a string"),
        ({"run": 1}, "'run' must be a string"),
    ],
)
def test_bad_recordings_are_named_by_line(ranked, check, change: dict, message: str) -> None:
    corpus, rows, _ = ranked
    status, record = check(corpus, [rows[0], rows[1] | change])
    assert status.startswith("error: ") and "recorded.jsonl.gz:2: " + message in status and record is None


def test_without_the_encoder_it_is_skipped(ranked, check, monkeypatch, tmp_path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    corpus, rows, _ = ranked
    assert check(corpus, rows, encoder="nobody/no-such-e5") == (None, None)
    said = capsys.readouterr().out
    assert said.startswith("skipped: the encoder nobody/no-such-e5 is not on this machine; `hf download nobody/")
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(not WIKI.is_dir(), reason="no real data beside the project (../shared/data/wiki18)")
@pytest.mark.skipif(why_missing("intfloat/e5-base-v2") is not None, reason=str(why_missing("intfloat/e5-base-v2")))
def test_e5_ranks_the_real_passages_as_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = [
        "--corpus",
        WIKI / "corpus.jsonl.gz",
        "--recorded",
        WIKI / "e5_top3.jsonl.gz",
        "--out",
        tmp_path / "x.json",
    ]
    monkeypatch.setattr(sys, "argv", ["parity", *map(str, given)])
    with pytest.raises(SystemExit) as end:
        parity.main()
    assert end.value.code == 0
