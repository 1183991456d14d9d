"""The results tables: append-only JSON lines under bench/results/, one row a measurement, one schema a table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"

_TEXT, _WHOLE, _NUMBER = (str,), (int,), (int, float)
_OR_NONE = (type(None),)

STATUS = ("ok", "not available", "failed", "wrong")

# Column -> types; a row has all columns of its table and no others.
_MACHINE: dict[str, tuple[type, ...]] = {
    "date": _TEXT,
    "commit": _TEXT + _OR_NONE,
    "source": _TEXT,
    "cpu": _TEXT,
    "cores": _WHOLE,
    "threads": _WHOLE,
    "load": _NUMBER + _OR_NONE,
    "gpu": _TEXT + _OR_NONE,
    "gpu_memory_gb": _NUMBER + _OR_NONE,
    "driver": _TEXT + _OR_NONE,
    "cuda": _TEXT + _OR_NONE,
    "python": _TEXT,
    "torch": _TEXT,
    "triton": _TEXT + _OR_NONE,
}
_MEASURED: dict[str, tuple[type, ...]] = {
    "run": _TEXT,  # rows of one run were taken in turns and may be compared
    "status": _TEXT,
    "reason": _TEXT + _OR_NONE,
    "direction": _TEXT,
    "device": _TEXT,
    "dtype": _TEXT,
    "n": _WHOLE,
    "fragments": _WHOLE,
    "spread": _TEXT,
    "seed": _WHOLE,
    "sum_l2": _WHOLE,
    "clock": _TEXT,
    "rounds": _WHOLE + _OR_NONE,
    "ms": _NUMBER + _OR_NONE,
    "ms_p20": _NUMBER + _OR_NONE,
    "ms_p80": _NUMBER + _OR_NONE,
    "first_call_s": _NUMBER + _OR_NONE,
    "peak_mb": _NUMBER + _OR_NONE,
}
SCHEMAS: dict[str, dict[str, tuple[type, ...]]] = {
    "attention": {
        **_MACHINE,
        **_MEASURED,
        "impl": _TEXT,
        "rotation": _TEXT,
        "heads": _WHOLE,
        "head_dim": _WHOLE,
        "tflops": _NUMBER + _OR_NONE,
        "build_ms": _NUMBER + _OR_NONE,
        "error_norm": _NUMBER + _OR_NONE,
        "error_max": _NUMBER + _OR_NONE,
    },
    "encoder": {
        **_MACHINE,
        **_MEASURED,
        "impl": _TEXT,
        "compiled": (bool,),
        "checkpointing": (bool,),
        "memory_limit_gb": _NUMBER + _OR_NONE,
        "reserved_mb": _NUMBER + _OR_NONE,
        "error_norm": _NUMBER + _OR_NONE,
        "shares": (dict, type(None)),
    },
}
# Rows of the pipeline's benchmarks differ by benchmark; these columns all of them have.
_PIPELINE = ("benchmark", "group", "date", "commit", "cpu", "cores", "gpu", "python", "torch")
# Rows of the tuners: settings and their times differ by kernel; these columns all of them have.
_TUNERS = ("tune", "tune_loss")
_TUNED = ("status", "device", "dtype", "date", "commit", "source", "gpu", "driver", "cuda", "torch", "triton")


def problems_of(table: str, row: dict[str, Any]) -> list[str]:
    """What is wrong with a row of `table`; empty where it fits."""
    if table not in SCHEMAS:
        return [f"lacks {name}" for name in (_TUNED if table in _TUNERS else _PIPELINE) if name not in row]
    schema = SCHEMAS[table]
    wrong = [f"lacks {name}" for name in schema.keys() - row.keys()]
    wrong += [f"has an unknown column {name}" for name in row.keys() - schema.keys()]
    for name in schema.keys() & row.keys():
        value = row[name]
        if not isinstance(value, schema[name]) or (isinstance(value, bool) and bool not in schema[name]):
            wrong.append(f"{name} is {value!r}")
    if wrong:
        return wrong
    if row["status"] not in STATUS:
        wrong.append(f"status is {row['status']!r}")
    if (row["status"] == "ok") != (row["ms"] is not None):
        wrong.append("only a row that is ok has a time, and each of them has one")
    if row["status"] != "ok" and not row["reason"]:
        wrong.append("a row without a figure says why")
    if row["ms"] is not None and not 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]:
        wrong.append("quantiles are out of order")
    if row["device"] == "cuda" and row["status"] == "ok" and not row["gpu"]:
        wrong.append("a figure of a GPU that is not named")
    return wrong


def read(table: str, *folders: Path) -> list[dict[str, Any]]:
    """All rows of a table, folder by folder, oldest first."""
    rows: list[dict[str, Any]] = []
    for folder in folders or (RESULTS,):
        path = folder / f"{table}.jsonl"
        if path.is_file():
            rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return rows


def folder() -> Path:
    """Where rows of this process go: ${OUT}, else bench/results/."""
    return Path(os.environ.get("OUT", RESULTS))


def append(table: str, row: dict[str, Any]) -> None:
    """Write one row at once, so that a session cut short keeps what it measured.

    Raises:
        ValueError: the row does not fit the table's schema.
    """
    if wrong := problems_of(table, row):
        raise ValueError(f"row for {table} {'; '.join(wrong)}: {row}")
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / f"{table}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rounded(value: float | None, digits: int = 4) -> float | None:
    """To as many digits as a measurement is good for."""
    return None if value is None else float(f"{value:.{digits}g}")
