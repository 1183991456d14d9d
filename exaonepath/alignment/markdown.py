"""Cells and tables of the reports, in Markdown; estimates are plain JSON types, as in the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    lines = [head, ["---"] * len(head), *body]
    return [*("| " + " | ".join(cells) + " |" for cells in lines), ""]


def interval(estimate: Mapping[str, Any]) -> str:
    """A number with its interval."""
    value = number(estimate["value"])
    return value if estimate["low"] is None else f"{value} [{number(estimate['low'])}, {number(estimate['high'])}]"


def signed(estimate: Mapping[str, Any]) -> str:
    """A difference with its sign and interval."""
    value = "-" if estimate["value"] is None else f"{estimate['value']:+.3f}"
    return value if estimate["low"] is None else f"{value} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number; "-" if there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def direction(name: str) -> str:
    """A direction of retrieval, for readers."""
    return name.replace("->", " to ")
