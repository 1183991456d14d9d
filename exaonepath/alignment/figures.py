"""Figures of evaluations and ablations. The colours of Okabe and Ito can be distinguished by colour-blind readers; the
meaning of a colour is also shown by a position or a label."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.studies.ablations import Outcome
from exaonepath.encoders.attention_map import AttentionMap
from exaonepath.files.atomic import atomic_path
from exaonepath.plotting import HAIRLINE, INK, MUTED, require_matplotlib

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_BASELINES = {"CCA": ("^", VERMILION), "ridge": ("x", ORANGE), "PLS": ("+", GREEN)}
_ROW = 0.27  # height of a row of a chart, in inches
_TITLE, _FOOT = 0.95, 0.55


def draw_outcome(outcome: Outcome, measures: Sequence[str], path: str | os.PathLike[str]) -> Path:
    """Draw a study: a panel per measure, a row per variant; a ring per seed, a dot for the mean, a bar for its
    interval."""
    variants = [variant.name for variant in outcome.study.variants]
    figure, panels = _panels(outcome.study.question, len(measures), len(variants), width=2.75, label=1.9)
    for axes, measure in zip(panels, measures, strict=True):
        for row, name in enumerate(variants):
            seeds = [v for v in outcome.values[name].get(measure, []) if v is not None]
            if not seeds:
                axes.annotate(
                    "not available", (0.03, row), xycoords=("axes fraction", "data"), color=MUTED, size=8, va="center"
                )
                continue
            mean = outcome.estimate(name, measure)
            color = BLUE if row == 0 else VERMILION
            axes.plot([mean.low, mean.high], [row, row], color=color, linewidth=2, alpha=0.45, solid_capstyle="butt")
            axes.scatter(seeds, [row] * len(seeds), s=16, facecolors="none", edgecolors=color, linewidths=0.9)
            axes.scatter([mean.value], [row], s=34, color=color, zorder=3)
        ends = [outcome.estimate(name, measure).high for name in variants if measure in outcome.values[name]]
        seen = [v for name in variants for v in outcome.values[name].get(measure, []) if v is not None]
        top = max([*seen, *(end / 1.2 for end in ends if end == end)], default=1.0)  # NaN: one seed has no interval
        _chance(axes, outcome.chance.get(measure), len(variants))
        _rows(axes, variants if axes is panels[0] else [""] * len(variants))
        axes.set_xlim(0, min(1.04, max(1.25 * top, 2.5 * outcome.chance.get(measure, 0.0))))
        axes.set_title(measure.replace(" x ", " × "), loc="left", color=INK, size=9)
    n, over = len(outcome.seeds) * outcome.draws, "draws, seeds" if outcome.draws > 1 else "seeds"
    runs = f"{n} runs of {outcome.draws} draws of the cohort" if outcome.draws > 1 else f"{n} seeds"
    note = (
        f"rings: {runs}; dot and bar: mean and 95 % interval over {over} and patients; dashed: chance; "
        "patients held out of training"
    )
    return save_figure(figure, path, note)


def draw_retrieval(report: Mapping[str, Any], part: str, path: str | os.PathLike[str]) -> Path:
    """Draw recall@1 and @10 of every direction with intervals, compared with chance and, if known, with baselines."""
    scores = report["parts"][part]["retrieval"]
    baselines = (report.get("baselines") or {}).get("retrieval", {}) if part == "test" else {}
    names = list(scores)
    figure, panels = _panels(f"Cross-modal retrieval, {part} patients", 2, len(names), width=3.4, label=1.5)
    for axes, k in zip(panels, ("1", "10"), strict=True):
        for row, name in enumerate(names):
            found, chance = scores[name]["recall"][k], scores[name]["chance"][k]
            axes.plot([found["low"], found["high"]], [row, row], color=BLUE, linewidth=2, alpha=0.45)
            axes.scatter([found["value"]], [row], s=28, color=BLUE, zorder=3)
            axes.plot([chance, chance], [row - 0.35, row + 0.35], color=MUTED, linewidth=1.2)
            for (method, (mark, color)), found_by in ((m, baselines.get(m[0], {})) for m in _BASELINES.items()):
                if name in found_by:
                    axes.scatter(
                        [found_by[name]["recall"][k]["value"]], [row], s=26, marker=mark, color=color, label=method,
                        zorder=2, linewidths=1.2,
                    )  # fmt: skip
        _rows(axes, [name.replace("->", " → ") for name in names] if axes is panels[0] else [""] * len(names))
        axes.set_xlim(0, 1.02)
        axes.set_title(f"recall@{k}", loc="left", color=INK, size=9)
    marks = "; triangle: CCA, cross: ridge, plus: PLS" if baselines else ""
    return save_figure(figure, path, f"dot and bar: ours, 95 % interval over patients; grey ticks: chance{marks}")


def draw_missing(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw curves over the number of available modalities: retrieval of the others, and labels from the fused
    embedding."""
    missing = report["missing"]
    charts: list[tuple[str, list[tuple[str, Mapping[str, Any], str]], float]] = [
        (f"find {target}: recall@1", [("", found, BLUE)], found["chance"])
        for target, found in missing["retrieval"].items()
    ]
    for label, found in missing["probes"].items():
        if not found:  # too few patients of a class
            continue
        lines = [("separate probes", found["refitted"], BLUE), ("probe of the full set", found["deployed"], VERMILION)]
        charts.append((f"{label}: balanced accuracy", lines, found["refitted"]["chance"]))
    columns = min(4, len(charts))
    lines_of = -(-len(charts) // columns)
    figure_class = require_matplotlib()
    figure = figure_class(figsize=(2.9 * columns + 0.4, 2.35 * lines_of + 1.2), facecolor="white")
    top = 1 - 0.75 / figure.get_figheight()
    grid = figure.add_gridspec(
        lines_of,
        columns,
        left=0.06,
        right=0.985,
        top=top - 0.03,
        bottom=0.8 / figure.get_figheight(),
        hspace=0.55,
        wspace=0.3,
    )
    draws = report.get("draws", 1)
    of_each = f" (mean of {draws} draws of the cohort)" if draws > 1 else ""
    draw_title(
        figure, f"Modalities missing at inference, {missing['patients']:.0f} patients who have them all{of_each}"
    )
    for at, (title, lines, chance) in enumerate(charts):
        axes = figure.add_subplot(grid[at // columns, at % columns])
        sizes: list[int] = []
        for line, (name, found, color) in enumerate(lines):
            curve = {int(size): value for size, value in found["curve"].items()}
            sizes = sorted(curve)
            mean, low, high = (np.array([curve[size][k] for size in sizes]) for k in range(3))
            axes.fill_between(sizes, low, high, color=color, alpha=0.13, linewidth=0)
            axes.plot(sizes, mean, color=color, marker="os"[line], markersize=4.5, linewidth=1.6, label=name or None)
        axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 1.03)
        axes.set_xticks(sizes)
        axes.set_title(title, loc="left", color=INK, size=9)
        axes.set_xlabel("modalities present", color=MUTED, size=8)
        plain(axes)
        if any(name for name, _, _ in lines):
            axes.legend(fontsize=7.5, frameon=False, loc="lower right", labelcolor=INK)
    return save_figure(figure, path, "line: mean over subsets of that size; band: worst to best subset; dashed: chance")


def draw_projections(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw the spectrum of both sides of every pair, and the similarity of their directions and of their order of
    patients."""
    pairs = report["projections"]["pairs"]
    columns = min(5, len(pairs))
    lines_of = -(-len(pairs) // columns)
    figure = require_matplotlib()(figsize=(2.35 * columns + 0.5, 2.1 * lines_of + 1.35), facecolor="white")
    grid = figure.add_gridspec(
        lines_of,
        columns,
        left=0.06,
        right=0.985,
        top=1 - 1.1 / figure.get_figheight(),
        bottom=0.85 / figure.get_figheight(),
        hspace=0.75,
    )
    draws = report.get("draws", 1)
    of_each = f", mean of {draws} draws" if draws > 1 else ""
    draw_title(figure, f"What the projections learned: singular values of both sides, over held-out patients{of_each}")
    for at, pair in enumerate(pairs):
        axes = figure.add_subplot(grid[at // columns, at % columns])
        for side, color, style in (("left", BLUE, "-"), ("right", VERMILION, (0, (4, 1.5)))):
            values = np.array(pair[f"{side}_spectrum"])
            axes.plot(
                np.arange(1, len(values) + 1), values, color=color, linestyle=style, linewidth=1.6, label=pair[side]
            )
        axes.set_title(
            f"same directions {pair['overlap']:.2f} (chance {pair['chance']:.2f})\n"
            f"same order of patients {pair['correlation']:.2f}",
            loc="left",
            color=MUTED,
            size=7.5,
        )
        axes.set_ylim(0, None)
        axes.legend(fontsize=7.5, frameon=False, loc="upper right", labelcolor=INK)
        plain(axes)
    note = (
        "x: direction, y: share of the sum; overlap of the directions that hold 90 % of the variance; order: linear CKA"
    )
    return save_figure(figure, path, note)


def draw_attention(
    maps: Sequence[AttentionMap],
    coords: np.ndarray,
    contour_index: np.ndarray,
    path: str | os.PathLike[str],
    *,
    patch_size: int = 256,
    title: str = "Attention inside and across fragments",
) -> Path:
    """Draw the attention of chosen patches (stars): one row per patch, one column per block.

    The colour is the probability, mean over heads.

    Args:
        maps: attention maps of one slide.
        coords: int [N, 2] and contour_index [N] of its patches, at level 0.
        path: PNG to write.
        patch_size: side of a patch in level-0 pixels.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    sections = _apart(np.asarray(coords, np.float64), np.asarray(contour_index), patch_size)
    span = np.ptp(sections, axis=0) + patch_size
    queries = maps[0].queries.tolist()
    side = 2.7
    height = float(np.clip(side * span[1] / span[0], 1.0, 3.4))
    figure = require_matplotlib()(
        figsize=(side * len(maps) + 1.25, (height + 0.32) * len(queries) + 1.35), facecolor="white"
    )
    wide, tall = figure.get_figwidth(), figure.get_figheight()
    place = {"left": 0.02, "right": 1 - 1.0 / wide, "top": 1 - 0.95 / tall, "bottom": 0.45 / tall}
    grid = figure.add_gridspec(len(queries), len(maps), hspace=0.16, wspace=0.04, **place)
    draw_title(figure, title)
    squares = [Rectangle((x, y), patch_size, patch_size) for x, y in sections]
    norm = LogNorm(1e-4, 1)
    drawn = None
    for row, query in enumerate(queries):
        for at, found in enumerate(maps):
            axes = figure.add_subplot(grid[row, at])
            p = found.patches[row].mean(0).numpy()
            nothing = p == 0
            drawn = PatchCollection(
                [s for s, none in zip(squares, nothing, strict=True) if not none], cmap="viridis", norm=norm
            )
            drawn.set_array(np.clip(p[~nothing], 1e-4, 1))
            drawn.set_edgecolor("face")
            # Probabilities of exactly zero are drawn as empty squares, to distinguish them from small ones.
            empty = [s for s, none in zip(squares, nothing, strict=True) if none]
            axes.add_collection(PatchCollection(empty, facecolor="#f2f3f5", edgecolor="#e2e5ea", linewidth=0.3))
            axes.add_collection(drawn)
            axes.plot(
                *(sections[query] + patch_size / 2), marker="*", markersize=12, color=VERMILION, markeredgecolor="white"
            )
            axes.set(xlim=(sections[:, 0].min() - patch_size, sections[:, 0].max() + 2 * patch_size))
            axes.set(
                ylim=(sections[:, 1].max() + 2 * patch_size, sections[:, 1].min() - patch_size), xticks=[], yticks=[]
            )
            axes.set_aspect("equal")
            for spine in axes.spines.values():
                spine.set_visible(False)
            kind = "RoPE, inside fragments" if found.restricted else "NoPE, whole slide"
            other = float(found.patches[row].mean(0)[contour_index != contour_index[query]].sum())
            if row == 0:
                axes.set_title(f"block {found.block}: {kind}", loc="left", color=INK, size=9)
            axes.annotate(
                f"to other fragments: {other:.3g}",
                (0, 0),
                (0, -9),
                "axes fraction",
                "offset points",
                color=MUTED,
                size=8,
            )
    bar = figure.add_axes((1 - 0.82 / figure.get_figwidth(), 0.25, 0.14 / figure.get_figwidth(), 0.5))
    figure.colorbar(drawn, cax=bar).ax.tick_params(labelsize=8, colors=MUTED)
    bar.set_title("probability", size=8, color=MUTED, loc="left")
    return save_figure(
        figure, path, "star: the patch that attends; empty squares: probability exactly 0; sections drawn side by side"
    )


def _apart(coords: np.ndarray, contour: np.ndarray, patch_size: int) -> np.ndarray:
    """Positions in which overlapping fragments are moved next to each other; others are not changed."""
    out = coords.copy()
    boxes: list[np.ndarray] = []
    for name in np.unique(contour):
        rows = contour == name
        box = np.array([out[rows].min(0), out[rows].max(0) + patch_size])
        while any((box[0] < other[1]).all() and (other[0] < box[1]).all() for other in boxes):
            shift = max(other[1, 0] for other in boxes) + 2 * patch_size - box[0, 0]
            out[rows, 0] += shift
            box[:, 0] += shift
        boxes.append(box)
    return out


def _panels(title: str, count: int, rows: int, *, width: float, label: float) -> tuple[Any, list[Any]]:
    height = _TITLE + rows * _ROW + _FOOT + 0.25
    total = label + count * width + 0.2
    figure = require_matplotlib()(figsize=(total, height), facecolor="white")
    bottom, tall = (_FOOT + 0.25) / height, rows * _ROW / height
    draw_title(figure, title)
    axes = [figure.add_axes(((label + k * width) / total, bottom, (width - 0.3) / total, tall)) for k in range(count)]
    return figure, axes


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    plain(axes)
    axes.tick_params(axis="y", length=0, labelcolor=INK)


def plain(axes: Any) -> None:
    """Thin grey axes, as in all figures of reports."""
    axes.tick_params(colors=MUTED, labelsize=8, length=2.5)
    axes.grid(axis="x", color=HAIRLINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=HAIRLINE)


def _chance(axes: Any, chance: float | None, rows: int) -> None:
    if chance is not None:
        axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))


def draw_title(figure: Any, text: str) -> None:
    """The title at the upper left."""
    figure.text(
        0.16 / figure.get_figwidth(), 1 - 0.34 / figure.get_figheight(), text, color=INK, size=11.5, weight="bold"
    )


def save_figure(figure: Any, path: str | os.PathLike[str], note: str) -> Path:
    """Write a PNG with a note at the bottom, completely or not at all."""
    target = Path(path)
    figure.text(0.16 / figure.get_figwidth(), 0.14 / figure.get_figheight(), note, color=MUTED, size=8)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return target
