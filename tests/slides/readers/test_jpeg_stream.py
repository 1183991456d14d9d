"""JPEG streams that are cut anywhere: an error, or not a pixel is missing but some at the very end."""

from __future__ import annotations

from io import BytesIO

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from exaonepath.slides.readers import jpeg_stream

UNIT = {"444": 8, "422": 16, "420": 16}


def tile(kind):
    rng = np.random.default_rng(3)
    if kind == "tissue":
        y, x = np.mgrid[:64, :64]
        smooth = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 90 + x + y], axis=-1)
        return np.clip(smooth + rng.normal(0, 9, (64, 64, 3)), 0, 255).astype(np.uint8)
    pixels = np.full((64, 64, 3), 240, np.uint8)
    if kind == "half":
        pixels[:32, :40] = rng.integers(0, 255, (32, 40, 3))
    return pixels


@pytest.mark.parametrize("optimize", [False, True], ids=["", "own codes"])
@pytest.mark.parametrize("subsampling", UNIT)
@pytest.mark.parametrize("kind", ["tissue", "half", "blank"])
def test_streams_that_are_cut(kind, subsampling, optimize):
    data = imagecodecs.jpeg8_encode(tile(kind), level=80, subsampling=subsampling, optimize=optimize)
    whole = imagecodecs.jpeg8_decode(data)
    assert jpeg_stream.why_truncated(data) is None
    assert jpeg_stream.is_complete(data, whole, imagecodecs.jpeg8_decode)
    start = data.index(b"\xff\xda") + 14
    found = 0
    for end in range(start + 1, len(data) - 3, max(1, (len(data) - start) // 150)):
        cut = data[:end].rstrip(b"\xff") + b"\xff\xd9"
        assert jpeg_stream.why_truncated(cut[:-2] + b"\0\0")
        pixels = imagecodecs.jpeg8_decode(cut)
        if not jpeg_stream.is_complete(cut, pixels, imagecodecs.jpeg8_decode):
            found += 1
            continue
        differs = (pixels != whole).any(axis=2)
        unit = UNIT[subsampling] + 1  # its colours are mixed into the pixels next to it
        differs[-unit:, -33:] = False
        assert not differs.any(), end
    assert found > 50 or kind == "blank"  # what is missing there is what is filled in


def test_tissue_is_decoded_once():
    data = imagecodecs.jpeg8_encode(tile("tissue"), level=80)
    assert jpeg_stream.is_complete(data, imagecodecs.jpeg8_decode(data), pytest.fail)


UNITS = [("444", (8, 8)), ("422", (8, 16)), ("420", (16, 16)), ("440", (16, 8))]


@pytest.mark.parametrize(("subsampling", "unit"), UNITS)
def test_the_unit_is_that_of_the_header(subsampling, unit):
    data = imagecodecs.jpeg8_encode(tile("tissue"), subsampling=subsampling)
    assert jpeg_stream._header(data[: data.index(b"\xff\xda")])[4:6] == unit
    grey = imagecodecs.jpeg8_encode(tile("tissue")[..., 0].copy())
    assert jpeg_stream._header(grey[: grey.index(b"\xff\xda")])[4:6] == (8, 8)
    assert jpeg_stream.is_simple(data)


def test_streams_of_other_kinds():
    """Progressive ones and damaged headers count as having the smallest unit."""
    buffer = BytesIO()
    Image.fromarray(tile("half")).save(buffer, "JPEG", progressive=True, quality=80)
    data = buffer.getvalue()
    assert jpeg_stream.is_complete(data, imagecodecs.jpeg8_decode(data), imagecodecs.jpeg8_decode)
    assert not jpeg_stream.is_simple(data)
    for header in (b"", b"\xff", b"\xff\xd8\xff\xc0\x00\x05\x00\x00\x00\x00\x00\x00\x00\x00", bytes(40), data[:200]):
        assert jpeg_stream._header(header)[4:6] == (8, 8)
        assert jpeg_stream.is_simple(header)  # no decoder reads it
    assert not jpeg_stream.is_simple(b"\xff\xd8" + data[20:])


@pytest.mark.parametrize("size", [(64, 64), (60, 41)])
@pytest.mark.parametrize("interval", [1, 3, 8])
def test_restart_marks_are_counted(size, interval):
    buffer = BytesIO()
    part = Image.fromarray(tile("tissue")[: size[0], : size[1]])
    part.save(buffer, "JPEG", subsampling="4:2:0", restart_marker_blocks=interval)
    data = buffer.getvalue()
    assert jpeg_stream.why_truncated(data) is None
    assert not jpeg_stream.is_simple(data)
    mark = data.index(b"\xff\xd0", data.index(b"\xff\xda"))
    assert "restart marks" in jpeg_stream.why_truncated(data[:mark] + b"\xff\xd9")
    assert "restart marks" in jpeg_stream.why_truncated(data[:mark] + data[mark + 2 :])


def test_a_pass_of_a_progressive_stream_that_is_cut():
    buffer = BytesIO()
    Image.fromarray(tile("tissue")).save(buffer, "JPEG", progressive=True, quality=80)
    data = buffer.getvalue()
    scan = data.rindex(b"\xff\xda")
    cut = data[: scan + (len(data) - scan) // 2].rstrip(b"\xff") + b"\xff\xd9"
    assert not jpeg_stream.is_complete(cut, imagecodecs.jpeg8_decode(cut), imagecodecs.jpeg8_decode)
