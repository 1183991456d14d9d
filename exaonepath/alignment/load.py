"""Load a trained alignment model, and compute embeddings of the patients of any cohort."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exaonepath.alignment.data.splits import Split
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.subject import Subject, load_model, open_cohort
from exaonepath.alignment.training.data import TrainingData, standardizer_of
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.validation import EmbeddedPatients
from exaonepath.errors import SettingsError
from exaonepath.text import few


@dataclass(frozen=True)
class Alignment:
    """A trained model on a device.

    Attributes:
        model: the model in evaluation mode.
        run: the folder of the run that trained it; None for a model folder.
        processes: the device.
    """

    model: ExaonePathAlignmentModel
    run: Path | None
    processes: Processes

    def embed(
        self,
        cohort: str | os.PathLike[str] | None = None,
        patients: Sequence[str] | None = None,
        *,
        by_name: bool = False,
    ) -> EmbeddedPatients:
        """Embeddings of the patients of a cohort, from all their slides and patches and all available modalities.

        Args:
            cohort: a folder with cohort.h5mu, slides.csv and labels.csv (those that exist), or a settings file with a
                table `data`; None: the cohort of the run.
            patients: their ids, in the order of the result; None: all.
            by_name: accept a cohort that lacks features of the model; they count as the training mean.

        Raises:
            SettingsError: the cohort or a patient does not exist, or the cohort has no modality of the model.
            DataFileError: a file of the cohort cannot be read. WeightsError: its features are not those of the model.
        """
        where = None if cohort is None else Path(cohort)
        known, settings = open_cohort(self.model, self.run, where, by_name=by_name)
        wanted = known.patients if patients is None else tuple(patients)
        if unknown := sorted(set(wanted) - set(known.patients)):
            raise SettingsError(f"the cohort has no patient {few(unknown)}")
        all_test = Split({"train": (), "val": (), "test": known.patients})  # no patient is used for training
        data = TrainingData(known, all_test, standardizer_of(self.model), settings, 0)
        return Subject(self.model, data, False, self.processes).embed(wanted)


def load_alignment(run: str | os.PathLike[str], *, device: str = "auto") -> Alignment:
    """Load a trained alignment model.

    Args:
        run: the folder of a run (its best model is used, else its final one), or of a model.
        device: "auto", "cpu" or "cuda".

    Raises:
        WeightsError: the model cannot be loaded. DeviceError: the device does not exist.
    """
    return Alignment(*load_model(Path(run), device))
