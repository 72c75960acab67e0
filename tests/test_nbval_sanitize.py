"""nbval drops a sanitize pair that it cannot parse without a word; every pair of ours must be live."""

from pathlib import Path

from nbval.plugin import get_sanitize_patterns

CONFIG = Path(__file__).parent / "nbval_sanitize.cfg"


def test_every_pattern_is_parsed() -> None:
    text = CONFIG.read_text(encoding="ascii")
    assert len(get_sanitize_patterns(text)) == text.count("regex:") == text.count("replace:") == 3


def test_timings_go_and_other_numbers_stay() -> None:
    import re

    said = "built in 12.5 s, 3 ms a query, 40 it/s; recall 0.75 of 3 stones"
    for pattern, token in get_sanitize_patterns(CONFIG.read_text(encoding="ascii")):
        said = re.sub(pattern, token, said)
    assert said == "built in TIMING, TIMING a query, TIMING; recall 0.75 of 3 stones"
