"""Every row of the table of formats in docs/slides.md: the file is made here, opened, and compared with its pixels."""

from __future__ import annotations

import logging
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile

from exaonepath.errors import SlideOpenError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.levels import LevelReader
from exaonepath.slides.patches.pipeline import patchfy

LOSSLESS = {
    "uncompressed": {},
    "LZW": {"compression": "lzw"},
    "LZW with predictor": {"compression": "lzw", "predictor": True},
    "deflate": {"compression": "zlib"},
    "deflate with predictor": {"compression": "zlib", "predictor": True},
    "PackBits": {"compression": "packbits"},
    "Zstandard": {"compression": "zstd"},
    "WebP": {"compression": "webp", "compressionargs": {"lossless": True}},
    "JPEG 2000": {"compression": "jpeg2000"},
    "BigTIFF": {"compression": "zlib", "bigtiff": True},
    "strips": {"tile": None, "rowsperstrip": 37},
    "strips of one row": {"tile": None, "rowsperstrip": 1, "compression": "lzw"},
    "one strip": {"tile": None, "rowsperstrip": 520, "compression": "zlib"},
    "tiles that are not square": {"tile": (64, 256), "compression": "zlib"},
}


def read(path, level=0, **options):
    """(RGB by both ways, RGBA, reader) of a whole level; the two ways must agree."""
    with SlideImage(path, **options) as slide:
        size = slide.level_dimensions[level]
        rgba = slide.read_region((0, 0), level, size)
        rgb, missing = slide.read_rgb((0, 0), level, size)
        assert missing == pytest.approx(np.mean(rgba[..., 3] == 0))
        return rgb, rgba, slide.reader


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_tiffs(write, pixels, kind, order):
    rgb, rgba, reader = read(write("a.tif", pixels, byteorder=order, **LOSSLESS[kind]))
    assert reader == "tiff"
    assert np.array_equal(rgb, pixels)
    assert np.array_equal(rgba[..., :3], pixels)
    assert rgba[..., 3].min() == 255


@pytest.mark.parametrize("tile", [(128, 128), None], ids=["tiles", "strips"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_jpeg_tiffs(write, pixels, order, tile):
    rgb, _, _ = read(write("a.tif", pixels, compression="jpeg", byteorder=order, tile=tile, rowsperstrip=64))
    assert np.abs(rgb.astype(int) - pixels).mean() < 1


@pytest.mark.parametrize("tile", [(128, 128), None], ids=["tiles", "strips"])
@pytest.mark.parametrize("compression", ["zlib", "jpeg", None])
def test_separate_planes(write, pixels, compression, tile):
    planes = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    options = {"planarconfig": "separate", "compression": compression, "tile": tile, "rowsperstrip": 50}
    rgb, _, _ = read(write("a.tif", planes, **options))
    assert np.abs(rgb.astype(int) - pixels).max() <= (0 if compression != "jpeg" else 8)


@pytest.mark.parametrize("tile", [(128, 128), None], ids=["tiles", "strips"])
@pytest.mark.parametrize("kind", ["minisblack", "miniswhite", "palette", "with alpha"])
def test_grey_and_palette(write, pixels, kind, tile):
    grey = pixels[..., 1].copy()
    expected = np.repeat(grey[..., None], 3, axis=2)
    options = {"photometric": kind, "compression": "zlib", "tile": tile}
    if kind == "miniswhite":
        grey = 255 - grey
    elif kind == "palette":
        table = np.random.default_rng(0).integers(0, 256, (3, 256), np.uint8)
        expected = np.moveaxis(table[:, grey], 0, 2)
        options["colormap"] = table.astype(np.uint16) * 257
    elif kind == "with alpha":
        grey = np.stack([grey, np.full_like(grey, 255)], axis=2)
        options |= {"photometric": "minisblack", "extrasamples": ["unassalpha"], "planarconfig": "contig"}
    rgb, rgba, _ = read(write("a.tif", grey, **options))
    assert np.array_equal(rgb, expected)
    assert np.array_equal(rgba[..., :3], expected)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("tile", [(128, 128), None], ids=["tiles", "strips"])
def test_alpha(write, pixels, kind, tile):
    cover = np.full(pixels.shape[:2], 255, np.uint8)
    cover[:150, :200] = 0
    colours = pixels.copy()
    if kind == "assocalpha":
        colours[:150, :200] = 0
    path = write("a.tif", np.dstack([colours, cover]), extrasamples=[kind], compression="zlib", tile=tile)
    rgb, rgba, _ = read(path, reader="tiff")
    expected = pixels.copy()
    if kind != "unspecified":  # a channel of any meaning: it is left out
        expected[:150, :200] = 0
        assert np.array_equal(rgba[..., 3], cover)
    assert np.array_equal(rgb, expected)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["deflate", "predictor", "JPEG 2000", "planes in strips", "SignificantBits", "tag"])
def test_16_bits_are_scaled_by_their_significant_bits(write, pixels, caplog, bits, kind):
    values = ((pixels.astype(np.uint32) * ((1 << bits) - 1) + 127) // 255).astype(np.uint16)
    options = {"compression": "zlib", "byteorder": ">" if bits == 14 else "<"}
    stated = "its largest value found is"
    if kind == "predictor":
        options["predictor"] = True
    elif kind == "JPEG 2000":
        options |= {"compression": "jpeg2000", "byteorder": "<"}
    elif kind == "planes in strips":
        values = np.ascontiguousarray(np.moveaxis(values, 2, 0))
        options |= {"planarconfig": "separate", "tile": None, "rowsperstrip": 100}
    elif kind == "SignificantBits":
        options |= {"ome": True, "metadata": {"axes": "YXS", "SignificantBits": bits}}
        stated = "SignificantBits"
    elif kind == "tag" and bits < 16:
        options["extratags"] = [(281, 3, 3, ((1 << bits) - 1,) * 3, True)]
        stated = "MaxSampleValue"
    top = 240  # not white: without a statement, the usual number of bits that holds the largest value counts
    with caplog.at_level(logging.WARNING):
        rgb, _, reader = read(write("a.tif", np.minimum(values, top * ((1 << bits) - 1) // 255), **options))
    assert reader == "tiff"
    assert f"read as {bits} significant bits ({stated}" in caplog.text
    assert np.array_equal(rgb, np.minimum(pixels, top))


@pytest.mark.parametrize("tile", [(128, 128), None], ids=["tiles", "strips"])
@pytest.mark.parametrize("extra", ["unassalpha", "unspecified"])
@pytest.mark.parametrize("kind", ["RGB", "grey", "planes", "tag"])
def test_only_colours_tell_the_significant_bits(write, pixels, caplog, kind, extra, tile):
    """An opaque alpha of 65,535 with colours of 12 bits made them nearly black."""
    values = ((pixels.astype(np.uint32) * 4095 + 127) // 255).astype(np.uint16)
    colours = values[..., :1] if kind == "grey" else values
    stored = np.dstack([colours, np.full(pixels.shape[:2], 65535, np.uint16)])
    options = {"photometric": "minisblack" if kind == "grey" else "rgb", "planarconfig": "contig"}
    if kind == "planes":
        stored, options["planarconfig"] = np.ascontiguousarray(np.moveaxis(stored, 2, 0)), "separate"
    elif kind == "tag":
        # libtiff wants equal values.
        options |= {"extratags": [(281, 3, 4, (4095, 4095, 4095, 65535), True)], "byteorder": ">"}
    path = write("a.tif", stored, extrasamples=[extra], compression="zlib", tile=tile, rowsperstrip=64, **options)
    with caplog.at_level(logging.WARNING):
        rgb, rgba, _ = read(path)
    assert "read as 12 significant bits" in caplog.text
    expected = np.repeat(pixels[..., :1], 3, axis=2) if kind == "grey" else pixels
    assert np.array_equal(rgb, expected)
    assert rgba[..., 3].min() == 255


OME = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
<Image ID="Image:0"><Pixels ID="Pixels:0" SizeX="90" SizeY="80" {label}><TiffData IFD="{other}"/></Pixels></Image>
<Image ID="Image:1"><Pixels ID="Pixels:1" SizeX="{width}" SizeY="520" {main}><TiffData IFD="{this}"/></Pixels></Image>
</OME>"""


@pytest.mark.parametrize("first", ["slide", "label"])
@pytest.mark.parametrize("unclear", [False, True])
def test_significant_bits_are_those_of_level_0(tmp_path, pixels, caplog, first, unclear):
    """The text stands in the first directory, and has an element for each image."""
    values = pixels.astype(np.uint16)  # dark: what is measured is 8 bits
    label = np.zeros((80, 90, 3), np.uint8)
    images = [values, label] if first == "slide" else [label, values]
    main, label_bits = 'SignificantBits="12" PhysicalSizeX="0.5"', 'SignificantBits="8"'
    this, other = (0, 1) if first == "slide" else (1, 0)
    text = OME.format(label=label_bits, main=main, this=this, other=other, width=701 if unclear else 700)
    if unclear:  # neither the size nor the directory says which element is that of level 0
        text = text.replace('IFD="0"', 'IFD="7"').replace('IFD="1"', 'IFD="7"')
    options = {"photometric": "rgb", "tile": (128, 128), "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        for number, image in enumerate(images):
            file.write(image, description=None if number else text, **options)
    with caplog.at_level(logging.WARNING), SlideImage(tmp_path / "a.ome.tif") as slide:
        assert slide.dimensions == (700, 520)
        rgb = slide.read_rgb((0, 0), 0, slide.dimensions)[0]
    if unclear:
        assert "8 significant bits (its largest value" in caplog.text
        return
    assert "12 significant bits (SignificantBits of its OME-XML)" in caplog.text
    assert np.array_equal(rgb, (values.astype(np.uint32) * 255 + 2047) // 4095)


def test_values_above_the_stated_bits_are_white_not_wrapped(write, pixels):
    values = np.full(pixels.shape, 5000, np.uint16)
    path = write("a.tif", values, compression="zlib", ome=True, metadata={"axes": "YXS", "SignificantBits": 12})
    assert read(path)[0].min() == 255


def write_pyramid(path, pixels, *, sub_directories, ome, **options):
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", **options}
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25} if ome else None
    with tifffile.TiffWriter(path, ome=ome) as file:
        extra = {"subifds": 2} if sub_directories else {}
        file.write(pixels, metadata=metadata, **extra, **options)
        for step in (2, 4):
            file.write(pixels[::step, ::step].copy(), subfiletype=1, metadata=None, **options)
    return path


@pytest.mark.parametrize("tile", [(128, 128), None], ids=["tiles", "strips"])
def test_an_ome_tiff_with_its_pyramid_in_sub_directories(tmp_path, pixels, tile):
    path = write_pyramid(tmp_path / "a.ome.tif", pixels, sub_directories=True, ome=True, tile=tile)
    with SlideImage(path) as slide:
        assert slide.reader == "tiff"
        assert slide.level_dimensions == ((700, 520), (350, 260), (175, 130))
        assert (slide.mpp, slide.mpp_source.split()[0]) == (0.25, "OME")
        for level, step in enumerate((1, 2, 4)):
            whole = slide.read_rgb((0, 0), level, slide.level_dimensions[level])[0]
            assert np.array_equal(whole, pixels[::step, ::step])
        assert np.array_equal(slide.read_rgb((40, 80), 2, (50, 60))[0], pixels[::4, ::4][20:80, 10:60])
        assert slide.get_best_level_for_downsample(3) == 1
        fingerprint = slide.fingerprint()
    if tile:
        with SlideImage(path, reader="openslide") as slide:
            assert slide.level_dimensions == ((700, 520),)
            assert slide.fingerprint() == fingerprint


@pytest.mark.parametrize("pyramid", [True, False])
def test_an_ome_tiff_that_begins_with_an_overview(tmp_path, pixels, pyramid):
    """As converters write it: the overview is the first image, and OpenSlide takes it for the slide."""
    path = tmp_path / "a.ome.tif"
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        coarse = {"axes": "YXS", "PhysicalSizeX": 8, "PhysicalSizeY": 8}
        file.write(pixels[:100, :90].copy(), metadata=coarse, **options)
        scale = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
        file.write(pixels, metadata=scale, **options, **({"subifds": 1} if pyramid else {}))
        if pyramid:
            file.write(pixels[::2, ::2].copy(), subfiletype=1, metadata=None, **options)
    with SlideImage(path) as slide:
        assert slide.dimensions == (700, 520)
        assert len(slide.level_dimensions) == 1 + pyramid
        assert (slide.mpp, slide.scale_doubts) == (0.25, ())
        assert np.array_equal(slide.read_rgb((0, 0), 0, slide.dimensions)[0], pixels)


@pytest.mark.parametrize("order", ["<", ">"])
def test_several_images_of_one_size_are_warned_about(tmp_path, pixels, caplog, order):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, byteorder=order) as file:
        for channel in range(3):
            file.write(pixels[..., channel].copy(), tile=(128, 128), photometric="minisblack", compression="zlib")
    with caplog.at_level(logging.WARNING):
        SlideImage(path).close()
    assert "has 3 images of 700 x 520 pixels (focal planes, channels or times); only the first is read" in caplog.text


def test_a_rotation_is_not_applied_and_said(write, pixels, caplog):
    path = write("a.tif", pixels, byteorder=">", extratags=[(274, 3, 1, 3, True)])
    with caplog.at_level(logging.WARNING), SlideImage(path) as slide:
        assert np.array_equal(slide.read_rgb((0, 0), 0, slide.dimensions)[0], pixels)
    assert "TIFF orientation 3" in caplog.text


@pytest.mark.parametrize("step", [2, 3.7, 1.4])
def test_a_level_is_read_in_pieces_as_in_one(tmp_path, pixels, step):
    """Levels that are not whole numbers smaller too: pieces meet without a gap or an overlap."""
    wide, high = int(5000 / step), int(300 / step)
    small = np.random.default_rng(0).integers(0, 256, (high, wide, 3), np.uint8)
    path = tmp_path / "a.ome.tif"
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(np.zeros((300, 5000, 3), np.uint8), subifds=1, metadata={"axes": "YXS"}, **options)
        file.write(small, subfiletype=1, metadata=None, **options)
    with SlideImage(path) as slide:
        whole = np.zeros_like(small)
        for band in LevelReader(slide, 1).bands():
            for x, y, part in band.pieces:
                whole[y : y + part.shape[0], x : x + part.shape[1]] = part[..., :3]
    assert np.array_equal(whole, small)


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_aperio_slide_without_openslide(write, tmp_path, pixels, order):
    """Its scale and its levels are found too: all tiled images of its shape, without the label."""
    path = tmp_path / "a.svs"
    text = "Aperio Image Library v12\n700x520 [0,0 700x520] (128x128) JPEG/RGB|AppMag = 40|MPP = 0.2520"
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path, byteorder=order) as file:
        file.write(pixels, description=text, **options)
        file.write(pixels[:100, :100].copy(), description="Aperio Image Library v12\nlabel 100x100", **options)
        file.write(pixels[::2, ::2].copy(), description="Aperio Image Library v12", **options)
    with SlideImage(path, reader="tiff") as slide:
        assert (slide.mpp, slide.properties["openslide.vendor"]) == (0.252, "aperio")
        assert slide.properties["openslide.objective-power"] == "40"
        if order == ">":  # which OpenSlide does not open
            assert slide.level_dimensions == ((700, 520), (350, 260))


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (np.zeros((300, 300, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, "5 channels"),
        (np.zeros((300, 300, 3), np.float32), {}, "has floating-point values"),
        (np.zeros((300, 300, 3), np.int16), {}, "has signed values"),
        (np.zeros((300, 300, 4), np.uint8), {"photometric": "separated"}, "photometric interpretation 5"),
        (np.zeros((300, 300), bool), {"photometric": "minisblack"}, "has 1 bit a channel"),
    ],
    ids=["channels", "float", "signed", "CMYK", "bilevel"],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_what_is_not_read_says_why(write, values, options, says, order):
    path = write("a.tif", values, byteorder=order, compression="zlib", **options)
    with pytest.raises(SlideOpenError, match=says):
        SlideImage(path, reader="tiff")
    if order == ">":
        with pytest.raises(SlideOpenError, match="vips tiffsave"):
            SlideImage(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tile": None, "rowsperstrip": 64}, "in strips"),
        ({"compression": "jpeg2000"}, "JPEG 2000, which OpenSlide does not read"),
        ({"compression": "webp"}, "WebP, which OpenSlide does not read"),
        ({"byteorder": ">"}, "big-endian byte order"),
        ({"dtype": np.uint16}, "16 bits a channel"),
    ],
    ids=["strips", "JPEG 2000", "WebP", "big-endian", "16 bits"],
)
def test_what_only_the_tiff_reader_reads_is_refused_by_openslide_with_the_reason(write, pixels, options, says):
    options = {**options}
    path = write("a.tif", pixels.astype(options.pop("dtype", np.uint8)), **options)
    with pytest.raises(SlideOpenError, match=says):
        SlideImage(path, reader="openslide")
    SlideImage(path).close()


def test_a_flat_slide_of_huge_tiles_is_compared_in_moderation(tmp_path):
    """100,000 x 100,000 pixels in tiles of 4096: one of them takes longer to decode than all samples elsewhere."""
    side, tile = 100_000, zlib.compress(bytes(4096 * 4096 * 3))
    count = (-(-side // 4096)) ** 2
    path = tmp_path / "huge.tif"
    tifffile.imwrite(
        path, (tile for _ in range(count)), shape=(side, side, 3), dtype="u1", tile=(4096, 4096), compression="zlib",
        photometric="rgb", bigtiff=True, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    with SlideImage(path) as slide:
        assert slide.reader == "tiff"
        assert slide._reader.tiles.cache.decoded <= 2
        assert slide.read_rgb((99_990, 99_990), 0, (20, 20))[0].shape == (20, 20, 3)


def test_results_of_a_reader_with_other_pixels_are_not_used_again(tmp_path, pixels, caplog):
    """OpenSlide sees level 0 of this OME-TIFF only, so the tissue is another one than on the pyramid."""
    path = tmp_path / "a.ome.tif"
    options = {"tile": (128, 128), "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(pixels, subifds=1, metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **options)
        file.write(np.ascontiguousarray(pixels[::2, ::2]), subfiletype=1, **options)
    reused = []
    with caplog.at_level(logging.INFO):
        for reader in ("openslide", "openslide", "auto", "auto", "tiff", "openslide"):
            caplog.clear()
            with SlideImage(path, reader) as slide:
                patchfy(slide, tmp_path / "out")
            reused.append("patches taken from" in caplog.text)
    assert reused == [False, True, False, True, True, False]


@pytest.mark.parametrize(("readers", "reused"), [(("openslide", "auto"), True), (("auto", "tiff"), False)])
def test_results_of_compared_readers_stand_for_each_other(write, tmp_path, pixels, caplog, readers, reused):
    path = write("a.tif", pixels)
    with caplog.at_level(logging.INFO):
        for reader in readers:
            caplog.clear()
            with SlideImage(path, reader) as slide:
                patchfy(slide, tmp_path / "out")
    assert ("patches taken from" in caplog.text) == reused


@pytest.mark.parametrize("order", ["<", ">"])
def test_webp_leaves_out_the_alpha_of_opaque_tiles(write, pixels, order):
    cover = np.full(pixels.shape[:2], 255, np.uint8)
    cover[:150, :150] = 0
    options = {"compression": "webp", "compressionargs": {"lossless": True}, "extrasamples": ["unassalpha"]}
    path = write("a.tif", np.dstack([pixels, cover]), byteorder=order, **options)
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages[0]
        opaque = pixels[256:384, 256:384].copy()
        data = imagecodecs.webp_encode(opaque, lossless=True)
        with path.open("ab") as end:
            place = end.tell()
            end.write(data)
        index = 2 * 6 + 2
        for tag, value in (("TileOffsets", place), ("TileByteCounts", len(data))):
            values = list(page.tags[tag].value)
            values[index] = value
            page.tags[tag].overwrite(values)
    expected = pixels.copy()
    expected[:150, :150] = 0
    rgb, rgba, _ = read(path)
    assert np.array_equal(rgb, expected)
    assert np.array_equal(rgba[..., 3], cover)


@pytest.mark.parametrize(
    ("values", "options", "tags", "says"),
    [
        (np.zeros((300, 300), bool), {"photometric": "minisblack"}, {}, "has 1 bit a channel"),
        (np.zeros((300, 300, 3), np.uint8), {}, {"BitsPerSample": (4, 4, 4)}, "has 4 bits a channel"),
        (np.zeros((300, 300, 3), np.float32), {}, {}, "has floating-point values"),
        (np.zeros((300, 300, 3), np.float16), {}, {}, "has floating-point values"),
        (np.zeros((300, 300, 3), np.int8), {}, {}, "has signed values"),
        (np.zeros((300, 300, 3), np.uint32), {}, {}, "has 32 bits a channel"),
        (np.zeros((300, 300, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, {}, "5 channels"),
        (np.zeros((300, 300, 3), np.uint8), {}, {"TileWidth": 0}, "states tiles of 0 x 128 pixels"),
        (np.zeros((300, 300, 3), np.uint8), {}, {"TileLength": 0}, "states tiles of 128 x 0 pixels"),
        (np.zeros((300, 300, 3), np.uint8), {}, {"ImageWidth": 0}, "states a size of 0 x 300 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("reader", ["auto", "openslide", "tiff"])
def test_what_openslide_would_read_wrongly_or_rejects_says_why(write, values, options, tags, says, reader):
    path = write("a.tif", values, compression="zlib", **options)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag, value in tags.items():
            file.pages[0].tags[tag].overwrite(value)
    with pytest.raises(SlideOpenError, match=says) as caught:
        SlideImage(path, reader)
    assert "truncated" not in str(caught.value)
    assert "10 or 12" not in str(caught.value)


def test_a_tiled_image_that_is_no_level_does_not_matter(tmp_path, pixels):
    """A map of numbers, as analysis programs append it: it is no level."""
    path = tmp_path / "a.tif"
    options = {"tile": (128, 128), "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, photometric="rgb", **options)
        file.write(np.zeros((100, 100), np.float32), photometric="minisblack", **options)
    for reader in ("auto", "openslide"):
        with SlideImage(path, reader) as slide:
            assert np.array_equal(slide.read_rgb((0, 0), 0, slide.dimensions)[0], pixels)
            assert slide.level_dimensions == ((700, 520),)


@pytest.mark.parametrize("kind", ["separated", "cielab", "ycbcr"])
def test_other_colours_in_tiles_are_converted_by_openslide(write, pixels, kind):
    """The TIFF reader refuses them."""
    options = {"photometric": "separated"} if kind == "separated" else {}
    path = write("a.tif", np.dstack([pixels, pixels[..., 0]]) if options else pixels, compression="zlib", **options)
    if not options:
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags["PhotometricInterpretation"].overwrite({"cielab": 8, "ycbcr": 6}[kind])
    with SlideImage(path) as slide:
        assert slide.reader == "openslide"
        assert slide.read_rgb((0, 0), 0, slide.dimensions)[0].std() > 5
    with pytest.raises(SlideOpenError, match="colours"):
        SlideImage(path, "tiff")
