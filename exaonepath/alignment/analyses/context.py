"""What an analysis works on: the model, the embeddings of the parts of the split, and the predictions of labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exaonepath.alignment.probing import LabelPredictions, Views
from exaonepath.alignment.subject import Subject
from exaonepath.alignment.training.validation import EmbeddedPatients
from exaonepath.errors import SettingsError

BECAUSE = "not evaluated because"
NO_TRANSFER = "the split has no training patients, or no test patients, of this cohort"


@dataclass
class Context:
    """The subject of an analysis.

    Attributes:
        subject: the model, the cohort and the split.
        parts: embeddings of each part of the split.
        views: embeddings by name (`embeddings_of`) of train, validation and test patients; empty if there are no
            training or no test patients.
        labels: columns to evaluate.
        predict: class probabilities of a label, fitted once; raises `SettingsError` if there are too few patients.
        expression: the modality whose features are predicted from the slide.
        seed: seed of draws and intervals.
        notes: what was not evaluated, and why: "...: not evaluated because ...".
    """

    subject: Subject
    parts: Mapping[str, EmbeddedPatients]
    views: Sequence[Views]
    labels: Sequence[str]
    predict: Callable[[str], LabelPredictions]
    expression: str = "rna"
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, what: str, reason: object) -> None:
        """Note a part of the analysis that is missing."""
        line = f"{what}: {BECAUSE} {reason}"
        if line not in self.notes:
            self.notes.append(line)

    def need_transfer(self) -> None:
        """Raise `SettingsError` if there are no training patients to fit on, or no test patients to score."""
        if not self.views:
            raise SettingsError(NO_TRANSFER)

    def each_label(self) -> dict[str, LabelPredictions]:
        """Predictions of every label; labels without enough patients are noted."""
        self.need_transfer()
        if not self.labels:
            raise SettingsError("the cohort has no label of 2 to 20 different values")
        found = {}
        for label in self.labels:
            try:
                found[label] = self.predict(label)
            except SettingsError as exc:
                self.note(label, exc)
        return found


Analysis = Callable[[Context], dict[str, Any]]
