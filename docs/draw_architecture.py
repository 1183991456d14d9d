"""Draws docs/images/architecture.png: how data flows through the package. Run it after a change of the layout:

python docs/draw_architecture.py
"""

from io import BytesIO
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

PICTURE = Path(__file__).parent / "images" / "architecture.png"
WIDTH, HEIGHT = 14.6, 8.5
INK, GREY = "#1f2933", "#66727f"
# Fill and edge of a box, by what it is.
STYLES = {
    "slides": ("#dcebf7", "#2f6da3"),
    "alignment": ("#fbe6d4", "#b8621b"),
    "shared": ("#e3efe3", "#3f7f4c"),
    "file": ("#ffffff", "#66727f"),
}
BOX_W, BOX_H = 1.62, 0.92


def box(axes: Axes, x: float, y: float, name: str, text: str, style: str, *, width: float = BOX_W) -> None:
    """A box around (x, y): the name of a module or of a file in bold, and what it does or holds."""
    fill, edge = STYLES[style]
    corner = (x - width / 2, y - BOX_H / 2)
    rounding = "square,pad=0" if style == "file" else "round,pad=0,rounding_size=0.1"
    axes.add_patch(
        FancyBboxPatch(
            corner, width, BOX_H, boxstyle=rounding, facecolor=fill, edgecolor=edge, linewidth=1.2,
            linestyle=(0, (4, 2)) if style == "file" else "solid",
        )
    )  # fmt: skip
    axes.text(x, y + 0.27, name, ha="center", va="center", fontsize=8.6, weight="bold", color=INK)
    axes.text(x, y - 0.13, text, ha="center", va="center", fontsize=7.8, color=INK, linespacing=1.15)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, calls: bool = False) -> None:
    """Data that moves, or (dashed) code that is called."""
    style = {"linestyle": (0, (3, 2)), "color": GREY} if calls else {"color": INK}
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.2, shrinkA=0, shrinkB=0, **style
        )
    )  # fmt: skip


def chain(axes: Axes, y: float, boxes: list[tuple[float, str, str, str]]) -> None:
    """Boxes of one row, each with an arrow to the next."""
    for x, name, text, style in boxes:
        box(axes, x, y, name, text, style)
    for (left, *_), (right, *_) in pairwise(boxes):
        step = BOX_W / 2 if right > left else -BOX_W / 2
        arrow(axes, (left + step, y), (right - step, y))


def band(axes: Axes, y: float, height: float, title: str, color: str) -> None:
    """A lane behind the boxes, with its title at the top left."""
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((0.1, y), WIDTH - 0.2, height, boxstyle=shape, facecolor=color, edgecolor="none"))
    axes.text(0.3, y + height - 0.24, title, fontsize=10, weight="bold", color=INK, va="center")


def draw() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(WIDTH * 0.82, HEIGHT * 0.82), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")

    x = [1.05, 3.13, 5.21, 7.29, 9.37, 11.45, 13.53]
    top, middle, low, bottom, end = 7.3, 5.35, 4.15, 2.2, 0.9
    half = BOX_H / 2

    band(axes, 6.6, 1.75, "slides/   a slide file becomes vectors", "#f3f8fc")
    band(axes, 3.5, 2.75, "shared by both", "#f4f9f4")
    band(axes, 0.25, 2.9, "alignment/   slides and molecular profiles of patients come to share a space", "#fdf6ef")

    chain(axes, top, [
        (x[0], "slide.svs", "pyramid of\nlevels", "file"),
        (x[1], "patches/", "tissue contours,\ngrid of patches", "slides"),
        (x[2], "patches file", "coords,\ncontour_index", "file"),
        (x[3], "features/", "pixels of patches\nto features", "slides"),
        (x[4], "features file", "features, coords,\ncontour_index", "file"),
        (x[5], "embed.py", "features to\nembeddings", "slides"),
        (x[6], "embedding file", "one vector a slide,\none a patch", "file"),
    ])  # fmt: skip

    stored = "reads and writes the three HDF5 files above:\nwhole or not at all, with checksums, reused if valid"
    box(axes, 2.5, 4.75, "files/", stored, "shared", width=4.1)
    box(axes, x[3], middle, "encoders/", "patch_encoder.py:\nViT-B/14", "shared")
    box(axes, x[5], middle, "encoders/", "slide_encoder.py,\nblock.py", "shared")
    box(axes, x[6], middle, "ops/attention/", "packed fragments;\nkernels/ (Triton)", "shared")
    box(axes, x[6], low, "ops/sigmoid_loss/", "one sweep over tiles;\ncsrc/ (C++, CUDA)", "shared")
    for column in (x[3], x[5]):
        arrow(axes, (column, top - half), (column, middle + half), calls=True)
    arrow(axes, (x[5] + BOX_W / 2, middle), (x[6] - BOX_W / 2, middle), calls=True)

    chain(axes, bottom, [
        (x[0], "cohort files", "tables, slides.csv,\nclinical labels", "file"),
        (x[1], "data/cohort.py", "read and check\neverything", "alignment"),
        (x[2], "data/splits.py", "patients apart;\nstandardizer.py", "alignment"),
        (x[4], "data/dataset.py", "rows of patients;\ntraining/data.py", "alignment"),
        (x[5], "model/", "alignment.py: one\nvector a modality", "alignment"),
        (x[6], "model/", "loss.py: all pairs\nof modalities", "alignment"),
    ])  # fmt: skip
    arrow(axes, (x[4], top - half), (x[4], bottom + half))
    arrow(axes, (x[5], bottom + half), (x[5], middle - half), calls=True)
    arrow(axes, (x[6], bottom + half), (x[6], low - half), calls=True)
    chain(axes, end, [
        (x[6], "training/", "trainer.py: steps,\ncheckpoints", "alignment"),
        (x[5], "run folder", "checkpoints, best,\nmodel, metrics", "file"),
        (x[4], "evaluate.py", "retrieval, probes,\nsurvival", "alignment"),
        (x[3], "report", "JSON, tables,\nfigures", "file"),
    ])  # fmt: skip
    arrow(axes, (x[6], bottom - half), (x[6], end + half))

    arrow(axes, (0.45, 1.1), (1.15, 1.1))
    axes.text(1.3, 1.1, "data", fontsize=8.4, color=INK, va="center")
    arrow(axes, (0.45, 0.7), (1.15, 0.7), calls=True)
    axes.text(1.3, 0.7, "calls", fontsize=8.4, color=INK, va="center")
    return figure


if __name__ == "__main__":
    drawn = BytesIO()
    draw().savefig(drawn)
    # Flat colours: a palette takes a third of the bytes and changes nothing that the eye sees.
    Image.open(drawn).convert("RGB").quantize(64).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
