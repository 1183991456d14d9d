"""The prefetching reader: same pixels as the obvious loop, in order, whatever the threads do; failures; shutdown."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from PIL import Image

from exaonepath.errors import DataFileError, SettingsError, SlideOpenError
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.features.reader import PatchReader
from exaonepath.slides.image import SlideImage

ALWAYS = 10**9


def obvious(pixels: np.ndarray, coords: np.ndarray, patch: int, resize: int = 256) -> np.ndarray:
    """Cut from the known pixels (black outside), resize, crop: one patch at a time."""
    height, width = pixels.shape[:2]
    pad = 3000
    padded = np.zeros((height + 2 * pad, width + 2 * pad, 3), np.uint8)
    padded[pad : pad + height, pad : pad + width] = pixels
    out = []
    for x, y in coords + pad:
        image = Image.fromarray(padded[y : y + patch, x : x + patch]).resize(
            (resize, resize), Image.Resampling.BILINEAR
        )
        edge = round((resize - 224) / 2)
        out.append(np.asarray(image.crop((edge, edge, edge + 224, edge + 224))))
    return np.stack(out)


def collect(reader: PatchReader) -> tuple[np.ndarray, np.ndarray]:
    batches = list(reader)
    assert len(batches) == len(reader)
    return np.concatenate([b.indices for b in batches]), np.concatenate([b.images for b in batches])


@pytest.mark.parametrize("workers", [0, 1, 2, 7])
@pytest.mark.parametrize("batch", [1, 5, 32, 1000])
def test_equals_the_obvious_loop(slide, pixels, coords, workers, batch):
    indices, images = collect(PatchReader(slide, coords, 256, batch_size=batch, num_workers=workers))
    assert np.array_equal(indices, np.arange(len(coords)))
    assert np.array_equal(images, obvious(pixels, coords, 256))


@pytest.mark.parametrize(
    ("patch", "resize"), [(506, 256), (256, 224), (100, 256), (333, 240), (1013, 256), (2000, 256)]
)
def test_equals_the_obvious_loop_when_resizing(slide, pixels, coords, patch, resize):
    some = coords[::7]
    _, images = collect(PatchReader(slide, some, patch, PreprocessingConfig(resize=resize)))
    assert np.array_equal(images, obvious(pixels, some, patch, resize))


@pytest.mark.golden
def test_equals_openslide_on_a_real_slide(data_dir):
    with SlideImage(data_dir / "slides" / "CMU-1-Small-Region.svs") as slide:
        coords = np.array([(x, y) for y in range(-30, 2900, 701) for x in range(-60, 2200, 333)], np.int32)
        _, images = collect(PatchReader(slide, coords, 506))
        for (x, y), image in zip(coords.tolist(), images, strict=True):
            whole = Image.fromarray(slide.read_region((x, y), 0, (506, 506))[..., :3].copy())
            expected = whole.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
            assert np.array_equal(image, np.asarray(expected))


def test_only_the_rows_asked_for(slide, pixels, coords):
    rows = np.array([3, 4, 20, 41])
    indices, images = collect(PatchReader(slide, coords, 256, batch_size=3, indices=rows))
    assert np.array_equal(indices, rows)
    assert np.array_equal(images, obvious(pixels, coords[rows], 256))


def test_no_patches(slide):
    assert list(PatchReader(slide, np.empty((0, 2), np.int32), 256)) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_read_that_fails_once_leaves_no_trace(slide, pixels, coords, bad_reads, workers):
    bad_reads.update({tuple(coords[i].tolist()): 1 for i in (0, 7, 8, len(coords) - 1)})
    indices, images = collect(PatchReader(slide, coords, 256, batch_size=8, num_workers=workers))
    assert np.array_equal(indices, np.arange(len(coords)))
    assert np.array_equal(images, obvious(pixels, coords, 256))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_unreadable_patches_are_told_and_the_others_are_read(slide, pixels, coords, bad_reads, workers):
    bad = [0, 7, 8, 30, len(coords) - 1]
    bad_reads.update({tuple(coords[i].tolist()): ALWAYS for i in bad})
    batches = list(PatchReader(slide, coords, 256, batch_size=8, num_workers=workers))
    failures = [failure for batch in batches for failure in batch.failures]
    assert [failure.index for failure in failures] == bad
    assert [(failure.x, failure.y) for failure in failures] == [tuple(coords[i].tolist()) for i in bad]
    assert all("injected" in failure.reason for failure in failures)
    good = np.setdiff1d(np.arange(len(coords)), bad)
    assert np.array_equal(np.concatenate([batch.indices for batch in batches]), good)
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), obvious(pixels, coords[good], 256))


def test_all_unreadable(slide, coords, bad_reads):
    bad_reads.update({tuple(xy): ALWAYS for xy in coords.tolist()})
    batches = list(PatchReader(slide, coords, 256, batch_size=8, num_workers=2))
    assert sum(len(batch.failures) for batch in batches) == len(coords)
    assert all(batch.images.shape == (0, 224, 224, 3) for batch in batches)


def test_broken_handles_are_not_hoarded(slide, coords, bad_reads, monkeypatch):
    """One open handle per bad patch would end in "too many open files" on a slide with a damaged region."""
    import openslide

    opened, closed = [], []
    opening, closing = openslide.OpenSlide.__init__, openslide.OpenSlide.close
    monkeypatch.setattr(openslide.OpenSlide, "__init__", lambda self, path: (opened.append(1), opening(self, path))[1])
    monkeypatch.setattr(openslide.OpenSlide, "close", lambda self: (closed.append(1), closing(self))[1])
    bad_reads.update({tuple(xy): ALWAYS for xy in coords.tolist()})
    list(PatchReader(slide, coords, 256, num_workers=3))
    assert len(opened) > len(coords)
    assert len(opened) - len(closed) <= 2


def test_a_slide_that_vanishes_ends_the_run(slide, coords, bad_reads, monkeypatch):
    """Not 50,000 failures: nothing can be read any more, and a later run can resume."""

    def gone(path):
        raise SlideOpenError(f"{path}: no such file")

    monkeypatch.setattr("exaonepath.slides.readers.openslide._open", gone)
    bad_reads[tuple(coords[9].tolist())] = 1
    with pytest.raises(SlideOpenError, match="no such file"):
        list(PatchReader(slide, coords, 256, batch_size=4, num_workers=2))


def test_reads_ahead_but_never_beyond_the_bound(slide, coords, monkeypatch):
    many = np.tile(coords, (4, 1))
    reads = []
    original = SlideImage.read_rgb
    monkeypatch.setattr(SlideImage, "read_rgb", lambda *args: (reads.append(1), original(*args))[1])
    reader = PatchReader(slide, many, 256, batch_size=4, num_workers=2)
    bound = reader.batches_ahead * reader.batch_size
    assert bound <= 4 + 2 * 8 + 4
    ahead = []
    for taken, _ in enumerate(reader, start=1):
        if taken in (3, 10):
            time.sleep(0.3)  # a slow model: the threads get as far as they may
        ahead.append(len(reads) - taken * 4)
    assert max(ahead) <= bound
    assert ahead[2] == ahead[9] == bound


@pytest.mark.parametrize("workers", [1, 4])
def test_leaving_early_stops_the_threads_at_once(slide, coords, workers, monkeypatch):
    original = SlideImage.read_rgb
    monkeypatch.setattr(SlideImage, "read_rgb", lambda *args: (time.sleep(0.02), original(*args))[1])
    batches = iter(PatchReader(slide, coords, 256, batch_size=32, num_workers=workers))
    next(batches)
    start = time.perf_counter()
    batches.close()
    assert time.perf_counter() - start < 0.5  # one patch each, not the batches ahead
    assert not [t for t in threading.enumerate() if t.name.startswith("exaonepath-reader")]


def test_an_error_in_a_thread_reaches_the_consumer(slide, coords, monkeypatch):
    def fail(self, location, level, size):
        raise MemoryError("no room")

    monkeypatch.setattr(SlideImage, "read_rgb", fail)
    with pytest.raises(MemoryError, match="no room"):
        list(PatchReader(slide, coords, 256, num_workers=3))


def test_two_passes_over_one_reader(slide, coords):
    reader = PatchReader(slide, coords, 256, num_workers=2)
    assert np.array_equal(collect(reader)[1], collect(reader)[1])


@pytest.mark.parametrize(
    ("options", "says"), [({"batch_size": 0}, "batch size"), ({"num_workers": -1}, "threads"), ({}, "patch size")]
)
def test_impossible_arguments(slide, coords, options, says):
    with pytest.raises(SettingsError, match=says):
        PatchReader(slide, coords, 256 if options else 0, **options)


def test_coordinates_of_the_wrong_shape(slide):
    with pytest.raises(DataFileError, match=r"\[N, 2\]"):
        PatchReader(slide, np.zeros((4, 3), np.int32), 256)


def test_closing_the_slide_waits_for_reads_in_other_threads(slide_path, coords):
    """OpenSlide would crash if a handle were closed under a reader; what comes after the close is reported."""
    slide = SlideImage(slide_path)
    batches = iter(PatchReader(slide, np.tile(coords, (5, 1)), 256, batch_size=4, num_workers=4))
    assert next(batches).failures == ()
    slide.close()
    failures = [failure for batch in batches for failure in batch.failures]
    assert failures
    assert all("was closed" in failure.reason for failure in failures)
