"""Tiles whose stated size would make OpenSlide end the process: they are refused before it sees the file."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
import tifffile

from exaonepath.errors import SlideOpenError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.readers import limits

SHORT, LONG, SLONG, LONG8, SLONG8 = 3, 4, 9, 16, 17
OPEN = """
import sys
from exaonepath.errors import SlideOpenError
from exaonepath.slides.image import SlideImage
for path in sys.argv[1:]:
    for reader in ("auto", "openslide"):
        try:
            with SlideImage(path, reader) as slide:
                slide.read_region((0, 0), 0, (50, 50))
        except SlideOpenError as exc:
            print(exc)
        else:
            print("read")
"""


def entries(data, start=None):
    """tag: place of its entry, in a little-endian BigTIFF; of its first directory, or of the one at `start`."""
    start = struct.unpack_from("<Q", data, 8)[0] if start is None else start
    count = struct.unpack_from("<Q", data, start)[0]
    return {struct.unpack_from("<H", data, start + 8 + 20 * at)[0]: start + 8 + 20 * at for at in range(count)}


def state(data, tag, kind, value, directory=0):
    """Overwrite the value of a tag of one number."""
    start = struct.unpack_from("<Q", data, 8)[0]
    for _ in range(directory):
        start = struct.unpack_from("<Q", data, start + 8 + 20 * len(entries(data, start)))[0]
    struct.pack_into("<HQ", data, (at := entries(data, start)[tag]) + 2, kind, 1)
    struct.pack_into("<q" if kind == SLONG8 else "<Q", data, at + 12, value)


@pytest.fixture
def slide(tmp_path, pixels):
    """Bytes of a BigTIFF of two levels."""
    path = tmp_path / "good.tif"
    options = {"tile": (128, 128), "photometric": "rgb", "metadata": None, "compression": "jpeg"}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(pixels, software="a" * 30, **options)
        file.write(pixels[::2, ::2].copy(), subfiletype=1, **options)
    return bytearray(path.read_bytes())


def lengths(data, value):
    """Every tile is stated to have `value` bytes."""
    at = entries(data)[325]
    count = struct.unpack_from("<Q", data, at + 4)[0]
    struct.pack_into("<HQQ", data, at + 2, LONG8, count, len(data))
    data += struct.pack("<Q", value) * count


CASES = {
    "a bit of the height": (lambda data: state(data, 323, LONG, 33554688), r"tiles of 128 x 33554688 pixels, 17\.2 GB"),
    "width": (lambda data: state(data, 322, LONG, (1 << 31) - 16), r"tiles of 2147483632 x 128"),
    "signed": (lambda data: state(data, 323, SLONG, 33554688), r"tiles of 128 x 33554688"),
    "signed, 64 bits": (lambda data: state(data, 323, SLONG8, 33554688), r"tiles of 128 x 33554688"),
    "a smaller level": (lambda data: state(data, 323, LONG, 33554688, 1), r"tiles of 128 x 33554688"),
    "samples": (lambda data: state(data, 277, SHORT, 65535), r"128 x 128 pixels, 1\.07 GB each"),
    "stored bytes": (lambda data: lengths(data, 1 << 40), r"a tile of 1\.1e\+03 GB as it is stored"),
    "more bytes than a sign allows": (lambda data: lengths(data, (1 << 64) - 1), r"a tile of 1\.84e\+10 GB as it"),
    # Another tag becomes a second TileLength: which of the two is used depends on the program.
    "stated twice": (lambda data: struct.pack_into("<HHQQ", data, entries(data)[305], 323, LONG, 1, 1 << 25), "twice"),
}  # fmt: skip


def test_openslide_never_sees_a_tile_that_it_has_no_memory_for(tmp_path, slide):
    """In a process of its own, which GLib would end."""
    paths = []
    for number, (damage, _) in enumerate(CASES.values()):
        data = bytearray(slide)
        damage(data)
        paths.append(tmp_path / f"{number}.tif")
        paths[-1].write_bytes(data)
    found = subprocess.run([sys.executable, "-c", OPEN, *paths], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 2 * len(CASES)
    for (name, (_, says)), *pair in zip(CASES.items(), lines[::2], lines[1::2], strict=True):
        for line in pair:
            with pytest.raises(SlideOpenError, match=says):
                raise SlideOpenError(line)
            assert "convert it" in line, name


def test_sub_directories_and_many_directories(tmp_path, pixels, monkeypatch):
    path = tmp_path / "a.tif"
    options = {"tile": (128, 128), "photometric": "rgb", "metadata": None, "compression": "zlib"}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, subifds=1, **options)
        file.write(pixels[::2, ::2].copy(), subfiletype=1, **options)
    assert limits.too_large_for_openslide(path) is None
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].pages[0].tags["TileLength"].overwrite(33554688, dtype="I")
    with pytest.raises(SlideOpenError, match="tiles of 128 x 33554688"):
        SlideImage(path)
    with tifffile.TiffWriter(path) as file:
        for _ in range(300):  # more than are read elsewhere
            file.write(np.zeros((16, 16), np.uint8), tile=(16, 16))
    assert limits.too_large_for_openslide(path) is None
    monkeypatch.setattr(limits, "_MAX_DIRECTORIES", 200)
    assert "more than 200 images" in limits.too_large_for_openslide(path)


def test_files_without_tiles_are_not_concerned(tmp_path, monkeypatch):
    """NDPI stores a whole level as one strip; a text is no TIFF at all."""
    path = tmp_path / "a.ndpi"
    options = {"photometric": "rgb", "metadata": None, "rowsperstrip": 3000}
    tifffile.imwrite(path, np.zeros((3000, 3000, 3), np.uint8), extratags=[(65420, "I", 1, 1, True)], **options)
    monkeypatch.setattr(limits, "_MOST", 1000)
    assert limits.too_large_for_openslide(path) is None
    path.write_text("no slide")
    assert limits.too_large_for_openslide(path) is None


def test_the_memory_that_is_free_counts_too(tmp_path, slide, monkeypatch):
    path = tmp_path / "a.tif"
    path.write_bytes(slide)
    monkeypatch.setattr(limits, "available_host_memory", lambda: 60_000)
    assert "128 x 128 pixels, 6.55e-05 GB each" in limits.too_large_for_openslide(path)
