"""One picture of a slide and its embedding: tissue and patches, the patch embeddings as colours on the tissue."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exaonepath.errors import SettingsError
from exaonepath.files.atomic import atomic_path
from exaonepath.plotting import HAIRLINE, INK, MUTED, require_matplotlib
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.fragments import grid_step
from exaonepath.viz import panels
from exaonepath.viz.canvas import Canvas, color_field, restain, tissue_mask, view
from exaonepath.viz.colors import project, score_colors, score_oklab, to_oklab
from exaonepath.viz.gallery import exemplars
from exaonepath.viz.layout import Box, Layout, arrange

_SEEN = 0.75  # share of a patch that must be on the slide for its colour to be shown: pixels outside are black
_TRIAL = 400  # pixels
_ROOM_FOR_NOTE, _ROOM_FOR_NOTICE = 4.0, 2.6  # inches
_TITLE_CHARACTERS_PER_INCH = 5.8
_CAPTION_SIZE, _CAPTION_CHARACTERS_PER_INCH = 9.5, 13.0


def draw_overview(
    slide: SlideImage,
    tissue: tuple[Sequence[np.ndarray], Sequence[Sequence[np.ndarray]]] | Any,
    coords: np.ndarray,
    patch_size_level0: int,
    embedding: np.ndarray,
    out_png: str | os.PathLike[str],
    *,
    title: str | None = None,
    subtitle: str | None = None,
    caption: str | None = None,
    colors: np.ndarray | None = None,
    dpi: float = 150,
) -> Path:
    """Draw the slide with its tissue and patches, and next to it the patch embeddings as colours on the tissue.

    Two details explain the colours: the embeddings on their first two principal components, and example patches of the
    main groups of colours. It needs no display and has no global state, so threads may draw at the same time.

    Args:
        slide: an open slide.
        tissue: `segment_tissue`'s result, or (contours, holes of each contour), int [P, 2] at level 0.
        coords: int [N, 2], corners of the patches at level 0; for N = 0, the picture states that there are none.
        patch_size_level0: side of a patch in level-0 pixels.
        embedding: float [N, E], shown as colours. A patch is not shown if a quarter or more of it is outside the slide,
            because its embedding depends on the black pixels outside.
        out_png: the file to write, in an existing folder, completely or not at all.
        title, subtitle, caption: text above and below; None: the slide's name, its numbers, nothing.
        colors: uint8 [N, 3] to use instead of `embedding_colors(embedding)`.
        dpi: pixels per inch; the picture is 9 to 15 inches wide.

    Returns:
        The path of the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        SettingsError: arrays do not match.
        SlideReadError: the slide cannot be read.
        OutputError: the picture cannot be written.
    """
    figure_class = require_matplotlib()
    contours, holes = list(tissue[0]), list(tissue[1])
    coords, embedding = np.asarray(coords), np.asarray(embedding)
    _check(contours, holes, coords, patch_size_level0, embedding, colors)
    # The size of the panels depends on the shape of the view, which is found with a small picture.
    details = len(coords) > 0
    subject = contours if details else []
    width, height = view(slide, subject, _TRIAL).size
    lines = _wrapped(caption, arrange(width / height, 0, details).size[0])
    layout = arrange(width / height, len(lines), details)
    canvas = view(slide, subject, round(max(layout.slide.width, layout.slide.height) * dpi))
    scene = _Scene(slide, canvas, contours, holes, coords, patch_size_level0)
    figure = figure_class(figsize=layout.size, dpi=dpi, facecolor="white")
    _texts(figure, layout, title or slide.name, subtitle or _numbers(scene), lines)
    _slide_panel(figure, layout, scene)
    if len(coords):
        _embedding_panels(figure, layout, scene, embedding, None if colors is None else np.asarray(colors))
    else:
        _nothing(figure, layout)
    path = Path(out_png)
    with atomic_path(path) as temporary:
        # Without creation date and version, the same input gives the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


class _Scene(NamedTuple):
    """The common inputs of all panels."""

    slide: SlideImage
    canvas: Canvas
    contours: list[np.ndarray]
    holes: list[Sequence[np.ndarray]]
    coords: np.ndarray
    patch_size: int

    def seen(self) -> np.ndarray:
        """Share of each patch that is on the slide, float [N]."""
        low = np.maximum(self.coords, 0)
        high = np.minimum(self.coords + self.patch_size, self.slide.dimensions)
        return np.maximum(high - low, 0).prod(axis=1) / self.patch_size**2


def _slide_panel(figure: Any, layout: Layout, scene: _Scene) -> None:
    canvas, coords = scene.canvas, scene.coords
    axes = _axes(figure, layout, layout.slide)
    panels.image(axes, canvas.image)
    points_per_pixel = layout.slide.width * 72 / canvas.size[0]
    notes: list[str | tuple[str, str]] = [("outline", panels.OUTLINE)] if scene.contours else []
    if any(len(inside) for inside in scene.holes):
        notes.append(("holes", panels.HOLE))
    if len(coords):
        step = grid_step(coords, scene.patch_size)
        if panels.cells(axes, canvas, coords, scene.patch_size, step, points_per_pixel):
            notes.append("patch grid")
    panels.outlines(axes, canvas, scene.contours, scene.holes, faint=False)
    panels.scale_bar(axes, canvas, scene.slide.mpp, points_per_pixel, assumed=scene.slide.mpp_source == "assumed")
    panels.heading(axes, "Slide", *notes)


def _embedding_panels(
    figure: Any, layout: Layout, scene: _Scene, embedding: np.ndarray, colors: np.ndarray | None
) -> None:
    canvas, size = scene.canvas, scene.patch_size
    seen = scene.seen()
    shown = (seen >= _SEEN) & np.isfinite(embedding).all(axis=1)
    if not shown.any():
        shown[:] = True
    scores, explained = project(embedding[shown])
    scores = np.nan_to_num(scores)
    lab = np.full((len(shown), 3), np.nan)
    lab[shown] = score_oklab(scores) if colors is None else to_oklab(colors[shown])
    rgb = score_colors(scores) if colors is None else colors[shown]

    field, cover = color_field(canvas, scene.coords + size / 2, lab, size, grid_step(scene.coords, size))
    if scene.contours:
        cover = cover * tissue_mask(canvas, scene.contours, scene.holes)
    axes = _axes(figure, layout, layout.embedding)
    panels.image(axes, restain(canvas.image, field, cover))
    panels.outlines(axes, canvas, scene.contours, scene.holes, faint=True)
    note = ["similar colour = similar embedding"] if layout.embedding.width >= _ROOM_FOR_NOTE else []
    panels.heading(axes, "Patch embeddings", *note)

    axes = _axes(figure, layout, layout.scatter)
    panels.scatter(axes, scores, rgb, explained)
    panels.heading(axes, "All patches", "each dot one patch")

    whole = seen[shown] >= 1 if (seen[shown] >= 1).any() else seen[shown] >= 0
    coords, scores, rgb = scene.coords[shown][whole], scores[whole], rgb[whole]
    axes = _axes(figure, layout, layout.tiles_heading)
    axes.set_axis_off()
    panels.heading(axes, "Up close", f"patches of {size * scene.slide.mpp:.0f} µm, grouped")
    groups = exemplars(scores, coords, size, len(layout.tiles), len(layout.tiles[0]))
    for boxes, members in zip(layout.tiles, groups, strict=False):
        for box, index in zip(boxes, members, strict=False):
            side = round(box.width * figure.dpi)
            panels.tile(_axes(figure, layout, box), scene.slide, coords[index], size, rgb[index], side)


def _nothing(figure: Any, layout: Layout) -> None:
    axes = _axes(figure, layout, layout.embedding)
    axes.set(xticks=[], yticks=[], facecolor="#f6f7f9")
    x, align = 0.5, "center"
    if layout.embedding.width < _ROOM_FOR_NOTICE:  # next to a very tall slide: no frame, left-aligned text
        axes.set_axis_off()
        x, align = 0.0, "left"
    for spine in axes.spines.values():
        spine.set(color=HAIRLINE, linewidth=0.8)
    centre = {"xy": (x, 0.5), "xycoords": "axes fraction", "textcoords": "offset points", "ha": align}
    axes.annotate("No tissue found", xytext=(0, 3), va="bottom", color=INK, size=13, weight="bold", **centre)
    axes.annotate("so there are no patches to embed", xytext=(0, -5), va="top", color=MUTED, size=9.5, **centre)


def _texts(figure: Any, layout: Layout, title: str, subtitle: str, caption: list[str]) -> None:
    width, height = layout.size
    left = layout.slide.left / width
    room = int((width - 0.8) * _TITLE_CHARACTERS_PER_INCH)
    if len(title) > room:
        title = f"{title[: room // 2]}…{title[-(room - room // 2 - 1) :]}"
    # Names of files may contain a dollar sign, which would otherwise start a formula.
    plain = {"va": "top", "parse_math": False}
    figure.text(left, 1 - 0.32 / height, title, **plain, size=18, weight="bold", color=INK)
    figure.text(left, 1 - 0.68 / height, subtitle, **plain, size=11.5, color=MUTED)
    if caption:
        top = 1 - layout.caption / height
        text = "\n".join(caption)
        figure.text(left, top, text, **plain, size=_CAPTION_SIZE, color=MUTED, linespacing=1.45)


def _numbers(scene: _Scene) -> str:
    n, fragments, mpp = len(scene.coords), len(scene.contours), scene.slide.mpp
    width, height = (side * mpp / 1000 for side in scene.slide.dimensions)
    parts = [f"{n:,} patch{'es' * (n != 1)} of {scene.patch_size * mpp:.0f} µm"]
    parts += [f"{fragments:,} tissue fragment{'s' * (fragments != 1)}"]
    parts += [f"{width:.3g} × {height:.3g} mm at {mpp:.3g} µm per pixel"]
    return "  ·  ".join(parts)


def _axes(figure: Any, layout: Layout, box: Box) -> Any:
    width, height = layout.size
    return figure.add_axes(
        (box.left / width, 1 - (box.top + box.height) / height, box.width / width, box.height / height)
    )


def _wrapped(caption: str | None, figure_width: float) -> list[str]:
    characters = int((figure_width - 0.8) * _CAPTION_CHARACTERS_PER_INCH)
    return [line for text in (caption or "").splitlines() for line in textwrap.wrap(text, characters)]


def _check(
    contours: list[np.ndarray],
    holes: list[Sequence[np.ndarray]],
    coords: np.ndarray,
    patch_size: int,
    embedding: np.ndarray,
    colors: np.ndarray | None,
) -> None:
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise SettingsError(f"coords must be [N, 2], got {list(coords.shape)}")
    if embedding.ndim != 2 or len(embedding) != len(coords):
        raise SettingsError(f"embedding must be [{len(coords)}, E] for these coords, got {list(embedding.shape)}")
    if colors is not None and np.shape(colors) != (len(coords), 3):
        raise SettingsError(f"colors must be [{len(coords)}, 3] for these coords, got {list(np.shape(colors))}")
    if len(contours) != len(holes):
        raise SettingsError(f"there are {len(contours)} contours and holes of {len(holes)}")
    if patch_size <= 0:
        raise SettingsError(f"patch_size_level0 must be positive, not {patch_size}")
