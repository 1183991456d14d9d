"""Patients as a torch data set: slides of different lengths, molecular inputs, and their availability."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from exaonepath.alignment.batch import PatientBatch, SlidePatches
from exaonepath.alignment.data.cohort import Cohort
from exaonepath.alignment.data.sampling import choose_patches, stream
from exaonepath.alignment.data.slides import Slide
from exaonepath.alignment.data.standardizer import Standardizer
from exaonepath.alignment.modalities import WSI, columns_of
from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.features import FeatureSet, read_features

SlideChoice = Literal["one", "all", "rows"]


@dataclass(frozen=True)
class PatientRow:
    """One row of a batch: a patient with the slides chosen for it.

    Attributes:
        patient: id.
        patient_index: its index in `Cohort.patients`; rows of one patient share it (the loss's patient id).
        slides: none, one or several.
        omics: modality to float32 [F]; zeros if the patient lacks it.
        available: bool [M], in the order of `columns_of(omics)`.
    """

    patient: str
    patient_index: int
    slides: tuple[SlidePatches, ...]
    omics: dict[str, Tensor]
    available: Tensor


class PatientDataset(Dataset[PatientRow]):
    """Patients of a cohort as inputs of a model.

    The content of row i of epoch e depends only on (seed, e, patient), not on the worker, the order, or earlier rows.
    The epoch is in shared memory, so `set_epoch` also has an effect on workers that persist between epochs. No file
    stays open between rows. Each process caches features of up to `cache_bytes`.
    """

    def __init__(
        self,
        cohort: Cohort,
        standardizer: Standardizer,
        patients: Sequence[str] | None = None,
        *,
        slides: SlideChoice = "one",
        patch_budget: int | None = None,
        seed: int = 0,
        cache_bytes: int = 1 << 30,
    ) -> None:
        """Args:
            cohort: from `load_cohort`.
            standardizer: fitted on training patients; the cohort is aligned with it.
            patients: ids of the patients; None: all.
            slides: "one": one row per patient, with one random slide each epoch; "all": one row per patient with all
                its slides (evaluation); "rows": one row per slide (and one for a patient without slides).
            patch_budget: largest number of patches per slide, whole fragments (`choose_patches`); None: all.
            seed: seed of the random choices.
            cache_bytes: largest size of the patch features that each process caches; 0: no cache.

        Raises:
            CohortError: the cohort does not match the standardizer. SettingsError: an argument is not valid.
        """
        if slides not in ("one", "all", "rows"):
            raise SettingsError(f"slides is {slides!r}; it must be one, all or rows")
        if patch_budget is not None and patch_budget < 1:
            raise SettingsError(f"the patch budget is {patch_budget}; it must be 1 or more")
        self.choice, self.patch_budget, self.seed = slides, patch_budget, seed
        self.cohort = cohort if patients is None else cohort.subset(patients)
        self.omics, self.report = standardizer.align(self.cohort)
        self.dims = standardizer.manifest.dims
        self.columns = columns_of(self.dims)
        # Indices in the whole cohort, so that they are equal in all subsets of a cohort.
        place = {patient: at for at, patient in enumerate(cohort.patients)}
        self._place = [place[patient] for patient in self.cohort.patients]
        self._row_of = {
            name: {patient: row for row, patient in enumerate(rows.table.patients)} for name, rows in self.omics.items()
        }
        self._slides: dict[str, list[Slide]] = {patient: [] for patient in self.cohort.patients}
        for slide in self.cohort.slides.slides:
            self._slides[slide.patient].append(slide)
        self._rows = self._make_rows()
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._cache = FeatureCache(cache_bytes)

    def _make_rows(self) -> list[tuple[int, int | None]]:
        """(patient, slide or None) of each row, by number."""
        rows: list[tuple[int, int | None]] = []
        for at, patient in enumerate(self.cohort.patients):
            n = len(self._slides[patient])
            rows += [(at, k) for k in range(n)] if self.choice == "rows" and n else [(at, None)]
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def epoch(self) -> int:
        """The epoch of the random choices."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Use the random choices of this epoch, also in every worker; call it before an iteration."""
        self._epoch.fill_(epoch)

    def __getitem__(self, row: int) -> PatientRow:
        at, which = self._rows[row]
        patient = self.cohort.patients[at]
        rng = stream("row", self.seed, self.epoch, patient, -1 if which is None else which)
        slides = self._slides[patient]
        if which is not None:
            chosen = [slides[which]]
        elif self.choice == "one" and slides:
            chosen = [slides[int(rng.integers(len(slides)))]]
        else:
            chosen = slides
        omics = {name: torch.zeros(dim) for name, dim in self.dims.items()}
        available = torch.zeros(len(self.columns), dtype=torch.bool)
        available[self.columns.index(WSI)] = bool(chosen)
        for name, rows in self.omics.items():
            table_row = self._row_of[name].get(patient)
            if table_row is not None:
                omics[name] = torch.from_numpy(rows.rows([table_row])[0])
                available[self.columns.index(name)] = True
        patches = tuple(self._patches(slide, rng) for slide in chosen)
        return PatientRow(patient, self._place[at], patches, omics, available)

    def _patches(self, slide: Slide, rng: np.random.Generator) -> SlidePatches:
        stored = self._cache.read(slide.features, slide.dim)
        assert stored.coords is not None
        features, coords, contours = stored.features, stored.coords, stored.contour_index
        if len(features) != slide.n_patches:
            raise DataFileError(
                f"{slide.features} changed since the cohort was checked: {len(features)} patches, not {slide.n_patches}"
            )
        if self.patch_budget is not None and len(features) > self.patch_budget:
            rows = choose_patches(coords, contours, self.patch_budget, rng)
            features, coords, contours = features[rows], coords[rows], contours[rows]
        # Copies, because a caller may change a row in place, which must not change the cache.
        return SlidePatches(torch.tensor(features), torch.tensor(coords), torch.tensor(contours), slide.slide)


class FeatureCache:
    """A cache of features files that drops the least recently used first. Its content is not sent to other
    processes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._held: OrderedDict[Path, FeatureSet] = OrderedDict()

    def read(self, path: Path, dim: int) -> FeatureSet:
        """The contents of a features file; raises `DataFileError` if it cannot be read."""
        if path in self._held:
            self._held.move_to_end(path)
            return self._held[path]
        features = read_features(path, expected_dim=dim)
        size = _n_bytes(features)
        if size <= self.max_bytes:
            self._held[path] = features
            self.n_bytes += size
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= _n_bytes(self._held.popitem(last=False)[1])
        return features

    def __getstate__(self) -> dict[str, Any]:
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.max_bytes, self.n_bytes, self._held = state["max_bytes"], 0, OrderedDict()


def _n_bytes(features: FeatureSet) -> int:
    coords = 0 if features.coords is None else features.coords.nbytes
    return features.features.nbytes + coords + features.contour_index.nbytes


def collate_patients(rows: Sequence[PatientRow]) -> PatientBatch:
    """A batch of rows; slides are concatenated without padding."""
    names = rows[0].omics if rows else {}
    columns = columns_of(names)
    available = (
        torch.stack([row.available for row in rows]) if rows else torch.zeros((0, len(columns)), dtype=torch.bool)
    )
    has_slides = any(row.slides for row in rows)
    held = [name for name in columns if name in names or (name == WSI and has_slides)]
    return PatientBatch.build(
        len(rows),
        [row.slides for row in rows] if has_slides else None,
        {name: torch.stack([row.omics[name] for row in rows]) for name in names},
        {name: available[:, columns.index(name)] for name in held},
        tuple(row.patient for row in rows),
        torch.tensor([row.patient_index for row in rows], dtype=torch.int64),
    )
