"""The format of a text table: column separator, and decimal and thousands separators of its numbers."""

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

# Size of the sample: enough to infer the format, and small compared with a table.
_SAMPLE_CHARACTERS, _SAMPLE_LINES = 1 << 18, 500
_SEPARATORS = ("\t", ";", ",")
SEPARATOR_NAMES = {"\t": "tabs", ";": "semicolons", ",": "commas"}

_WITH_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_ONE_GROUP = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")  # 1,234: ambiguous, 1.234 or 1234
_GROUPS = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3}){2,}|(?:,\d{3})+\.\d*)(?:[eE][+-]?\d+)?")
_POINT_GROUPS = re.compile(r"[+-]?\d{1,3}(?:\.\d{3})+,\d+|[+-]?\d{1,3}(?:\.\d{3}){2,}")
_WITH_POINT = re.compile(r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")
_OTHER_GROUPS = re.compile(r"[+-]?\d{1,3}(?:['\u2019 \u00a0\u202f]\d{3})+(?:[.,]\d+)?")


@dataclass(frozen=True)
class Sample:
    """The beginning of a table of text.

    Attributes:
        separator: column separator. skip: number of comment lines before the header.
        header: its names, as written. rows: the first rows, as written.
        quoting: a constant of the `csv` module.
    """

    separator: str
    skip: int
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    quoting: int = csv.QUOTE_MINIMAL


@dataclass(frozen=True)
class Numbers:
    """Decimal separator of numbers, and their thousands separator if there is one."""

    decimal: str = "."
    thousands: str | None = None

    @property
    def description(self) -> str:
        """The separators in words; empty for plain numbers."""
        words = ["decimal commas"] if self.decimal == "," else []
        if self.thousands:
            words.append(f"{self.thousands!r} between thousands")
        return ", ".join(words)


def sample_of(path: Path, quoting: int = csv.QUOTE_MINIMAL, separators: Sequence[str] = _SEPARATORS) -> Sample:
    """Read the beginning of a text table and infer its column separator.

    Lines that begin with "#" before the header are comments. With the right separator, rows have as many fields as the
    header (or one more, in files of R). The name of the file decides only if the content is ambiguous.

    Raises:
        DataFileError: the file is of another kind, which the message names. One of `UNREADABLE`: it cannot be read.
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
    """Quality of a separator, for comparison: (how well rows match the header, whether lines have several fields)."""
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
    """Infer the decimal and thousands separators of the numbers in these cells.

    Raises:
        DataFileError: the numbers are ambiguous, or cells contradict each other; the message names them and the option.
    """
    seen: dict[str, str] = {}  # kind of number to the first cell of this kind
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
            f"{path}: the comma of {seen['one group']!r} may be a decimal comma or a thousands separator; set its "
            "`decimal` to ',' (decimal comma) or '.' (thousands separator)"
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
    """A number with a decimal point and without thousands separators; None if its separators are misplaced."""
    text = cell.strip()
    if numbers.thousands:
        mark, point = re.escape(numbers.thousands), re.escape(numbers.decimal)
        if not re.fullmatch(rf"[+-]?(?:\d+|\d{{1,3}}(?:{mark}\d{{3}})+)?(?:{point}\d*)?(?:[eE][+-]?\d+)?", text):
            return None
        text = text.replace(numbers.thousands, "")
    return text.replace(numbers.decimal, ".")
