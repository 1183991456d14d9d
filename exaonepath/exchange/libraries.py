"""Optional libraries of the layouts, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from exaonepath.errors import MissingDependencyError

_EXTRAS = {"spatialdata": "spatialdata", "geopandas": "spatialdata", "shapely": "spatialdata"}


def library(name: str, needed_for: str) -> Any:
    """A module by its full name.

    Args:
        name: the module.
        needed_for: what it is for, as the message says it ("AnnData files").

    Raises:
        MissingDependencyError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        package = name.partition(".")[0]
        extra = _EXTRAS.get(package, "exchange")
        raise MissingDependencyError(f"{needed_for} need {package}: pip install 'exaonepath[{extra}]' ({exc})") from exc
