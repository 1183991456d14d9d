"""How a table of text is written: what separates its columns, and what its numbers have for decimals and thousands."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exaonepath.alignment.data.text_files import open_text, refuse_foreign
from exaonepath.errors import DataFileError

Decimal = Literal["auto", ".", ","]

# Enough to tell, and nothing beside a table of any size.
_SAMPLE_CHARACTERS, _SAMPLE_LINES = 1 << 18, 500
_SEPARATORS = ("\t", ";", ",")
SEPARATOR_NAMES = {"\t": "tabs", ";": "semicolons", ",": "commas"}

_WITH_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_ONE_GROUP = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")  # 1,234: one and a bit, or a thousand
_GROUPS = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3}){2,}|(?:,\d{3})+\.\d*)(?:[eE][+-]?\d+)?")
_POINT_GROUPS = re.compile(r"[+-]?\d{1,3}(?:\.\d{3})+,\d+|[+-]?\d{1,3}(?:\.\d{3}){2,}")
_WITH_POINT = re.compile(r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")
_OTHER_GROUPS = re.compile(r"[+-]?\d{1,3}(?:['\u2019 \u00a0\u202f]\d{3})+(?:[.,]\d+)?")


@dataclass(frozen=True)
class Sample:
    """The beginning of a table of text.

    Attributes:
        separator: between columns. skip: lines of comment before the header.
        header: its names, as written. rows: the first rows, as written.
        quoting: of the `csv` module.
    """

    separator: str
    skip: int
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    quoting: int = csv.QUOTE_MINIMAL


@dataclass(frozen=True)
class Numbers:
    """Marks of numbers: of decimals, and of thousands where there is one."""

    decimal: str = "."
    thousands: str | None = None

    @property
    def told(self) -> str:
        """In words; empty for plain numbers."""
        words = ["decimal commas"] if self.decimal == "," else []
        if self.thousands:
            words.append(f"{self.thousands!r} between thousands")
        return ", ".join(words)


def sample_of(path: Path, quoting: int = csv.QUOTE_MINIMAL, separators: Sequence[str] = _SEPARATORS) -> Sample:
    """Read the beginning of a table of text and find what separates its columns.

    Lines that begin with "#" before the header are comments. What separates is what gives the rows as many fields as
    the header (or one more, as R writes it); the name of the file decides only where the content leaves a choice.

    Raises:
        DataFileError: the file is of another kind, and named. One of `UNREADABLE`: it cannot be read.
    """
    refuse_foreign(path)
    lines: list[str] = []
    skip = characters = 0
    with open_text(path) as file:
        for line in file:
            if not lines and line.startswith("#"):
                skip += 1
                continue
            lines.append(line.rstrip("\r\n"))
            characters += len(line)
            if len(lines) >= _SAMPLE_LINES or (len(lines) > 1 and characters > _SAMPLE_CHARACTERS):
                break
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    usual = "," if suffixes and suffixes[-1] == ".csv" else "\t"
    found = max(separators, key=lambda s: (*_quality(lines, s, quoting), s == usual))
    parsed = [tuple(row) for row in csv.reader(lines, delimiter=found, quoting=quoting)] if lines else [()]  # type: ignore[arg-type]
    return Sample(found, skip, parsed[0], tuple(row for row in parsed[1:] if row), quoting)


def _quality(lines: list[str], separator: str, quoting: int) -> tuple[int, int]:
    """How well a separator explains the lines: (kind of fit, whether there is anything to separate)."""
    counts = [
        len(next(csv.reader([line], delimiter=separator)))
        if '"' in line and quoting != csv.QUOTE_NONE
        else line.count(separator) + 1
        for line in lines
        if line
    ]
    if not counts:
        return 0, 0
    header, rows = counts[0], counts[1:]
    usual = Counter(rows).most_common(1)[0][0] if rows else 0
    if usual >= 2 and header in (usual, usual - 1):
        return (3 if header == usual else 2), 1
    return 0, int(max(header, usual) >= 2)


def numbers_of(path: Path, cells: Iterable[str], decimal: str = "auto") -> Numbers:
    """What the numbers among these cells have for decimals and thousands.

    Raises:
        DataFileError: it cannot be told, or some cells speak for the one and some for the other; the message names
            them, and the option.
    """
    seen: dict[str, str] = {}  # what a cell speaks for, and the first that does
    for cell in cells:
        cell = cell.strip()
        if "," in cell or "." in cell or "'" in cell or "\u2019" in cell or " " in cell or "\u00a0" in cell:
            kind = _kind(cell)
            if kind:
                seen.setdefault(kind, cell)
    if "other" in seen:
        raise DataFileError(f"{path}: {seen['other']!r} has marks between thousands; write numbers without them")
    if decimal == ",":
        return Numbers(",", "." if "point groups" in seen else None)
    if decimal == ".":
        return Numbers(".", "," if {"groups", "one group", "comma"} & set(seen) else None)
    for one, other in (("comma", "groups"), ("comma", "point"), ("point groups", "groups"), ("point groups", "point")):
        if one in seen and other in seen:
            raise DataFileError(
                f"{path}: {seen[one]!r} has a decimal comma and {seen[other]!r} a decimal point (or commas between "
                "thousands); write all numbers with a decimal point and nothing between thousands"
            )
    if "comma" in seen or "point groups" in seen:
        return Numbers(",", "." if "point groups" in seen else None)
    if "groups" in seen or ("one group" in seen and "point" in seen):
        return Numbers(".", ",")
    if "one group" in seen:
        raise DataFileError(
            f"{path}: whether the comma of {seen['one group']!r} is for decimals or between thousands cannot be told; "
            "set its `decimal` to ',' (one and a bit) or '.' (thousands)"
        )
    return Numbers()


def _kind(cell: str) -> str:
    if "," not in cell:
        if _WITH_POINT.fullmatch(cell):
            return "point"
        if _POINT_GROUPS.fullmatch(cell):
            return "point groups"
        return "other" if _OTHER_GROUPS.fullmatch(cell) else ""
    if _ONE_GROUP.fullmatch(cell):
        return "one group"
    if _GROUPS.fullmatch(cell):
        return "groups"
    if _POINT_GROUPS.fullmatch(cell):
        return "point groups"
    if _WITH_COMMA.fullmatch(cell):
        return "comma"
    return "other" if _OTHER_GROUPS.fullmatch(cell) else ""


def plain_number(cell: str, numbers: Numbers) -> str | None:
    """A number as a decimal point would write it, or None where the marks do not stand as they must."""
    text = cell.strip()
    if numbers.thousands:
        mark, point = re.escape(numbers.thousands), re.escape(numbers.decimal)
        if not re.fullmatch(rf"[+-]?(?:\d+|\d{{1,3}}(?:{mark}\d{{3}})+)?(?:{point}\d*)?(?:[eE][+-]?\d+)?", text):
            return None
        text = text.replace(numbers.thousands, "")
    return text.replace(numbers.decimal, ".")
