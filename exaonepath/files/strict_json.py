"""Strict reading of JSON from others: config.json, the index of shards, the header of a safetensors file."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any, NoReturn

from exaonepath.errors import WeightsError

# No file that is read here nests deeper than 5. Python's parser is recursive, and with a recursion limit above the
# default, 10^6 brackets would overflow the stack.
MAX_DEPTH = 32
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """`repr` of a value from a file, short and without control characters: for error messages."""
    return _SHORT.repr(value)


def parse_json(data: bytes, where: str) -> Any:
    """The value in `data`, which is UTF-8 without a byte order mark; `where` names the file in messages.

    Raises:
        WeightsError: not JSON, nested deeper than `MAX_DEPTH`, a repeated key in one object, NaN or infinity, or text
            that is not valid Unicode (half of a surrogate pair).
    """
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise WeightsError(f"{where} starts with a byte order mark; save it again as UTF-8 without one")
    _check_depth(data, where)

    def reject_constant(name: str) -> NoReturn:
        raise WeightsError(f"{where} holds {name}, which is no number in JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise WeightsError(f"{where} states {shown(twice)} twice; which one holds is not defined")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=reject_constant)
        if rb"\u" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as exc:
        raise WeightsError(f"{where} is not UTF-8 text: {exc}") from exc
    except ValueError as exc:
        raise WeightsError(f"{where} is not valid JSON: {exc}") from exc
    return value


def _check_depth(data: bytes, where: str) -> None:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKEN.finditer(data):
        mark = token.group()[:1]
        depth += (mark in b"[{") - (mark in b"]}")
        if depth > MAX_DEPTH:
            raise WeightsError(f"{where} nests deeper than {MAX_DEPTH} levels: it is no file of this model family")
