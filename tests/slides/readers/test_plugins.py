"""Readers of other packages: asked last, and their faults stay theirs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from PIL import Image

from exaonepath.errors import SettingsError, SlideOpenError, SlideReadError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.slides.readers import plugins
from exaonepath.slides.readers.base import SlideReader


class Reader(SlideReader):
    """A slide of one level, as short as a plug-in can be."""

    name = "mine"

    def __init__(self, path):
        self.path = path
        self.level_dimensions = ((300, 200), (150, 100))
        self.scalar_downsamples = (1.0, 2.0)
        self.properties = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}

    def read_image(self, location, level, size):
        x, y = self.at_level(location, level)
        image = Image.new("RGBA", size)
        width, height = self.level_dimensions[level]
        image.paste((200, 100, 150, 255), (-x, -y, width - x, height - y))
        return image

    def close(self):
        pass


def install(monkeypatch, **functions):
    """Make functions of this module plug-ins."""
    points = [EntryPoint(name, f"tests:{name}", plugins.GROUP) for name in functions]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == plugins.GROUP else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: functions[self.name])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.czi"
    path.write_bytes(b"ZISRAWFILE" + bytes(100))
    return path


def test_a_plugin_reads_what_nothing_built_in_reads(monkeypatch, file, tmp_path):
    install(monkeypatch, first=lambda path: None, second=Reader)
    with SlideImage(file) as slide:
        assert (slide.reader, slide.mpp, slide.dimensions) == ("mine", 0.25, (300, 200))
        rgb, missing = slide.read_rgb((-20, -20), 0, (100, 100))
        assert (rgb[:20].max(), rgb[20:, 20:].min(), missing) == (0, 100, 0)
        assert slide.get_best_level_for_downsample(5) == 1
        assert slide.thumbnail(64).shape == (43, 64, 3)
        assert slide.encoded_tile(0, 0, 0) is None
        with slide.tile_cache(1 << 20):
            assert slide.cache_bytes == 1 << 20
        assert len(patchfy(slide, tmp_path / "out")[1]) == 0
        assert slide.fingerprint()
    with SlideImage(file, reader="second") as slide:
        assert slide.reader == "mine"


def test_without_a_plugin_the_error_names_the_group(file, tmp_path):
    with pytest.raises(SlideOpenError, match=r"Zeiss CZI .*exaonepath\.readers.*convert the file"):
        SlideImage(file)
    for suffix in (".vsi", ".lif", ".isyntax"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(bytes(100))
        with pytest.raises(SlideOpenError, match=r"exaonepath\.readers"):
            SlideImage(path)


def test_a_plugin_that_fails_is_named(monkeypatch, file):
    def broken(path):
        raise KeyError("what")

    install(monkeypatch, broken=broken)
    with pytest.raises(SlideOpenError, match=r"by the reader broken \(tests:broken\): KeyError"):
        SlideImage(file)
    install(monkeypatch, odd=lambda path: object())
    with pytest.raises(SlideOpenError, match="returned object, not a SlideReader"):
        SlideImage(file)


def test_a_typed_error_of_a_plugin_is_passed_on(monkeypatch, file):
    def broken(path):
        raise SlideReadError("no licence for this format")

    install(monkeypatch, broken=broken)
    with pytest.raises(SlideReadError, match="no licence"):
        SlideImage(file)


def test_unknown_readers(file, write, pixels):
    with pytest.raises(SettingsError, match="no reader 'tif'; known: auto, openslide, tiff, image"):
        SlideImage(file, reader="tif")
    for reader in ("openslide", "tiff", "image"):
        with pytest.raises(SlideOpenError):
            SlideImage(file, reader=reader)
    path = write("a.tif", pixels, compression="zlib")
    for reader in ("openslide", "tiff"):
        with SlideImage(path, reader) as slide:
            assert slide.reader == reader
            assert np.array_equal(slide.read_region((0, 0), 0, slide.dimensions)[..., :3], pixels)
    with pytest.raises(SlideOpenError, match="not a PNG"):
        SlideImage(path, "image")


def test_plugins_are_not_looked_for_on_the_ordinary_way(write, pixels, monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", pytest.fail)
    for options in ({"compression": "zlib"}, {"compression": "zlib", "byteorder": ">"}):
        SlideImage(write("a.tif", pixels, **options)).close()


def test_importing_the_readers_imports_no_decoder():
    code = "import sys, exaonepath.slides.image; print([m for m in ('imagecodecs', 'tifffile') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
