"""The warning about counts: counts per million depend on which columns were added up to a patient's total."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.alignment.feature_match import FeatureMatch
from exaonepath.text import few

# If totals include other columns than in training, a warning is logged above this share of names or counts.
_OTHER_TOTALS = 0.01


def check_totals(
    modality: str, table: ModalityTable, features: Sequence[str], measured: Sequence[str], report: CohortReport
) -> None:
    """Report a warning if counts per million are computed over other columns than in training.

    Args:
        modality: modality of the table.
        table: counts.
        features: the model's features.
        measured: all columns of the training table; empty if the model does not store them: `features` is used then.
        report: receives the warning.
    """
    trained = measured or features
    match = FeatureMatch.of(trained, table.features)
    lacking, surplus = match.lacking, match.surplus
    if len(lacking) + len(surplus) <= _OTHER_TOTALS * len(trained):
        return
    share = _share_of_counts(table, surplus)
    if share <= _OTHER_TOTALS and len(lacking) <= _OTHER_TOTALS * len(trained):
        return  # features that no training patient expresses were dropped in training, and add nothing to a total here
    differences, effects = [], []
    if surplus:
        differences.append(
            f"{len(surplus)} are additional ({few(surplus, 3)}) and have {100 * share:.2g}% of the counts"
        )
        effects.append(f"the others are scaled to {100 * (1 - share):.3g}% of their value in training")
    if lacking:
        differences.append(f"{len(lacking)} are missing ({few(lacking, 3)})")
        effects.append("the others are too high by the share of the missing ones")
    doubt = (
        "" if measured or not surplus else "; if training dropped these columns (`top_variance`), there is no problem"
    )
    report.add(
        "warning",
        "other-totals",
        modality,
        f"counts per million are computed over all {len(table.features)} columns of the table, but over "
        f"{len(trained)} in training: {', '.join(differences)}; so {', and '.join(effects)}. Use a table "
        f"with the columns of the training cohort{doubt}",
        features=[*surplus, *lacking],
    )


def _share_of_counts(table: ModalityTable, names: Sequence[str]) -> float:
    wanted = set(names)
    columns = [at for at, name in enumerate(table.features) if name in wanted]
    of_columns = of_all = 0.0
    for _, block in table.row_blocks():
        of_all += float(np.nansum(block, dtype=np.float64))
        of_columns += float(np.nansum(block[:, columns], dtype=np.float64))
    return of_columns / of_all if of_all > 0 else 0.0
