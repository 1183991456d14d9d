"""Results tables as text: one block a run, candidates by speed, ours marked, and who could not take part and why.

python bench/report.py [FOLDER ...] > summary.md        (default: bench/results)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import table

OURS = "exaonepath"
Row = dict[str, Any]


def lines(rows: Sequence[tuple[str, Row]]) -> Iterable[str]:
    """Text of rows given as (table, row), in their order."""
    runs: dict[tuple[str, str, str], list[Row]] = {}
    for name, row in rows:
        runs.setdefault((name, row["run"], row["direction"]), []).append(row)
    for (name, _, direction), members in runs.items():
        yield ""
        yield _title(name, direction, members[0])
        yield from (_attention if name == "attention" else _encoder)(members)


def _title(name: str, direction: str, row: Row) -> str:
    where = row["gpu"] if row["device"] == "cuda" else f"{row['cpu']}, {row['threads']} threads"
    return (
        f"## {name}, {direction}: N {row['n']:,} in {row['fragments']:,} fragments ({row['spread']}), {row['dtype']}, "
        f"{where}, torch {row['torch']}, {row['commit']} ({row['source']})"
    )


def _attention(rows: list[Row]) -> Iterable[str]:
    main = next((r for r in rows if (r["impl"], r["rotation"]) == (OURS, "own") and r["ms"]), None)
    heads = f"{'ms':>10}{'20-80 %':>19}{'TFLOP/s':>9}{'ours is':>9}{'MB':>8}{'build ms':>10}{'error':>9}"
    yield f"    {'':<18}{'rotation':<10}{heads}"
    for row in sorted((r for r in rows if r["ms"]), key=lambda r: r["ms"]):
        spread = f"{row['ms_p20']:.4g}-{row['ms_p80']:.4g}"
        ratio = f"{row['ms'] / main['ms']:.2f}x" if main else "-"
        yield (
            f"    {row['impl']:<18}{row['rotation']:<10}{row['ms']:>10.4g}{spread:>19}{row['tflops']:>9.3g}{ratio:>9}"
            f"{_cell(row['peak_mb'], '.0f'):>8}{_cell(row['build_ms'], '.3g'):>10}{_cell(row['error_norm'], '.1e'):>9}"
        )
    yield from _missing(rows, lambda r: f"{r['impl']}, rotation {r['rotation']}")


def _encoder(rows: list[Row]) -> Iterable[str]:
    main = next((r for r in rows if r["impl"] == OURS and not r["compiled"] and r["ms"]), None)
    heads = f"{'ms':>10}{'20-80 %':>19}{'ours is':>9}{'MB':>8}{'reserved':>10}{'limit GB':>10}"
    yield f"    {'':<34}{heads}  shares of the time"
    for row in sorted((r for r in rows if r["ms"]), key=lambda r: r["ms"]):
        spread = f"{row['ms_p20']:.4g}-{row['ms_p80']:.4g}"
        ratio = f"{row['ms'] / main['ms']:.2f}x" if main else "-"
        shares = ", ".join(f"{name} {share:.0%}" for name, share in (row["shares"] or {}).items())
        yield (
            f"    {_variant(row):<34}{row['ms']:>10.4g}{spread:>19}{ratio:>9}{_cell(row['peak_mb'], '.0f'):>8}"
            f"{_cell(row['reserved_mb'], '.0f'):>10}{_cell(row['memory_limit_gb'], '.0f'):>10}  {shares}"
        )
    yield from _missing(rows, _variant)


def _variant(row: Row) -> str:
    extras = [name for name in ("compiled", "checkpointing") if row[name]]
    return ", ".join([row["impl"], *extras])


def _missing(rows: list[Row], name: Any) -> Iterable[str]:
    for row in rows:
        if not row["ms"]:
            yield f"    {name(row)}: {row['status']}: {row['reason']}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of *.jsonl (default: bench/results)")
    folders = parser.parse_args().folders
    for name in table.SCHEMAS:
        for line in lines([(name, row) for row in table.read(name, *folders)]):
            print(line)


if __name__ == "__main__":
    main()
