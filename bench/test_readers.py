"""Reading and preprocessing patches: the TIFF reader against OpenSlide, and against decoding each tile once.

All three do the same file in the same round, so a busy machine slows all of them down. `of_raw` is the time of reading
and preprocessing over that of decoding each stored tile once, one after the other, and nothing else. The patches do not
fall together with the tiles, so each tile is needed by several patches. Both readers give the same bytes, which is
checked before anything is timed; formats that OpenSlide does not read are compared with raw decoding only.

EXAONEPATH_BENCH=full takes a slide of 12,000 x 9,000 pixels in place of 3,600 x 2,600.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch

from exaonepath.files.features import read_features
from exaonepath.slides.features.extract import extract_features
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.features.reader import PatchReader
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.slides.readers.tiff_image import Codec
from exaonepath.slides.readers.tiff_tiles import TiffTiles
from exaonepath.synthetic import make_slide

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ROUNDS = 5
APERIO = "Aperio Image Library v12\n{0}x{1} [0,0 {0}x{1}] (256x256) J2K|AppMag = 20|MPP = 0.5"

# compression: (options of tifffile, whether OpenSlide reads it too)
FORMATS = {
    "JPEG": ({"compression": "jpeg", "compressionargs": {"level": 80}}, True),
    "deflate": ({"compression": "zlib"}, True),
    "LZW": ({"compression": "lzw", "predictor": True}, True),
    "uncompressed": ({}, True),
    "JPEG 2000": ({"compression": "jpeg2000", "compressionargs": {"level": 40}}, True),
    "WebP": ({"compression": "webp", "compressionargs": {"level": 80}}, False),
}


@pytest.fixture(scope="module")
def slides(tmp_path_factory, full) -> dict[str, Path]:
    """The same tissue in every compression, by name."""
    folder = tmp_path_factory.mktemp("slides")
    size = (12_000, 9_000) if full else (3_600, 2_600)
    tissue = make_slide(folder / "tissue.tif", *size, levels="flat", vendor="generic", fragments=1, holes=False)
    with SlideImage(tissue) as slide:
        pixels = slide.read_rgb((0, 0), 0, slide.dimensions)[0]
    # Noise, as a sensor has it: without it, large parts would have one colour, which no scanner gives.
    noise = np.random.default_rng(0).normal(0, 2, pixels.shape).astype(np.int8)
    pixels = np.clip(pixels.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    found = {}
    for name, (options, _) in FORMATS.items():
        scale = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
        found[name] = folder / f"{name}.tif"
        part = pixels if name != "JPEG 2000" else pixels[:1400, :1400]  # ten times as slow as the others
        text = {"description": APERIO.format(*part.shape[1::-1])} if name == "JPEG 2000" else {}
        arguments = {"tile": (256, 256), "photometric": "rgb", "metadata": None, **scale, **options, **text}
        tifffile.imwrite(found[name], part, **arguments)
    with tifffile.TiffFile(found["JPEG 2000"], mode="r+b") as file:
        file.pages[0].tags["Compression"].overwrite(33005)  # Aperio's: the only JPEG 2000 that OpenSlide reads
    return found


def grid(slide: SlideImage, patch: int) -> np.ndarray:
    """Adjacent patches that do not fall together with tiles, as in practice: int32 [N, 2]."""
    xs, ys = (range(77, side - patch, patch) for side in slide.dimensions)
    return np.array([(x, y) for y in ys for x in xs], np.int32)


def patches(slide: SlideImage, patch: int, workers: int) -> Iterator[np.ndarray]:
    """Preprocessed patches, by batches; no tile is in a cache at the beginning."""
    slide.set_cache_bytes(0)
    for batch in PatchReader(slide, grid(slide, patch), patch, PreprocessingConfig(), num_workers=workers):
        yield batch.images


def exhaust(slide: SlideImage, patch: int, workers: int) -> None:
    """Take every batch and keep none, as a model would."""
    deque(patches(slide, patch, workers), maxlen=0)


def decode_each_tile_once(slide: SlideImage, patch: int) -> None:
    """What the codec takes for the tiles that the patches lie on, and nothing else: no cache, no patches."""
    tiles: TiffTiles = slide._reader.tiles
    image, coords = tiles.images[0], grid(slide, patch)
    # Of a patch of 256 px that is not resized, 16 px at each side are cropped and not read.
    last = coords.max(axis=0) + patch - 17
    for row in range(93 // image.cell_height, last[1] // image.cell_height + 1):
        for column in range(93 // image.cell_width, last[0] // image.cell_width + 1):
            if image.codec is Codec.JPEG:  # without the checks of the reader
                stored = tiles.encoded(0, column, row)
                imagecodecs.jpeg8_decode(stored, colorspace="YCBCR", outcolorspace="RGB")
            else:
                tiles._segment(0, column, row)


def _seconds(work, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


@pytest.mark.parametrize("patch", [256, 506])
@pytest.mark.parametrize("name", FORMATS)
def test_readers(benchmark, compare, slides, name, patch):
    """One thread."""
    path, both = slides[name], FORMATS[name][1]
    raw: list[float] = []
    with ExitStack() as stack:
        fast = stack.enter_context(SlideImage(path))
        assert fast.reader == "tiff"
        openslide = stack.enter_context(SlideImage(path, "openslide")) if both else None
        if openslide:
            pairs = zip(patches(fast, patch, 0), patches(openslide, patch, 0), strict=True)
            assert all(np.array_equal(one, two) for one, two in pairs)

        def theirs() -> None:
            raw.append(_seconds(decode_each_tile_once, fast, patch))
            if openslide:
                exhaust(openslide, patch, 0)

        cache = fast._reader.tiles.cache
        decoded = cache.decoded
        exhaust(fast, patch, 0)
        decoded = cache.decoded - decoded
        compare(f"reader {name} {patch} px", lambda: exhaust(fast, patch, 0), theirs, rounds=ROUNDS, threads=1)
        count = len(grid(fast, patch))
    seconds, decoding = benchmark.stats.stats.median, statistics.median(raw[:ROUNDS])
    # The time of the baseline includes the raw decoding, which is not a part of it.
    before = benchmark.extra_info["baseline_seconds"] - decoding if both else decoding
    benchmark.extra_info.update(
        baseline_seconds=round(before, 4),
        ratio=round(before / seconds, 3),
        of_raw=round(seconds / decoding, 3),
        patches=count,
        patches_per_second=round(count / seconds),
        cache_peak_mb=round(cache.peak / 2**20, 1),
        tiles_decoded=decoded,
    )
    against = f"{before / seconds:.2f} times as fast as through OpenSlide, " if both else ""
    print(
        f"\n{name}, {patch} px: {count / seconds:.0f} patches/s, {against}{seconds / decoding:.2f} times the time of "
        f"decoding each tile once ({decoded} tiles decoded, cache {cache.peak / 2**20:.0f} MB)"
    )


@pytest.fixture(scope="module")
def large_slide(slides, tmp_path_factory) -> Path:
    """Four times the tissue in JPEG: enough patches that the first and the last ones of each thread do not count."""
    with SlideImage(slides["JPEG"]) as slide:
        pixels = np.tile(slide.read_rgb((0, 0), 0, slide.dimensions)[0], (2, 2, 1))
    path = tmp_path_factory.mktemp("large") / "large.tif"
    options = {"tile": (256, 256), "photometric": "rgb", "metadata": None, **FORMATS["JPEG"][0]}
    tifffile.imwrite(path, pixels, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **options)
    return path


@pytest.mark.parametrize("patch", [256, 506])
def test_threads(benchmark, compare, large_slide, patch):
    """Two threads against one. It shows something only where a core is free for each.

    `decoding_alone` is the same ratio for the codec with no Python around it: two threads on a machine share its
    memory and its clock, so it is less than two.
    """
    alone: dict[int, list[float]] = {1: [], 2: []}
    with SlideImage(large_slide) as slide:
        tiles: TiffTiles = slide._reader.tiles
        image = tiles.images[0]
        stored = [tiles.encoded(0, at % image.columns, at // image.columns) for at in range(image.columns * 10)]
        compare(
            f"reader JPEG {patch} px, 2 threads against 1",
            lambda: exhaust(slide, patch, 2),
            lambda: exhaust(slide, patch, 1),
            rounds=2 * ROUNDS,
            threads=2,
        )
        for threads in (1, 2) * ROUNDS:
            with ThreadPoolExecutor(threads) as pool:
                parts = [stored[at::threads] for at in range(threads)]
                alone[threads].append(_seconds(list, pool.map(decode_all, parts)))
    benchmark.extra_info["decoding_alone"] = round(statistics.median(alone[1]) / statistics.median(alone[2]), 3)
    print(f"\n{patch} px: decoding alone {benchmark.extra_info['decoding_alone']:.2f}")


def decode_all(tiles: list[bytes]) -> None:
    """JPEG tiles, with nothing else done."""
    for tile in tiles:
        imagecodecs.jpeg8_decode(tile, colorspace="YCBCR", outcolorspace="RGB")


class MeanColour(torch.nn.Module):
    """Stands in for the patch encoder, in no time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).repeat(1, 256)


@pytest.mark.parametrize("name", ["JPEG", "deflate"])
def test_whole_slide(compare, slides, tmp_path, name):
    """Opening, segmentation, patches, and features with an encoder that takes no time: what a fast GPU would see."""
    encoder, numbers = MeanColour(), itertools.count()

    def run(reader: str) -> Path:
        out = tmp_path / str(next(numbers))
        with SlideImage(slides[name], reader) as slide:
            # The slide has one level: it is segmented near the scale that the segmentation is made for.
            patches = patchfy(slide, out, seg_downsample="auto", save_mask=False)[0]
            extract_features(slide, patches, out / "features.h5", encoder, weights="none", weights_fingerprint="none")
        return out / "features.h5"

    one, two = (read_features(run(reader)).features for reader in ("auto", "openslide"))
    assert np.array_equal(one, two)
    compare(f"whole slide, {name}", lambda: run("auto"), lambda: run("openslide"), rounds=3, patches=len(one))


@pytest.mark.parametrize("reader", ["auto", "openslide"])
def test_opening(compare, slides, reader):
    """Opening a slide, with and without the comparison of the two readers; without it is the baseline."""
    path = slides["JPEG"]

    def ours() -> None:
        SlideImage(path, reader).close()

    compare(f"opening, {reader}", ours, lambda: SlideImage(path, "openslide").close(), rounds=ROUNDS)
