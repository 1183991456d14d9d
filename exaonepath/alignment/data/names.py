"""Names of patients and features: one rule for surrounding blanks, and warnings for names that a program has changed.

A name is text: "NA" and "nan" are kept in rows and in columns, with a warning. Only an empty cell is no name.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from exaonepath.alignment.data.report import CohortReport
from exaonepath.text import few

# Blanks that str.strip does not remove: those of zero width, and a byte order mark.
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_NOT_AVAILABLE = frozenset({"na", "nan", "n/a", "#n/a", "null", "none"})

# Genes that a spreadsheet converts to dates: MARCH1, SEPT2 (now SEPTIN2), DEC1.
_MONTHS = {"mar": ("MARCH", "MARCHF"), "sep": ("SEPT", "SEPTIN"), "sept": ("SEPT", "SEPTIN"), "dec": ("DEC", "DELEC")}
_OF_MONTH = {3: "mar", 9: "sep", 12: "dec"}
_DAY_FIRST = re.compile(r"(\d{1,2})[-./ ](mar|sept?|dec)[a-z]*\.?(?:[-./ ](\d{2}|\d{4}))?", re.IGNORECASE)
_MONTH_FIRST = re.compile(r"(mar|sept?|dec)[a-z]*\.?[-./ ](\d{1,2})", re.IGNORECASE)
_ISO = re.compile(r"\d{4}[-/](\d{1,2})[-/](\d{1,2})(?: 00:00:00)?")
_SERIAL = re.compile(r"[34]\d{4}")  # days since 1899-12-30: the years 1982 to 2036
_LAST = {"mar": 11, "sep": 15, "dec": 2}
_LONGEST = 19  # "2022-03-01 00:00:00"
_EPOCH = datetime.date(1899, 12, 30)


def clean_name(name: object) -> str:
    """A name as text without surrounding blanks, including those of zero width; "" for None."""
    text = "" if name is None else str(name).strip()
    return text if text.isascii() else text.strip(_INVISIBLE).strip()


def is_no_name(name: str) -> bool:
    """Whether a name is a mark for a missing name: NA, nan, null."""
    return name.lower() in _NOT_AVAILABLE


def gene_of_date(name: str) -> str | None:
    """The gene that a spreadsheet converted to this date, such as "MARCH1 (MARCHF1)" for "1-Mar", or None."""
    if len(name) > _LONGEST or not (name[:1].isdigit() or name[:3].lower() in _LAST):
        return None  # a fast exit for nearly all of several hundred thousand names
    if match := _DAY_FIRST.fullmatch(name):
        return _gene(match.group(2), int(match.group(1)))
    if match := _MONTH_FIRST.fullmatch(name):
        return _gene(match.group(1), int(match.group(2)))
    if match := _ISO.fullmatch(name):
        return _gene(_OF_MONTH.get(int(match.group(1)), ""), int(match.group(2)))
    if _SERIAL.fullmatch(name):
        date = _EPOCH + datetime.timedelta(int(name))
        return _gene(_OF_MONTH.get(date.month, ""), date.day)
    return None


def _gene(month: str, number: int) -> str | None:
    month = month.lower()
    if month not in _MONTHS or not 1 <= number <= _LAST[month[:3]]:
        return None
    old, new = _MONTHS[month]
    return f"{old}{number} ({new}{number})"


def check_names(where: str, patients: Sequence[str], features: Sequence[str], report: CohortReport) -> None:
    """Report warnings for names that mean a missing name, and for genes that a spreadsheet converted to dates."""
    for what, names in (("patient", patients), ("feature", features)):
        called = [name for name in names if is_no_name(name)]
        if called:
            report.add(
                "warning",
                "na-names",
                where,
                f"{len(called)} {what}(s) are named {few(sorted(set(called)))} and were kept; if this means a missing "
                "name, remove them",
                patients=called if what == "patient" else (),
                features=called if what == "feature" else (),
            )
    dates = {name: gene for name in features if (gene := gene_of_date(name))}
    # Five digits may be a date only among names. Among Entrez ids they are an id.
    if any(not name.isdigit() for name in dates) or sum(name.isdigit() for name in features) < len(features) / 2:
        shown = few([f"{name} for {gene}" for name, gene in dates.items()])
    else:
        return
    if dates:
        report.add(
            "warning",
            "dates-for-genes",
            where,
            f"{len(dates)} feature(s) are dates, which a spreadsheet made from names of genes: {shown}; restore the "
            "names, because dates do not match other tables",
            features=list(dates),
        )
