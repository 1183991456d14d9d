"""Plain images as slides of one level."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from contextlib import suppress

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from exaonepath.errors import MemoryLimitError, SlideOpenError, SlideReadError
from exaonepath.slides.find import find_slides
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.levels import LevelReader
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.slides.readers import plain
from exaonepath.synthetic import make_slide


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["a.png", "a.bmp", "a.jpg", "progressive.jpg", "grey.jpg", "a.unknown"])
def test_images_are_slides(tmp_path, pixels, kind, caplog):
    options = {"quality": 98, "subsampling": 0, "progressive": "progressive" in kind} if ".jpg" in kind else {}
    expected = pixels
    if kind == "grey.jpg":
        expected = np.repeat(pixels[..., :1], 3, axis=2)
    if kind == "a.unknown":  # recognised by its content
        options["format"] = "PNG"
    path = save(tmp_path / kind, expected[..., 0].copy() if kind == "grey.jpg" else pixels, **options)
    with caplog.at_level(logging.WARNING), SlideImage(path) as slide:
        assert (slide.reader, slide.level_dimensions) == ("image", ((700, 520),))
        assert (slide.mpp, slide.mpp_source) == (0.5, "assumed")
        whole = slide.read_region((0, 0), 0, slide.dimensions)
        assert np.abs(whole[..., :3].astype(int) - expected).max() <= (8 if ".jpg" in kind else 0)
        assert np.array_equal(slide.read_rgb((0, 0), 0, slide.dimensions)[0], whole[..., :3])
        beyond = slide.read_region((650, -30), 0, (100, 60))
        assert np.array_equal(beyond[30:, :50], whole[:30, 650:])
        assert beyond[:30].max() == beyond[:, 50:].max() == 0
        assert slide.read_rgb((650, -30), 0, (100, 60))[1] == 0
        for far in ((9000, 9000), (-9000, 5), (5, -9000)):
            assert slide.read_region(far, 0, (10, 10)).max() == 0
        again = LevelReader(slide, 0)
        total = sum(piece.pixels.shape[0] * piece.pixels.shape[1] for band in again.bands() for piece in band.pieces)
        assert total == 700 * 520
    assert "assuming 0.50 um" in caplog.text


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_kinds_of_png(tmp_path, pixels, mode, caplog):
    path = tmp_path / "a.png"
    if mode == "I;16":  # 12 bits in 16
        values = (pixels[..., 0].astype(np.uint32) * 4095 + 127) // 255
        Image.fromarray(values.astype(np.uint16)).save(path)
        expected = np.repeat(pixels[..., :1], 3, axis=2)
    elif mode == "P":
        image = Image.fromarray(pixels).quantize(64)
        image.save(path)
        expected = np.asarray(image.convert("RGB"))
    else:
        image = Image.fromarray(pixels).convert(mode)
        image.save(path)
        expected = np.asarray(image.convert("RGB"))
    with caplog.at_level(logging.WARNING), SlideImage(path) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, slide.dimensions)[..., :3], expected)
    assert ("12 significant bits" in caplog.text) == (mode == "I;16")


@pytest.mark.parametrize("channels", [2, 4])
def test_only_colours_of_a_png_tell_the_significant_bits(tmp_path, pixels, channels, caplog):
    values = ((pixels.astype(np.uint32) * 4095 + 127) // 255).astype(np.uint16)[..., : channels - 1]
    cover = np.full(pixels.shape[:2], 65535, np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.dstack([values, cover])))
    with caplog.at_level(logging.WARNING), SlideImage(tmp_path / "a.png") as slide:
        rgba = slide.read_region((0, 0), 0, slide.dimensions)
    assert np.array_equal(rgba[..., :3], pixels if channels == 4 else np.repeat(pixels[..., :1], 3, axis=2))
    assert rgba[..., 3].min() == 255
    assert "12 significant bits" in caplog.text


def test_transparent_pixels_have_no_data(tmp_path, pixels):
    cover = np.full(pixels.shape[:2], 255, np.uint8)
    cover[:100, :100] = 0
    path = save(tmp_path / "a.png", np.dstack([pixels, cover]))
    with SlideImage(path) as slide:
        assert slide.read_rgb((0, 0), 0, (200, 100))[1] == 0.5
        assert slide.read_rgb((0, 0), 0, (100, 100))[0].max() == 0


def test_a_rotation_is_not_applied_and_said(tmp_path, pixels, caplog):
    exif = Image.Exif()
    exif[274] = 6
    path = save(tmp_path / "a.jpg", pixels, exif=exif)
    with caplog.at_level(logging.WARNING), SlideImage(path) as slide:
        assert slide.dimensions == (700, 520)
    assert "EXIF orientation 6" in caplog.text


def png_of(width, height):
    """The beginning of a PNG that states this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = zlib.compress(bytes(1000))
    body = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return b"\x89PNG\r\n\x1a\n" + chunk + body


def jpeg_of(width, height):
    """A JPEG of 8 x 8 pixels that states another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("data", [png_of(60_000, 60_000), jpeg_of(65_000, 65_000)], ids=["PNG", "JPEG"])
def test_an_image_that_does_not_fit_is_refused_with_the_figure(tmp_path, monkeypatch, data):
    monkeypatch.setattr(plain, "available_host_memory", lambda: 4 << 30)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(MemoryLimitError, match=r"takes \d\d\.\d GB to decode, and 4\.3 GB are free.*vips tiffsave"):
        SlideImage(tmp_path / "a")


def test_damaged_images_raise_a_typed_error(tmp_path, pixels):
    for name in ("a.png", "a.jpg", "a.bmp"):
        path = save(tmp_path / name, pixels)
        good = path.read_bytes()
        for size in (30, 200, len(good) // 2, len(good) - 100):
            path.write_bytes(good[:size])
            with pytest.raises(SlideOpenError):
                SlideImage(path)
        rng = np.random.default_rng(0)
        for _ in range(10):
            data = bytearray(good)
            for _ in range(5):
                data[rng.integers(2, 300)] = rng.integers(256)
            path.write_bytes(data)
            with suppress(SlideOpenError, MemoryLimitError):
                SlideImage(path).close()
    (tmp_path / "zero.png").write_bytes(png_of(0, 10))
    with pytest.raises(SlideOpenError, match="no pixels"):
        SlideImage(tmp_path / "zero.png")
    with pytest.raises(SlideOpenError, match="CMYK"):
        SlideImage(save(tmp_path / "cmyk.jpg", pixels, "CMYK"))


def test_a_closed_image_says_so(tmp_path, pixels):
    slide = SlideImage(save(tmp_path / "a.png", pixels))
    slide.close()
    with pytest.raises(SlideReadError, match="was closed"):
        slide.read_region((0, 0), 0, (5, 5))


def test_an_image_gives_the_patches_of_a_flat_slide(tmp_path):
    """It is only found where it is named: a folder of slides has pictures of other kinds."""
    flat = make_slide(tmp_path / "a.tif", 1500, 1200, levels="flat", vendor="generic", fragments=1)
    with SlideImage(flat) as slide:
        expected = patchfy(slide, tmp_path / "1")[1]
        save(tmp_path / "b.png", slide.read_region((0, 0), 0, slide.dimensions)[..., :3].copy())
    found = patchfy(tmp_path / "b.png", tmp_path / "2")[1]
    assert len(found) > 3
    assert np.array_equal(found, expected)
    assert find_slides([tmp_path]) == [flat]
    assert find_slides([tmp_path / "b.png"]) == [tmp_path / "b.png"]


def jpeg_with_preview(pixels, **options):
    """As cameras write it: the preview in the EXIF segment is a whole JPEG with marks of its own."""
    preview, buffer, exif = io.BytesIO(), io.BytesIO(), Image.Exif()
    Image.fromarray(pixels[:64, :64]).save(preview, "JPEG")
    exif[270] = "x"
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, exif=exif, **options)
    data = buffer.getvalue()
    segment = b"Exif\0\0" + preview.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_a_jpeg_that_is_cut_is_not_read(tmp_path, pixels, options):
    noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 9, pixels.shape), 0, 255).astype(np.uint8)
    data = jpeg_with_preview(noisy, **options)
    path = tmp_path / "a.jpg"
    path.write_bytes(data + jpeg_with_preview(noisy[:80, :80]))  # a second picture at the end
    with SlideImage(path) as slide:
        whole = slide.read_rgb((0, 0), 0, slide.dimensions)[0]
        assert np.abs(whole.astype(int) - noisy).mean() < 8
    for part in (0.3, 0.6, 0.9):
        cut = data[: int(len(data) * part)].rstrip(b"\xff")
        for end in (b"", b"\xff\xd9", b"\xff\xd9" + bytes(300)):
            path.write_bytes(cut + end)
            with pytest.raises(SlideOpenError, match=r"is (damaged or )?incomplete"):
                SlideImage(path)


def bmp_of(width, height, core=False):
    if core:
        return b"BM" + struct.pack("<IHHI", 80, 0, 0, 26) + struct.pack("<IHHHH", 12, width, height, 1, 24) + bytes(54)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)
    return b"BM" + struct.pack("<IHHI", 108, 0, 0, 54) + header + bytes(54)


@pytest.mark.parametrize("size", [(14_000, 14_000), (10_000, 10_000), (1 << 30, 1 << 30), (100_000, -100_000), (-5, 3)])
def test_a_bmp_that_states_too_much(tmp_path, size, recwarn):
    path = tmp_path / "a.bmp"
    path.write_bytes(bmp_of(*size))
    with pytest.raises((SlideOpenError, MemoryLimitError), match=r"a\.bmp"):
        SlideImage(path)
    assert not [one for one in recwarn if "DecompressionBomb" in str(one.category)]


def test_an_old_bmp(tmp_path):
    """A header of 12 bytes, with a size of 16 bits."""
    path = tmp_path / "a.bmp"
    path.write_bytes(bmp_of(4, 4, core=True))
    with SlideImage(path) as slide:
        assert slide.dimensions == (4, 4)
