"""Patients as a torch data set: slides of different lengths, molecular inputs, and their availability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from exaonepath.alignment.batch import PatientBatch, SlidePatches
from exaonepath.alignment.data.cohort import Cohort
from exaonepath.alignment.data.feature_cache import Allocate, FeatureCache
from exaonepath.alignment.data.sampling import choose_patches, stream
from exaonepath.alignment.data.slides import Slide
from exaonepath.alignment.data.standardizer import Standardizer
from exaonepath.alignment.modalities import WSI, columns_of
from exaonepath.errors import SettingsError

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
    stays open between rows. The cache of features is shared with the workers of a loader (see `FeatureCache`).
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
        cache: FeatureCache | None = None,
    ) -> None:
        """Args:
            cohort: from `load_cohort`.
            standardizer: fitted on training patients; the cohort is aligned with it.
            patients: ids of the patients; None: all.
            slides: "one": one row per patient, with one random slide each epoch; "all": one row per patient with all
                its slides (evaluation); "rows": one row per slide (and one for a patient without slides).
            patch_budget: largest number of patches per slide, whole fragments (`choose_patches`); None: all.
            seed: seed of the random choices.
            cache_bytes: largest size of the cache of patch features, of this process and all workers together; 0: none.
            cache: a cache to share with other data sets, instead of one of `cache_bytes`.

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
        self.cache = FeatureCache(self.cohort.slides.slides, cache_bytes) if cache is None else cache

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
        return self.row(row, self.epoch)

    def batch(self, rows: Sequence[int], epoch: int) -> PatientBatch:
        """Rows as a batch, with the random choices of an epoch.

        The result is that of `collate_patients`. Features are read to their place in the batch, without copies.
        """
        features = _Features(sum(self._most_patches(row) for row in rows), self.cohort.slides.dim or 0)
        return collate_patients([self.row(row, epoch, features.allocate) for row in rows], features.filled)

    def _most_patches(self, row: int) -> int:
        """The largest number of patches that a row can have."""
        at, which = self._rows[row]
        slides = self._slides[self.cohort.patients[at]]
        counts = [min(slide.n_patches, self.patch_budget or slide.n_patches) for slide in slides]
        if which is not None:
            return counts[which]
        return max(counts, default=0) if self.choice == "one" else sum(counts)

    def row(self, row: int, epoch: int, allocate: Allocate | None = None) -> PatientRow:
        """Row number `row`, with the random choices of an epoch; for `allocate`, see `FeatureCache.read`."""
        at, which = self._rows[row]
        patient = self.cohort.patients[at]
        rng = stream("row", self.seed, epoch, patient, -1 if which is None else which)
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
        patches = tuple(self._patches(slide, rng, allocate) for slide in chosen)
        return PatientRow(patient, self._place[at], patches, omics, available)

    def _patches(self, slide: Slide, rng: np.random.Generator, allocate: Allocate | None) -> SlidePatches:
        budget = self.patch_budget

        def choose(coords: np.ndarray, contours: np.ndarray) -> np.ndarray | None:
            # The numbers of `rng` that are drawn depend on the slide only, not on where its features come from.
            return None if budget is None or len(coords) <= budget else choose_patches(coords, contours, budget, rng)

        found = self.cache.read(slide, choose, allocate)
        return SlidePatches(found.features, found.coords, found.contour_index, slide.slide)


class _Features:
    """Memory for the features of a batch, which is given out in parts, one after the other.

    In a worker of a loader, it is memory that the training process can use without a copy.
    """

    def __init__(self, n: int, dim: int) -> None:
        self._used = 0
        empty = torch.empty(0, dim)
        if get_worker_info() is None or not n * dim:
            self._rows = torch.empty(n, dim)
        else:  # as torch's own collate function does it
            self._rows = empty.new(empty._typed_storage()._new_shared(n * dim, device=empty.device)).resize_(n, dim)

    def allocate(self, n: int) -> Tensor:
        """The next n rows."""
        self._used += n
        return self._rows[self._used - n : self._used]

    @property
    def filled(self) -> Tensor:
        """All rows that were given out."""
        return self._rows[: self._used]


def collate_patients(rows: Sequence[PatientRow], features: Tensor | None = None) -> PatientBatch:
    """A batch of rows; slides are concatenated without padding.

    Args:
        rows: the rows.
        features: the features of all slides of the rows, if they already lie one after the other; see `PatientBatch`.
    """
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
        features,
    )
