"""Which ids of slides are possible: an id is a part of file names, on every system that may read the folder."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from exaonepath.text import printable

_MAX_BYTES = 200  # a file name has 255, and temporary names are up to 50 longer than the id
_RESERVED_CHARACTERS = set('<>:"|?*\\/')
_RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def why_not_an_id(text: str) -> str:
    """The reason why a text cannot be an id, a phrase; empty if it can."""
    if not text:
        return "is empty"
    if len(text.encode("utf-8", "surrogateescape")) > _MAX_BYTES:
        return f"has more than {_MAX_BYTES} bytes"
    if printable(text) != text:
        return "has control or invisible characters"
    found = sorted(set(text) & _RESERVED_CHARACTERS)
    if found:
        return f"has {' '.join(found)}, which not every system allows in file names"
    if text.startswith("."):
        return "begins with a dot, so that its files would be hidden"
    if text != text.strip() or text.endswith("."):
        return "begins or ends with a space, or ends with a dot, which not every system allows"
    if PurePosixPath(text).name.split(".")[0].rstrip().casefold() in _RESERVED_NAMES:
        return "is a name that Windows reserves"
    return ""


def id_collisions(named: Iterable[tuple[str, str]]) -> list[str]:
    """A line for every group of equal ids, and of ids whose files would have equal names.

    Args:
        named: (id, where it is stated) of each slide.

    Returns:
        Lines such as "the id a is given twice: line 2, line 5".
    """
    places: dict[str, list[str]] = {}
    for name, where in named:
        places.setdefault(name, []).append(where)
    found = [
        f"the id {name} is given {_times(len(where))}: {', '.join(where)}"
        for name, where in places.items()
        if len(where) > 1
    ]
    found += [
        f"the features of {name} ({where[0]}) and the patches of {name}_features ({places[f'{name}_features'][0]}) "
        "would be one file"
        for name, where in places.items()
        if f"{name}_features" in places
    ]
    alike: dict[str, list[str]] = {}
    for name in places:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    found += [
        f"the ids {' and '.join(names)} differ only in upper and lower case or in how accents are encoded, which not "
        "every file system tells apart"
        for names in alike.values()
        if len(names) > 1
    ]
    return found


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"
