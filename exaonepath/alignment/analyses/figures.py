"""Figures of the analyses: curves of few labels, correlations of genes, and reliability."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.figures import BLUE, GREEN, ORANGE, VERMILION, draw_title, plain, save_figure
from exaonepath.plotting import INK, MUTED, require_matplotlib

_COLUMNS = 4
_BASELINE = "#666666"
_CURVES = (("fused", BLUE, "o"), ("wsi", VERMILION, "s"))
_METHODS = (("PCA + logistic regression (all)", GREEN, "^"), ("mean patch features + logistic regression", ORANGE, "x"))


def draw_analyses(report: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw the figures of the analyses that the report has."""
    found = report.get("analyses") or {}
    written = []
    for name, draw in (("few-shot", draw_few_shot), ("expression", draw_expression), ("calibration", draw_calibration)):
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier evaluation into this folder
        if name in found:
            written.append(draw(found[name], path))
    return written


def draw_few_shot(found: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Balanced accuracy by the number of labelled patients a class, with 95 % bands; a panel per label and input."""
    panels = [(f"{label}, from {name}", view) for label, views in found.items() for name, view in views.items()]
    figure, axes = _grid("Labels from few labelled patients", len(panels))
    for at, (axis, (title, view)) in enumerate(zip(axes, panels, strict=True)):
        points = view["points"]
        places = range(len(points))
        for key, color, mark, name in (
            ("baseline", _BASELINE, "s", view["baseline"]),
            ("ours", BLUE, "o", "ours"),
        ):
            value, low, high = ([point[key][part] for point in points] for part in ("value", "low", "high"))
            axis.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
            axis.plot(places, value, color=color, marker=mark, markersize=4, linewidth=1.5, label=name)
        axis.axhline(view["chance"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axis.set_ylim(0, 1.03)
        axis.set_xticks(places, [str(point["shots"] or "all") for point in points])
        axis.set_title(title, loc="left", color=INK, size=9)
        axis.set_xlabel("labelled training patients a class", color=MUTED, size=8)
        if at % _COLUMNS == 0:
            axis.set_ylabel("balanced accuracy", color=MUTED, size=8)
        axis.legend(fontsize=7.5, frameon=False, loc="lower right", labelcolor=INK)
    note = "mean over draws, the same for both; band: 95 % interval over draws and test patients; dashed: chance"
    return save_figure(figure, path, note)


def draw_expression(found: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """The distribution of the genes' correlations, and ours against that of mean patch features, gene by gene."""
    genes = found["genes"]
    ours, theirs, q = (
        np.array([np.nan if value is None else value for value in genes[key]], float)
        for key in ("pearson", "pearson_mean_patches", "q")
    )
    figure, (left, right) = _grid(f"Features of {found['target']} predicted from the slide", 2, width=3.9, height=3.4)
    known = np.concatenate([ours[np.isfinite(ours)], theirs[np.isfinite(theirs)]])
    lowest = min(-0.3, float(known.min(initial=0.0)))
    edges = np.linspace(lowest, 1, 31)
    for values, color, name in ((theirs, _BASELINE, "mean patch features"), (ours, BLUE, "ours")):
        known_values = values[np.isfinite(values)]
        left.hist(known_values, edges, color=color, alpha=0.35, label=name)
        if len(known_values):
            left.axvline(float(np.mean(known_values)), color=color, linewidth=1.5)
    left.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    left.set_title("correlation with the measured values", loc="left", color=INK, size=9)
    left.set_xlabel("Pearson, test patients", color=MUTED, size=8)
    left.set_ylabel("features", color=MUTED, size=8)
    left.legend(fontsize=7.5, frameon=False, loc="upper left", labelcolor=INK)
    significant = np.nan_to_num(q, nan=1.0) <= 0.05
    for chosen, color, name in ((~significant, MUTED, "not significant"), (significant, BLUE, "significant (ours)")):
        if chosen.any():
            right.scatter(theirs[chosen], ours[chosen], s=9, color=color, alpha=0.6, linewidths=0, label=name)
    right.plot([lowest, 1], [lowest, 1], color=MUTED, linewidth=1)
    right.set(xlim=(lowest, 1), ylim=(lowest, 1))
    right.set_title("each feature", loc="left", color=INK, size=9)
    right.set_xlabel("from mean patch features", color=MUTED, size=8)
    right.set_ylabel("ours", color=MUTED, size=8)
    right.legend(fontsize=7.5, frameon=False, loc="upper left", labelcolor=INK)
    note = "lines: means; significant: 5 % false discoveries (Benjamini & Hochberg), one-sided"
    return save_figure(figure, path, note)


def draw_calibration(found: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Share of hits by predicted probability, with Wilson's intervals; a panel per label."""
    figure, axes = _grid("Are the probabilities right?", len(found), height=2.7, top=0.3)
    for at, (axis, (label, entry)) in enumerate(zip(axes, found.items(), strict=True)):
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        drawn = [(f"ours, {name}", name, color, mark) for name, color, mark in _CURVES]
        drawn += [(name.split(" + ")[0], name, color, mark) for name, color, mark in _METHODS]
        for text, name, color, mark in drawn:
            if name not in entry["methods"]:
                continue
            curve = entry["methods"][name]["curve"]
            x, y, low, high = (
                np.array([point[key] for point in curve]) for key in ("probability", "hits", "low", "high")
            )
            axis.errorbar(
                x, y, [y - low, high - y], color=color, marker=mark, markersize=4, linewidth=1.3, elinewidth=0.7,
                alpha=0.85, label=text,
            )  # fmt: skip
        axis.set(xlim=(0, 1.03), ylim=(0, 1.03))
        axis.set_title(label, loc="left", color=INK, size=9)
        axis.set_xlabel("probability of the predicted class", color=MUTED, size=8)
        if at % _COLUMNS == 0:
            axis.set_ylabel("share of hits", color=MUTED, size=8)
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, loc="upper left", bbox_to_anchor=(0.02, 1 - 0.42 / figure.get_figheight()),
        ncol=len(handles), fontsize=7.5, frameon=False, labelcolor=INK, columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip
    note = "bins of equal numbers of test patients; bars: 95 % (Wilson); dashed: perfect"
    return save_figure(figure, path, note)


def _grid(
    title: str, count: int, *, width: float = 2.9, height: float = 2.35, top: float = 0.0
) -> tuple[Any, Sequence[Any]]:
    """A figure with `count` panels, at most four in a line, and `top` inches of room under the title."""
    columns = min(_COLUMNS, max(count, 1))
    lines = -(-max(count, 1) // columns)
    wide, tall = max(width * columns + 0.5, 5.2), height * lines + 1.2 + top
    figure = require_matplotlib()(figsize=(wide, tall), facecolor="white")
    grid = figure.add_gridspec(
        lines, columns, left=0.6 / wide, right=1 - 0.15 / wide, top=1 - (0.85 + top) / tall, bottom=0.85 / tall,
        hspace=0.5, wspace=0.28,
    )  # fmt: skip
    draw_title(figure, title)
    axes = [figure.add_subplot(grid[at // columns, at % columns]) for at in range(count)]
    for axis in axes:
        plain(axis)
    return figure, axes
