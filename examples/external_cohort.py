"""Train on the patients of two centres, and evaluate everything also on the patients of a third one.

    python examples/external_cohort.py --out external

The tables are external/evaluation/evaluation.md: retrieval, labels, survival, labels from few patients or from none,
single genes predicted from the slide, calibration, slides that find slides, and the third centre as an external cohort
whose RNA lacks every tenth gene. All are compared with the simplest methods on the same patients.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import mudata

import exaonepath
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort

CENTRE = 2


def main() -> None:
    """Two cohorts, training, tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("external"))
    parser.add_argument("--patients", type=int, default=900)
    parser.add_argument("--modalities", nargs="*", default=["wsi", "rna", "methylation"])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any training setting")
    arguments = parser.parse_args()
    out = arguments.out
    whole = write_synthetic_cohort(out / "all-centres", SyntheticCohortSettings(patients=arguments.patients))
    truth = json.loads((whole / "README.json").read_text())["truth"]
    outside = {patient for patient, found in truth.items() if found["batch"] == CENTRE}
    cohort = part_of(whole, out / "cohort", set(truth) - outside)
    other = part_of(whole, out / "third-centre", outside, every_tenth_gene=False)
    files = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
    values = {f"data.{key}": str(cohort / name) for key, name in files.items()}
    values |= {"data.modalities": arguments.modalities, "run.tensorboard": False, "run.device": "cpu"}
    settings = exaonepath.read_settings(None, arguments.set, values=values)
    if not exaonepath.train(settings, out / "run", report=say).finished:
        raise SystemExit("stopped; the same command goes on")
    asked = exaonepath.EvaluationSettings(labels=("subtype", "spatial"), missing=False, external=str(other))
    exaonepath.write_report(out / "run", out / "evaluation", asked)
    sys.stdout.write((out / "evaluation" / "evaluation.md").read_text())


def part_of(whole: Path, out: Path, patients: set[str], *, every_tenth_gene: bool = True) -> Path:
    """The files of some patients of a cohort, as a cohort of their own."""
    out.mkdir(parents=True, exist_ok=True)
    with mudata.set_options(pull_on_update=False):
        tables = {}
        for name, table in mudata.read_h5mu(whole / "cohort.h5mu").mod.items():
            keep = [every_tenth_gene or name != "rna" or at % 10 > 0 for at in range(table.n_vars)]
            tables[name] = table[[patient in patients for patient in table.obs_names], keep].copy()
        mudata.write_h5mu(out / "cohort.h5mu", mudata.MuData(tables))
    for name in ("slides.csv", "labels.csv"):
        with (whole / name).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["patient"] in patients]
        for row in rows:
            if "features" in row:
                row["features"] = str(whole.resolve() / row["features"])
        with (out / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return out


def say(text: str) -> None:
    """A line to standard error."""
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
