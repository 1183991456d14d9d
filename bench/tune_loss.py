"""Times the sweep of the sigmoid loss with other tiles on this machine's GPU, and each kernel in it.

    python bench/tune_loss.py [--sizes 32768x512 8192x256] [--dtype bfloat16] [--seconds 30] [--device cuda|cpu]

For the authors of `exaonepath/ops/sigmoid_loss/cuda_sweep.py` (CUDA_TILE, OVERLAPPED): the library never runs this
code. Rows go to ${OUT:-bench/results}/tune_loss.jsonl as they come. `part` is

    plain product   TFLOP/s of a large product, the limit that the other rows refer to
    host            microseconds of the host's time a tile, launches included
    sweep           a size, a tile, one stream or two: milliseconds of a pair, and as `limit_share` the time that its
                    6 B^2 d operations would take at the rate of the plain product, over its time
    kernels         a size and a tile: [name, calls, mean microseconds] of each kernel of a sweep, by the profiler

Every sweep is compared with the settings in use before it is timed. --device cpu rehearses with the loop in Python
and tiny sizes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from harness import table
from harness.machine import facts
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from exaonepath.ops.sigmoid_loss.cuda_sweep import CUDA_TILE, OVERLAPPED, CudaSweep
from exaonepath.ops.sigmoid_loss.engine import choose_engine
from exaonepath.ops.sigmoid_loss.sweep import N_SUMS, Engine, PairConstants, PairTask, Tile, TileLoop, Workspace

TILES = [
    CUDA_TILE,
    *(Tile(*x) for x in ((2048, 2048), (4096, 4096), (8192, 2048), (8192, 1024), (4096, 1024), (2048, 4096))),
    *(Tile(*x) for x in ((1024, 8192), (2048, 8192), (16384, 1024))),
]
REHEARSAL_TILES = [Tile(64, 32), Tile(32, 64)]
MOST_BYTES = 128 << 20  # of workspace, cuBLAS's 32 MB on a Hopper included


def make_task(n_rows: int, dim: int, engine: Engine, device: str) -> PairTask:
    """A pair of random unit rows, every row its own patient."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda: F.normalize(torch.randn(n_rows, dim, generator=generator, device=device), dim=1)  # noqa: E731
    ids = torch.arange(n_rows, device=device)
    numbers = (10.0, -10.0, 1.0)
    return PairTask(
        draw().to(engine.operand),
        draw().to(engine.operand),
        ids,
        ids.clone(),
        PairConstants(*numbers, torch.tensor(numbers, dtype=torch.float64, device=device)),
        engine,
        torch.zeros(N_SUMS, dtype=torch.float64, device=device),
        (torch.zeros(n_rows, dim, device=device), torch.zeros(n_rows, dim, device=device)),
        Workspace(),
    )


def milliseconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """Median of the device's time for `work`."""
    times = []
    for _ in range(rounds):
        if device == "cpu":
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def product_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a large plain product."""
    n = 8192 if device == "cuda" else 256
    a = torch.randn(n, n, device=device).to(dtype)
    work = lambda: a @ a  # noqa: E731
    milliseconds(work, device, 3)
    return 2e3 * n**3 / milliseconds(work, device, 10)


class Report:
    """Appends a row to the table, and prints what is its own."""

    def __init__(self, device: str, dtype: str) -> None:
        self.device = device
        self.shared = {"benchmark": "tune_loss", "group": "sweep of the sigmoid loss", **facts()}
        self.dtype = dtype

    def __call__(self, **row: Any) -> None:
        row = {"device": self.device, "dtype": self.dtype, **row}
        table.append("tune_loss", {**self.shared, **row})
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def run(task: PairTask) -> list[Tensor]:
    """Sums and gradients, from zero."""
    assert task.gradients is not None
    found = [task.sums, *task.gradients]
    for tensor in found:
        tensor.zero_()
    task.engine.sweep(task)
    return [tensor.clone() for tensor in found]


def sweeps(
    size: tuple[int, int], engines: list[tuple[Tile, bool, Engine]], rate: float, report: Report, until: float
) -> None:
    """Each tile, on one stream and on two."""
    n_rows, dim = size
    device = report.device
    reference: list[Tensor] | None = None
    for tile, overlapped, engine in engines:
        row = {"part": "sweep", "rows": n_rows, "dim": dim, "tile": [tile.rows, tile.columns], "overlapped": overlapped}
        if time.monotonic() > until:
            report(**row, status="out of time")
            continue
        task = make_task(n_rows, dim, engine, device)
        try:
            found = run(task)
        except RuntimeError as exc:
            report(**row, status=f"failed: {str(exc)[:300]}")
            continue
        reference = reference or found
        # Other tiles add in another order, which moves a few slopes to the next bfloat16.
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, reference, strict=True)]
        if not max(errors) < 1e-3:
            report(**row, status=f"wrong: {errors}")
            continue
        once = milliseconds(lambda task=task: task.engine.sweep(task), device, 1)
        ms = milliseconds(lambda task=task: task.engine.sweep(task), device, max(3, min(20, int(400 / max(once, 0.1)))))
        share = 6 * n_rows**2 * dim / rate / (ms / 1e3)
        report(**row, status="ok", ms=table.rounded(ms), limit_share=table.rounded(share, 3))
        del task, found


def kernels(size: tuple[int, int], engines: list[tuple[Tile, bool, Engine]], report: Report, until: float) -> None:
    """Every kernel of a sweep on one stream, longest in total first."""
    n_rows, dim = size
    device = report.device
    activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    for tile, overlapped, engine in engines:
        if overlapped or time.monotonic() > until:
            continue
        task = make_task(n_rows, dim, engine, device)
        run(task)
        with profile(activities=activities) as recorded:
            task.engine.sweep(task)
            if device == "cuda":
                torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for event in recorded.events():
            if device == "cuda" and event.device_type == DeviceType.CUDA:
                times.setdefault(event.name, []).append(event.self_device_time_total)
        ordered = sorted(times.items(), key=lambda item: -sum(item[1]))[:10]
        found = [[name[:80], len(us), table.rounded(statistics.mean(us))] for name, us in ordered]
        report(part="kernels", status="ok", rows=n_rows, dim=dim, tile=[tile.rows, tile.columns], kernels=found)


def host_time(engine: Engine, tile: int, report: Report) -> None:
    """What the host takes to queue a tile, launches of CUDA and cuBLAS included: 16 x 16 tiny tiles."""
    device = report.device
    side = 16 if device == "cuda" else 2
    task = make_task(side * tile, 64, engine, device)
    run(task)
    times = []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        task.engine.sweep(task)
        times.append(1e6 * (time.perf_counter() - start) / side**2)
    report(part="host", status="ok", us_per_tile=table.rounded(min(times), 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["32768x512", "8192x256", "32768x256", "8192x1024"], help="rows x dim"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds * 3 / 4
    if arguments.device == "cpu":
        arguments.dtype, arguments.sizes = "float32", ["200x16"]
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    sizes = [(int(rows), int(dim)) for rows, _, dim in (size.partition("x") for size in arguments.sizes)]
    report = Report(device, arguments.dtype)
    with torch.no_grad():
        if device == "cuda":
            chosen = choose_engine("cuda", torch.device("cuda", torch.cuda.current_device()), dtype)
            element = 4 if dtype == torch.float32 else 6
            engines = [
                (tile, overlapped, replace(chosen, sweep=CudaSweep(tile, overlapped)))
                for overlapped in (OVERLAPPED, not OVERLAPPED)
                for tile in TILES
                if tile == CUDA_TILE or tile.rows * tile.columns * element * (1 + overlapped) + (32 << 20) <= MOST_BYTES
            ]
            tiny = replace(chosen, sweep=CudaSweep(Tile(128, 128), OVERLAPPED))
        else:
            chosen = choose_engine("torch", torch.device("cpu"), dtype)
            engines = [
                (tile, False, replace(chosen, sweep=TileLoop(chosen.sweep.run_pass, tile))) for tile in REHEARSAL_TILES
            ]
            tiny = replace(chosen, sweep=TileLoop(chosen.sweep.run_pass, Tile(128, 128)))
        rate = product_rate(dtype, device)
        report(part="plain product", status="ok", tflops=table.rounded(rate / 1e12, 3))
        host_time(tiny, 128, report)
        for size in sizes:
            sweeps(size, engines, rate, report, until)
        for size in sizes:
            kernels(size, engines, report, until + arguments.seconds / 3)


if __name__ == "__main__":
    main()
