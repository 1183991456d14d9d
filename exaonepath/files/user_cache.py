"""The folder of the user's cache: files that can be deleted at any time, at the cost of time."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "EXAONEPATH_CACHE"


def cache_folder() -> Path | None:
    """The folder; None if the user wants none, or has no home.

    It is `$EXAONEPATH_CACHE`, or `exaonepath` in `$XDG_CACHE_HOME`, or in `~/.cache`. An empty `EXAONEPATH_CACHE` means
    that nothing is kept.
    """
    if (own := os.environ.get(VARIABLE)) is not None:
        return Path(own).absolute() if own.strip() else None
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "exaonepath"
    try:
        return Path.home() / ".cache" / "exaonepath"
    except RuntimeError:
        return None
