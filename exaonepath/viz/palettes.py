"""Colours of the values of patches: perceptual colour maps and categories that people with any colour vision can read.

A number has the colour of matplotlib's colour map, a category one of the viewer's colours (Okabe and Ito's, then some
of Paul Tol's).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from exaonepath.errors import SettingsError
from exaonepath.plotting import require_matplotlib
from exaonepath.viz.values.patch_values import PatchValues

Palette = Literal["viridis", "cividis", "magma"]

MISSING = (128, 134, 144)  # a patch without a value
CROSS = "#c4002b"  # of a patch that could not be read
FAILED = (40, 40, 40)  # the same, where no cross can be drawn
_HEX = "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 999933 882255 44aa99 aa4499 dddddd"
CATEGORY_COLOURS = np.array([list(bytes.fromhex(code)) for code in _HEX.split()], np.uint8)


def colour_map(palette: Palette) -> Any:
    """Matplotlib's colour map of this name.

    Raises:
        SettingsError: it is not one that people with any colour vision can read.
        MissingDependencyError: matplotlib is not installed.
    """
    if palette not in get_args(Palette):
        raise SettingsError(f"the palettes are {', '.join(get_args(Palette))}, not {palette!r}")
    require_matplotlib()
    from matplotlib import colormaps

    return colormaps[palette]


def patch_colours(values: PatchValues, palette: Palette = "viridis") -> np.ndarray:
    """The colour of each patch, uint8 [N, 3]; `MISSING` for those without a value.

    Raises:
        SettingsError, MissingDependencyError: see `colour_map`.
    """
    known = np.isfinite(values.values)
    colours = np.full((len(values), 3), MISSING, np.uint8)
    if values.colours is not None:
        colours[known] = values.colours[known]
    elif values.categories:
        colours[known] = category_colour(values.values[known].astype(np.int64))
    else:
        shares = shares_of_range(values.values[known], values.limits)
        colours[known] = colour_map(palette)(shares, bytes=True)[:, :3]
    return colours


def category_colour(number: np.ndarray) -> np.ndarray:
    """Colours uint8 [N, 3] of categories int [N]; they repeat after 12."""
    return CATEGORY_COLOURS[number % len(CATEGORY_COLOURS)]


def shares_of_range(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Where values lie between two limits, float64 0 to 1; 0 if the limits are equal."""
    low, high = limits
    if not high > low:
        return np.zeros(len(values))
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
