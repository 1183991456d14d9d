"""Host time of the sweep of the sigmoid loss, microseconds a tile, without a card.

The sweep of csrc/ is compiled against an emulation in which launches and products return at once; the baseline is the
loop in Python that it replaced, on tiles so small that the CPU's arithmetic is negligible. Neither includes what CUDA
and cuBLAS take for a call. `pair_seconds` is what Python takes for a pair before and after the call, checks included.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from harness import table

from exaonepath.ops.extension import load_extension
from exaonepath.ops.sigmoid_loss import cuda_sweep, sweep
from exaonepath.ops.sigmoid_loss.cuda_sweep import CUDA_TILE, CudaSweep
from exaonepath.ops.sigmoid_loss.sweep import N_SUMS, Engine, PairConstants, PairTask, Tile, TileLoop, Workspace

ROOT = Path(__file__).resolve().parents[1]
SIDE, TILE, DIM = 30, 4, 4


def make_task() -> PairTask:
    engine = Engine(TileLoop(sweep.cpu_pass, Tile(TILE, TILE)), torch.float32, torch.float32, torch.float32)
    rows = SIDE * TILE
    u, v = torch.randn(2, rows, DIM)
    ids = torch.arange(rows)
    constants = PairConstants(10.0, -10.0, 1.0, torch.tensor([10.0, -10.0, 1.0], dtype=torch.float64))
    sums = torch.zeros(N_SUMS, dtype=torch.float64)
    gradients = (torch.zeros_like(u), torch.zeros_like(v))
    return PairTask(u, v, ids, ids, constants, engine, sums, gradients, Workspace())


def best_sweep(task: PairTask, rounds: int) -> float:
    """Microseconds of a sweep."""
    times = []
    with torch.no_grad():
        for _ in range(rounds):
            start = time.perf_counter()
            task.engine.sweep(task)
            times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def loop_in_python() -> float:
    """Microseconds a tile of the loop with torch's products."""
    with (
        patch.object(sweep, "product_nt", lambda a, b: torch.mm(a, b.t())),
        patch.object(sweep, "product_tn", lambda a, b: torch.mm(a.t(), b)),
    ):
        return best_sweep(make_task(), 5) / SIDE**2


def python_of_a_pair() -> float:
    """Microseconds that Python takes for a pair where the extension returns at once."""
    extension = SimpleNamespace(sigmoid_sweep_workspace_cuda=lambda *_: 1024, sigmoid_sweep_cuda=lambda **_: None)
    task = make_task()
    task = replace(task, engine=replace(task.engine, sweep=CudaSweep(CUDA_TILE, False)))
    with (
        patch.object(cuda_sweep, "require_extension", lambda: extension),
        patch.object(torch.cuda, "device", lambda _: nullcontext()),
        patch.object(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0)),
        patch.object(torch.cuda, "current_blas_handle", lambda: 0),
    ):
        return best_sweep(task, 1000)


def test_host_time_of_a_tile(benchmark, tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None or load_extension()[0] is None:
        pytest.skip("no CMake, or no extension")
    options = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DEXAONEPATH_TESTS=ON",
        "-DEXAONEPATH_PYTHON=OFF",
        "-DEXAONEPATH_CUDA=OFF",
    )
    for command in (
        (cmake, "-S", str(ROOT), "-B", str(tmp_path), *options),
        (cmake, "--build", str(tmp_path), "--target", "bench_sigmoid_sweep"),
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = []

    def measure():
        done = subprocess.run([tmp_path / "bench_sigmoid_sweep"], check=True, capture_output=True, text=True)
        rows.append((json.loads(done.stdout), loop_in_python()))

    benchmark.group = "sigmoid loss, host time a tile"
    benchmark.pedantic(measure, rounds=3)
    ours = min(found["us_per_tile"] for found, _ in rows)
    two_streams = min(found["us_per_tile_two_streams"] for found, _ in rows)
    python = min(found for _, found in rows)
    benchmark.extra_info.update(
        seconds=table.rounded(ours / 1e6, 3),
        baseline_seconds=table.rounded(python / 1e6, 3),
        ratio=table.rounded(python / ours, 3),
        pair_seconds=table.rounded(python_of_a_pair() / 1e6, 3),
        two_streams_seconds=table.rounded(two_streams / 1e6, 3),
    )
