"""Times hand-picked launch settings of the attention kernels on this machine's GPU and prints what each costs.

    python bench/tune.py [--problem TOKENS:FRAGMENTS ...] [--kernel NAME ...] [--seconds 110] [--dtype bfloat16]

For the authors of `kernels/launch_config.py`: the library never runs this code. Worker processes first compile all
settings in parallel and launch each on a small problem, so that a setting that crashes ends only its worker. Then every
setting is checked against exact rows, and timed in turns with the others: the kernel alone, not the operation. Rows are
appended to ${OUT:-bench/results}/tune.jsonl as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from exaonepath.kernels.launch_config import LaunchConfig, attention_config
from harness import table
from harness.clock import Timed, time_once
from harness.exact import TOLERANCE, Sample, exact_sample
from harness.machine import facts
from harness.problems import Problem
from harness.session import FAILURES, reason

from exaonepath.ops.attention import triton as kernels
from exaonepath.ops.attention.tiles import schedules

# What is expected to be fast on sm_90 in bfloat16 with head dimension 64, by instructions and registers
# (docs/triton.md), and by earlier sessions, besides the settings in the file: the fields of LaunchConfig, best guess
# first.
_Fields = (
    tuple[int, int, int, int, bool] | tuple[int, int, int, int, bool, int] | tuple[int, int, int, int, bool, int, int]
)
SETTINGS: dict[str, tuple[_Fields, ...]] = {
    "forward": (
        (128, 64, 4, 3, True, 8),
        (64, 128, 4, 2, True, 8, 64),
        (64, 64, 4, 3, True, 8),
        (128, 64, 4, 3, True, 8, 32),
        (64, 128, 4, 2, False, 8, 64),
        (128, 64, 4, 3, False, 8),
        (128, 64, 4, 3, True),
        (128, 128, 8, 2, True, 8, 64),
    ),
    "key_gradient": (
        (128, 64, 4, 2, True, 1, 0),
        (64, 64, 4, 3, True),
        (64, 64, 4, 3, False),
        (64, 64, 4, 2, True),
        (128, 128, 8, 2, True, 1, 64),
        (32, 64, 4, 3, False),
        (64, 128, 8, 2, False),
    ),
    "query_gradient": (
        (64, 64, 4, 3, True),
        (64, 128, 4, 2, True, 1, 64),
        (64, 64, 4, 3, True, 1, 32),
        (64, 64, 4, 3, False),
        (64, 64, 4, 2, True),
        (64, 128, 4, 2, False),
        (128, 64, 4, 2, True),
        (128, 128, 8, 2, False),
    ),
}
# Products of 2 * D operations per score.
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradient": 4}
# Below this many tokens, a launch by the host takes longer than the kernel; then a CUDA graph of this many is timed.
_SHORT, _LAUNCHES = 4096, 20
_PREPARE_SECONDS = 75


def candidates(base: LaunchConfig, kernel: str) -> list[LaunchConfig]:
    """The settings in use, then the others, the best guess first."""
    found = [base]
    for values in SETTINGS[kernel]:
        one = LaunchConfig(*values)
        if one not in found:
            found.append(one)
    return found


class Bench:
    """One problem and one kernel; `launch` runs the kernel alone, `results` are what it wrote."""

    def __init__(self, problem: Problem, rotated: bool, kernel: str) -> None:
        self.problem, self.kernel, self.rotated = problem, kernel, rotated
        qkv, self._dout = problem.inputs(0)
        self._qkv = qkv
        segments = problem.segments()
        self._known = schedules(segments.offsets, segments)
        capability = torch.cuda.get_device_capability() if problem.device == "cuda" else None
        self.base = attention_config(capability, qkv.element_size(), problem.head_dim)
        empty = qkv.new_empty(0, dtype=torch.float32)
        self._tables = problem.rotation.cos_sin(torch.float32) if rotated else (empty, empty)
        self._scale = problem.head_dim**-0.5
        # What the kernel reads comes from the settings in use.
        training = kernel != "forward"
        self._out, self._lse, turned = kernels._forward(qkv, *self._tables, segments.offsets, self._scale, training)
        self._turned = turned if turned.numel() else qkv
        self._keys = qkv[:, 1].clone()
        if rotated and not training:
            kernels._rotate_rows(self._keys, *self._tables, 0)
        self._delta = torch.empty_like(self._lse)
        self._gradient = torch.full_like(qkv, float("nan"))
        if kernel == "key_gradient":
            self._query_gradient(self.base)

    def launch(self, setting: LaunchConfig) -> None:
        """Run the kernel once under this setting."""
        config = dataclasses.replace(self.base, **{self.kernel: setting})
        if self.kernel == "forward":
            q, _, v = self._qkv.unbind(1)
            kernels._launch_forward(
                config, q, self._keys, v, self._out, None, *self._tables, self._known, 0, self.rotated, self._scale
            )
        elif self.kernel == "query_gradient":
            self._query_gradient(config)
        else:
            kernels._launch_key_gradient(
                config, self._turned, self._gradient, self._dout, self._lse, self._delta, *self._tables, self._known,
                self._scale,
            )  # fmt: skip

    def _query_gradient(self, config: Any) -> None:
        kernels._launch_query_gradient(
            config, self._turned, self._gradient, self._out, self._dout, self._lse, self._delta, *self._tables,
            self._known, self._scale,
        )  # fmt: skip

    def exact(self) -> Sample:
        """Exact rows of what the kernel writes."""
        dout = None if self.kernel == "forward" else self._dout
        sample = exact_sample(self.problem, self._qkv, dout, rotated=self.rotated)
        written = {"forward": {"out"}, "query_gradient": {"dq"}, "key_gradient": {"dk", "dv"}}[self.kernel]
        return Sample(
            sample.head,
            [(n, rows, {k: v for k, v in values.items() if k in written}) for n, rows, values in sample.fragments],
        )

    def error(self, setting: LaunchConfig, exact: Sample) -> float:
        """Error of this setting against exact rows."""
        self._out.fill_(float("nan")) if self.kernel == "forward" else self._gradient.fill_(float("nan"))
        self.launch(setting)
        gradients = zip(("dq", "dk", "dv"), self._gradient.unbind(1), strict=True)
        return exact.errors({"out": self._out, **dict(gradients)})[0]

    def timed(self, setting: LaunchConfig) -> tuple[Timed, int]:
        """The kernel under this setting, and how often one step launches it."""
        if self.problem.device != "cuda" or self.problem.n >= _SHORT:
            return Timed(str(setting), [lambda *_: self.launch(setting)]), 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_LAUNCHES):
                self.launch(setting)
        return Timed(str(setting), [lambda *_: graph.replay()]), _LAUNCHES


def sweep(
    bench: Bench, settings: Sequence[LaunchConfig], until: float, refused: dict[LaunchConfig, str], rounds: int
) -> list[dict[str, Any]]:
    """A row per setting: milliseconds of one launch, or the reason why there are none."""
    rows: list[dict[str, Any]] = []
    alive: list[tuple[dict[str, Any], Timed, int]] = []
    exact = bench.exact()
    for setting in settings:
        row = {"kernel": bench.kernel, **dataclasses.asdict(setting), **bench.problem.describe()}
        row.update(rotated=bench.rotated, current=setting == getattr(bench.base, bench.kernel))
        row.update(status="ok", reason=None, ms=None, ms_p20=None, ms_p80=None, tflops=None, error=None)
        rows.append(row)
        if setting in refused:
            row.update(status="failed", reason=refused[setting])
            continue
        if time.monotonic() > until:
            row.update(status="not available", reason="out of time")
            continue
        try:
            row["error"] = table.rounded(bench.error(setting, exact), 2)
            if not row["error"] <= TOLERANCE[bench.problem.dtype]:
                row.update(status="wrong", reason=f"error {row['error']:.2g}")
                continue
            alive.append((row, *bench.timed(setting)))
        except FAILURES as exc:
            row.update(status="failed", reason=reason(exc))
    for turn in range(rounds):
        if turn and time.monotonic() > until:
            break
        for _, timed, _ in alive:
            time_once(timed, 0, bench.problem.device)
    for row, timed, launches in alive:
        row["ms_p20"], row["ms"], row["ms_p80"] = (table.rounded(1e3 * s / launches) for s in timed.quantiles())
        operations = 2 * PRODUCTS[bench.kernel] * bench.problem.heads * bench.problem.head_dim * bench.problem.sum_l2
        row["tflops"] = table.rounded(operations / row["ms"] / 1e9)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Best first; the settings in use are marked."""
    for row in sorted(rows, key=lambda r: (r["ms"] is None, r["ms"])):
        shape = f"{row['block_m']:4} x{row['block_n']:4}, {row['num_warps']} warps, {row['num_stages']} stages"
        how = "descriptors" if row["descriptors"] else "pointers"
        how += f", masked {row['masked']}" if row["masked"] else ""
        how += f", {row['sums']} sums" if row["sums"] > 1 else ""
        what = f"{row['ms']:9.4g} ms {row['tflops']:7.4g} TFLOP/s" if row["ms"] else f"{row['status']}: {row['reason']}"
        print(f"{'>' if row['current'] else ' '} {row['kernel']:<15}{shape}, {how:<34}{what}", flush=True)


def prepare(kernel: str, setting: LaunchConfig, problem: Problem, rotated: bool) -> str | None:
    """Compile a setting into Triton's cache by launching it; the reason if that fails. Runs in a worker process."""
    try:
        Bench(problem, rotated, kernel).launch(setting)
        if problem.device == "cuda":
            torch.cuda.synchronize()
    except FAILURES as exc:
        return reason(exc)
    return None


def prepare_all(
    wanted: dict[str, list[LaunchConfig]], problem: Problem, rotated: bool, workers: int
) -> dict[str, dict[LaunchConfig, str]]:
    """`prepare` for all settings of all kernels, a process each; the reasons of those that failed.

    A process each, because after an illegal memory access a process cannot use the GPU any more.
    """
    refused: dict[str, dict[LaunchConfig, str]] = {kernel: {} for kernel in wanted}
    until = time.monotonic() + _PREPARE_SECONDS
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        waiting = [
            (kernel, setting, pool.apply_async(prepare, (kernel, setting, problem, rotated)))
            for kernel, settings in wanted.items()
            for setting in settings
        ]
        for kernel, setting, done in waiting:
            try:
                why = done.get(max(0.0, until - time.monotonic()))
            except multiprocessing.TimeoutError:
                why = f"did not compile within {_PREPARE_SECONDS} s, or its process ended"
            if why is not None:
                refused[kernel][setting] = why
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--problem", nargs="+", default=["16384:1", "100000:100"], metavar="TOKENS:FRAGMENTS",
        help="problems of equal fragments (default: 16384:1 100000:100)",
    )  # fmt: skip
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--kernel", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="launches to vary")
    parser.add_argument("--seconds", type=float, default=110, help="start nothing new after this long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile (default: cores)")
    parser.add_argument("--rounds", type=int, default=15, help="how often each setting is timed")
    parser.add_argument("--no-rotation", action="store_true")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the interpreter, as a rehearsal"
    )
    parser.add_argument("--most", type=int, help="try at most this many settings a kernel")
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device here; --device cpu rehearses under TRITON_INTERPRET=1\n")
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.exit(2, "--device cpu needs TRITON_INTERPRET=1, set before Python starts\n")
    dtype = getattr(torch, arguments.dtype)

    def problem_of(tokens: int, fragments: int) -> Problem:
        return Problem(tokens, fragments, "equal", dtype, arguments.device, head_dim=arguments.head_dim)

    problems = [problem_of(*map(int, text.split(":"))) for text in arguments.problem]
    rotated = not arguments.no_rotation
    capability = torch.cuda.get_device_capability() if arguments.device == "cuda" else None
    config = attention_config(capability, dtype.itemsize, arguments.head_dim)
    wanted = {name: candidates(getattr(config, name), name)[: arguments.most] for name in arguments.kernel}
    refused: dict[str, dict[LaunchConfig, str]] = {name: {} for name in wanted}
    if arguments.device == "cuda":
        # 350 tokens a fragment are whole blocks and a partial one, so every loop of a kernel runs.
        refused = prepare_all(wanted, problem_of(700, 2), rotated, arguments.workers)
        print(f"{sum(map(len, wanted.values()))} settings compiled after {time.monotonic() - start:.0f} s", flush=True)
    table.folder().mkdir(parents=True, exist_ok=True)
    for problem in problems:
        for kernel, settings in wanted.items():
            print(f"{kernel}: {problem.n} tokens in {problem.fragments} equal fragments", flush=True)
            rows = sweep(
                Bench(problem, rotated, kernel), settings, start + arguments.seconds, refused[kernel], arguments.rounds
            )
            show(rows)
            with (table.folder() / "tune.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({**row, **facts()}) + "\n" for row in rows)
    print(f"done after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
