"""One page of tables: each target of the project, what was measured, and whether it is met.

    python bench/targets.py [FOLDER ...] > targets.md        (default: bench/results)

A target without a measurement is "unmeasured", not met. Where several rows answer, the newest counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import table

Row = dict[str, Any]
OURS, AUTO = "exaonepath", "exaonepath_auto"


@dataclass(frozen=True)
class Target:
    """`measured` is None if there is no row for it; `at_least` says in which direction the limit holds."""

    name: str
    limit: float
    at_least: bool
    unit: str
    measured: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "green", "RED" or "unmeasured"."""
        if self.measured is None:
            return "unmeasured"
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return "green" if met else "RED"

    def line(self) -> str:
        """A row of the page."""
        value = "-" if self.measured is None else f"{self.measured:.4g} {self.unit}".strip()
        limit = f"{'at least' if self.at_least else 'at most'} {self.limit:g} {self.unit}".strip()
        return f"| {self.name} | {limit} | {value} | {self.verdict} | {self.note} |"


class Attention:
    """Times and rates of the attention table, on a GPU in bfloat16."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [
            row for row in rows if row["device"] == "cuda" and row["dtype"] == "bfloat16" and row["status"] == "ok"
        ]

    def find(self, impl: str, rotation: str, direction: str, n: int, fragments: int, spread: str) -> Row | None:
        """The newest row, or None."""
        wanted = {"impl": impl, "rotation": rotation, "direction": direction, "n": n, "fragments": fragments}
        wanted["spread"] = spread
        found = [row for row in self._rows if all(row[key] == value for key, value in wanted.items())]
        return found[-1] if found else None

    def rate(self, *which: Any) -> float | None:
        """TFLOP/s."""
        row = self.find(*which)
        return None if row is None else row["tflops"]

    def ratio(self, peer: str, direction: str, n: int, fragments: int, spread: str) -> float | None:
        """The peer's time over ours, in one run, both without rotation."""
        mine = self.find(OURS, "none", direction, n, fragments, spread)
        theirs = [row for row in self._rows if mine and row["run"] == mine["run"] and row["direction"] == direction]
        times = [row["ms"] for row in theirs if row["impl"] == peer and row["rotation"] == "none"]
        return times[0] / mine["ms"] if mine and times else None

    def ratio_with_mask(self, n: int, fragments: int, spread: str) -> float | None:
        """flex_attention's time with the building of its mask, over ours with the building of the tile list."""
        mine = self.find(OURS, "none", "forward", n, fragments, spread)
        theirs = [row for row in self._rows if mine and row["run"] == mine["run"] and row["impl"] == "flex"]
        theirs = [row for row in theirs if row["build_ms"] is not None]
        if not mine or mine["build_ms"] is None or not theirs:
            return None
        return (theirs[0]["ms"] + theirs[0]["build_ms"]) / (mine["ms"] + mine["build_ms"])


def attention_targets(rows: Sequence[Row]) -> Iterator[Target]:
    """Speed of the attention kernels."""
    known = Attention(rows)
    long, skewed = (16_384, 1, "equal"), (100_000, 1_000, "lognormal")
    peers = [known.rate(peer, "none", "forward", *long) for peer in ("sdpa_cudnn", "sdpa_flash", "varlen_attn")]
    fastest = max((rate for rate in peers if rate is not None), default=420.0 / 0.97)
    default = known.rate(AUTO, "none", "forward", *long) or known.rate(OURS, "none", "forward", *long)
    yield Target(
        "forward, 16k, one segment, by default", min(420.0, 0.97 * fastest), True, "TFLOP/s", default,
        "420, or 0.97 of torch's fastest kernel",
    )  # fmt: skip
    backward = known.rate(OURS, "none", "backward", *long)
    yield Target("backward, 16k, one segment, deterministic", 300, True, "TFLOP/s", backward)
    for n, fragments, length, limit in ((16_384, 1, 16_384, 1.02), (100_000, 100, 1_000, 1.08)):
        plain = known.find(OURS, "none", "forward", n, fragments, "equal")
        turned = known.find(OURS, "own", "forward", n, fragments, "equal")
        cost = turned["ms"] / plain["ms"] if plain and turned and plain["run"] == turned["run"] else None
        yield Target(f"forward with rotation over without, segments of {length:,}", limit, False, "x", cost)
    dense = known.rate(OURS, "none", "forward", 100_000, 1, "equal") or known.rate(OURS, "none", "forward", *long)
    for fragments, share in ((10, 0.9), (100, 0.9), (500, 0.75)):
        rate = known.rate(OURS, "none", "forward", 100_000, fragments, "equal")
        value = rate / dense if rate and dense else None
        yield Target(f"rate on 100k in {fragments} equal fragments over that on one segment", share, True, "", value)
    for direction in ("forward", "backward"):
        for limit, what, problem in ((1, "one segment", long), (2, "1,000 skewed fragments", skewed)):
            value = known.ratio("varlen_attn", direction, *problem)
            yield Target(f"speed over varlen_attn, {direction}, {what}", limit, True, "x", value)
    yield Target("speed over flex_attention, forward", 1.2, True, "x", known.ratio("flex", "forward", *skewed))
    yield Target("the same with building the mask", 3, True, "x", known.ratio_with_mask(*skewed))
    for spread in ("lognormal", "equal"):
        for direction in ("forward", "forward+backward"):
            name = f"on the CPU, 64 {spread} fragments, speed over SDPA, both with rotation, {direction}"
            yield Target(name, 1, True, "x", _ratio_on_the_cpu(rows, direction, spread))


def _ratio_on_the_cpu(rows: Sequence[Row], direction: str, spread: str) -> float | None:
    """The time of SDPA, a call a fragment, after a compiled rotation, over ours in the same run."""
    wanted = {"device": "cpu", "dtype": "float32", "n": 4_000, "fragments": 64, "status": "ok"}
    wanted |= {"spread": spread, "direction": direction}
    usable = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    ours = [row for row in usable if (row["impl"], row["rotation"]) == (OURS, "own")]
    theirs = [
        row["ms"]
        for row in usable
        if ours and row["run"] == ours[-1]["run"] and (row["impl"], row["rotation"]) == ("sdpa_loop", "separate")
    ]
    return theirs[0] / ours[-1]["ms"] if theirs else None


def encoder_targets(rows: Sequence[Row]) -> Iterator[Target]:
    """Memory of the whole slide encoder in 12 GB."""
    usable = [row for row in rows if row["device"] == "cuda" and row["dtype"] == "bfloat16" and row["reserved_mb"]]

    def reserved(n: int, direction: str, impl: str) -> float | None:
        found = [r["reserved_mb"] for r in usable if (r["n"], r["direction"], r["impl"]) == (n, direction, impl)]
        return found[-1] / 1e3 if found else None

    for n, limit in ((100_000, 1.0), (250_000, 2.2), (1_000_000, 8.5)):
        value = reserved(n, "forward", "exaonepath_streamed")
        yield Target(f"memory, inference, {n:,} patches", limit, False, "GB", value)
    for n, limit in ((100_000, 5.0), (250_000, 10.5)):
        yield Target(f"memory, training, {n:,} patches", limit, False, "GB", reserved(n, "training step", OURS))


def pipeline_targets(rows: Sequence[Row]) -> Iterator[Target]:
    """The sigmoid loss, and the way from patches to features."""
    on_gpu = [row for row in rows if row.get("gpu") and row.get("device") == "cuda"]
    loss = [row for row in on_gpu if row.get("group") == "sigmoid loss" and row.get("limit_share")]
    for n, dim, limit in ((32_768, 512, 0.65), (8_192, 256, 0.45)):
        found = [row for row in loss if (row["rows"], row["dim"]) == (n, dim)]
        share = found[-1]["limit_share"] if found else None
        extra = found[-1]["peak_mb"] - found[-1]["inputs_and_gradients_mb"] if found else None
        yield Target(f"sigmoid loss, B = {n:,}, d = {dim}, share of the product's rate", limit, True, "", share)
        yield Target(f"its workspace, B = {n:,}, d = {dim}", 128, False, "MB", extra)
    joined = [row["of_slower"] for row in on_gpu if row.get("of_slower") is not None and not row.get("compiled")]
    value = max(joined, default=None)
    yield Target("patches to features: rate over that of the slower part", 0.95, True, "", value)
    yield from reader_targets(rows)


def reader_targets(rows: Sequence[Row]) -> Iterator[Target]:
    """Reading and preprocessing patches of JPEG tiles, on the CPU."""
    for patch, limit in ((256, 2.2), (506, 2.0)):
        found = [row for row in rows if row.get("group") == f"reader JPEG {patch} px"]
        ratio, of_raw = (found[-1][key] if found else None for key in ("ratio", "of_raw"))
        yield Target(f"reading {patch} px, one thread, speed over OpenSlide", limit, True, "x", ratio)
        yield Target(f"reading {patch} px, time over decoding each tile once", 2, False, "x", of_raw)
        threads = [row["ratio"] for row in rows if row.get("group") == f"reader JPEG {patch} px, 2 threads against 1"]
        yield Target(f"reading {patch} px, 2 threads over 1", 1.8, True, "x", threads[-1] if threads else None)


def correctness(folders: Sequence[Path]) -> Iterator[Target]:
    """Tests that failed on the GPU, by their last outcome."""
    last = {}
    for folder in folders:
        path = folder / "tests.jsonl"
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            last |= {row["test"]: row["outcome"] for row in rows}
    failed = sum(outcome == "failed" for outcome in last.values())
    yield Target(f"tests that fail, of {len(last)}", 0, False, "", float(failed) if last else None)


TABLES: dict[str, Callable[[Sequence[Row]], Iterator[Target]]] = {
    "attention": attention_targets,
    "encoder": encoder_targets,
    "pipeline": pipeline_targets,
}


def page(folders: Sequence[Path]) -> Iterator[str]:
    """The page, line by line."""
    found = {"correctness": list(correctness(folders))}
    found |= {name: list(targets(table.read(name, *folders))) for name, targets in TABLES.items()}
    verdicts = [target.verdict for targets in found.values() for target in targets]
    yield "# Targets: " + ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("green", "RED", "unmeasured"))
    for name, targets in found.items():
        yield from ("", f"## {name}", "", "| target | limit | measured | verdict | |", "|---|---|---|---|---|")
        yield from (target.line() for target in targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of *.jsonl (default: bench/results)")
    for line in page(parser.parse_args().folders or [table.RESULTS]):
        print(line)


if __name__ == "__main__":
    main()
