"""Draws docs/images/masks-*.png: the pictures of masks.md, from a synthetic slide with pen marks and a blurred part.

python docs/draw_masks.py
"""

import json
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
from PIL import Image

from exaonepath import SlideImage, patchfy
from exaonepath.synthetic.artefacts import defocus, draw_pen_marks, tissue_pixels, write_pixels

IMAGES = Path(__file__).parent / "images"
SIZE, WIDTH = (6000, 4500), 760


def polygon(class_name: str, *rings: list[list[int]]) -> dict:
    """An annotation as QuPath exports it."""
    geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]] for ring in rings]}
    properties = {"objectType": "annotation", "classification": {"name": class_name}}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def box(x0: int, y0: int, x1: int, y1: int) -> list[list[int]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def save(name: str, folder: Path) -> None:
    """Reduce the mask picture of a result, and keep it with 160 colours."""
    picture = cv2.imread(str(folder / "masks" / "slide.jpg"))
    height = round(WIDTH * picture.shape[0] / picture.shape[1])
    small = cv2.cvtColor(cv2.resize(picture, (WIDTH, height), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)
    data = BytesIO()
    Image.fromarray(small).quantize(160, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    (IMAGES / f"masks-{name}.png").write_bytes(data.getvalue())


def main() -> None:
    clean = tissue_pixels(*SIZE, fragments=2, seed=1)
    marked, _ = draw_pen_marks(clean)
    marked, _ = defocus(marked, (700, 1500, 2600, 3600), 6)
    with TemporaryDirectory() as name:
        folder = Path(name)
        given = [
            polygon("Tissue", box(500, 900, 2700, 3700), box(1300, 1700, 1800, 2300)),
            polygon("Tissue", [[3400, 700], [5600, 1400], [5300, 3700], [3600, 3300]]),
            polygon("Pen", [[2200, 2900], [4100, 2600], [4300, 3300], [2300, 3900]]),
        ]
        (folder / "given.geojson").write_text(json.dumps(given))
        # Levels down to 1/8: the picture is drawn from the segmented one.
        for name, pixels, options in (
            ("contours", clean, {}),
            ("given", clean, {"mask": folder / "given.geojson", "exclude_class": "Pen"}),
            ("removed", marked, {"remove": ("pen", "blur")}),
        ):
            path = write_pixels(folder / "slide.tif", pixels, factors=(1, 4, 8))
            with SlideImage(path) as slide:
                patchfy(slide, folder / name, a_h=0.1, line_thickness=30, **options)
            save(name, folder / name)


if __name__ == "__main__":
    main()
