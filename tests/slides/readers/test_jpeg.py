"""JPEG streams that are damaged or cut are refused wherever OpenSlide refuses them, and in some more cases."""

from __future__ import annotations

import contextlib
import logging
from io import BytesIO

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from exaonepath.errors import SlideError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.readers.jpeg import Colours, JpegError, decode_jpeg


def tile(kind: str = "tissue", side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "tissue":
        y, x = np.mgrid[:side, :side]
        smooth = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 90 + x + y], axis=-1)
        return np.clip(smooth + rng.normal(0, 9, (side, side, 3)), 0, 255).astype(np.uint8)
    pixels = np.full((side, side, 3), 240, np.uint8)
    if kind == "half":
        pixels[: side // 2, : side - 24] = rng.integers(0, 255, (side // 2, side - 24, 3))
    return pixels


def by_pillow(pixels: np.ndarray, **options) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize("kind", ["tissue", "half", "blank"])
def test_streams_that_are_cut(kind, subsampling):
    """Wherever a stream is cut, with or without an end mark after it, it is refused."""
    data = imagecodecs.jpeg8_encode(tile(kind), level=80, subsampling=subsampling)
    assert np.array_equal(decode_jpeg(data, (64, 64, 3)), imagecodecs.jpeg8_decode(data))
    start = data.index(b"\xff\xda") + 14
    for end in range(start, len(data) - 2, max(1, (len(data) - start) // 150)):
        for mark in (b"", b"\xff\xd9", b"\0\0"):
            with pytest.raises(JpegError, match="incomplete"):
                decode_jpeg(data[:end].rstrip(b"\xff") + mark, (64, 64, 3))
    for end in range(start):
        with pytest.raises(JpegError):
            decode_jpeg(data[:end], (64, 64, 3))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_changed_bits_are_refused_where_openslide_refuses_them(tmp_path, options, caplog):
    """Where both accept a stream, they give the same pixels. OpenSlide does not look at what follows the last pixel."""
    caplog.set_level(logging.CRITICAL)
    path, rng = tmp_path / "a.tif", np.random.default_rng(5)
    stored = by_pillow(tile(side=128), subsampling="4:2:0", **options)
    tifffile.imwrite(
        path, iter([stored]), shape=(128, 128, 3), dtype=np.uint8, tile=(128, 128), photometric="ycbcr",
        compression="jpeg", subsampling=(2, 2), metadata=None,
    )  # fmt: skip
    data = path.read_bytes()
    begin = data.index(stored) + stored.index(b"\xff\xda") + 14
    refused = accepted = 0
    for _ in range(120):
        changed = bytearray(data)
        place = int(rng.integers(begin, data.index(stored) + len(stored) - 2))
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with openslide.OpenSlide(path) as slide:
            theirs = None
            with contextlib.suppress(openslide.OpenSlideError):
                theirs = np.asarray(slide.read_region((0, 0), 0, (128, 128)))[..., :3]
        ours, said = None, None
        try:
            with SlideImage(path, "tiff") as slide:
                ours = slide.read_rgb((0, 0), 0, (128, 128))[0]
        except SlideError as exc:
            said = exc
        if ours is None:  # OpenSlide too, unless it is only that fewer bytes were decoded than are stored
            assert theirs is None or "extraneous bytes before marker 0xd9" in str(said)
        else:
            assert theirs is not None
            assert np.array_equal(ours, theirs)
        refused, accepted = refused + (ours is None), accepted + (ours is not None)
    assert refused > 15
    assert accepted > 3


def test_restart_marks():
    data = by_pillow(tile(), restart_marker_blocks=3)
    assert np.array_equal(decode_jpeg(data), imagecodecs.jpeg8_decode(data))
    mark = data.index(b"\xff\xd0", data.index(b"\xff\xda"))
    for damaged in (
        data[:mark] + b"\xff\xd9",
        data[:mark] + data[mark + 2 :],
        data[:mark] + b"\xff\xd3" + data[mark + 2 :],
    ):
        with pytest.raises(JpegError, match="incomplete"):
            decode_jpeg(damaged)


def scans_of(data: bytes) -> list[int]:
    found = [data.index(b"\xff\xda")]
    while (at := data.find(b"\xff\xda", found[-1] + 2)) >= 0:
        found.append(at)
    return found


@pytest.mark.parametrize("grey", [False, True])
def test_scans_that_are_missing(grey):
    """libjpeg does not report them: the pixels are coarse, or lack a colour."""
    pixels = tile()[..., 0] if grey else tile()
    data = by_pillow(pixels, progressive=True)
    assert np.array_equal(np.squeeze(decode_jpeg(data)), imagecodecs.jpeg8_decode(data))
    scans = scans_of(data)
    assert len(scans) > 3
    for at, start in enumerate(scans):
        stop = scans[at + 1] if at + 1 < len(scans) else len(data) - 2
        for damaged in (data[:start] + data[stop:], data[:start] + b"\xff\xd9"):
            with pytest.raises(JpegError):
                decode_jpeg(damaged)


def test_scans_of_single_channels():
    """Each channel in a scan of its own, without progression."""
    whole = imagecodecs.jpeg8_encode(tile(), level=80, subsampling="444")
    channels = [imagecodecs.jpeg8_encode(np.full((64, 64), 90 + i, np.uint8)) for i in range(3)]
    # The header of a stream of three channels with one table for all, and the scan of a grey stream for each of them.
    grey = channels[0][: channels[0].index(b"\xff\xda")]
    frame = grey.index(b"\xff\xc0")
    three = (
        b"\xff\xc0" + (17).to_bytes(2, "big") + grey[frame + 4 : frame + 9] + bytes([3, 1, 17, 0, 2, 17, 0, 3, 17, 0])
    )
    header = grey[:frame] + three + grey[frame + 2 + int.from_bytes(grey[frame + 2 : frame + 4], "big") :]
    scans = []
    for at, data in enumerate(channels):
        body = data[data.index(b"\xff\xda") + 10 : -2]
        scans.append(b"\xff\xda\x00\x08\x01" + bytes([at + 1, 0, 0, 63, 0]) + body)
    stream = header + b"".join(scans) + b"\xff\xd9"
    assert np.array_equal(decode_jpeg(stream, colours=Colours.RGB)[0, 0], [90, 91, 92])
    for left_out in range(3):
        with pytest.raises(JpegError, match="lack a scan"):
            decode_jpeg(header + b"".join(s for at, s in enumerate(scans) if at != left_out) + b"\xff\xd9")
    assert whole.startswith(b"\xff\xd8")


@pytest.mark.parametrize("mark", ["JFIF", "Adobe RGB", "Adobe YCbCr", "none"])
@pytest.mark.parametrize("colours", list(Colours))
def test_the_tiff_decides_about_the_colours(mark, colours):
    """Whatever the marks in the stream say."""
    data = imagecodecs.jpeg8_encode(tile(), level=90, subsampling="444", colorspace="RGB", outcolorspace="YCBCR")
    at = 2
    while data[at + 1] in (0xE0, 0xEE):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    jfif = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
    adobe = b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0"
    front = {"JFIF": jfif, "Adobe RGB": adobe + b"\0", "Adobe YCbCr": adobe + b"\1", "none": b""}[mark]
    stream = data[:2] + front + data[at:]
    expected = imagecodecs.jpeg8_decode(stream, colorspace=colours.name, outcolorspace="RGB")
    assert np.array_equal(decode_jpeg(stream, (64, 64, 3), colours=colours), expected)


def test_tables_are_added():
    data = imagecodecs.jpeg8_encode(tile(), level=80)
    start, frame = data.index(b"\xff\xdb"), data.index(b"\xff\xc0")
    tables, short = b"\xff\xd8" + data[start:frame] + b"\xff\xd9", data[:start] + data[frame:]
    whole = imagecodecs.jpeg8_decode(data)
    for given in (tables, tables[:-2]):
        assert np.array_equal(decode_jpeg(short, (64, 64, 3), tables=given), whole)
    for given in (b"", b"\xff", bytes(40), tables[: len(tables) // 2]):
        with pytest.raises(JpegError):
            decode_jpeg(short, (64, 64, 3), tables=given)


def test_other_shapes_and_no_streams():
    data = imagecodecs.jpeg8_encode(tile(), level=80)
    for shape in ((64, 32, 3), (128, 64, 3), (32, 64, 3), (65, 64, 3)):
        with pytest.raises(JpegError):
            decode_jpeg(data, shape)
    with pytest.raises(JpegError, match="3 channels in its JPEG stream, and 1 are stated"):
        decode_jpeg(data, (64, 64, 1))
    with pytest.raises(JpegError, match="4 channels"):
        decode_jpeg(cmyk())
    for junk in (b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", bytes(100), b"\xff\xd8" + bytes(100), data[20:]):
        with pytest.raises(JpegError, match="valid header"):
            decode_jpeg(junk)


def cmyk() -> bytes:
    buffer = BytesIO()
    Image.fromarray(tile()).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_stated_size_takes_no_memory(monkeypatch):
    """A header of 65,500 x 65,500 pixels in a small tile."""
    data = bytearray(imagecodecs.jpeg8_encode(tile(), level=80))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (65_500).to_bytes(2, "big") * 2
    with pytest.raises(JpegError):
        decode_jpeg(bytes(data), (64, 64, 3))


def test_a_preview_in_a_segment_is_no_scan():
    preview = by_pillow(tile(side=16))
    data = by_pillow(tile())
    segment = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    assert np.array_equal(decode_jpeg(data[:2] + segment + data[2:]), decode_jpeg(data))


def test_headers_that_are_damaged():
    """Any change of a byte in the header: an error, or pixels; nothing else."""
    data = imagecodecs.jpeg8_encode(tile(side=16), level=80)
    rng = np.random.default_rng(0)
    for place in range(data.index(b"\xff\xda") + 14):
        changed = bytearray(data)
        changed[place] ^= int(rng.integers(1, 256))
        with contextlib.suppress(JpegError):
            assert decode_jpeg(bytes(changed), (16, 16, 3)).shape == (16, 16, 3)
