"""Build dataclasses from the tables of a settings file, with checks of keys and types."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from exaonepath.errors import ConfigError
from exaonepath.text import close_to


def build_typed(cls: type[Any], table: Any, where: str = "") -> Any:
    """An instance of the dataclass `cls` from nested mappings; `where` is the dotted name of the table, for messages.

    Raises:
        ConfigError: a key is unknown (the most similar one is named), or a value has another type.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where.rstrip('.')} must be a table, got {table!r}")
    hints: dict[str, Any] = get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise ConfigError(f"unknown setting {where}{key!r}{close_to(str(key), set(hints))}")
    values = {}
    for key, value in table.items():
        hint = hints[key]
        values[key] = (
            build_typed(hint, value, f"{where}{key}.")
            if isinstance(hint, type) and dataclasses.is_dataclass(hint)
            else _typed(hint, value, where + key)
        )
    return cls(**values)


def _typed(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        # TOML has no null, so "none" means None.
        if type(None) in arguments and (value is None or value == "none"):
            return None
        for choice in arguments:
            if choice is type(None):
                continue
            try:
                return _typed(choice, value, name)
            except ConfigError:
                continue
        raise ConfigError(f"{name} must be {' or '.join(map(_type_name, arguments))}, got {value!r}")
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        kinds = arguments[:1] if arguments[-1] is Ellipsis else arguments
        if not isinstance(value, list | tuple) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        return tuple(_typed(kinds[min(i, len(kinds) - 1)], item, name) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, got {value!r}")
        return {key: _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{name} must be {_type_name(hint)}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value!r}")
    return value


def _type_name(hint: Any) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): '"none"'}
    return words.get(hint, "a table")
