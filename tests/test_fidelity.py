"""FIDELITY.md: the tests that it names exist, and the lines of the original hold what it says stands there."""

import os
import re
from pathlib import Path

import pytest

from searchr1_lite.config import ROOT

PAGE = (ROOT / "FIDELITY.md").read_text(encoding="utf-8")
LINE = re.compile(r"`([\w/.-]+\.(?:py|sh|yaml)):(\d+)` `([^`]+)`")


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_point_says_what_holds_it():
    same = PAGE.partition("## The same")[2].partition("## ")[0]
    rows = [line.strip("|").split("|") for line in same.replace(r"\|", "/").splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    assert [row for row in rows if len(row) != 4 or not all(cell.strip() for cell in row)] == []


def test_the_lines_of_the_original():
    checkout = os.environ.get("SEARCH_R1")
    if not checkout:
        pytest.skip("SEARCH_R1 names no checkout of PeterGriffinJin/Search-R1 to compare with")
    found = LINE.findall(PAGE.replace(r"\|", "|"))
    assert len(found) > 40
    for file, number, text in found:
        line = (Path(checkout) / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert text in line, f"{file}:{number} does not hold {text!r}, but {line.strip()!r}"
