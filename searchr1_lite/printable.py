"""Text that a model, a passage or a server wrote, made safe to print.

A terminal obeys some characters in place of showing them: they colour, move, erase, rename the window, turn lines
round. Here they are shown and not obeyed. Each character is replaced by itself, so that text may come in pieces cut
anywhere, also through the middle of an escape sequence. Not for HTML, which has its own escaping; characters that are
invisible or look like others are left as they are.
"""

import re

# C0 but tab and newline, DEL, C1; embeddings, overrides, isolates of writing direction; halves of surrogate pairs
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with a visible sign for each character that a terminal obeys, ␛ or \x9b or \u202e; the rest as it is.

    Tab and newline stay. Text may come in pieces: `printable(a) + printable(b) == printable(a + b)`.
    """
    return OBEYED.sub(lambda found: _shown(ord(found[0])), text)


def _shown(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
