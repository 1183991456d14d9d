"""The result of a study as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from exaonepath.alignment.metrics.intervals import LEVEL
from exaonepath.alignment.studies.ablations import Outcome


def outcome_table(outcome: Outcome, measures: Sequence[str]) -> str:
    """A row for each variant, a column for each measure: the mean, and the difference to the first variant.

    Differences are paired over draws, seeds and patients. They are bold if their p-value, corrected for the number of
    variants, is below 1 - `LEVEL`.
    """
    rows = ["| | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
    differences = outcome.differences()
    for variant in outcome.study.variants:
        cells = []
        for measure in measures:
            estimate = outcome.estimate(variant.name, measure)
            found = differences.get(variant.name, {}).get(measure)
            if not estimate.n:
                cells.append("")
            elif found is None:
                cells.append(f"{estimate}")
            else:
                text = f"{found.difference:+.3f}"
                clear = found.p_corrected < 1 - LEVEL
                cells.append(f"{estimate.value:.3f}: {f'**{text}**' if clear else text}")
        rows.append(f"| {variant.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
