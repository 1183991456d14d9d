"""Text for users: safe to print, because file names may contain any characters, and short, because lists may be
long."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

# Control, format (bidirectional overrides, zero-width), surrogate, private use, line and paragraph separators.
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def printable(text: object) -> str:
    """The text, with all characters escaped that a terminal would interpret or cannot show.

    Control characters (ESC, newline, ...), marks that reverse the direction of writing, and bytes of a name that are
    not UTF-8 become `\\x1b`, `\\u202e`, `\\udcff`; a backslash stays one.
    """
    return "".join(_escaped(c) if unicodedata.category(c) in _ESCAPED else c for c in str(text))


def _escaped(character: str) -> str:
    if ord(character) < 128:
        return f"\\x{ord(character):02x}"
    return character.encode("ascii", "backslashreplace").decode()


def few(names: Iterable[object], limit: int = 5) -> str:
    """ "a, b, c, ... (12 in all)": the first names and how many there are."""
    names = list(names)
    shown = ", ".join(map(str, names[:limit]))
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def close_to(key: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown key: the most similar known key, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
