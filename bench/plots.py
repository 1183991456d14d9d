"""One picture a question, drawn from the results tables; what was not measured is not drawn.

    python bench/plots.py [--out docs/images] [FOLDER ...]      (default: bench/results)

Per machine: speed against tokens, speed against fragments, memory against patches (with the line of a 12 GB card),
error against dtype, and the pairwise loss. Where a case was measured more than once, the newest row counts.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib

matplotlib.use("Agg")

import loss_plots
from harness import table
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Row = dict[str, Any]
OURS = "exaonepath"
CARD_GB = 12
_CLOCKS = {"events": "times by CUDA events", "wall": "wall time", "cpu": "processor time"}
_BUSY = 1.5  # load per core above which other processes clearly ran at the same time

# Okabe and Ito's colours, which most readers can distinguish; markers differ too. (colour, marker, name in the legend)
# A colour is a kernel; where it serves twice, the second way is dashed.
_DASHED = ("sdpa_loop", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flex_static")
_STYLES = {
    OURS: ("#D55E00", "o", "exaonepath (this project)"),
    f"{OURS}_streamed": ("#E69F00", "d", "exaonepath, features on the host"),
    "varlen_attn": ("#0072B2", "s", "torch varlen_attn"),
    "flash_varlen": ("#56B4E9", "D", "aten flash, varlen"),
    "cudnn_varlen": ("#009E73", "^", "aten cuDNN, varlen"),
    "efficient_varlen": ("#F0E442", "v", "aten efficient, varlen"),
    "sdpa_loop": ("#0072B2", "P", "SDPA, a call a fragment"),
    "sdpa_flash": ("#56B4E9", "X", "SDPA flash, a call a fragment"),
    "sdpa_cudnn": ("#009E73", "<", "SDPA cuDNN, a call a fragment"),
    "sdpa_efficient": ("#F0E442", ">", "SDPA efficient, a call a fragment"),
    "flex": ("#CC79A7", "h", "flex_attention, dynamic shapes"),
    "flex_static": ("#CC79A7", "p", "flex_attention, this shape"),
    "dense_mask": ("#000000", "x", "SDPA, dense mask (as published)"),
}
_ROTATIONS = (("with rotation (RoPE block)", ("own", "separate")), ("without rotation (NoPE block)", ("none",)))


def machines(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the machine they were measured on, under a name that can stand in a file's."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if (row.get("device") or loss_plots.device_of(row)) == "cuda":
            name = re.sub(r"[^a-z0-9]+", "-", row["gpu"].lower().replace("nvidia", "")).strip("-")
        else:
            name = "cpu"
        found.setdefault(name, []).append(row)
    return found


def newest(rows: Iterable[Row], *columns: str) -> list[Row]:
    """The last row of each combination of `columns`."""
    return list({tuple(row[name] for name in columns): row for row in rows}.values())


def speed_against_tokens(rows: list[Row]) -> Figure | None:
    """One fragment: how fast each candidate is as the number of tokens grows."""
    rows = _timed(rows, _main_dtype(rows))
    return _speed([r for r in rows if r["fragments"] == 1], "n", "tokens in one fragment", "Speed, one fragment")


def speed_against_fragments(rows: list[Row]) -> Figure | None:
    """A fixed number of tokens in more and more fragments: where launch-per-fragment and masks lose."""
    rows = _timed(rows, _main_dtype(rows))
    if not rows:
        return None
    counts = Counter(n for n, _ in {(row["n"], row["fragments"]) for row in rows})
    n = max(counts, key=lambda n: (counts[n], n))
    if counts[n] < 2:
        return None
    # Skewed lengths are what tissue has; equal ones are in the table.
    rows = [r for r in rows if r["n"] == n and (r["spread"] != "equal" or r["fragments"] == 1)]
    return _speed(rows, "fragments", "fragments (lengths lognormal)", f"Speed, {n:,} tokens in fragments")


def memory_against_patches(rows: list[Row]) -> Figure | None:
    """Memory of the whole encoder for growing slides, ours and the dense mask, compared with a 12 GB GPU."""
    on_gpu = rows[0]["device"] == "cuda"
    column = "reserved_mb" if on_gpu else "peak_mb"
    keys = ("impl", "direction", "n", "dtype", "checkpointing", "memory_limit_gb")
    rows = newest((r for r in rows if not r["compiled"] and r["dtype"] == _main_dtype(rows)), *keys)
    have = [r for r in rows if r["status"] == "ok" and r[column]]
    if len({r["n"] for r in have}) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.9), sharey=True)
    for axis, direction in zip(axes, ("forward", "training step"), strict=True):
        for impl, checkpointing in sorted({(r["impl"], r["checkpointing"]) for r in rows}, reverse=True):
            mine = [
                r for r in rows if (r["impl"], r["checkpointing"], r["direction"]) == (impl, checkpointing, direction)
            ]
            line = sorted({r["n"]: r[column] / 1e3 for r in mine if r["status"] == "ok" and r[column]}.items())
            colour, marker, name = _STYLES[impl]
            label = name + (", checkpointing" if checkpointing else "")
            style = {"color": colour, "marker": marker, "lw": 2.2 if impl.startswith(OURS) else 1.4}
            axis.plot(
                *(zip(*line, strict=True) if line else ([], [])),
                label=label,
                ls="--" if checkpointing else "-",
                **style,
            )
            for row in mine:
                if row["status"] == "failed" and "memory" in (row["reason"] or "").lower() and row["memory_limit_gb"]:
                    axis.plot(row["n"], CARD_GB, marker="X", ms=11, color=colour, mec="white", ls="none")
        axis.axhline(CARD_GB, color="#777777", ls=":", lw=1.4)
        axis.text(0.02, CARD_GB * 1.06, "12 GB", transform=axis.get_yaxis_transform(), color="#555555", fontsize=9)
        _log(axis, "patches of the slide")
        axis.set_title(direction, fontsize=11)
        axis.set_ylim(top=max(axis.get_ylim()[1], 1.6 * CARD_GB))
    axes[0].set_ylabel("peak memory, GB")
    what = "reserved on the card, weights included; a cross: out of memory" if on_gpu else "growth of the process"
    title = f"Memory of the whole slide encoder ({what})"
    return _finish(figure, title, have)


def error_against_dtype(rows: list[Row]) -> Figure | None:
    """How far each candidate is from float64, per dtype, at the size that was measured in most dtypes."""
    rows = [r for r in rows if r["error_norm"] and r["direction"] in ("forward", "forward+backward")]
    if not rows:
        return None
    dtypes = ("float32", "float16", "bfloat16")
    counts = {
        n: (len({r["dtype"] for r in rows if r["n"] == n}), n) for n in {r["n"] for r in rows if r["fragments"] == 1}
    }
    n = max(counts, key=lambda n: counts[n], default=None)
    rows = [r for r in rows if r["n"] == n and r["fragments"] == 1]
    rows = newest(rows, "impl", "rotation", "dtype", "direction")
    present = [name for name in dtypes if any(r["dtype"] == name for r in rows)]
    impls = [name for name in _STYLES if any(r["impl"] == name for r in rows)]
    if len(present) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.9), sharey=True)
    kinds = (("forward", "output"), ("forward+backward", "output and gradients, the worst of them"))
    for axis, (direction, title) in zip(axes, kinds, strict=True):
        for i, impl in enumerate(impls):
            colour, marker, label = _STYLES[impl]
            points = [
                (present.index(r["dtype"]) + 0.7 * ((i + 0.5) / len(impls) - 0.5), r["error_norm"])
                for r in rows
                if r["impl"] == impl and r["direction"] == direction and r["rotation"] != "none"
            ]
            axis.plot(
                *(zip(*points, strict=True) if points else ([], [])), marker=marker, ls="none", ms=8, color=colour,
                mec="#333333", mew=0.6 if marker != "x" else 2, label=label,
            )  # fmt: skip
        axis.set_xticks(range(len(present)), present)
        axis.set_xlim(-0.5, len(present) - 0.5)
        axis.set_yscale("log")
        axis.grid(axis="y", color="#e4e4e4", lw=0.8)
        axis.set_axisbelow(True)
        axis.set_title(title, fontsize=11)
    axes[0].set_ylabel("error against float64, relative to its norm")
    return _finish(figure, f"Error with rotation, {n:,} tokens in one fragment", rows)


QUESTIONS: dict[str, tuple[str, Callable[[list[Row]], Figure | None]]] = {
    "speed-n": ("attention", speed_against_tokens),
    "speed-f": ("attention", speed_against_fragments),
    "memory-n": ("encoder", memory_against_patches),
    "error-dtype": ("attention", error_against_dtype),
    "loss": ("pipeline", loss_plots.loss_against_rows),
}


def draw(out: Path, folders: Iterable[Path] = ()) -> list[Path]:
    """Draw what the rows in `folders` can answer into `out`, and return the files written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for question, (name, make) in QUESTIONS.items():
        for machine, rows in machines(table.read(name, *folders)).items():
            figure = make(rows)
            if figure is not None:
                path = out / f"bench-{machine}-{question}.png"
                figure.savefig(path, dpi=110)
                plt.close(figure)
                written.append(path)
    return written


def _timed(rows: list[Row], dtype: str | None) -> list[Row]:
    rows = [r for r in rows if r["status"] == "ok" and r["dtype"] == dtype]
    return newest(rows, "impl", "rotation", "direction", "n", "fragments", "spread")


def _main_dtype(rows: list[Row]) -> str | None:
    counts = Counter(row["dtype"] for row in rows if row["status"] == "ok")
    return counts.most_common(1)[0][0] if counts else None


def _speed(rows: list[Row], column: str, label: str, title: str) -> Figure | None:
    directions = [d for d in ("forward", "backward") if len({r[column] for r in rows if r["direction"] == d}) >= 2]
    if not directions:
        return None
    # TFLOP/s where that gives round numbers, GFLOP/s for processors.
    unit, factor = ("TFLOP/s", 1.0) if rows[0]["device"] == "cuda" else ("GFLOP/s", 1e3)
    figure, grid = plt.subplots(
        len(directions), 2, figsize=(11, 1.2 + 3.7 * len(directions)), squeeze=False, sharex=True
    )
    for axes, direction in zip(grid, directions, strict=True):
        for axis, (heading, rotations) in zip(axes, _ROTATIONS, strict=True):
            for impl, (colour, marker, name) in _STYLES.items():
                mine = [
                    r for r in rows if r["impl"] == impl and r["direction"] == direction and r["rotation"] in rotations
                ]
                mine.sort(key=lambda r: r[column])
                if not mine and not any(r["impl"] == impl for r in rows):
                    continue
                ours = impl == OURS
                x, y = [r[column] for r in mine], [r["tflops"] * factor for r in mine]
                axis.plot(
                    x, y, color=colour, marker=marker, lw=2.6 if ours else 1.3, ms=7 if ours else 5.5,
                    zorder=3 if ours else 2, label=name, ls="--" if impl in _DASHED else "-",
                )  # fmt: skip
                # The same work takes less time the faster it is: the quantiles of time, reversed.
                low, high = ([y_ * r["ms"] / r[q] for y_, r in zip(y, mine, strict=True)] for q in ("ms_p80", "ms_p20"))
                axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            _log(axis, label if direction == directions[-1] else "")
            axis.set_title(f"{direction}, {heading}", fontsize=11)
        low = min(axis.get_ylim()[0] for axis in axes)
        high = max(axis.get_ylim()[1] for axis in axes)
        # At least a factor of six from bottom to top: a few per cent must not look like a gap.
        spread = max(1.0, (6 * low / high) ** 0.5)
        for axis in axes:
            axis.set_ylim(low / spread, high * spread)
            axis.set_xticks(sorted({row[column] for row in rows}))
        axes[0].set_ylabel(unit)
    return _finish(figure, title + " (bands: 20 to 80 %)", rows)


def _log(axis: Axes, label: str) -> None:
    """Both axes logarithmic with plain numbers, if there is a line."""
    axis.set_xlabel(label)
    axis.grid(color="#e4e4e4", lw=0.8)
    axis.set_axisbelow(True)
    if not any(len(line.get_xdata()) and line.get_label()[0] != "_" for line in axis.lines):
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="#777777")
        return
    axis.set_xscale("log")
    axis.set_yscale("log")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_formatter(FuncFormatter(_short))
        which.set_minor_formatter(NullFormatter())
        low, high = which.get_view_interval()
        if math.log10(high / low) < 2.3:
            which.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _short(value: float, _: object = None) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _finish(figure: Figure, title: str, rows: list[Row]) -> Figure:
    """Legend below, and under it where all this was measured."""
    last = rows[-1]
    where = (
        last["gpu"]
        if last["device"] == "cuda"
        else f"{last['cpu']}, {last['threads']} thread{'s' * (last['threads'] > 1)}"
    )
    commits = sorted({row["commit"] or "no commit" for row in rows})
    clocks = " and ".join(sorted({_CLOCKS[row["clock"]] for row in rows}))
    versions = f"torch {last['torch']}" + (f", triton {last['triton']}" if last["device"] == "cuda" else "")
    dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
    figure.suptitle(f"{title}\n{where}", fontsize=13, y=0.985)
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles.update({text: handle for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)})
    height = figure.get_size_inches()[1]
    lines = -(-len(handles) // 3)
    bottom = (0.46 + 0.22 * lines) / height
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=3, frameon=False, fontsize=9.5,
                  bbox_to_anchor=(0.5, 0.42 / height))  # fmt: skip
    note = f"{dtypes}; {clocks}; {versions}; commit {', '.join(commits)}; {last['date']}"
    busy = max((row["load"] or 0) / row["cores"] for row in rows)
    if last["device"] == "cpu" and busy > _BUSY:
        note += f"\nshared machine, load {busy:.0f} a core: only ratios within a run hold"
    figure.text(0.5, 0.08 / height, note, ha="center", va="bottom", fontsize=8.5, color="#555555")
    figure.tight_layout(rect=(0, bottom, 1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of *.jsonl (default: bench/results)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "images")
    arguments = parser.parse_args()
    for path in draw(arguments.out, arguments.folders):
        print(path)


if __name__ == "__main__":
    main()
