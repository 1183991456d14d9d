"""The features a model was trained on, by name: what it carries, and what a cohort is held against."""

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
    """Names and order of the features of each modality a model takes.

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
            ConfigError: not lists of distinct names.
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
        """Column of `table` for each feature of the manifest, -1 where the table lacks it: int64 [F].

        What is lacking, what is not used, and what is done about it goes into the report; nothing in common is an
        error there.
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
                f"{len(table.features)} (such as {few(table.features, 3)}); are these other identifiers?",
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
                f"{unused} feature(s) of the cohort are not the model's and are left out: {few(others)}",
                features=others,
            )
        return columns


# Totals over other columns than in training: above this share of names and of counts it is worth a warning.
_OTHER_TOTALS = 0.01


def check_totals(
    modality: str, table: ModalityTable, features: Sequence[str], measured: Sequence[str], report: CohortReport
) -> None:
    """Warn where counts per million would be of other columns than those of the training cohort.

    Args:
        modality: whose table.
        table: counts.
        features: the model's features.
        measured: all columns of the training table; empty where the model does not tell: then no less than `features`.
        report: takes the warning.
    """
    trained = measured or features
    known, held = set(trained), set(table.features)
    lacking = [name for name in trained if name not in held]
    surplus = [at for at, name in enumerate(table.features) if name not in known]
    if len(lacking) + len(surplus) <= _OTHER_TOTALS * len(trained):
        return
    share = _share_of_counts(table, surplus)
    if share <= _OTHER_TOTALS and len(lacking) <= _OTHER_TOTALS * len(trained):
        return  # a feature that nobody expresses was dropped in training, and counts nothing here
    told, follows = [], []
    if surplus:
        told.append(
            f"{len(surplus)} are surplus ({few([table.features[at] for at in surplus], 3)}) and hold "
            f"{100 * share:.2g}% of the counts"
        )
        follows.append(f"the others are put to {100 * (1 - share):.3g}% of what they would be")
    if lacking:
        told.append(f"{len(lacking)} are lacking ({few(lacking, 3)})")
        follows.append("the others are put too high by the share of the lacking")
    doubt = (
        "" if measured or not surplus else "; if training had these too and dropped them (`top_variance`), all is well"
    )
    report.add(
        "warning",
        "other-totals",
        modality,
        f"counts per million are of all {len(held)} columns of the table, and were of {len(trained)} in training: "
        f"{', '.join(told)}; so {', and '.join(follows)}. Give the table the columns of the training cohort{doubt}",
        features=[*(table.features[at] for at in surplus), *lacking],
    )


def _share_of_counts(table: ModalityTable, columns: Sequence[int]) -> float:
    of_columns = of_all = 0.0
    for _, block in table.row_blocks():
        of_all += float(np.nansum(block, dtype=np.float64))
        of_columns += float(np.nansum(block[:, columns], dtype=np.float64))
    return of_columns / of_all if of_all > 0 else 0.0
