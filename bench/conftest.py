"""What every benchmark shares: ours and the baseline interleaved in one run, their peak memory, and a table at the end.

Timings are noisy on shared machines, so what counts is the ratio of two medians taken in turns. A benchmark compares
results before it times anything; where that check fails, no speed is reported.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
Work = Callable[[], object]
_M_MMAP_THRESHOLD = -3  # glibc's mallopt


@pytest.fixture
def compare(benchmark) -> Callable[..., None]:
    """Time `ours` against `baseline` in turns, then measure the memory of both.

    `compare(group, ours, baseline, rounds=5, device="cpu", **info)`; `info` lands in the table as it is. With one
    round, memory is measured in the timed run itself: such work takes minutes.
    """

    def run(group: str, ours: Work, baseline: Work, *, rounds: int = 5, device: str = "cpu", **info: Any) -> None:
        times: list[float] = []
        peaks: dict[str, float | None] = {}

        def time_baseline() -> None:
            start = time.perf_counter()
            if rounds == 1:
                peaks["baseline_peak_mb"] = peak_mb(baseline, device, tidy=False)
            else:
                baseline()
            times.append(time.perf_counter() - start)

        def run_ours() -> None:
            if rounds == 1:
                peaks["peak_mb"] = peak_mb(ours, device, tidy=False)
            else:
                ours()

        benchmark.group = group
        benchmark.pedantic(run_ours, setup=time_baseline, rounds=rounds)
        seconds, baseline_seconds = benchmark.stats.stats.median, statistics.median(times)
        benchmark.extra_info.update(
            seconds=_round(seconds),
            baseline_seconds=_round(baseline_seconds),
            ratio=_round(baseline_seconds / seconds),
            **info,
        )
        if rounds > 1:
            peaks = {"peak_mb": peak_mb(ours, device), "baseline_peak_mb": peak_mb(baseline, device)}
        benchmark.extra_info.update(peaks)

    return run


def peak_mb(work: Work, device: str, *, tidy: bool = True) -> float | None:
    """Growth of `device`'s memory during `work`, in MB; None where the system does not tell.

    `tidy` keeps glibc's allocator from making the figure depend on what ran before; it costs time, so a timed run
    goes without.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_reserved() - before) / 1e6, 1)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what earlier work freed but glibc kept would hide growth
    if tidy and hasattr(libc, "mallopt"):
        # The size from which blocks are given back at once grows with use: set it, until this is measured.
        libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    try:
        reset.write_text("5")  # the kernel's own high-water mark starts again from here
    except OSError:
        return None
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    try:
        work()
    finally:
        if tidy and hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return round((int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before) * 1024 / 1e6, 1)


@pytest.fixture(scope="session")
def full() -> bool:
    """True where EXAONEPATH_BENCH=full asks for the sizes the README quotes (minutes instead of seconds)."""
    return os.environ.get("EXAONEPATH_BENCH") == "full"


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print the comparison as one table; with EXAONEPATH_BENCH_SAVE=1 append it to bench/results/."""
    session = getattr(config, "_benchmarksession", None)
    benchmarks = getattr(session, "benchmarks", [])
    errors = [bench for bench in benchmarks if "slide_error" in bench.extra_info]
    if errors:
        terminalreporter.write_sep("-", "relative error against float64, ours and the dense mask in the same dtype")
        terminalreporter.write_line(f"{'golden':<58}{'slide':>10}{'dense':>10}{'patches':>10}{'dense':>10}")
        for bench in errors:
            info = bench.extra_info
            keys = ("slide_error", "dense_slide_error", "patch_error", "dense_patch_error")
            name = f"{info['golden']} {bench.group.split()[-1]}"
            terminalreporter.write_line(f"{name:<58}" + "".join(f"{info[key]:>10.1e}" for key in keys))
    rows = [bench for bench in benchmarks if bench.extra_info.get("ratio")]
    if errors or rows:
        _maybe_save(terminalreporter, errors + rows)
    if not rows:
        return
    terminalreporter.write_sep("-", "ours against the baseline of the same run")
    header = f"{'benchmark':<58}{'ours s':>10}{'baseline s':>12}{'ratio':>8}{'ours MB':>10}{'baseline MB':>13}"
    terminalreporter.write_line(header)
    for bench in rows:
        info = bench.extra_info
        name = f"{bench.group} {'-'.join(str(v) for v in (bench.params or {}).values())}"
        memory = [info.get("peak_mb"), info.get("baseline_peak_mb")]
        cells = ["-" if value is None else f"{value:.0f}" for value in memory]
        terminalreporter.write_line(
            f"{name[:57]:<58}{info['seconds']:>10}{info['baseline_seconds']:>12}{info['ratio']:>8}"
            f"{cells[0]:>10}{cells[1]:>13}"
        )


def _maybe_save(terminalreporter, rows: list[Any]) -> None:
    if os.environ.get("EXAONEPATH_BENCH_SAVE") == "1":
        terminalreporter.write_line(f"appended {len(rows)} rows to {_save(rows)}")


def _save(rows: list[Any]) -> Path:
    """One JSON line a measurement, append-only, with what it takes to read it later."""
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pipeline.jsonl"
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    with path.open("a") as file:
        for bench in rows:
            row = {"benchmark": bench.name, "group": bench.group, **bench.extra_info, **machine}
            file.write(json.dumps(row) + "\n")
    return path


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def _round(value: float) -> float:
    return float(f"{value:.3g}")
