"""Strict reading of JSON from others: config.json, the index of shards, the header of a safetensors file, GeoJSON."""

from __future__ import annotations

import json
import reprlib
from typing import Any, NoReturn

import numpy as np

from exaonepath.errors import ExaonePathError, WeightsError

# No file that is read here nests deeper than 15. Python's parser is recursive, and with a recursion limit above the
# default, 10^6 brackets would overflow the stack.
MAX_DEPTH = 32
_DEPTH_BYTES = 1 << 22  # bytes whose depth is computed at a time

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """`repr` of a value from a file, short and without control characters: for error messages."""
    return _SHORT.repr(value)


def parse_json(data: bytes, where: str, error: type[ExaonePathError] = WeightsError, *, constants: bool = False) -> Any:
    """The value in `data`, which is UTF-8 without a byte order mark; `where` names the file in messages.

    Args:
        data: the text.
        where: names the file in messages.
        error: the type of the errors.
        constants: accept NaN and Infinity, which are no JSON, and which Java programs write all the same.

    Raises:
        WeightsError, or `error`: not JSON, nested deeper than `MAX_DEPTH`, a repeated key in one object, NaN or
            infinity, or text that is not valid Unicode (half of a surrogate pair).
    """
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise error(f"{where} starts with a byte order mark; save it again as UTF-8 without one")
    _check_depth(data, where, error)

    def reject_constant(name: str) -> NoReturn:
        raise error(f"{where} holds {name}, which is no number in JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{where} states {shown(twice)} twice; which one holds is not defined")
        return result

    try:
        constant = float if constants else reject_constant
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        if rb"\u" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as exc:
        raise error(f"{where} is not UTF-8 text: {exc}") from exc
    except ValueError as exc:
        raise error(f"{where} is not valid JSON: {exc}") from exc
    return value


def _check_depth(data: bytes, where: str, error: type[ExaonePathError]) -> None:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    # Without escaped characters, every quotation mark begins or ends a string.
    plain = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    step = np.zeros(256, np.int8)
    step[list(b"[{")], step[list(b"]}")] = 1, -1
    depth = quotes = 0
    for start in range(0, len(plain), _DEPTH_BYTES):
        part = plain[start : start + _DEPTH_BYTES]
        marks = quotes + np.cumsum(part == ord('"'), dtype=np.int64)
        depths = depth + np.cumsum(np.where(marks % 2 == 0, step[part], 0), dtype=np.int64)
        if depths.max() > MAX_DEPTH:
            raise error(f"{where} nests deeper than {MAX_DEPTH} levels: it is no file of the expected kind")
        quotes, depth = int(marks[-1]) % 2, int(depths[-1])
