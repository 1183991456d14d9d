"""Sweeps launch settings of the attention kernels on this machine's GPU and prints what each costs.

    python bench/tune.py [--dtype bfloat16] [--tokens 16384] [--fragments 1 100] [--seconds 480] [--kernel NAME ...]

For the authors of `kernels/launch_config.py`: the library never runs this code. One kernel is varied at a time,
the others keep their settings; every setting is checked against exact rows before it is timed, and the settings now in
the file run in the same rounds. Rows go to ${OUT:-bench/results}/tune.jsonl as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import torch
from exaonepath.kernels.launch_config import LaunchConfig, attention_config
from harness import table
from harness.clock import Timed, time_once
from harness.exact import TOLERANCE, Sample, exact_sample
from harness.machine import facts
from harness.problems import Problem
from harness.session import FAILURES, reason

from exaonepath.ops.attention.fragment_attention import fragment_attention

# Everything that chooses a launch asks this function, under this name, in these modules.
_ASKED_IN = "exaonepath.ops.attention.triton.attention_config"
_SPACE = {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
_TILE = 128 * 128  # more scores than this in a tile never fit the registers


def candidates(base: LaunchConfig, space: dict[str, tuple[int, ...]] = _SPACE) -> Iterator[LaunchConfig]:
    """The settings in use, then all others of the space that stand a chance."""
    yield base
    for values in itertools.product(*space.values()):
        one = dataclasses.replace(base, **dict(zip(space, values, strict=True)))
        if one != base and one.block_m * one.block_n <= _TILE:
            yield one


def kernels_of(config: Any) -> list[str]:
    """Names of the fields of an attention config that are launches."""
    return [f.name for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), LaunchConfig)]


class Bench:
    """One problem and one kernel under changing settings."""

    def __init__(self, problem: Problem, rotated: bool, kernel: str) -> None:
        self.problem, self.kernel = problem, kernel
        self.backward = kernel != "forward"
        self.rotation = problem.rotation if rotated else None
        self.qkv, self.dout = problem.inputs(0)
        self.qkv.requires_grad_(self.backward)
        given = self.dout if self.backward else None
        self.exact: Sample = exact_sample(problem, self.qkv.detach(), given, rotated=rotated)
        capability = torch.cuda.get_device_capability() if problem.device == "cuda" else None
        self.base = attention_config(capability, self.qkv.element_size(), problem.head_dim)

    def timed(self, launch: LaunchConfig) -> Timed:
        """Steps under these settings: forward, and backward where the kernel is one of its."""
        config = dataclasses.replace(self.base, **{self.kernel: launch})
        segments = self.problem.segments()

        def forward(*_: object) -> torch.Tensor:
            with patch(_ASKED_IN, lambda *_: config), torch.set_grad_enabled(self.backward):
                return fragment_attention(self.qkv, segments, self.rotation, backend="triton")

        def gradients(_: int, out: torch.Tensor) -> torch.Tensor:
            with patch(_ASKED_IN, lambda *_: config):
                return torch.autograd.grad(out, self.qkv, self.dout)[0]

        return Timed(str(launch), [forward, gradients] if self.backward else [forward])

    def check(self, timed: Timed) -> float:
        """Error of these settings against exact rows."""
        out = timed.steps[0](0, None)
        tensors = {"out": out.detach()}
        if self.backward:
            tensors.update(zip(("dq", "dk", "dv"), timed.steps[1](0, out).unbind(1), strict=True))
        return self.exact.errors(tensors)[0]


def sweep(bench: Bench, launches: list[LaunchConfig], until: float, rounds: int = 5) -> list[dict[str, Any]]:
    """A row per setting: milliseconds of the varied part, or the reason why there are none."""
    rows: list[dict[str, Any]] = []
    alive: list[tuple[dict[str, Any], Timed]] = []
    for launch in launches:
        row = {"kernel": bench.kernel, **dataclasses.asdict(launch), **bench.problem.describe()}
        row.update(rotated=bench.rotation is not None, status="ok", reason=None, ms=None, current=launch is launches[0])
        rows.append(row)
        if time.monotonic() > until:
            row.update(status="not available", reason="out of time")
            continue
        timed = bench.timed(launch)
        try:
            error = bench.check(timed)
        except FAILURES as exc:
            row.update(status="failed", reason=reason(exc))
            continue
        if not error <= TOLERANCE[bench.problem.dtype]:
            row.update(status="wrong", reason=f"error {error:.2g}")
            continue
        alive.append((row, timed))
        print(f"  {bench.kernel} {launch} compiled", flush=True)
    for _ in range(rounds):
        for _, timed in alive:
            time_once(timed, 0, bench.problem.device)
    for row, timed in alive:
        row["ms"] = table.rounded(1e3 * timed.quantiles(1 if bench.backward else None)[1])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Best first; the settings in use are marked."""
    for row in sorted(rows, key=lambda r: (r["ms"] is None, r["ms"])):
        setting = " ".join(f"{name} {row[name]}" for name in _SPACE)
        what = f"{row['ms']:10.4g} ms" if row["ms"] else f"{row['status']}: {row['reason']}"
        print(f"{'>' if row['current'] else ' '} {row['kernel']:<16}{setting:<52}{what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--fragments", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--kernel", nargs="+", help="names of the launches to vary (default: all)")
    parser.add_argument("--seconds", type=float, default=480, help="stop compiling new settings after this long")
    parser.add_argument("--no-rotation", action="store_true")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the interpreter, as a rehearsal"
    )
    parser.add_argument("--most", type=int, help="try at most this many settings a kernel")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device here; --device cpu rehearses under TRITON_INTERPRET=1\n")
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.exit(2, "--device cpu needs TRITON_INTERPRET=1, set before Python starts\n")
    until = time.monotonic() + arguments.seconds
    dtype = getattr(torch, arguments.dtype)
    table.folder().mkdir(parents=True, exist_ok=True)
    for fragments in arguments.fragments:
        spread = "equal" if fragments == 1 else "lognormal"
        problem = Problem(arguments.tokens, fragments, spread, dtype, arguments.device, head_dim=arguments.head_dim)
        names = kernels_of(Bench(problem, False, "forward").base)
        for kernel in arguments.kernel or names:
            if kernel not in names:
                parser.exit(2, f"no launch is called {kernel}; there are {', '.join(names)}\n")
            bench = Bench(problem, not arguments.no_rotation, kernel)
            launches = list(candidates(getattr(bench.base, kernel)))[: arguments.most]
            print(f"{kernel}: {len(launches)} settings, {problem.n} tokens in {fragments} fragments", flush=True)
            rows = sweep(bench, launches, until)
            show(rows)
            with (table.folder() / "tune.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({**row, **facts()}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
