"""Common parts of all pictures: the import of matplotlib, and the colours of text and lines."""

from __future__ import annotations

from typing import Any

from exaonepath.errors import MissingDependencyError

INK, MUTED, HAIRLINE = "#1b1f27", "#6a7280", "#d5d9e0"


def require_matplotlib() -> Any:
    """Matplotlib's Figure class; raises `MissingDependencyError` if matplotlib is not installed."""
    try:
        # Unlike pyplot, the Figure class draws with Agg and has no global state.
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingDependencyError('drawing pictures needs matplotlib: pip install "exaonepath[viz]"') from exc
    return Figure
