"""What every benchmark shares: ours and the baseline interleaved in one run, their peak memory, and a table at the end.

Timings are noisy on shared machines, so what counts is the ratio of two medians taken in turns. A benchmark compares
results before it times anything; where that check fails, no speed is reported.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The helpers in this folder are no package of the project: only this file makes them importable.
sys.path.insert(0, str(Path(__file__).parent))

from harness import machine, table
from harness.memory import peak_mb
from harness.session import Session
from report import lines

Work = Callable[[], object]


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
            seconds=table.rounded(seconds, 3),
            baseline_seconds=table.rounded(baseline_seconds, 3),
            ratio=table.rounded(baseline_seconds / seconds, 3),
            **info,
        )
        if rounds > 1:
            peaks = {"peak_mb": peak_mb(ours, device), "baseline_peak_mb": peak_mb(baseline, device)}
        benchmark.extra_info.update(peaks)

    run.benchmark = benchmark
    return run


def pytest_configure(config) -> None:
    config.bench_session = Session()
    # A line a case as it goes: some cases take half a minute.
    config.option.verbose = config.option.verbose or 1


@pytest.fixture(scope="session")
def session(pytestconfig) -> Session:
    """Where benchmarks with tables of their own put their rows."""
    return pytestconfig.bench_session


@pytest.fixture(scope="module", autouse=True)
def _time_of_the_file(request, session) -> None:
    files = list(dict.fromkeys(item.path for item in request.session.items))
    if not session.full:
        session.share_time(len(files) - files.index(request.path))


@pytest.fixture(autouse=True)
def _time_left(session, _time_of_the_file) -> None:
    """Every benchmark skips once the session's time is spent."""
    session.need_time()


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Torch on one thread, where only the reading is to run in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def full(session) -> bool:
    """True where EXAONEPATH_BENCH=full asks for the sizes the README quotes (minutes instead of seconds)."""
    return session.full


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """With EXAONEPATH_BENCH_SAVE=1 append what a test measured at once: a session that is cut off keeps it."""
    result = yield
    asked = getattr(item, "funcargs", {})
    bench = asked.get("benchmark") or getattr(asked.get("compare"), "benchmark", None)
    measured = bench is not None and (bench.extra_info.get("ratio") or "slide_error" in bench.extra_info)
    if measured and os.environ.get("EXAONEPATH_BENCH_SAVE") == "1":
        _save(bench)
    return result


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print the comparison as one table."""
    for line in lines(config.bench_session.rows):
        terminalreporter.write_line(line)
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
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


def _save(bench: Any) -> None:
    """One JSON line a measurement, append-only, with what it takes to read it later."""
    table.append("pipeline", {"benchmark": bench.name, "group": bench.group, **bench.extra_info, **machine.facts()})
