"""The features of a model by name, and their comparison with those of a cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.alignment.feature_match import FeatureMatch
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
        match = FeatureMatch.of(names, table.features)
        lacking = match.lacking
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
        if match.surplus:
            report.add(
                "note",
                "unused-features",
                modality,
                f"{len(match.surplus)} feature(s) of the cohort are not features of the model and are left out: "
                f"{few(match.surplus)}",
                features=match.surplus,
            )
        return match.columns
