"""How the pixels of one image of a TIFF file are stored, as its tags state it; refused where it cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from exaonepath.slides import tiff

_STRIP_ROWS, _STRIP_BYTES = 256, 8 << 20  # strips are decoded together up to these sizes
_MAX_SEGMENT = 1 << 31  # bytes of a decoded tile or strip
_MAX_SIDE = 1 << 31


class NotReadable(Exception):
    """This image is stored in a way that is not supported; the text is a phrase that says how."""


class Codec(Enum):
    """Kinds of compression."""

    NONE = "uncompressed"
    LZW = "LZW"
    JPEG = "JPEG"
    DEFLATE = "deflate"
    PACKBITS = "PackBits"
    ZSTD = "Zstandard"
    WEBP = "WebP"
    JPEG2000 = "JPEG 2000"


class Colour(Enum):
    """What the stored samples are."""

    GREY = "grey"
    GREY_INVERTED = "inverted grey"
    RGB = "RGB"
    PALETTE = "palette"
    YCBCR = "YCbCr"


_CODECS = {
    1: Codec.NONE,
    5: Codec.LZW,
    7: Codec.JPEG,
    8: Codec.DEFLATE,
    32946: Codec.DEFLATE,
    32773: Codec.PACKBITS,
    34926: Codec.ZSTD,
    50000: Codec.ZSTD,
    34927: Codec.WEBP,
    50001: Codec.WEBP,
    33003: Codec.JPEG2000,
    33004: Codec.JPEG2000,
    33005: Codec.JPEG2000,
    34712: Codec.JPEG2000,
}
_COLOURS = {0: Colour.GREY_INVERTED, 1: Colour.GREY, 2: Colour.RGB, 3: Colour.PALETTE, 6: Colour.YCBCR}
_APERIO_YCBCR, _APERIO_RGB = 33003, 33005  # Aperio's codes of JPEG 2000 state the colours; its photometric tag does not


@dataclass(frozen=True)
class TiffImage:
    """The storage of one image. A "cell" is what is decoded and cached as one: a tile, or some strips.

    Attributes:
        width, height: of the image, in pixels.
        cell_width, cell_height: of a cell, in pixels.
        segment_height: rows of a stored tile or strip; a cell has one or more of them, one below the other.
        codec, colour: of the stored bytes.
        samples: values of a pixel that are stored.
        bits: of a sample, 8 or 16.
        planes: `samples` if each sample is stored in tiles of its own, else 1.
        predictor: whether differences of neighbouring samples are stored.
        alpha: "straight", "premultiplied", or None if the image has no alpha.
        offsets, lengths: int64, the bytes of each tile or strip: row by row, plane by plane.
        tables: JPEG tables that all tiles share.
        palette: uint8 [256, 3] of a palette image.
        order: byte order of the samples.
    """

    width: int
    height: int
    cell_width: int
    cell_height: int
    segment_height: int
    tiled: bool
    codec: Codec
    colour: Colour
    samples: int
    bits: int
    planes: int
    predictor: bool
    alpha: str | None
    offsets: np.ndarray
    lengths: np.ndarray
    tables: bytes
    palette: np.ndarray | None
    order: str

    @property
    def columns(self) -> int:
        """Cells in a row."""
        return -(-self.width // self.cell_width)

    @property
    def segment_rows(self) -> int:
        """Rows of tiles or strips."""
        return -(-self.height // self.segment_height)

    @property
    def channels(self) -> int:
        """Channels of a decoded cell: 3, or 4 with alpha."""
        return 4 if self.alpha else 3

    @property
    def colours(self) -> int:
        """Stored samples that are colours; the others are alpha, or have a meaning of their own."""
        return _colour_samples(self.colour)

    @property
    def cell_bytes(self) -> int:
        """Bytes of a decoded cell in the cache."""
        return self.cell_width * self.cell_height * self.channels

    @property
    def segment_bytes(self) -> int:
        """Bytes of a decoded tile or strip before it becomes RGB."""
        return self.cell_width * self.segment_height * (self.samples // self.planes) * (self.bits // 8)

    def rows_of(self, segment_row: int) -> int:
        """Rows that a tile or strip has: tiles are stored whole, the last strip has only the rows that are left."""
        left = self.height - segment_row * self.segment_height
        return self.segment_height if self.tiled else min(self.segment_height, left)

    def cells_of(self, x: int, y: int, width: int, height: int) -> int:
        """Number of cells that a region lies on."""
        columns = range(max(0, x) // self.cell_width, -(-min(self.width, x + width) // self.cell_width))
        rows = range(max(0, y) // self.cell_height, -(-min(self.height, y + height) // self.cell_height))
        return len(columns) * len(rows)

    def describe(self) -> str:
        """A phrase for log lines."""
        tiles, strips = f"{self.cell_width} x {self.cell_height} tiles", f"strips of {self.segment_height} rows"
        kind = tiles if self.tiled else strips
        return f"{self.codec.value}, {self.colour.value}, {self.samples} x {self.bits} bits, {kind}"


def tiff_image(directory: tiff.Directory, order: str) -> TiffImage:
    """The storage of an image.

    Raises:
        NotReadable: it cannot be read; the text says why.
    """
    width, height = directory.number(tiff.WIDTH, 0), directory.number(tiff.LENGTH, 0)
    if not (0 < width < _MAX_SIDE and 0 < height < _MAX_SIDE):
        raise NotReadable(f"states a size of {width} x {height} pixels")
    code = directory.number(tiff.COMPRESSION, 1)
    codec = _CODECS.get(code)
    if codec is None:
        raise NotReadable(f"has pixels compressed in a way that is not read (TIFF compression {code})")
    samples = directory.number(tiff.SAMPLES, 1)
    colour, alpha = _colour(directory, code, codec, samples)
    bits = _bits(directory, codec)
    if colour is Colour.PALETTE and bits != 8:
        raise NotReadable(f"has a palette of {bits} bits, which is not read")
    planes = samples if directory.number(tiff.PLANAR, 1) == 2 and samples > 1 else 1
    if planes > 1 and codec is Codec.WEBP:
        raise NotReadable("has WebP tiles of single channels, which is not read")
    predictor = directory.number(tiff.PREDICTOR, 1)
    lossless = codec in (Codec.LZW, Codec.DEFLATE, Codec.ZSTD, Codec.NONE, Codec.PACKBITS)
    if predictor not in (1, 2) and lossless:
        raise NotReadable(f"has a predictor of kind {predictor}, which is not read")
    tiled = tiff.TILE_WIDTH in directory
    if tiled:
        cell_width = directory.number(tiff.TILE_WIDTH, 0)
        segment_height = cell_height = directory.number(tiff.TILE_LENGTH, 0)
    else:
        cell_width = width
        segment_height = min(height, directory.number(tiff.ROWS_PER_STRIP, height) or height)
        rows = min(_STRIP_ROWS, _STRIP_BYTES // (3 * width))
        cell_height = max(1, rows // segment_height) * segment_height
    if min(cell_width, segment_height) <= 0:
        raise NotReadable(f"states tiles of {cell_width} x {segment_height} pixels")
    tags = (tiff.TILE_OFFSETS, tiff.TILE_LENGTHS) if tiled else (tiff.STRIP_OFFSETS, tiff.STRIP_LENGTHS)
    offsets, lengths = (directory.array(tag) for tag in tags)
    image = TiffImage(
        width, height, cell_width, cell_height, segment_height, tiled, codec, colour, samples, bits, planes,
        predictor == 2 and lossless, alpha, offsets, lengths, directory.bytes(tiff.JPEG_TABLES),
        _palette(directory) if colour is Colour.PALETTE else None, order,
    )  # fmt: skip
    if image.segment_bytes > _MAX_SEGMENT:
        raise NotReadable(f"states {'tiles' if tiled else 'strips'} of {image.segment_bytes / 1e9:.3g} GB each")
    needed = image.columns * image.segment_rows * planes
    if min(len(offsets), len(lengths)) < needed:
        raise NotReadable(
            f"needs {needed} {'tiles' if tiled else 'strips'} for {width} x {height} pixels, and lists the places of "
            f"{len(offsets)} and the lengths of {len(lengths)}"
        )
    return image


def _colour(directory: tiff.Directory, code: int, codec: Codec, samples: int) -> tuple[Colour, str | None]:
    stated = directory.number(tiff.PHOTOMETRIC, -1)
    if code == _APERIO_YCBCR:
        stated = 6
    elif code == _APERIO_RGB:
        stated = 2
    colour = _COLOURS.get(stated)
    if colour is None:
        raise NotReadable(f"has colours that are not read (TIFF photometric interpretation {stated})")
    if codec is Codec.WEBP:
        colour = Colour.RGB
    if colour is Colour.YCBCR and codec not in (Codec.JPEG, Codec.JPEG2000):
        raise NotReadable(f"has YCbCr colours compressed as {codec.value}, which is not read")
    plain = _colour_samples(colour)
    if samples not in (plain, plain + 1) or (codec is Codec.JPEG and samples != plain):
        raise NotReadable(f"has {samples} channels ({colour.value}); grey, RGB, and these with alpha are read")
    if samples == plain:
        return colour, None
    # The value 0, unspecified, is a channel of any meaning: it is left out.
    return colour, {1: "premultiplied", 2: "straight"}.get(directory.number(tiff.EXTRA_SAMPLES, 0))


def _colour_samples(colour: Colour) -> int:
    return 3 if colour in (Colour.RGB, Colour.YCBCR) else 1


def _bits(directory: tiff.Directory, codec: Codec) -> int:
    kinds = set(directory.numbers(tiff.SAMPLE_FORMAT))
    if kinds & {2, 5}:
        raise NotReadable("has signed values; unsigned ones are read")
    if kinds - {1, 4}:
        raise NotReadable("has floating-point values; unsigned whole numbers are read")
    stated = directory.numbers(tiff.BITS) or (1,)
    if len(set(stated)) > 1 or stated[0] not in (8, 16):
        different = "/".join(map(str, stated if len(set(stated)) > 1 else stated[:1]))
        raise NotReadable(f"has {different} bit{'' if different == '1' else 's'} a channel; 8 and 16 are read")
    if stated[0] == 16 and codec in (Codec.JPEG, Codec.WEBP):
        raise NotReadable(f"has {codec.value} tiles of more than 8 bits a channel, which is not read")
    if directory.number(tiff.FILL_ORDER, 1) != 1:
        raise NotReadable("has bits in reverse order, which is not read")
    return stated[0]


def _palette(directory: tiff.Directory) -> np.ndarray:
    values = directory.array(tiff.COLOR_MAP)
    if len(values) != 3 * 256:
        raise NotReadable(f"has a palette of {len(values)} values in place of 768")
    # Values of 16 bits; some programs write 8 bits all the same.
    shift = 8 if values.max() > 255 else 0
    return np.ascontiguousarray((values >> shift).astype(np.uint8).reshape(3, 256).T)
