"""Train on a synthetic cohort with default settings, and compare the model with the simplest alternatives.

    python examples/compare_with_baselines.py --out compared
    python examples/compare_with_baselines.py --out compared-103 --seed 103     # another draw of the cohort

The tables are <out>/evaluation/evaluation.md: retrieval compared with CCA, ridge regression and PLS; labels with
principal components and logistic regression, mean patch features and attention MIL; survival with Cox. All are
fitted on the same training patients, and compared in pairs on the same test patients.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import exaonepath
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort


def main() -> None:
    """Cohort, training, tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("compared"))
    parser.add_argument("--patients", type=int, default=SyntheticCohortSettings.patients)
    parser.add_argument("--seed", type=int, default=SyntheticCohortSettings.seed, help="of the cohort; default: 0")
    parser.add_argument("--modalities", nargs="*", default=[], help="those to train with; default: all five")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any training setting")
    arguments = parser.parse_args()
    drawn = SyntheticCohortSettings(patients=arguments.patients, seed=arguments.seed)
    cohort = write_synthetic_cohort(arguments.out / "cohort", drawn)
    files = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
    values = {f"data.{key}": str(cohort / name) for key, name in files.items()}
    values |= {"data.modalities": arguments.modalities, "run.tensorboard": False, "run.device": "cpu"}
    settings = exaonepath.read_settings(None, arguments.set, values=values)
    if not exaonepath.train(settings, arguments.out / "run", report=say).finished:
        raise SystemExit("stopped; the same command goes on")
    probed = exaonepath.EvaluationSettings(labels=("subtype", "spatial"), missing=False)
    exaonepath.write_report(arguments.out / "run", arguments.out / "evaluation", probed)
    sys.stdout.write((arguments.out / "evaluation" / "evaluation.md").read_text())


def say(text: str) -> None:
    """A line to standard error."""
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
