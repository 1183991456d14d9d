"""A slide whose every pixel is known, patches on it, a small encoder, and reads that fail on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
import tifffile
import torch

from exaonepath.slides.features.extract import ExtractionResult, extract_features
from exaonepath.slides.image import SlideImage
from exaonepath.slides.readers import choose

WIDTH, HEIGHT = 1400, 1100


class PooledColours(torch.nn.Module):
    """A patch encoder in miniature: colours of a 16 x 16 grid, mixed: [B, 3, 224, 224] to [B, 768]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.nn.Parameter(torch.randn(768, 768, generator=generator) / 28)
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.batches.append(len(x))
        return torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1) @ self.mix


@pytest.fixture
def encoder() -> PooledColours:
    return PooledColours().train()


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """Level 0 of the slide, uint8 [h, w, 3]: noise over a gradient, so that every patch differs from every other."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ramp = np.stack([x * 200 // WIDTH, y * 200 // HEIGHT, (x + y) * 200 // (WIDTH + HEIGHT)], axis=-1)
    return (ramp + rng.integers(0, 56, ramp.shape)).astype(np.uint8)


@pytest.fixture(scope="session")
def slide_path(pixels, tmp_path_factory) -> Path:
    """A lossless tiled TIFF of `pixels`, with more tiles than patches in a row."""
    path = tmp_path_factory.mktemp("slides") / "known.tif"
    options = {"tile": (128, 128), "compression": "zlib", "photometric": "rgb"}
    tifffile.imwrite(path, pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
    return path


@pytest.fixture
def slide(slide_path, request):
    if "bad_reads" in request.fixturenames:  # decides about the reader, so it comes first
        request.getfixturevalue("bad_reads")
    with SlideImage(slide_path) as opened:
        yield opened


def grid(patch: int = 256, step: int = 170) -> np.ndarray:
    """Overlapping patches in rows, some beyond each edge of the slide: int32 [N, 2]."""
    xs, ys = range(-100, WIDTH - 50, step), range(-100, HEIGHT - 50, step)
    return np.array([(x, y) for y in ys for x in xs], np.int32)


@pytest.fixture
def coords() -> np.ndarray:
    return grid()


@pytest.fixture
def write_patches(tmp_path) -> Callable[..., Path]:
    """Write a patches file as the original's patchfy does."""

    def write(coords: np.ndarray, contour_index: np.ndarray | None = None, patch_size: int = 256) -> Path:
        path = tmp_path / "patches.h5"
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset("coords", data=coords.astype(np.int32).reshape(-1, 2))
            dataset.attrs.update({"patch_size": patch_size, "patch_level": 0, "name": "known"})
            if contour_index is not None:
                file.create_dataset("contour_index", data=contour_index.astype(np.int32)).attrs["name"] = "known"
            file.attrs.update({"complete": True, "n_coords": len(coords)})
        return path

    return write


@pytest.fixture
def patches_h5(write_patches, coords) -> Path:
    return write_patches(coords, np.arange(len(coords)) // 10)


@pytest.fixture
def run(slide_path, patches_h5, tmp_path, encoder) -> Callable[..., ExtractionResult]:
    """`extract_features` with everything filled in; keywords override."""

    def run(**overrides) -> ExtractionResult:
        arguments = {
            "slide": slide_path,
            "patches_h5": patches_h5,
            "out_h5": tmp_path / "out.h5",
            "encoder": encoder,
            "weights": "stub:0",
            "weights_fingerprint": "f" * 64,
            "batch_size": 8,
            "num_workers": 2,
        }
        return extract_features(**{**arguments, **overrides})

    return run


@pytest.fixture
def bad_reads(monkeypatch) -> dict[tuple[int, int], int]:
    """{(x, y) of a patch: how many reads of it fail}; a handle stays broken, as in OpenSlide."""
    failing: dict[tuple[int, int], int] = {}
    broken: set[int] = set()
    kept: list[openslide.OpenSlide] = []  # an id must not be given to a second handle
    lock = threading.Lock()
    original = openslide.OpenSlide.read_region

    def read_region(self, location, level, size):
        # The reader asks for the part of a patch that it needs, so the corner lies up to 32 px inside.
        with lock:
            for (x, y), left in failing.items():
                if left > 0 and 0 <= location[0] - x <= 32 and 0 <= location[1] - y <= 32:
                    failing[x, y] = left - 1
                    broken.add(id(self))
                    kept.append(self)
            if id(self) in broken:
                raise openslide.OpenSlideError("injected")
        return original(self, location, level, size)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", read_region)
    monkeypatch.setattr(choose, "fast_reader", lambda *_, **__: "reads through OpenSlide are to fail")
    return failing


@pytest.fixture(autouse=True)
def one_torch_thread():
    """torch's threads spin while they wait for each other; on a small busy machine that starves the readers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_leaked_threads():
    """Whatever a test does, the threads that read and write must be gone afterwards."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("exaonepath-")]
    assert not left
