"""The fast reader against OpenSlide: the same bytes, or it is not used."""

from __future__ import annotations

import io
import logging
import pickle
import shutil
import sys

import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from exaonepath.errors import SlideOpenError, SlideReadError
from exaonepath.slides.features.extract import extract_features
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.slides.readers import fast, tiff_tiles
from exaonepath.slides.readers.openslide import OpenSlideReader
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Slides that OpenSlide reads, with levels of whole and of other factors."""
    folder = tmp_path_factory.mktemp("slides")
    return {
        "aperio": make_slide(folder / "a.svs", 2500, 1900, fragments=2, seed=1),
        "generic": make_slide(folder / "b.tif", 2048, 1536, levels=[1, 2, 4], vendor="generic", fragments=1, tile=128),
        "odd factors": make_slide(folder / "c.tif", 2100, 1501, levels=[1, 2.37, 7.1], vendor="generic", fragments=1),
    }


def regions(slide, seed, number=60):
    """Regions anywhere, on every level, also beyond the borders and of one pixel."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        level = int(rng.integers(len(slide.level_dimensions)))
        step = int(slide.scalar_downsamples[level]) if rng.random() < 0.7 else 1
        size = tuple(int(side) for side in rng.integers(1, 400, 2))
        x, y = (int(rng.integers(-500, side + 300)) // step * step for side in slide.dimensions)
        yield (x, y), level, size


def compare(path, seed=0):
    """Read regions through both readers; returns how many the TIFF reader decoded tiles for."""
    with SlideImage(path) as ours, SlideImage(path, reader="openslide") as theirs:
        assert (ours.reader, theirs.reader) == ("tiff", "openslide")
        assert ours.level_dimensions == theirs.level_dimensions
        assert ours.level_downsamples == theirs.level_downsamples
        assert ours.properties == theirs.properties
        assert ours.fingerprint() == theirs.fingerprint()
        for location, level, size in regions(theirs, seed):
            (mine, missing), (other, missing_there) = (one.read_rgb(location, level, size) for one in (ours, theirs))
            assert np.array_equal(mine, other), (location, level, size)
            assert missing == pytest.approx(missing_there)
            region, region_there = (one.read_region(location, level, size) for one in (ours, theirs))
            assert np.array_equal(region, region_there)
            assert np.array_equal(other, region_there[..., :3])
        return ours._reader.tiles.cache.decoded


@pytest.mark.parametrize("name", ["aperio", "generic", "odd factors"])
def test_any_region_has_the_bytes_of_openslide(slides, name):
    assert compare(slides[name]) > 10


@pytest.mark.golden
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "small.svs", "nonint.tif"])
def test_slides_of_the_golden_files(data_dir, name):
    assert compare(data_dir / "slides" / name) > 10


@pytest.mark.parametrize("options", [{"compression": kind} for kind in ("jpeg", "zlib", "lzw", "zstd", None)])
def test_every_compression_that_both_read(write, pixels, options):
    assert compare(write("a.tif", pixels, **options)) > 10


@pytest.mark.parametrize("code", [33003, 33005])
def test_jpeg_2000_of_aperio(write, pixels, code):
    """33003: YCbCr, converted to RGB after decoding; 33005: RGB."""
    text = "Aperio Image Library v12\n700x520 [0,0 700x520] (128x128) J2K|AppMag = 20|MPP = 0.5"
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)  # every combination of colours
    path = write("a.svs", noise, compression="jpeg2000", description=text, compressionargs={"mct": False})
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["Compression"].overwrite(code)
    assert compare(path) > 10


def test_tiles_without_data(write, pixels, no_data):
    path = write("a.tif", pixels, compression="jpeg")
    no_data(path, lambda at: at % 3 == 0)
    assert compare(path) > 5
    with SlideImage(path) as slide:
        rgb, missing = slide.read_rgb((0, 0), 0, (128, 128))
        assert (missing, rgb.max()) == (1, 0)
        assert slide.read_rgb((64, 0), 0, (128, 128))[1] == 0.5


def test_a_gap_in_a_smaller_level_is_filled_as_openslide_does(slides, tmp_path):
    path = shutil.copy(slides["aperio"], tmp_path / "a.svs")
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages[1].tags["TileByteCounts"]
        tag.overwrite([0] * (len(tag.value) // 2) + list(tag.value[len(tag.value) // 2 :]))
    compare(path)


class Mean(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1)


@pytest.mark.parametrize("name", ["aperio", "odd factors"])
def test_both_readers_give_the_same_files(slides, tmp_path, name):
    found = {}
    for reader in ("auto", "openslide"):
        out = tmp_path / reader
        with SlideImage(slides[name], reader=reader) as slide:
            patches = patchfy(slide, out, patch_size=300, step_size=300)[0]
            options = {"weights": "m", "weights_fingerprint": "m", "num_workers": 2}
            features = extract_features(slide, patches, out / "f.h5", Mean(), **options).path
        with h5py.File(patches) as p, h5py.File(features) as f:
            assert f.attrs["reader"] == p.attrs["reader"] == ("tiff" if reader == "auto" else "openslide")
            found[reader] = [file[key][:].tobytes() for file in (p, f) for key in ("coords", "contour_index")]
            found[reader] += [f["features"][:].tobytes(), p.attrs["settings_hash"], f.attrs["settings_hash"]]
    assert found["auto"] == found["openslide"]
    assert len(found["auto"][0]) > 8


@pytest.mark.parametrize("what", ["colour", "coverage", "error"])
def test_a_reader_that_differs_is_not_used(slides, monkeypatch, caplog, what):
    decode = tiff_tiles.decode

    def other(stored, image, rows, scale=None):
        pixels = decode(stored, image, rows, scale).copy()
        if what == "error":
            raise tiff_tiles.DecodeError("is odd")
        if what == "coverage":
            return np.dstack([pixels, np.full(pixels.shape[:2], 254, np.uint8)])
        pixels[5, 5, 1] ^= 1
        return pixels

    monkeypatch.setattr(tiff_tiles, "decode", other)
    with caplog.at_level(logging.INFO), SlideImage(slides["aperio"]) as slide:
        assert slide.reader == "openslide"
        assert slide.read_rgb((0, 0), 0, (300, 300))[0].shape == (300, 300, 3)
    assert "is read through OpenSlide: " in caplog.text


def test_without_imagecodecs_openslide_reads(slides, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with caplog.at_level(logging.INFO), SlideImage(slides["aperio"]) as slide:
        assert slide.reader == "openslide"
    assert "tiles cannot be decoded without imagecodecs" in caplog.text


def test_the_comparison_is_small_and_the_same_each_time(slides):
    with SlideImage(slides["aperio"]) as slide:
        for level, image in enumerate(slide._reader.tiles.images):
            samples = list(fast._samples(image, level))
            assert samples == list(fast._samples(image, level))
            assert len(samples) <= 15
            corners = {(x // image.cell_width, y // image.cell_height) for x, y, *_ in samples[1:]}
            assert {(0, 0), (image.columns - 1, image.segment_rows - 1)} <= corners
            x, y, width, height = samples[0]
            assert x + width > image.width
            assert y + height > image.height


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("where", ["interior", "border"])
def test_every_level_is_compared_however_large_its_tiles_are(slides, monkeypatch, caplog, level, where):
    """Tiles of 1024 pixels used up what was decoded for the comparison, and smaller levels were believed."""
    monkeypatch.setattr(fast, "_MAX_DECODED", 1)
    cell = tiff_tiles.TiffTiles._decode

    def other(self, at, column, row):
        found, image = cell(self, at, column, row), self.images[at]
        if at != level:
            return found
        if where == "border" and (column, row) == (image.columns - 1, image.segment_rows - 1):
            x, y = image.width - column * image.cell_width - 1, image.height - row * image.cell_height - 1
            found.pixels[y, 3 * x] ^= 1
        elif where == "interior":
            found.pixels[3, 3] ^= 1
        return found

    monkeypatch.setattr(tiff_tiles.TiffTiles, "_decode", other)
    with caplog.at_level(logging.INFO), SlideImage(slides["generic"]) as slide:
        assert slide.reader == "openslide"
    assert f"level {level}" in caplog.text


def test_a_level_that_was_not_compared_is_read_through_openslide(tmp_path, pixels, caplog):
    """All sampled tiles of level 1 have no data: nothing is known about the others."""
    path = tmp_path / "a.tif"
    options = {"tile": (16, 16), "photometric": "rgb", "metadata": None, "compression": "jpeg"}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, **options)
        file.write(pixels[::2, ::2].copy(), subfiletype=1, **options)
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages[1].tags["TileByteCounts"]
        tag.overwrite([0] * tag.count)
    with caplog.at_level(logging.INFO), SlideImage(path) as slide:
        assert slide.reader == "tiff"
        assert slide.encoded_tile(0, 3, 3)
        assert slide.encoded_tile(1, 3, 3) is None
    assert "level 1 has no data in any sample" in caplog.text


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
@pytest.mark.parametrize("level", [0, 1])
def test_levels_with_a_stated_rotation(tmp_path, pixels, compression, level, caplog):
    """OpenSlide turns each tile of some compressions by itself; such a file is read without it."""
    path = tmp_path / "a.tif"
    options = {"tile": (1024, 1024), "photometric": "rgb", "metadata": None, "compression": compression}
    images = [pixels, pixels[::2, ::2].copy()]
    with tifffile.TiffWriter(path) as file:
        for number, image in enumerate(images):
            tag = [(274, "H", 1, 3, True)] if number == level else []
            file.write(image, subfiletype=number, extratags=tag, **options)
    with caplog.at_level(logging.INFO), SlideImage(path) as slide:
        for number, image in enumerate(images):
            found = slide.read_rgb((0, 0), number, slide.level_dimensions[number])[0]
            assert np.abs(found.astype(int) - image).mean() < (1 if compression == "jpeg" else 0.001)
        if compression == "jpeg":
            assert slide.encoded_tile(level, 0, 0) is None  # read through OpenSlide
    if compression != "jpeg":
        with pytest.raises(SlideOpenError, match="states a rotation"):
            SlideImage(path, "openslide")


@pytest.mark.parametrize("kind", ["alpha", "vendor", "same size twice"])
def test_where_openslide_stays_responsible(write, tmp_path, pixels, kind, caplog):
    if kind == "alpha":
        cover = np.full(pixels.shape[:2], 255, np.uint8)
        cover[200:210, 200:210] = 90  # blended by libtiff; no sampled tile needs to show it
        path = write("a.tif", np.dstack([pixels, cover]), extrasamples=["unassalpha"], compression="zlib")
        with SlideImage(path) as ours, SlideImage(path, reader="openslide") as theirs:
            both = [one.read_rgb((150, 150), 0, (100, 100))[0] for one in (ours, theirs)]
        assert np.array_equal(*both)
        return
    path = tmp_path / "a.tif"
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        text = "Philips" if kind == "vendor" else None
        file.write(pixels, software="Philips DP v1.0" if kind == "vendor" else None, description=text, **options)
        file.write(pixels[::-1].copy(), **options)
    with caplog.at_level(logging.INFO), SlideImage(path) as slide:
        if kind == "same size twice":
            assert slide.reader == "openslide"
            assert "level 0 may be any of 2 images of the file" in caplog.text
        assert np.array_equal(slide.read_rgb((0, 0), 0, slide.dimensions)[0], pixels)


def test_a_truncated_tile_fails_its_patches_only(write, pixels):
    path = write("a.tif", pixels, compression="jpeg", tile=(64, 64))
    with SlideImage(path) as slide:
        image = slide._reader.tiles.images[0]
        sampled = {(x // 64 + i, y // 64 + j) for x, y, *_ in fast._samples(image, 0) for i in (0, 1) for j in (0, 1)}
    column, row = next((c, r) for r in range(1, 7) for c in range(1, 9) if (c, r) not in sampled)
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages[0].tags["TileByteCounts"]
        counts = list(tag.value)
        counts[row * image.columns + column] //= 2
        tag.overwrite(counts)
    with SlideImage(path) as slide:
        assert slide.reader == "tiff"
        for _ in range(2):
            with pytest.raises(SlideReadError, match=f"tile in column {column}, row {row} of level 0 is "):
                slide.read_rgb((64 * column, 64 * row), 0, (100, 100))
        assert slide.read_rgb((0, 64 * row), 0, (64 * column, 64))[1] == 0


@pytest.mark.parametrize("damage", ["zeros", "early end", "cut", "cut and ended"])
def test_an_incomplete_jpeg_stream_is_found_as_openslide_finds_it(write, pixels, damage):
    """libjpeg fills the rest of the tile with one colour, and says so only in a warning."""
    path = write("a.tif", pixels, compression="jpeg", tile=(256, 256))
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        data = bytearray(path.read_bytes())
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            scan, middle = data.index(b"\xff\xda", offset) + 14, offset + count // 2
            assert scan < middle
            if damage == "zeros":
                data[middle : middle + count // 4] = bytes(count // 4)
            elif damage == "early end":
                data[middle : middle + 2] = b"\xff\xd9"
            else:
                data[middle : offset + count - 2] = b"\xff" * (offset + count - 2 - middle)
                if damage == "cut":
                    data[offset + count - 2 : offset + count] = b"\xff\xff"
    path.write_bytes(data)
    for reader in ("tiff", "openslide"):
        with SlideImage(path, reader) as slide:
            assert slide.reader == reader
            for corner in ((0, 0), (256, 256), (512, 0)):
                with pytest.raises(SlideReadError):
                    slide.read_rgb(corner, 0, (100, 100))


@pytest.mark.parametrize("colour", [0, 128, 245, 255])
@pytest.mark.parametrize("options", [{}, {"photometric": "minisblack"}], ids=["RGB", "grey"])
def test_tiles_of_one_colour_are_complete(write, colour, options):
    shape = (300, 300) if options else (300, 300, 3)
    path = write("a.tif", np.full(shape, colour, np.uint8), compression="jpeg", **options)
    with SlideImage(path) as slide, SlideImage(path, "openslide") as other:
        assert slide.reader == "tiff"
        assert np.array_equal(*(one.read_region((0, 0), 0, (300, 300)) for one in (slide, other)))


def test_a_pickled_slide_keeps_its_reader(slides):
    for reader in ("auto", "openslide", "tiff"):
        with SlideImage(slides["aperio"], reader) as slide, pickle.loads(pickle.dumps(slide)) as other:  # noqa: S301
            assert other.reader == slide.reader
            assert np.array_equal(other.read_rgb((0, 0), 0, (50, 50))[0], slide.read_rgb((0, 0), 0, (50, 50))[0])


def test_a_closed_slide_says_so(slides):
    slide = SlideImage(slides["aperio"])
    slide.close()
    with pytest.raises(SlideReadError, match="was closed"):
        slide.read_rgb((0, 0), 0, (50, 50))
    slide.close()


def test_stored_tiles(slides):
    for reader in ("auto", "openslide"):
        with SlideImage(slides["aperio"], reader) as slide:
            tile = slide.encoded_tile(0, 1, 2)
            if reader == "openslide":
                assert tile is None
                continue
            assert tile.startswith(b"\xff\xd8")
            with pytest.raises(SlideReadError, match="no tile in column 100"):
                slide.encoded_tile(0, 100, 0)


def test_a_vendor_with_tiles_of_its_own_is_not_read_as_a_plain_tiff(write, pixels, monkeypatch):
    """Without OpenSlide, its overlaps would be read as they are stored."""
    monkeypatch.setattr("exaonepath.slides.readers.choose.wrong_pixels", lambda *_: "has wrong pixels")
    monkeypatch.setattr("exaonepath.slides.readers.choose.VENDORS", ("aperio",))
    with pytest.raises(SlideOpenError, match=r"has wrong pixels \(vendor generic-tiff"):
        SlideImage(write("a.tif", pixels))


def _jpeg_tiles(path, tiles, shape):
    tifffile.imwrite(
        path, iter(tiles), shape=shape, dtype="u1", tile=(128, 128), photometric="ycbcr", compression="jpeg",
        subsampling=(2, 2), metadata=None,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("kind", ["restart", "progressive"])
@pytest.mark.parametrize("which", ["all", "one"])
def test_jpeg_that_libjpeg_repairs_in_silence_is_refused(tmp_path, pixels, kind, which):
    """A cut before a restart mark, or in any scan of a progressive stream, gives wrong pixels and only a warning."""
    rng = np.random.default_rng(0)
    size = (520, 640)
    noisy = np.clip(pixels[:, :640] + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    options = {"restart": {"restart_marker_blocks": 4}, "progressive": {"progressive": True}}[kind]
    tiles, plain = [], []
    for y in range(0, 520, 128):
        for x in range(0, 640, 128):
            part = np.zeros((128, 128, 3), np.uint8)
            part[: 520 - y, : 640 - x] = noisy[y : y + 128, x : x + 128]
            for found, more in ((tiles, {"quality": 30, **options}), (plain, {"quality": 60})):
                buffer = io.BytesIO()
                Image.fromarray(part).save(buffer, "JPEG", subsampling="4:2:0", **more)
                found.append(buffer.getvalue())
    with SlideImage(_jpeg_tiles(tmp_path / "plain.tif", plain, (*size, 3))) as slide:
        image = slide._reader.tiles.images[0]
        sampled = {(x // 128 + i, y // 128 + j) for x, y, *_ in fast._samples(image, 0) for i in (0, 1) for j in (0, 1)}
    victim = next(at for at in range(25) if (at % 5, at // 5) not in sampled)
    if which == "one":  # the others are as usual, and so are all sampled ones
        tiles = [tiles[at] if at == victim else tile for at, tile in enumerate(plain)]
    whole = _jpeg_tiles(tmp_path / "whole.tif", tiles, (*size, 3))
    with SlideImage(whole) as ours, SlideImage(whole, "openslide") as theirs:
        assert ours.reader == "tiff"
        assert np.array_equal(*(one.read_region((0, 0), 0, size) for one in (ours, theirs)))
    data = tiles[victim]
    start = data.index(b"\xff\xda") + 20
    found = []
    for end in rng.integers(start, len(data) - 8, 12):
        tiles[victim] = data[:end].rstrip(b"\xff") + b"\xff\xd9"
        path = _jpeg_tiles(tmp_path / "a.tif", tiles, (*size, 3))
        for reader in ("openslide", "auto", "tiff"):
            with SlideImage(path, reader) as slide:
                try:
                    slide.read_rgb((victim % 5 * 128, victim // 5 * 128), 0, (128, 128))
                except SlideReadError:
                    found.append((end, reader))
    ends = {name: {end for end, reader in found if reader == name} for name in ("openslide", "auto", "tiff")}
    assert len(ends["tiff"]) > 6
    assert ends["auto"] >= ends["openslide"]
    # Whole scans that are missing, which OpenSlide does not see, are refused as well.
    assert ends["auto"] == ends["tiff"]


@pytest.mark.parametrize("tile", [(80, 272), (272, 80)])
def test_what_only_the_tiff_reader_reads_is_read_without_openslide(write, pixels, caplog, tile):
    """libtiff expects another number of bytes in uncompressed tiles of some sizes, and OpenSlide opens the file."""
    path = write("a.tif", pixels, tile=tile)
    with SlideImage(path, "openslide") as slide:
        try:
            slide.read_region((0, 0), 0, (20, 20))
        except SlideReadError:
            pass
        else:
            pytest.skip("this OpenSlide reads it")
    with caplog.at_level(logging.WARNING), SlideImage(path) as slide:
        assert slide.reader == "tiff"
        assert slide.mpp == 0.5
        assert np.array_equal(slide.read_rgb((0, 0), 0, slide.dimensions)[0], pixels)
    assert "is read without OpenSlide: OpenSlide cannot read any of" in caplog.text


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
def test_a_damaged_tile_does_not_replace_openslide(write, pixels, compression, monkeypatch, caplog):
    """Only one sample fails, or it is JPEG, whose damage OpenSlide alone may see."""
    path = write("a.tif", pixels, compression=compression)
    read = OpenSlideReader.read_image

    def fails(self, location, level, size):
        if compression == "jpeg" or location == (0, 0):
            raise SlideReadError("damaged")
        return read(self, location, level, size)

    monkeypatch.setattr(OpenSlideReader, "read_image", fails)
    with caplog.at_level(logging.INFO), SlideImage(path) as slide:
        assert slide.reader == "openslide"
    assert "is read through OpenSlide: OpenSlide cannot read a sample" in caplog.text
