"""Make the synthetic cohort, train on it, and tell how well held-out patients are found across modalities.

    python examples/train_synthetic_cohort.py --out demo-training

Writes <out>/cohort and <out>/run; run again, it goes on where it was. The patients reported on were held out of
training and of the choice of the best model.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import exaonepath
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort


def main() -> None:
    """Cohort, training, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-training"))
    parser.add_argument("--patients", type=int, default=SyntheticCohortSettings.patients)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any training setting")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")

    cohort = write_synthetic_cohort(arguments.out / "cohort", SyntheticCohortSettings(patients=arguments.patients))
    paths = {f"data.{name}": str(cohort / file) for name, file in
             (("mudata", "cohort.h5mu"), ("slides", "slides.csv"), ("labels", "labels.csv"))}  # fmt: skip
    settings = exaonepath.read_settings(Path(__file__).parent / "synthetic_cohort.toml", arguments.set, values=paths)
    started = time.perf_counter()
    result = exaonepath.train(
        settings,
        arguments.out / "run",
        progress=lambda step, total, row: (
            say(f"step {step}/{total}  loss {row['loss']:.3f}") if step % 10 == 0 else None
        ),
        report=say,
    )
    if not result.finished:
        sys.exit(130)
    say(f"trained in {time.perf_counter() - started:.0f} s; best at step {result.best_step}")

    run, quick = arguments.out / "run", exaonepath.EvaluationSettings(missing=False)
    report = exaonepath.evaluate(run / "best", quick, cohort=cohort, split=run / "split.json")
    for direction, score in report["parts"]["test"]["retrieval"].items():
        recall, chance = score["recall"]["1"], score["chance"]["1"]
        sys.stdout.write(f"{direction:<22} recall@1 {recall['value']:.3f}  {recall['value'] / chance:5.1f} x chance\n")


def say(text: str) -> None:
    """One line to standard error."""
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
