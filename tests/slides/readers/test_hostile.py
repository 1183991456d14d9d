"""TIFF files whose tags or tiles are wrong: a typed error, bounded memory, and only where the fault is."""

from __future__ import annotations

import resource
import struct
import threading
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile

from exaonepath.errors import ExaonePathError, MemoryLimitError, SlideOpenError, SlideReadError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.readers import tiff as tiff_reader
from exaonepath.slides.readers.tiff_tiles import TiffTiles


def overwrite(path, tag, value):
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[tag].overwrite(value)


def test_tiles_beyond_the_end_of_the_file(write, pixels):
    path = write("a.tif", pixels, compression="zlib", byteorder=">")
    with tifffile.TiffFile(path) as file:
        offsets = list(file.pages[0].tags["TileOffsets"].value)
    offsets[0], offsets[1] = 1 << 31, path.stat().st_size - 10
    overwrite(path, "TileOffsets", offsets)
    with SlideImage(path) as slide:
        for x in (0, 200):
            with pytest.raises(SlideReadError, match="the file ends at byte"):
                slide.read_region((x, 0), 0, (20, 20))
        assert np.array_equal(slide.read_region((300, 0), 0, (20, 20))[..., :3], pixels[:20, 300:320])


def test_lengths_that_cannot_be(write, pixels):
    path = write("a.tif", pixels, compression="zlib", byteorder=">")
    with tifffile.TiffFile(path) as file:
        counts = list(file.pages[0].tags["TileByteCounts"].value)
    overwrite(path, "TileByteCounts", [(1 << 32) - 1, *counts[1:]])
    with SlideImage(path) as slide, pytest.raises(SlideReadError, match="4294967295 bytes"):
        slide.read_region((0, 0), 0, (20, 20))


@pytest.mark.parametrize(
    ("tag", "value", "says"),
    [
        ("ImageWidth", 100_000_000, "lists the places of 30"),
        ("ImageLength", 0, "size of 700 x 0 pixels"),
        ("TileWidth", 1 << 30, r"tiles of .* GB each"),
        ("TileWidth", 0, "tiles of 0 x 128"),
        ("Compression", 9999, "TIFF compression 9999"),
        ("PhotometricInterpretation", 8, "photometric interpretation 8"),
        ("SamplesPerPixel", 60_000, "60000 channels"),
    ],
)
def test_tags_that_cannot_be(write, pixels, tag, value, says):
    path = write("a.tif", pixels, compression="zlib", byteorder=">")
    overwrite(path, tag, value)
    with pytest.raises(SlideOpenError, match=says):
        SlideImage(path)


BOMBS = {
    "zlib": zlib.compress(bytes(200_000_000)),
    "lzw": imagecodecs.lzw_encode(bytes(20_000_000)),
    "zstd": imagecodecs.zstd_encode(bytes(200_000_000)),
    "jpeg": imagecodecs.jpeg8_encode(np.zeros((6000, 6000, 3), np.uint8)),
    "jpeg2000": imagecodecs.jpeg2k_encode(np.zeros((3000, 3000, 3), np.uint8), codecformat="j2k"),
    "webp": imagecodecs.webp_encode(np.zeros((4000, 4000, 3), np.uint8)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_tile_that_decodes_to_more_than_was_declared(write, pixels, kind):
    """It may not take the memory that it asks for, whatever its own header says."""
    path = write("a.tif", pixels, compression=kind, byteorder=">")
    with path.open("ab") as file:
        place = file.tell()
        file.write(BOMBS[kind])
    with tifffile.TiffFile(path) as file:
        offsets, counts = (list(file.pages[0].tags[f"Tile{name}"].value) for name in ("Offsets", "ByteCounts"))
    overwrite(path, "TileOffsets", [place, *offsets[1:]])
    overwrite(path, "TileByteCounts", [len(BOMBS[kind]), *counts[1:]])
    with SlideImage(path) as slide:
        slide.read_region((300, 300), 0, (20, 20))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if kind == "lzw":  # its decoder stops at the declared size
            slide.read_region((0, 0), 0, (20, 20))
        else:
            with pytest.raises(
                SlideReadError, match=f"column 0, row 0 of level 0 .*{tiff_name(kind)}|holds|when it is decoded"
            ):
                slide.read_region((0, 0), 0, (20, 20))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB
        assert slide.read_region((128, 0), 0, (20, 20))[..., 3].min() == 255


def tiff_name(kind):
    return {"zlib": "deflate", "zstd": "Zstandard", "jpeg": "JPEG", "jpeg2000": "JPEG 2000", "webp": "WebP"}[kind]


@pytest.mark.parametrize("kind", [*BOMBS, None])
@pytest.mark.parametrize("damage", ["short", "noise", "other size"])
def test_a_damaged_tile(write, pixels, kind, damage):
    path = write("a.tif", pixels, compression=kind, byteorder=">")
    with tifffile.TiffFile(path) as file:
        offsets, counts = (list(file.pages[0].tags[f"Tile{name}"].value) for name in ("Offsets", "ByteCounts"))
    if damage == "short":
        overwrite(path, "TileByteCounts", [counts[0] // 2, *counts[1:]])
    elif damage == "noise" and kind is not None:
        data = bytearray(path.read_bytes())
        data[offsets[0] : offsets[0] + counts[0]] = np.random.default_rng(0).bytes(counts[0])
        path.write_bytes(data)
    else:
        other = pixels[:64, :64].copy()
        encoded = {"zlib": zlib.compress, "jpeg": imagecodecs.jpeg8_encode, None: bytes}.get(kind)
        if encoded is None:
            pytest.skip("as for the others")
        data = encoded(other)
        with path.open("ab") as file:
            place = file.tell()
            file.write(data)
        overwrite(path, "TileOffsets", [place, *offsets[1:]])
        overwrite(path, "TileByteCounts", [len(data), *counts[1:]])
    with SlideImage(path) as slide:
        with pytest.raises(SlideReadError, match="column 0, row 0 of level 0"):
            slide.read_region((100, 100), 0, (20, 20))
        assert slide.read_region((128, 0), 0, (20, 20))[..., 3].min() == 255


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_raises_nothing_else(write, pixels, seed):
    """Any byte of the tags, in files that the TIFF reader opens without OpenSlide."""
    rng = np.random.default_rng(seed)
    options = {"compression": ["zlib", "jpeg", "lzw", None][seed % 4], "tile": (64, 64) if seed % 3 else None}
    path = write("a.tif", pixels[:200, :200].copy(), bigtiff=bool(seed % 2), byteorder="<>"[seed // 2 % 2], **options)
    good = path.read_bytes()
    for _ in range(6):
        data = bytearray(good)
        for _ in range(3):
            data[rng.integers(4, 500)] = rng.integers(256)
        path.write_bytes(data)
        try:
            with SlideImage(path, reader="tiff") as slide:
                slide.read_region((0, 0), 0, (300, 300))
                slide.read_rgb((-10, -10), len(slide.level_dimensions) - 1, (50, 50))
        except ExaonePathError:
            pass


def test_a_directory_that_refers_to_one_text_many_times(tmp_path):
    """256 directories with a text of 16 MB each are 4 GB, in a file of 16 MB."""
    entries, length = 40, 16 << 20
    first = 8
    size = 2 + 12 * entries + 4
    data = bytearray(struct.pack("<2sHI", b"II", 42, first))
    for number in range(250):
        data += struct.pack("<H", entries)
        data += struct.pack("<HHII", 270, 2, length, first + 250 * size) * entries
        data += struct.pack("<I", first + (number + 1) * size if number < 249 else 0)
    path = tmp_path / "a.tif"
    path.write_bytes(bytes(data) + bytes(length))
    with pytest.raises(SlideOpenError):
        SlideImage(path)


def test_a_strip_that_cannot_fit_is_refused_beforehand(write, pixels, monkeypatch):
    path = write("a.tif", pixels, tile=None, rowsperstrip=520, compression="zlib")
    monkeypatch.setattr(tiff_reader, "available_host_memory", lambda: 1_000_000)
    with pytest.raises(MemoryLimitError, match=r"strip of it takes 0\.0 GB to decode, and 0\.0 GB are free"):
        SlideImage(path)


def test_a_file_that_is_cut_while_it_is_read(write, pixels):
    path = write("a.tif", pixels, compression="zlib", byteorder=">")
    with SlideImage(path) as slide:
        slide.read_region((0, 0), 0, (20, 20))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(SlideReadError, match="the file ends at byte"):
            slide.read_region((600, 450), 0, (20, 20))


def test_closing_waits_for_reads(write, pixels, monkeypatch):
    """A descriptor that is closed under a reader could be given to another file."""
    path = write("a.tif", pixels, compression="zlib", byteorder=">")
    started, go_on = threading.Event(), threading.Event()
    stored = TiffTiles._stored

    def slow(self, *args):
        with self._reading():
            started.set()
            assert go_on.wait(10)
        return stored(self, *args)

    slide = SlideImage(path)
    monkeypatch.setattr(TiffTiles, "_stored", slow)
    closed = []
    monkeypatch.setattr("exaonepath.slides.readers.tiff_tiles.os.close", closed.append)
    caught = []

    def read():
        try:
            slide.read_region((0, 0), 0, (20, 20))
        except SlideReadError as exc:
            caught.append(str(exc))

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(10)
    slide.close()
    assert not closed
    go_on.set()
    thread.join()
    assert len(closed) == 1
    assert "was closed" in caught[0]


@pytest.mark.parametrize("options", [{"tile": (64, 64)}, {"rowsperstrip": 30, "tile": None}], ids=["tiles", "strips"])
@pytest.mark.parametrize("compression", ["zlib", "jpeg"])
def test_any_tag_of_any_type(write, pixels, options, compression):
    """A tag of a type that does not fit counts as missing; in one place it was an IndexError."""
    path = write("a.tif", pixels[:120, :130].copy(), compression=compression, **options)
    good = path.read_bytes()
    start = struct.unpack_from("<I", good, 4)[0]
    (count,) = struct.unpack_from("<H", good, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        for kind in (1, 2, 7, 9, 10, 11, 12, 17, 99):
            for number in (1, 0, 3):
                data = bytearray(good)
                struct.pack_into("<HI", data, entry + 2, kind, number)
                path.write_bytes(data)
                for reader in ("auto", "openslide", "tiff"):
                    try:
                        with SlideImage(path, reader) as slide:
                            slide.read_rgb((0, 0), 0, (70, 70))
                    except ExaonePathError:
                        pass


@pytest.mark.parametrize("compression", ["zlib", "lzw"])
def test_a_tile_of_more_bytes_than_it_can_have_is_not_read(write, pixels, compression):
    """They would be read whole before a decoder looks at them."""
    path = write("a.tif", pixels, compression=compression, byteorder=">")
    with tifffile.TiffFile(path) as file:
        counts = list(file.pages[0].tags["TileByteCounts"].value)
    overwrite(path, "TileByteCounts", [500 << 20, *counts[1:]])
    with path.open("r+b") as file:
        file.truncate(600 << 20)  # without taking that much on the disk
    with SlideImage(path) as slide:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(SlideReadError, match=r"524288000 bytes at byte \d+, and 49152 when it is decoded"):
            slide.read_region((0, 0), 0, (20, 20))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB
        assert slide.read_region((128, 0), 0, (20, 20))[..., 3].min() == 255
