"""Reading and preprocessing patches: the prefetching reader against the obvious loop over patches.

Both give the same normalised float32 batches, checked before anything is timed. Both open the slide afresh in each
round, so neither finds decoded tiles in a cache; rounds alternate between the two. "One thread" is one thread in all:
the reader reads in the caller's. "All cores" is compared with the same loop, so its ratio holds the scaling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from PIL import Image

from exaonepath.slides.features.preprocessing import IMAGENET_MEAN, IMAGENET_STD, PreprocessingConfig, normalise
from exaonepath.slides.features.reader import PatchReader, default_workers
from exaonepath.slides.image import SlideImage
from exaonepath.synthetic import make_slide

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ROUNDS, BATCH = 5, 32


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory) -> Path:
    """345 patches of 256 px, 77 of 506 px."""
    return make_slide(tmp_path_factory.mktemp("slide") / "bench.svs", 6000, 4000)


def obvious_loop(path: Path, coords: np.ndarray, patch: int) -> Iterator[torch.Tensor]:
    """One patch at a time, on one thread: read, drop alpha, resize, crop, to float, normalise; stacked into batches."""
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    batch = []
    with openslide.OpenSlide(path) as slide:
        for x, y in coords.tolist():
            image = slide.read_region((x, y), 0, (patch, patch)).convert("RGB")
            image = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
            values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
            batch.append(values.sub_(mean).div_(std))
            if len(batch) == BATCH:
                yield torch.stack(batch)
                batch = []
    if batch:
        yield torch.stack(batch)


def prefetching(path: Path, coords: np.ndarray, patch: int, workers: int) -> Iterator[torch.Tensor]:
    """The same through `PatchReader`; `workers` 0 reads in the calling thread."""
    config = PreprocessingConfig()
    with SlideImage(path) as slide:
        reader = PatchReader(slide, coords, patch, config, batch_size=BATCH, num_workers=workers)
        for batch in reader:
            yield normalise(torch.from_numpy(batch.images), config)


def exhaust(batches: Iterator[torch.Tensor]) -> None:
    """Take every batch and keep none, as a model would."""
    deque(batches, maxlen=0)


@pytest.mark.parametrize("threads", ["one thread", "all cores"])
@pytest.mark.parametrize("patch", [256, 506])
def test_reading(benchmark, compare, slide_path, patch, threads):
    with SlideImage(slide_path) as slide:
        width, height = slide.dimensions
    # 77: patches do not fall together with tiles, as in practice
    xy = [(x, y) for y in range(77, height - patch, patch) for x in range(77, width - patch, patch)]
    coords = np.array(xy, np.int32)
    workers = 0 if threads == "one thread" else default_workers()

    def ours() -> None:
        exhaust(prefetching(slide_path, coords, patch, workers))

    def theirs() -> None:
        exhaust(obvious_loop(slide_path, coords, patch))

    pairs = zip(obvious_loop(slide_path, coords, patch), prefetching(slide_path, coords, patch, workers), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)

    compare(f"reading {patch} px", ours, theirs, rounds=ROUNDS, patches=len(coords), threads=max(workers, 1))
    rate = round(len(coords) / benchmark.stats.stats.median)
    benchmark.extra_info.update(patches_per_second=rate)
