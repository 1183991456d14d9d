"""The slide maker: what OpenSlide says of its files, and that they hold tissue."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import openslide
import pytest

from exaonepath.errors import OutputError, SettingsError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.segmentation import segment_tissue
from exaonepath.synthetic import make_slide
from exaonepath.synthetic import slide as maker
from exaonepath.synthetic.tissue import Tissue


def test_aperio_pyramid(tmp_path):
    path = make_slide(tmp_path / "a.svs", 3000, 2200, mpp=0.25)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.level_dimensions == ((3000, 2200), (750, 550), (187, 137))
        assert slide.properties["openslide.mpp-x"] == "0.25"
        assert slide.properties["openslide.objective-power"] == "40"


def test_generic_with_fractional_levels(tmp_path):
    path = make_slide(tmp_path / "g.tif", 2001, 1503, levels=(1, 2.37, 7.1), vendor="generic", mpp=0.4942, tile=128)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_dimensions == ((2001, 1503), (844, 634), (281, 211))
        assert slide.properties["openslide.level[0].tile-width"] == "128"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.4942)


@pytest.mark.parametrize("vendor", ["aperio", "generic"])
def test_without_mpp(tmp_path, vendor):
    with SlideImage(make_slide(tmp_path / "n.tif", 600, 400, mpp=None, vendor=vendor, levels="flat")) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "assumed")
        assert len(slide.level_dimensions) == 1


@pytest.mark.parametrize(("levels", "size"), [("pyramid", (4000, 3000)), ("flat", (3000, 2200))])
def test_each_fragment_is_found(tmp_path, levels, size):
    with SlideImage(make_slide(tmp_path / "s.svs", *size, fragments=3, levels=levels)) as slide:
        assert len(segment_tissue(slide).contours) == 3


def test_holes_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "_UNIQUE_TILES", 100)
    path = make_slide(tmp_path / "s.svs", 16000, 12000, fragments=1, levels=(1, 32))
    with SlideImage(path) as slide:
        tissue = segment_tissue(slide)
    assert len(tissue.contours) == 1
    assert 1 <= len(tissue.holes[0]) <= 2


def test_no_fragments(tmp_path):
    with SlideImage(make_slide(tmp_path / "s.svs", 900, 700, fragments=0)) as slide:
        pixels = slide.read_region((0, 0), 0, slide.dimensions)[..., :3]
        assert pixels.min() > 235
        assert segment_tissue(slide).contours == []


def test_same_seed_same_file(tmp_path):
    first, second, other = (
        make_slide(tmp_path / f"{i}.svs", 900, 700, seed=seed).read_bytes() for i, seed in enumerate((5, 5, 6))
    )
    assert first == second
    assert first != other


def test_tiles_join_without_a_seam():
    """A tile is what a larger picture shows at its place."""
    tissue = Tissue(2000, 1500, 1, True, 0.5, 0)
    whole = tissue.render((700, 500), (1.0, 1.0), (512, 512)).astype(int)
    part = tissue.render((956, 756), (1.0, 1.0), (256, 256)).astype(int)
    assert np.abs(whole[256:, 256:] - part).max() <= 2  # float32 interpolation rounds differently


PEAK = """
import resource, sys
from exaonepath.synthetic import make_slide, slide
slide._UNIQUE_TILES, slide._REPEATS = 200, 32
make_slide(sys.argv[1] + "/small.svs", 1000, 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
make_slide(sys.argv[1] + "/large.svs", 25000, 8000, fragments=1, levels=(1, 16))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_slide(tmp_path):
    """200 Mpx, 600 MB of pixels, in less than 100 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100
    with openslide.OpenSlide(tmp_path / "large.svs") as slide:
        assert slide.dimensions == (25000, 8000)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"width": 0},
        {"height": -1},
        {"fragments": -1},
        {"mpp": 0},
        {"levels": "tall"},
        {"levels": (2, 4)},
        {"levels": (1, 4, 4)},
        {"levels": ()},
        {"tile": 100},
        {"vendor": "philips"},
        {"quality": 0},
    ],
    ids=str,
)
def test_impossible_arguments(tmp_path, kwargs):
    with pytest.raises(SettingsError):
        make_slide(tmp_path / "s.svs", **{"width": 500, "height": 500, **kwargs})
    assert not list(tmp_path.iterdir())


def test_folder_missing(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        make_slide(tmp_path / "none" / "s.svs", 500, 500)


def test_big_tiff(tmp_path, monkeypatch):
    classic = make_slide(tmp_path / "classic.svs", 900, 700)
    monkeypatch.setattr(maker, "_BIG_PIXELS", 0)
    big = make_slide(tmp_path / "big.svs", 900, 700)
    assert (classic.read_bytes()[2], big.read_bytes()[2]) == (42, 43)
    with openslide.OpenSlide(classic) as one, openslide.OpenSlide(big) as two:
        assert one.level_dimensions == two.level_dimensions
        for level, size in enumerate(one.level_dimensions):
            pixels = [np.asarray(slide.read_region((0, 0), level, size)) for slide in (one, two)]
            np.testing.assert_array_equal(*pixels)


def test_other_readers_agree(tmp_path):
    import tifffile

    path = make_slide(tmp_path / "s.svs", 900, 700, fragments=1)
    with tifffile.TiffFile(path) as file, openslide.OpenSlide(path) as slide:
        assert file.is_svs
        for level, page in enumerate(file.pages):
            ours = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]
            # The two decoders may round colours and smooth chroma differently.
            assert np.abs(page.asarray().astype(int) - ours).mean() < 2
