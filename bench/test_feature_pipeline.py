"""Patches to features: reading alone, the encoder alone, and both together as `extract_features` runs them.

What a run takes is at least what the slower of the two takes. `of_slower` is how much of that rate the run reaches: 1
means that nothing is lost, and one after the other they would reach 0.5 where both are equally fast.

`test_stand_ins` shows the same without a GPU: an encoder and a slide that only sleep. `test_extraction` writes a
synthetic slide and takes a few seconds a case; the baseline of its table is one batch after another, in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import machine

from exaonepath.encoders.loading import load_patch_encoder
from exaonepath.slides.features.encoding import BatchEncoder
from exaonepath.slides.features.partial import Block, PartialFile
from exaonepath.slides.features.pipeline import encode_batches
from exaonepath.slides.features.preprocessing import PreprocessingConfig, normalise
from exaonepath.slides.features.reader import PatchReader, default_workers
from exaonepath.slides.image import SlideImage
from exaonepath.synthetic import make_slide

CONFIG = PreprocessingConfig()
PATCH = 256


class SleepingSlide:
    """Takes this long to read a patch, without a core."""

    path = Path("sleeping.svs")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.properties: dict[str, str] = {}

    @contextmanager
    def tile_cache(self, size: int) -> Iterator[None]:
        yield

    def read_rgb(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[np.ndarray, float]:
        time.sleep(self._seconds)
        return np.zeros((size[1], size[0], 3), np.uint8), 0.0

    def check_unchanged(self) -> None:
        pass


class SleepingEncoder(torch.nn.Module):
    """Takes this long for a batch, without a core, as the host sees a GPU."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.busy = seconds, 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.busy += time.perf_counter() - start
        return torch.zeros(len(x), 768)


@pytest.mark.parametrize("slower", ["encoder", "reading"])
def test_stand_ins(benchmark, session, tmp_path, slower):
    """The share of the wall time that the slower part is busy; the aim is 95 %."""
    batch, batches, workers = 8, 120, 4  # so many that filling and emptying the pipeline counts little
    config = PreprocessingConfig(resize=16, crop=16)  # so small that the host has nothing to compute
    seconds = {"encoder": 0.1, "reading": 0.1}  # for a batch; reading on all threads
    seconds["reading" if slower == "encoder" else "encoder"] = 0.06
    slide = SleepingSlide(seconds["reading"] / batch * workers)
    module = SleepingEncoder(seconds["encoder"])
    # A thread reads a run of 8 patches, here a batch; four batches are read in parallel.
    coords = np.zeros((batch * batches, 2), np.int32)
    reader = PatchReader(slide, coords, 16, config, batch_size=batch, num_workers=workers)
    encoder = BatchEncoder(module, config, torch.device("cpu"), torch.float32, batch_size=batch)

    def run() -> None:
        module.busy = 0.0
        partial = PartialFile(tmp_path / "part", {}, fresh=True)
        encode_batches(reader, encoder, partial, 0, batch * batches)
        partial.close()

    benchmark.group = "stand-ins that sleep"
    benchmark.pedantic(run, rounds=2)
    wall = benchmark.stats.stats.median
    busy = {"encoder": module.busy, "reading": batches * seconds["reading"]}
    together = busy["encoder"] + busy["reading"]
    shares = {name: round(value / wall, 3) for name, value in busy.items()}
    benchmark.extra_info.update(slower=slower, share=shares[slower], speedup=round(together / wall, 2))
    print(f"\n{slower} is slower: busy {shares[slower]:.1%} of {wall:.2f} s; one after another: {together:.2f} s")


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory) -> Path:
    """A slide with enough tissue for a second of work on a card; a small one where there is none."""
    path = tmp_path_factory.mktemp("slide") / "bench.svs"
    if not torch.cuda.is_available():
        return make_slide(path, 1_500, 1_200, levels="flat", fragments=1, holes=False)
    # So large that tiles inside the tissue are drawn once and repeated: it is written in seconds.
    return make_slide(path, 24_000, 23_000, levels="flat", fragments=1, holes=False)


@pytest.fixture(scope="module")
def models() -> dict:
    """Loaded encoders by device, so that a compiled one is compiled once."""
    return {}


@pytest.fixture(scope="module")
def rates() -> dict:
    """Patches a second of reading alone, by batch size, measured once."""
    return {}


def _coords(path: Path, most: int) -> np.ndarray:
    """A grid in the middle of the slide, where the tissue is; it does not fall together with tiles, as in practice."""
    with SlideImage(path) as slide:
        width, height = slide.dimensions
    xs, ys = (range(side // 4 + 77, side - side // 4 - PATCH, PATCH) for side in (width, height))
    return np.array([(x, y) for y in ys for x in xs][:most], np.int32)


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# device, dtype, batch size, compiled; the most informative first, for sessions that are cut off
_CASES = [
    ("cuda", "bfloat16", 128, False),
    ("cuda", "bfloat16", 32, False),
    ("cuda", "bfloat16", "auto", False),
    ("cuda", "bfloat16", 128, True),
    ("cuda", "bfloat16", 256, False),
    ("cuda", "bfloat16", 32, True),
    ("cuda", "bfloat16", 256, True),
    ("cuda", "float32", 128, False),
    ("cpu", "float32", 2, False),
    ("cpu", "bfloat16", 2, False),
]


def _param(case: tuple) -> pytest.param:
    device, dtype, batch, compiled = case
    name = f"{device}-{dtype}-batch-{batch}" + "-compiled" * compiled
    return pytest.param(*case, id=name, marks=[pytest.mark.gpu] if device == "cuda" else [])


@pytest.mark.parametrize(("device", "dtype", "batch_size", "compiled"), [_param(case) for case in _CASES])
def test_extraction(
    benchmark, session, request, slide_path, models, rates, tmp_path, device, dtype, batch_size, compiled
):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    session.need_dtype(device, dtype)
    gpu = device == "cuda"
    if device not in models:
        models[device] = load_patch_encoder("random:0", device=device).model
    model = models[device]
    coords = _coords(slide_path, 2_304 if gpu else 8)
    half = dtype != "float32"
    encoder = BatchEncoder(
        model, CONFIG, torch.device(device), getattr(torch, dtype), batch_size=batch_size, compile=compiled
    )
    batch = encoder.batch_size
    coords = coords[: len(coords) // batch * batch]

    def reader(slide: SlideImage) -> PatchReader:
        return PatchReader(slide, coords, PATCH, CONFIG, batch_size=batch, page_locked=encoder.page_locked)

    def read_only() -> None:
        with SlideImage(slide_path) as slide:
            for _ in reader(slide):
                pass

    with SlideImage(slide_path) as slide:
        images = next(iter(reader(slide))).images

    def encode_only() -> None:
        waiting = []
        for _ in range(len(coords) // batch):
            waiting.append(encoder.start(images))
            if len(waiting) > 1:
                waiting.pop(0).result()
        waiting.pop().result()

    def together() -> None:
        with SlideImage(slide_path) as slide:
            partial = PartialFile(tmp_path / "part", {}, fresh=True)
            encode_batches(reader(slide), encoder, partial, 0, len(coords))
            partial.close()

    def in_series() -> None:
        """One batch after another: one stream, memory that is not page-locked, autocast, a wait after each step."""
        autocast = torch.autocast(device, getattr(torch, dtype), enabled=half)
        with SlideImage(slide_path) as slide, torch.inference_mode(), autocast:
            partial = PartialFile(tmp_path / "series", {}, fresh=True)
            for part in PatchReader(slide, coords, PATCH, CONFIG, batch_size=batch):
                features = model(normalise(torch.from_numpy(part.images).to(device), CONFIG)).float().cpu().numpy()
                partial.append(Block(part.indices, features, part.failures, part.stop))
            partial.close()

    first_call = _seconds(lambda: encoder.start(images).result())
    with torch.inference_mode():
        exact = model(normalise(torch.from_numpy(images).to(device), CONFIG)).cpu().numpy()
    found = encoder.start(images).result()
    assert np.linalg.norm(found - exact) <= (3e-2 if half else 1e-3) * np.linalg.norm(exact)

    n, rounds = len(coords), 3 if gpu else 2
    if (device, batch) not in rates:
        rates[device, batch] = n / min(_seconds(read_only) for _ in range(2))
    encoding = n / min(_seconds(encode_only) for _ in range(rounds))
    series: list[float] = []
    benchmark.group = f"extraction {request.node.callspec.id}"
    benchmark.pedantic(together, setup=lambda: series.append(_seconds(in_series)), rounds=rounds)
    seconds, before = benchmark.stats.stats.median, sorted(series)[len(series) // 2]
    rate, reading = n / seconds, rates[device, batch]
    benchmark.extra_info.update(
        seconds=round(seconds, 4),
        baseline_seconds=round(before, 4),
        ratio=round(before / seconds, 3),
        device=device,
        dtype=dtype,
        batch_size=batch,
        auto=batch_size == "auto",
        compiled=compiled,
        patches=n,
        reading_threads=default_workers(),
        first_call_s=round(first_call, 2),
        reading_per_s=round(reading, 1),
        encoder_per_s=round(encoding, 1),
        together_per_s=round(rate, 1),
        of_slower=round(rate / min(reading, encoding), 3),
        peak_mb=round(torch.cuda.max_memory_allocated() / 2**20) if gpu else None,
    )
    print(
        f"\npatches/s: reading {reading:.0f}, encoder {encoding:.0f}, together {rate:.0f} "
        f"({rate / min(reading, encoding):.0%} of the slower), in series {n / before:.0f}; "
        f"first call {first_call:.1f} s [{machine.facts()['gpu'] or machine.facts()['cpu']}]"
    )
