"""The features of a model by name, and their comparison with those of a cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.errors import ConfigError
from exaonepath.files.artifact import settings_hash
from exaonepath.text import few


@dataclass(frozen=True)
class FeatureManifest:
    """Names and order of a model's features of each modality.

    Attributes:
        features: modality to feature names, in the order of the model's inputs.
    """

    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def dims(self) -> dict[str, int]:
        """Modality to number of features."""
        return {name: len(names) for name, names in self.features.items()}

    @property
    def fingerprint(self) -> str:
        """Hex digest of names and order."""
        return settings_hash(self.as_dict())

    def as_dict(self) -> dict[str, list[str]]:
        """Plain JSON types."""
        return {name: list(self.features[name]) for name in sorted(self.features)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FeatureManifest:
        """The inverse of `as_dict`.

        Raises:
            ConfigError: the values are not lists of distinct names.
        """
        features = {}
        for name, names in data.items():
            if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
                raise ConfigError(f"the feature manifest of {name!r} is not a list of names")
            if len(set(names)) != len(names):
                raise ConfigError(f"the feature manifest of {name!r} names a feature twice")
            features[str(name)] = tuple(names)
        return FeatureManifest(features)

    def columns(self, modality: str, table: ModalityTable, report: CohortReport) -> np.ndarray:
        """Column of `table` for each feature of the manifest, -1 if the table lacks it: int64 [F].

        Missing and unused features are added to the report. If no feature is in common, this is an error.
        """
        names = self.features[modality]
        at = {name: column for column, name in enumerate(table.features)}
        columns = np.array([at.get(name, -1) for name in names], np.int64)
        lacking = [name for name, column in zip(names, columns, strict=True) if column < 0]
        if len(lacking) == len(names):
            report.add(
                "error",
                "no-common-features",
                modality,
                f"none of the model's {len(names)} features (such as {few(names, 3)}) is among the cohort's "
                f"{len(table.features)} (such as {few(table.features, 3)}); these may be other identifiers",
                features=lacking,
            )
        elif lacking:
            report.add(
                "warning",
                "lacking-features",
                modality,
                f"{len(lacking)} of the model's {len(names)} features are not in the cohort and are filled with the "
                f"training mean: {few(lacking)}",
                features=lacking,
            )
        unused = len(table.features) - (len(names) - len(lacking))
        if unused:
            known = set(names)
            others = [name for name in table.features if name not in known]
            report.add(
                "note",
                "unused-features",
                modality,
                f"{unused} feature(s) of the cohort are not features of the model and are left out: {few(others)}",
                features=others,
            )
        return columns


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
    known, held = set(trained), set(table.features)
    lacking = [name for name in trained if name not in held]
    surplus = [at for at, name in enumerate(table.features) if name not in known]
    if len(lacking) + len(surplus) <= _OTHER_TOTALS * len(trained):
        return
    share = _share_of_counts(table, surplus)
    if share <= _OTHER_TOTALS and len(lacking) <= _OTHER_TOTALS * len(trained):
        return  # features that no training patient expresses were dropped in training, and add nothing to a total here
    differences, effects = [], []
    if surplus:
        differences.append(
            f"{len(surplus)} are additional ({few([table.features[at] for at in surplus], 3)}) and have "
            f"{100 * share:.2g}% of the counts"
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
        f"counts per million are computed over all {len(held)} columns of the table, but over {len(trained)} in "
        f"training: {', '.join(differences)}; so {', and '.join(effects)}. Use a table with the columns of "
        f"the training cohort{doubt}",
        features=[*(table.features[at] for at in surplus), *lacking],
    )


def _share_of_counts(table: ModalityTable, columns: Sequence[int]) -> float:
    of_columns = of_all = 0.0
    for _, block in table.row_blocks():
        of_all += float(np.nansum(block, dtype=np.float64))
        of_columns += float(np.nansum(block[:, columns], dtype=np.float64))
    return of_columns / of_all if of_all > 0 else 0.0
