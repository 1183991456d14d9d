"""Draws docs/images/figures.png: what `exaonepath heatmap` makes of the slide of `exaonepath demo`.

exaonepath demo --out demo-output && python docs/draw_figures.py demo-output
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from exaonepath.slides.cohort.inputs import cohort_inputs
from exaonepath.viz.figures import FigureMaker, Look, Question

TARGET = Path(__file__).parent / "images" / "figures.png"
HEIGHT, GAP = 1000, 24
COLOURS = 255  # of the stored picture


def main(out: str) -> None:
    slides = Path(out, "slides")
    given = cohort_inputs([slides]).slides if slides.is_dir() else ()
    with tempfile.TemporaryDirectory() as folder, FigureMaker(out, given) as maker:
        (entry,) = maker.slides()
        made = [
            *maker.make(entry, Question("similarity", at=(1180, 1300)), Look(longest=1250), folder),
            *maker.make(entry, Question("cluster", clusters=6), Look(("contact-sheet",), each=6), folder),
        ]
        pictures = [Image.open(path).convert("RGB") for path in made]
    shown = [picture.resize((picture.width * HEIGHT // picture.height, HEIGHT), 1) for picture in pictures]
    whole = Image.new("RGB", (sum(picture.width + GAP for picture in shown) - GAP, HEIGHT), "white")
    left = 0
    for picture in shown:
        whole.paste(picture, (left, 0))
        left += picture.width + GAP
    whole.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(TARGET, optimize=True)
    print(TARGET, whole.size)


if __name__ == "__main__":
    main(sys.argv[1])
