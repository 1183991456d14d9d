"""Batches of patients: slides of different lengths and molecular profiles, some of them missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from exaonepath.alignment.modalities import WSI
from exaonepath.errors import SettingsError


@dataclass(frozen=True)
class SlidePatches:
    """Patch features of one slide.

    Attributes:
        features: [N, C] floating point.
        coords: [N, 2], (x, y) of each patch in level-0 pixels; None: positions unknown, no rotation.
        contour_index: integer [N], tissue fragment of each patch; None: no fragment restriction.
        slide: id of the slide; empty: not known.
    """

    features: Tensor
    coords: Tensor | None = None
    contour_index: Tensor | None = None
    slide: str = ""

    def __post_init__(self) -> None:
        n = self.features.shape[0]
        if self.features.ndim != 2 or not self.features.is_floating_point():
            raise SettingsError(f"slide features must be floating point [N, C], got {list(self.features.shape)}")
        if self.coords is not None and self.coords.shape != (n, 2):
            raise SettingsError(f"coords must be [{n}, 2] to match the features, got {list(self.coords.shape)}")
        if self.contour_index is not None and self.contour_index.shape != (n,):
            raise SettingsError(f"contour_index must be [{n}], got {list(self.contour_index.shape)}")


@dataclass(frozen=True)
class SlideBatch:
    """Concatenated slides, without padding.

    Attributes:
        features: [sum N, C].
        coords: [sum N, 2] or None.
        contour_index: int64 [sum N] or None.
        lengths: N of each of the S slides.
        patients: row of the patient of each slide, ascending.
    """

    features: Tensor
    coords: Tensor | None
    contour_index: Tensor | None
    lengths: tuple[int, ...]
    patients: tuple[int, ...]

    @staticmethod
    def join(slides: Sequence[Sequence[SlidePatches]], features: Tensor | None = None) -> SlideBatch | None:
        """The slides of each patient, in order; slides without patches are left out; None if no slides remain.

        Args:
            slides: slides of each patient.
            features: the features of all these slides one after the other, if there is such a tensor; else a copy is
                made.

        Raises:
            SettingsError: some slides have coordinates or fragments and others do not, or widths differ.
        """
        kept = [(row, slide) for row, of_one in enumerate(slides) for slide in of_one if slide.features.shape[0]]
        if not kept:
            return None
        widths = {slide.features.shape[1] for _, slide in kept}
        if len(widths) > 1:
            raise SettingsError(f"slides have features of different widths: {sorted(widths)}")
        return SlideBatch(
            torch.cat([slide.features for _, slide in kept]) if features is None else features,
            _join("coords", [slide.coords for _, slide in kept]),
            _join("contour_index", [slide.contour_index for _, slide in kept]),
            tuple(slide.features.shape[0] for _, slide in kept),
            tuple(row for row, _ in kept),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self) -> list[SlidePatches]:
        """The slides one by one, as views."""
        parts = [
            [None] * len(self) if part is None else part.split(self.lengths)
            for part in (self.features, self.coords, self.contour_index)
        ]
        return [SlidePatches(*tensors) for tensors in zip(*parts, strict=True)]

    def map(self, change: Callable[[Tensor], Tensor]) -> SlideBatch:
        """The slides with `change` applied to every tensor."""
        coords = None if self.coords is None else change(self.coords)
        contours = None if self.contour_index is None else change(self.contour_index)
        return SlideBatch(change(self.features), coords, contours, self.lengths, self.patients)

    def to(self, device: torch.device) -> SlideBatch:
        """The same slides on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class PatientBatch:
    """B patients.

    Attributes:
        size: B.
        slides: their slides; None if there are none.
        profiles: modality to [B, F], standardised; rows of patients without the modality may have any values.
        available: modality (the slide included) to bool [B].
        patients: B ids; empty: not known.
        patient_index: int64 [B], a number that rows of one patient share (the loss's patient id); None: not known.
    """

    size: int
    slides: SlideBatch | None = None
    profiles: Mapping[str, Tensor] = field(default_factory=dict)
    available: Mapping[str, Tensor] = field(default_factory=dict)
    patients: tuple[str, ...] = ()
    patient_index: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    @staticmethod
    def build(
        size: int,
        slides: Sequence[Sequence[SlidePatches]] | None = None,
        profiles: Mapping[str, Tensor] | None = None,
        available: Mapping[str, Tensor] | None = None,
        patients: tuple[str, ...] = (),
        patient_index: Tensor | None = None,
        features: Tensor | None = None,
    ) -> PatientBatch:
        """A batch with inferred availability: a patient has the slide modality if there is at least one patch. A
        patient has a profile according to `available` or, if it has no entry, if not all values are NaN. For
        `features`, see `SlideBatch.join`.

        Raises:
            SettingsError: numbers of rows do not match.
        """
        profiles, available = dict(profiles or {}), dict(available or {})
        for name, profile in profiles.items():
            if profile.ndim != 2 or profile.shape[0] != size:
                raise SettingsError(f"{name}: profiles must be [{size}, F], got {list(profile.shape)}")
            available.setdefault(name, ~torch.isnan(profile).all(1))
        joined = None
        if slides is not None:
            if len(slides) != size:
                raise SettingsError(f"slides of {len(slides)} patients for a batch of {size}")
            joined = SlideBatch.join(slides, features)
            has_slide = torch.zeros(size, dtype=torch.bool)
            has_slide[list(joined.patients) if joined else []] = True
            available[WSI] = has_slide & available[WSI] if WSI in available else has_slide
        for name, flags in available.items():
            if flags.shape != (size,) or flags.dtype != torch.bool:
                raise SettingsError(f"{name}: available must be bool [{size}], got {flags.dtype} {list(flags.shape)}")
        return PatientBatch(size, joined, profiles, available, patients, patient_index)

    def map(self, change: Callable[[Tensor], Tensor]) -> PatientBatch:
        """The batch with `change` applied to slides and profiles.

        `available` and `patient_index` stay on the host, which uses them to select the rows to compute.
        """
        slides = None if self.slides is None else self.slides.map(change)
        return replace(self, slides=slides, profiles={name: change(x) for name, x in self.profiles.items()})

    def to(self, device: torch.device | str) -> PatientBatch:
        """The same patients on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PatientBatch:
        """The batch in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self.map(Tensor.pin_memory)


def _join(name: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    if given and len(given) < len(parts):
        raise SettingsError(f"{len(parts) - len(given)} of {len(parts)} slides lack {name}; give all of them, or none")
    return torch.cat(given) if given else None
