"""Train on a synthetic cohort with default settings, and compare the model with the simplest alternatives.

    python examples/compare_with_baselines.py --out compared
    python examples/compare_with_baselines.py --out compared-103 --seed 103     # another draw of the cohort
    python examples/compare_with_baselines.py --out compared-8 --draws 8        # the mean of eight draws, 0 to 7

The tables are <out>/evaluation/evaluation.md, and with several draws <out>/draws.md: retrieval compared with CCA, ridge
regression and PLS; labels with principal components and logistic regression, mean patch features and attention MIL;
survival with Cox. All are fitted on the same training patients, and compared in pairs on the same test patients.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import exaonepath
from exaonepath.alignment.studies.repeats import measures_table, summarize, values_of
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort


def main() -> None:
    """One draw, or several with their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("compared"))
    parser.add_argument("--patients", type=int, default=SyntheticCohortSettings.patients)
    parser.add_argument("--seed", type=int, default=SyntheticCohortSettings.seed, help="of the cohort; default: 0")
    parser.add_argument("--draws", type=int, default=1, help="cohorts of as many seeds, --seed and the ones after it")
    parser.add_argument("--modalities", nargs="*", default=[], help="those to train with; default: all five")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any training setting")
    arguments = parser.parse_args()
    if arguments.draws < 1:
        parser.error(f"--draws must be positive, got {arguments.draws}")
    if arguments.draws == 1:
        compare(arguments.out, arguments.seed, arguments)
        sys.stdout.write((arguments.out / "evaluation" / "evaluation.md").read_text())
        return
    found = []
    for seed in range(arguments.seed, arguments.seed + arguments.draws):
        report = compare(arguments.out / f"draw-{seed}", seed, arguments)
        found.append(values_of(json.loads(report.read_text(encoding="utf-8"))))
    text = (
        f"{arguments.draws} draws of the synthetic cohort, seeds {arguments.seed} to {seed}, one split and one run "
        "each; means, and 95 % intervals (Student's t) over draws. Recall is the mean of both directions.\n\n"
        # Draws have no patients in common.
        + measures_table(summarize(found, 0.0))
    )
    (arguments.out / "draws.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def compare(out: Path, seed: int, arguments: argparse.Namespace) -> Path:
    """Cohort, training and report of one draw, unless they are there; the path of evaluation.json."""
    report = out / "evaluation" / "evaluation.json"
    if report.is_file() and arguments.draws > 1:
        return report
    drawn = SyntheticCohortSettings(patients=arguments.patients, seed=seed)
    cohort = write_synthetic_cohort(out / "cohort", drawn)
    files = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
    values = {f"data.{key}": str(cohort / name) for key, name in files.items()}
    values |= {"data.modalities": arguments.modalities, "run.tensorboard": False, "run.device": "cpu"}
    settings = exaonepath.read_settings(None, arguments.set, values=values)
    if not exaonepath.train(settings, out / "run", report=say).finished:
        raise SystemExit("stopped; the same command goes on")
    probed = exaonepath.EvaluationSettings(labels=("subtype", "spatial"), missing=False)
    exaonepath.write_report(out / "run", out / "evaluation", probed)
    return report


def say(text: str) -> None:
    """A line to standard error."""
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
