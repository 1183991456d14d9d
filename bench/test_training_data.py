"""Data of a training run at scale: rows of features files, the loader against the disk, memory, waiting for data.

`test_rows` compares rows with whole files. `test_loader_against_the_disk` reads sparse files (`harness/sparse.py`)
through a simulated disk: one request at a time, a fixed number of bytes a second, shared by all processes. The baseline
reads the same number of bytes and does nothing else. With EXAONEPATH_BENCH=full, the cohort has 23,099 patients.
`test_waiting` runs training steps on the CPU and takes the time in which they wait for a batch.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from harness import machine
from harness.sparse import write_cohort

pytest.importorskip("anndata", reason="needs the extra `train`")

from exaonepath.alignment.data.sampling import choose_patches
from exaonepath.alignment.training.batch_plan import BatchPlan
from exaonepath.alignment.training.run import prepare
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.alignment.training.settings import build_settings
from exaonepath.alignment.training.trainer import Trainer
from exaonepath.files import raw_file
from exaonepath.files.feature_rows import open_features
from exaonepath.files.features import read_features

PATCHES, WIDTH, BUDGET = 15_000, 768, 2_048
_LATENCY = 2e-3


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EXAONEPATH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A cohort of 24 slides that hold features (1.1 GB)."""
    return write_cohort(tmp_path_factory.mktemp("real") / "cohort", 24, PATCHES, WIDTH, sparse=False)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, full) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "cohort"
    return write_cohort(folder, 23_099 if full else 600, PATCHES, WIDTH)


def settings_for(slides: Path, **tables):
    data = {
        "slides": str(slides),
        "tables": {"rna": {"path": str(slides.with_name("rna.csv")), "scale": "log"}},
        "max_patches": BUDGET,
        "check_features": "header",
        "validation_share": 0.0,
        "test_share": 0.0,
        **tables.pop("data", {}),
    }
    run = {"device": "cpu", "tensorboard": False, "monitor": False, "epochs": 1, **tables.pop("run", {})}
    return build_settings({"data": data, "run": run, **tables})


@pytest.mark.parametrize("dtype", ["float32"])
def test_rows(benchmark, compare, real, dtype):
    """2,048 of 15,000 patches, chosen as in training, from files in the system's cache."""
    file = real.parent / "features" / "00000.h5"

    def ours() -> np.ndarray:
        with open_features(file) as opened:
            rows = choose_patches(opened.coords, opened.contour_index, BUDGET, np.random.default_rng(1))
            return opened.take(rows)

    def whole() -> np.ndarray:
        stored = read_features(file)
        rows = choose_patches(stored.coords, stored.contour_index, BUDGET, np.random.default_rng(1))
        return stored.features[rows]

    assert np.array_equal(ours(), whole())
    compare("features of a step: rows against whole files", ours, whole, rounds=15, patches=PATCHES, rows=BUDGET)


class SimulatedDisk:
    """Serves one request at a time with `rate` bytes a second, to this process and those that are forked from it."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        context = multiprocessing.get_context("fork")
        self._free_at = context.Value(ctypes.c_double, 0.0)
        self._bytes = context.Value(ctypes.c_int64, 0)

    @property
    def bytes(self) -> int:
        return self._bytes.value

    def serve(self, n: int) -> None:
        """Wait until n bytes have been delivered."""
        with self._free_at.get_lock():
            start = max(time.perf_counter(), self._free_at.value)
            self._free_at.value = start + n / self.rate
            late = self._free_at.value - time.perf_counter()
        with self._bytes.get_lock():
            self._bytes.value += n
        # A disk reads ahead, so small requests do not wait one by one; the rate is the same.
        if late > _LATENCY:
            time.sleep(late)


@pytest.fixture
def disk(monkeypatch):
    """`disk(rate)`: from now on, HDF5 files are read through a simulated disk."""

    def make(rate: float) -> SimulatedDisk:
        simulated = SimulatedDisk(rate)
        original = raw_file.RawFile.readinto

        def readinto(self, buffer):
            simulated.serve(len(memoryview(buffer).cast("B")))
            return original(self, buffer)

        monkeypatch.setattr(raw_file.RawFile, "readinto", readinto)
        return simulated

    return make


def read_plainly(simulated: SimulatedDisk, n: int) -> float:
    """Seconds to read n bytes, in requests of 2 MB, without doing anything with them."""
    start = time.perf_counter()
    for _ in range(n >> 21):
        simulated.serve(1 << 21)
    return time.perf_counter() - start


@pytest.mark.parametrize("megabytes", [250, 500, 1000])
def test_loader_against_the_disk(benchmark, session, sparse, disk, megabytes, full):
    """Rate of the bytes that three workers read, as a share of the disk's; the aim is 90 %."""
    chunk, workers = 8, 3
    prepared = prepare(settings_for(sparse, data={"cache_mb": 0}, run={"batch_size": 64, "chunk_size": chunk}))
    data = prepared.data
    steps = 20 if full else 4
    # One more step than is measured: so all workers are busy until the end.
    plan = BatchPlan.of(data.train, batch_size=64, chunk_size=chunk, epochs=0, steps=steps + 2, seed=0, processes=1)
    simulated = disk(megabytes * 1e6)
    figures = {}

    def run() -> None:
        batches = data.chunks(plan.steps(0, 0, 1), workers=workers)
        next(batches)  # the start of the workers
        before, start = simulated.bytes, time.perf_counter()
        n = sum(len(piece.batch) for _, pieces in itertools.islice(batches, steps) for piece in pieces)
        figures.update(seconds=time.perf_counter() - start, bytes=simulated.bytes - before, slides=n)

    benchmark.group = f"loader through a disk of {megabytes} MB/s"
    benchmark.pedantic(run, rounds=1)
    plain = read_plainly(simulated, figures["bytes"])
    share = plain / figures["seconds"]
    benchmark.extra_info.update(
        seconds=round(figures["seconds"], 3), baseline_seconds=round(plain, 3), ratio=round(share, 3),
        patients=len(data.train), slides_read=figures["slides"], workers=workers,
    )  # fmt: skip
    print(
        f"\nloader: {figures['bytes'] / figures['seconds'] / 1e6:.0f} MB/s, {share:.0%} of the disk's rate; "
        f"{figures['slides']} slides of {len(data.train)} [{machine.facts()['cpu']}]"
    )


def test_memory_stays_flat(benchmark, sparse, full):
    """Memory of the process and its workers after each epoch; shared pages count once."""
    epochs, workers = (3, 2) if full else (6, 2)
    settings = settings_for(sparse, data={"cache_mb": 512, "max_patches": 64}, run={"batch_size": 50})
    data = prepare(settings).data
    plan = BatchPlan.of(data.train, batch_size=50, chunk_size=50, epochs=epochs, steps=0, seed=0, processes=1)
    found: list[float] = []

    def run() -> None:
        for step, _ in data.chunks(plan.steps(0, 0, 1), workers=workers):
            if (step + 1) % plan.steps_per_epoch == plan.steps_per_epoch // 2:  # workers are busy, batches are waiting
                found.append(_proportional_mb())

    benchmark.group = "memory of a training process with two workers"
    benchmark.pedantic(run, rounds=1)
    growth = found[-1] / found[1]
    benchmark.extra_info.update(
        seconds=benchmark.stats.stats.median, baseline_seconds=benchmark.stats.stats.median, ratio=round(growth, 3),
        mb_by_epoch=[round(value) for value in found], patients=len(data.train),
        hit_share=round(data.cache.n_bytes / sum(s.n_bytes for s in data.cohort.slides.slides), 3),
    )  # fmt: skip
    print(f"\nMB by epoch, {len(data.train)} patients: {', '.join(f'{value:.0f}' for value in found)}")


def _proportional_mb() -> float:
    """Memory of this process and its children; pages that n of them share count 1/n in each."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    text = "".join(Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return sum(int(kb) for kb in re.findall(r"^Pss:\s+(\d+)", text, re.MULTILINE)) / 1e3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("preset", ["small", "published"])
def test_waiting(benchmark, session, real, tmp_path, one_torch_thread, full, preset, workers):
    """The share of training steps that is waiting for data; slides in the cache. The aim is 10 % on 2 cores."""
    if preset == "published" and not full:
        pytest.skip("a step takes many seconds on the CPU, and waits for nothing")
    size = 2 if preset == "published" else 12
    settings = settings_for(
        real,
        data={"cache_mb": 2000},
        model={"preset": preset, "start": "random"},
        run={"batch_size": size, "chunk_size": size, "epochs": 3, "num_workers": workers},
    )
    prepared = prepare(settings)
    trainer = Trainer(prepared.model, prepared.data, prepared.settings, RunFolder(tmp_path / "run"), prepared.processes)
    for slide in prepared.data.cohort.slides.slides:
        prepared.data.cache.read(slide)
    steps = 3 if preset == "published" else 8
    figures = {"waiting": 0.0, "all": 0.0}

    def run() -> None:
        plan = trainer.plan.steps(0, 0, 1)
        batches = trainer.data.chunks((next(plan) for _ in range(min(steps, trainer.total))), workers=workers)
        trainer._train_step(*next(batches))  # the start of the workers
        last = time.perf_counter()
        begin = last
        for step, chunks in batches:
            figures["waiting"] += time.perf_counter() - last
            trainer._train_step(step, chunks)
            last = time.perf_counter()
        figures["all"] = last - begin

    benchmark.group = f"waiting for data, {preset}, {workers} workers"
    benchmark.pedantic(run, rounds=1)
    share = figures["waiting"] / figures["all"]
    benchmark.extra_info.update(
        seconds=round(figures["all"], 3), baseline_seconds=round(figures["all"] - figures["waiting"], 3),
        ratio=round(1 - share, 3), waiting_share=round(share, 4), patients_per_step=size, workers=workers,
    )  # fmt: skip
    print(f"\n{preset}, {workers} workers: {share:.1%} of {figures['all']:.1f} s is waiting for data")


def test_check_is_remembered(benchmark, real, monkeypatch):
    """The check of all features files at the start: the first one, and one that is remembered."""
    from exaonepath.alignment.data import feature_checks

    monkeypatch.setattr(feature_checks, "_SETTLED_SECONDS", -1e9)  # files of this benchmark were just written
    settings = {"data": {"check_features": "full"}}
    for record in (Path(os.environ["EXAONEPATH_CACHE"]) / "feature-checks").glob("*.json"):
        record.unlink()
    start = time.perf_counter()
    prepare(settings_for(real, **settings))
    first = time.perf_counter() - start
    benchmark.group = "check of features files at the start"
    benchmark.pedantic(lambda: prepare(settings_for(real, **settings)), rounds=3)
    again = benchmark.stats.stats.median
    size = sum(file.stat().st_size for file in (real.parent / "features").iterdir())
    benchmark.extra_info.update(
        seconds=round(again, 4), baseline_seconds=round(first, 4), ratio=round(first / again, 1), gigabytes=size / 1e9
    )
    print(f"\nfirst {first:.2f} s, remembered {again:.3f} s, {size / 1e9:.2f} GB")
