"""What a terminal would obey is shown: checked by a scanner of its own, that knows bytes and no regular expression."""

import itertools
import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from searchr1_lite.printable import printable

# Mostly what is dangerous, so that sequences come up; and any character at all, halves of surrogate pairs too.
dangerous = st.sampled_from(
    ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\r", "\b", "\x7f", "\x85", "\u202e", "\u2067", "\ud800", "\udcff", "\0"]
)
texts = st.lists(dangerous | st.text(st.characters(), max_size=6)).map("".join)
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def commands(text: str) -> list[int]:
    """The bytes and characters of printed text that a terminal would take as a command; a lone surrogate raises."""
    printed = text.encode("utf-8")
    found = [byte for byte in printed if (byte < 32 and byte not in (9, 10)) or byte == 127]
    pairs = itertools.pairwise(printed)
    found += [second for first, second in pairs if first == 0xC2 and second < 0xA0]  # C1, as UTF-8 has it
    return found + [ord(one) for one in text if unicodedata.bidirectional(one) in TURNS]


@given(texts)
@example("\x1b[2J\x1b]8;;http://x\x1b\\click\x1b]8;;\x1b\\")
def test_nothing_is_left_for_a_terminal_to_obey(text):
    assert commands(printable(text)) == []


@given(texts)
def test_once_is_enough(text):
    assert printable(printable(text)) == printable(text)


@given(texts, texts)
def test_pieces_are_as_safe_as_the_whole(first, second):
    assert printable(first) + printable(second) == printable(first + second)


@given(texts)
def test_the_rest_is_there_as_it_was(text):
    def harmless(one: str) -> bool:
        turns = unicodedata.bidirectional(one) in TURNS
        return one in "\t\n" or (not turns and unicodedata.category(one) not in ("Cc", "Cs"))

    assert all(printable(one) == one for one in text if harmless(one))
    assert all(printable(one) != one for one in text if not harmless(one))


def test_by_hand():
    assert printable("\x1b[31mred\x1b[0m") == "␛[31mred␛[0m"
    assert printable("one\r\ntwo\x08\x7f\tthree") == "one␍\ntwo␈␡\tthree"
    assert printable("\x9b2J \u202eabc\u202c \udcff") == "\\x9b2J \\u202eabc\\u202c \\udcff"
    assert printable("Ōtsu — 静か <answer> שלום 🏁") == "Ōtsu — 静か <answer> שלום 🏁"
