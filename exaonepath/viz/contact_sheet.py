"""The patches that stand for each cluster or category, or for the two ends of a score, as pictures on one sheet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exaonepath.errors import SettingsError
from exaonepath.plotting import INK, MUTED
from exaonepath.slides.image import SlideImage
from exaonepath.text import printable
from exaonepath.viz.gallery import tile_or_none
from exaonepath.viz.heatmap import check_values, figure_notes, subtitle
from exaonepath.viz.palettes import CROSS, Palette, patch_colours
from exaonepath.viz.sheet import (
    DPI,
    LEFT,
    TOP,
    Frame,
    axes_over,
    new_figure,
    notes_height,
    place_pixels,
    wrapped,
    write_heading,
    write_notes,
    write_png,
)
from exaonepath.viz.values.patch_values import PatchValues
from exaonepath.viz.values.results import Results
from exaonepath.viz.values.vectors import UnitRows, top_rows

MOST_EACH = 16
_MOST_ROWS = 12
_TILE = 168  # pixels
_GAP, _CAPTION, _HEADING = 14, 48, 40
_STRIPES = 14


class SheetRow(NamedTuple):
    """One row of the sheet.

    Attributes:
        heading: what the patches have in common.
        patches: their numbers, int64 [at most k].
        captions: the value of each.
    """

    heading: str
    patches: np.ndarray
    captions: list[str]


def draw_contact_sheet(
    slide: SlideImage,
    results: Results,
    values: PatchValues,
    out_png: str | os.PathLike[str],
    *,
    each: int = 8,
    palette: Palette = "viridis",
) -> Path:
    """Draw `each` patches of every category (of clusters: the most typical ones), or of either end of a score.

    A tile is a whole patch as the patch encoder saw it, in a frame of its colour, with its position (level-0 pixels)
    and its value below. Patches that could not be read when the slide was encoded have a row of their own, and a patch
    that cannot be read now is striped.

    Args:
        slide, results, values, palette: as for `draw_heatmap`.
        out_png: the file to write, in an existing folder, whole or not at all.
        each: patches in a row.

    Returns:
        The path of the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        SettingsError: an argument cannot be used, or the values are of other patches.
        SlideChangedError: the slide was replaced while it was read.
        OutputError: the picture cannot be written.
    """
    if not 1 <= each <= MOST_EACH:
        raise SettingsError(f"a row of the sheet can have 1 to {MOST_EACH} patches, not {each!r}")
    check_values(results, values)
    colours = patch_colours(values, palette)
    rows = sheet_rows(values, each)
    left_out = max(0, len(rows) - _MOST_ROWS)
    rows = rows[:_MOST_ROWS]
    failed = results.failures[:each]

    notes = figure_notes(slide, results)
    if left_out:
        notes.append(f"The {_MOST_ROWS} largest groups are shown; {left_out} others are not.")
    width = max(round(2 * LEFT * DPI) + each * (_TILE + _GAP), round(7.5 * DPI))
    lines = wrapped(notes, width)
    pitch = _HEADING + _TILE + _CAPTION
    count = max(1, len(rows) + bool(failed))
    frame = Frame(round(LEFT * DPI), round(TOP * DPI), width, round(TOP * DPI) + count * pitch + notes_height(lines))
    figure = new_figure(frame)
    write_heading(
        figure,
        frame,
        f"{values.title} — {printable(slide.name)}",
        subtitle(slide, results, values) + "  ·  positions in pixels",
    )
    write_notes(figure, frame, lines)
    for number, row in enumerate(rows):
        top = frame.top + number * pitch
        _heading(figure, frame, top, row.heading)
        for column, (patch, caption) in enumerate(zip(row.patches.tolist(), row.captions, strict=True)):
            corner = results.coords[patch]
            pixels = tile_or_none(slide, corner, results.patch_size, _TILE)
            frame_colour = tuple(colours[patch] / 255.0)
            words = [f"{corner[0]}, {corner[1]}", caption if pixels is not None else "cannot be read"]
            _tile(figure, frame, (column, top), pixels, frame_colour, words)
    if failed:
        top = frame.top + len(rows) * pitch
        _heading(figure, frame, top, f"could not be read  ({len(results.failures):,})")
        for column, failure in enumerate(failed):
            words = [f"{failure.x}, {failure.y}", printable(failure.reason)[:22]]
            _tile(figure, frame, (column, top), None, CROSS, words)
    if not rows and not failed:
        empty = "there are no patches" if not len(values) else f"no patch has a value ({values.missing})"
        _heading(figure, frame, frame.top, f"Nothing to show: {empty}")
    return write_png(figure, out_png, slide)


def sheet_rows(values: PatchValues, each: int) -> list[SheetRow]:
    """Which patches are shown: `each` of every category, the largest category first, or the highest and the lowest.

    Of clusters, the patches nearest to the mean vector of the cluster; of other categories, patches evenly spaced in
    the order in which they are stored. Equal values are in that order too.
    """
    known = np.isfinite(values.values)
    if not known.any():
        return []
    if values.categories:
        return _of_categories(values, known, each)
    numbers = np.where(known, values.values, -np.inf)
    most = min(each, int(known.sum()))
    rows = []
    for heading, ranked in (("highest", numbers), ("lowest", np.where(known, -values.values, -np.inf))):
        patches = top_rows(ranked, most)
        rows.append(SheetRow(f"{heading}: {values.label}", patches, [f"{values.values[at]:.4g}" for at in patches]))
    return rows


def _of_categories(values: PatchValues, known: np.ndarray, each: int) -> list[SheetRow]:
    rows = []
    for number, name in enumerate(values.categories):
        members = np.flatnonzero(known & (values.values == number))
        if not len(members):
            continue
        if values.unit is not None:
            patches, captions = _most_typical(values.unit, members, each)
        else:
            patches = members[np.linspace(0, len(members) - 1, min(each, len(members))).astype(np.int64)]
            captions = [f"patch {at}" for at in patches]
        plural = "es" * (len(members) != 1)
        rows.append((len(members), SheetRow(f"{name}  ({len(members):,} patch{plural})", patches, captions)))
    return [row for _, row in sorted(rows, key=lambda item: -item[0])]


def _most_typical(unit: UnitRows, members: np.ndarray, each: int) -> tuple[np.ndarray, list[str]]:
    """The members nearest to their mean, and their cosine to it."""
    mean = np.zeros(unit.rows.shape[1], np.float64)
    for start in range(0, len(members), 1 << 14):  # rows are memory-mapped, and there may be a million
        mean += unit.rows[members[start : start + (1 << 14)]].sum(axis=0, dtype=np.float64)
    mean /= max(float(np.linalg.norm(mean)), 1e-30)
    cosine = np.empty(len(members), np.float32)
    for start in range(0, len(members), 1 << 14):
        cosine[start : start + (1 << 14)] = unit.rows[members[start : start + (1 << 14)]] @ mean.astype(np.float32)
    best = top_rows(cosine, min(each, len(members)))
    return members[best], [f"cosine {cosine[at]:.3f}" for at in best]


def _heading(figure: Any, frame: Frame, top: int, words: str) -> None:
    x, y = frame.left / frame.width, 1 - (top + 6) / frame.height
    figure.text(x, y, words, va="top", parse_math=False, size=10.5, weight="bold", color=INK)


def _tile(
    figure: Any, frame: Frame, place: tuple[int, int], pixels: np.ndarray | None, color: Any, words: list[str]
) -> None:
    column, row = place
    corner = frame.left + column * (_TILE + _GAP), row + _HEADING
    place_pixels(figure, frame, corner, striped(_TILE) if pixels is None else pixels)
    axes = axes_over(figure, frame, corner, (_TILE, _TILE))
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2.5)
    x, y = corner[0] / frame.width, 1 - (corner[1] + _TILE + 5) / frame.height
    figure.text(x, y, "\n".join(words), va="top", parse_math=False, size=7, color=MUTED, linespacing=1.3)


def striped(side: int) -> np.ndarray:
    """What stands in place of a patch that cannot be read: grey with diagonal stripes, uint8 RGB [side, side, 3]."""
    stripes = (np.add.outer(np.arange(side), np.arange(side)) // _STRIPES) % 2
    return np.repeat((128 + 24 * stripes).astype(np.uint8)[..., None], 3, axis=2)
