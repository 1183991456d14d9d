"""The picture of the pairwise loss: time and memory of a step against the rows of a batch, ours and the peers."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Row = dict[str, Any]

GROUP = "sigmoid loss"
# (colour, marker, name in the legend)
_STYLES = {
    "exaonepath": ("#D55E00", "o", "exaonepath (this project)"),
    "torch_backend": ("#E69F00", "d", "exaonepath, plain torch"),
    "naive": ("#000000", "x", "all logits at once"),
    "compiled": ("#CC79A7", "h", "all logits at once, torch.compile"),
    "chunked": ("#0072B2", "s", "chunks of columns"),
    "checkpointed": ("#009E73", "^", "chunks of columns, checkpointed"),
}


def device_of(row: Row) -> str:
    """ "cpu" or "cuda": what the benchmark ran on, which a machine with a card leaves open."""
    return "cuda" if "[cuda-" in row["benchmark"] else "cpu"


def loss_against_rows(rows: list[Row]) -> Figure | None:
    """Seconds and megabytes of forward and backward, every pair and gradient, at the width most sizes were run with.

    Of a case that was measured more than once the newest row counts; ours was measured with each peer: the median.
    """
    newest = {row["benchmark"]: row for row in rows if row["group"] == GROUP}  # the table holds other benchmarks too
    widths = [row["dim"] for row in newest.values()]
    if not widths:
        return None
    chosen = [row for row in newest.values() if row["dim"] == max(set(widths), key=widths.count)]
    sizes = sorted({row["rows"] for row in chosen})
    if len(sizes) < 2:
        return None
    found: dict[str, dict[int, list[tuple[float, float | None]]]] = defaultdict(lambda: defaultdict(list))
    for row in chosen:
        found["exaonepath"][row["rows"]].append((row["seconds"], row["peak_mb"]))
        found[row["peer"]][row["rows"]].append((row["baseline_seconds"], row["baseline_peak_mb"]))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.9))
    for column, (axis, label) in enumerate(
        zip(axes, ("seconds a step", "peak memory above the inputs, MB"), strict=True)
    ):
        for name, (colour, marker, text) in _STYLES.items():
            points = {n: [v[column] for v in values if v[column] is not None] for n, values in found[name].items()}
            line = sorted((n, statistics.median(values)) for n, values in points.items() if values)
            if line:
                ours = name == "exaonepath"
                axis.plot(*zip(*line, strict=True), color=colour, marker=marker, label=text, lw=2.6 if ours else 1.3,
                          zorder=3 if ours else 2)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("rows of the batch")
        axis.set_ylabel(label)
        axis.grid(color="#e4e4e4", lw=0.8)
        axis.set_axisbelow(True)
    last = chosen[-1]
    where = last["gpu"] if device_of(last) == "cuda" else f"{last['cpu']}, {last['threads']} threads"
    figure.suptitle(f"Ten pairs, width {last['dim']}, loss and every gradient\n{where}", fontsize=13, y=0.985)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="lower center", ncol=3, frameon=False, fontsize=9.5, bbox_to_anchor=(0.5, 0.075))
    commits = ", ".join(sorted({row["commit"] or "no commit" for row in chosen}))
    note = f"{last['dtype']}; torch {last['torch']}; commit {commits}; {last['date']}; absent: did not fit, or not run"
    figure.text(0.5, 0.02, note, ha="center", va="bottom", fontsize=8.5, color="#555555")
    figure.tight_layout(rect=(0, 0.18, 1, 1))
    return figure
