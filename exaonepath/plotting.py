"""What all pictures share: matplotlib where it is installed, and the colours of text and lines."""

from __future__ import annotations

from typing import Any

from exaonepath.errors import MissingDependencyError

INK, MUTED, HAIRLINE = "#1b1f27", "#6a7280", "#d5d9e0"


def require_matplotlib() -> Any:
    """Matplotlib's Figure class; raises `MissingDependencyError` where matplotlib is not installed."""
    try:
        # The Figure class alone draws with Agg and registers nothing globally, unlike pyplot.
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingDependencyError('drawing pictures needs matplotlib: pip install "exaonepath[viz]"') from exc
    return Figure
