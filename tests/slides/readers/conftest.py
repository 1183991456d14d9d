"""Pixels that are easy to recognise, and TIFF files of any kind made from them."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

WIDTH, HEIGHT = 700, 520


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """uint8 [h, w, 3]: smooth, so that JPEG changes little, and different everywhere."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [np.sin(x / 23) + np.cos(y / 31), np.sin((x + y) / 37) + np.cos(x / 51), np.sin(y / 19) + np.cos(x / 29)]
    return np.stack([127.5 + 60 * wave for wave in waves], axis=-1).astype(np.uint8)


@pytest.fixture
def write(tmp_path):
    """`write("a.tif", values, **options of tifffile)`: a tiled TIFF at 0.5 um per pixel."""

    def write(name, values, **options):
        scale = {} if options.get("ome") else {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
        options = {"tile": (128, 128), "photometric": "rgb", "metadata": None, **scale, **options}
        path = tmp_path / name
        tifffile.imwrite(path, values, **options)
        return path

    return write


@pytest.fixture
def no_data(monkeypatch):
    """`no_data(path, which)`: give tiles of level 0, those for whose number `which` is true, a length of zero."""

    def drop(path, which):
        with tifffile.TiffFile(path, mode="r+b") as file:
            tag = file.pages[0].tags["TileByteCounts"]
            tag.overwrite([0 if which(at) else count for at, count in enumerate(tag.value)])

    return drop
