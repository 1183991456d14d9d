"""Settings of a training run from a TOML file; flags override it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exaonepath.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from exaonepath.alignment.training.settings import TrainSettings

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, under the name of the package before it became part of Python
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        tomllib = None


def read_settings(
    path: Path | None, overrides: Iterable[str] = (), *, values: Mapping[str, Any] | None = None
) -> TrainSettings:
    """Read a settings file, and override it with flags.

    Args:
        path: TOML with the tables of `TrainSettings`; relative paths in it are relative to its folder. None: defaults.
        overrides: "section.key=value", the value in TOML (a bare word is text); relative paths are relative to the
            working directory.
        values: "section.key" to value; they override both.

    Raises:
        ConfigError: the file is no TOML, a key is unknown (named), or a value has a wrong type or range.
    """
    from exaonepath.alignment.training.settings import build_settings

    return build_settings(read_tables(path, overrides, values=values))


def read_tables(
    path: Path | None, overrides: Iterable[str] = (), *, values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The tables of a settings file, overridden by flags as in `read_settings`, but not yet checked.

    Raises:
        ConfigError: the file is no TOML, or a flag is not valid.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = _parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"settings file {path} cannot be read: {exc}") from exc
        _anchor(tables, path.resolve().parent)
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or "." not in name:
            raise ConfigError(f"a setting is written section.key=value, got {override!r}")
        _put(tables, name.strip(), _value(text.strip(), override))
    for name, value in (values or {}).items():
        _put(tables, name, value)
    return tables


def _put(tables: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    table = tables
    for key in path:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: {key} is a value, not a table")
    table[last] = value


def _parse(text: str, where: str) -> dict[str, Any]:
    if tomllib is None:
        raise MissingDependencyError("reading TOML on Python 3.10 needs tomli: pip install 'exaonepath[train]'")
    try:
        out: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{where} is not valid TOML: {exc}") from exc
    return out


def _value(text: str, where: str) -> Any:
    try:
        return _parse(f"value = {text}", where)["value"]
    except ConfigError:
        if any(mark in text for mark in "\"'[]{}=,"):
            raise
        return text  # a bare word or path; in a shell, TOML quotes would need a second pair of quotes


def _anchor(tables: dict[str, Any], folder: Path) -> None:
    """Convert relative paths of a settings file to paths that start with its folder, in place."""
    data, model = tables.get("data"), tables.get("model")
    places = [(data, key) for key in ("mudata", "slides", "labels", "split")]
    places += [(model, key) for key in ("init", "slide_weights")]
    sources = data.get("tables") if isinstance(data, dict) else None
    places += [(source, "path") for source in (sources.values() if isinstance(sources, dict) else ())]
    for table, key in places:
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(value, str) and value:
            anchored = folder / Path(value).expanduser()
            # slide_weights may be a Hub id, for which no such folder exists.
            if key != "slide_weights" or anchored.exists():
                table[key] = str(anchored)
