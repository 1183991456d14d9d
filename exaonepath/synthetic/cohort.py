"""Write a synthetic cohort with simulated biology: slides, four molecular modalities, labels, survival, and the truth.

For tests, demos and trials of training settings; it has no diagnostic meaning.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, MissingDependencyError, OutputCollisionError, SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.atomic import atomic_path, ensure_folder, write_text
from exaonepath.files.features import write_features
from exaonepath.synthetic.cohort_biology import (
    MODALITIES,
    OMICS,
    Latents,
    draw_availability,
    draw_latents,
    measure_modality,
    seen_programmes,
)
from exaonepath.synthetic.cohort_morphology import PATCH_SIZE, Appearance, PatchCloud, draw_appearance, draw_slide

logger = logging.getLogger(__name__)

_FORMAT = "exaonepath-synthetic-cohort-1"
_PREFIX = {"rna": "GENE", "snp": "MUT", "cnv": "CNA", "methylation": "cg"}


@dataclass(frozen=True)
class SyntheticCohortSettings:
    """Settings of a synthetic cohort.

    Attributes:
        patients, subtypes, programmes: their numbers.
        slides_per_patient: smallest and largest number of slides.
        patches_per_slide: approximate number of patches.
        fragment_pairs: pairs of registered serial sections on a slide.
        feature_dim: width of the patch features.
        rna, snp, cnv, methylation: number of features of each modality.
        noise: standard deviation of all other variation than programmes; 1 is the default, 0 is none.
        missing: modality ("wsi" too) to the share of patients without it; every patient keeps at least two.
        dominant, dominance: the programmes are `dominance` times weaker in all modalities except the dominant one.
        batches, batch_effect: number of centres, and the size of the shift of each centre's measurements.
        spatial_periods: patches per period of the intermixed and of the nested arrangement. The defaults are periods of
            RoPE with base 10,000 at head dimensions 32 and 64.
        seed: the same settings give the same cohort.
    """

    patients: int = 600
    subtypes: int = 4
    programmes: int = 5
    slides_per_patient: tuple[int, int] = (1, 2)
    patches_per_slide: int = 120
    fragment_pairs: int = 1
    feature_dim: int = 32
    rna: int = 300
    snp: int = 80
    cnv: int = 120
    methylation: int = 200
    noise: float = 1.0
    missing: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(OMICS, 0.1))
    dominant: str | None = None
    dominance: float = 4.0
    batches: int = 3
    batch_effect: float = 0.3
    spatial_periods: tuple[float, float] = (3.1623, 10.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("patients", "subtypes", "programmes", "fragment_pairs", "feature_dim", "batches", *OMICS):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        low, high = self.slides_per_patient
        if not 1 <= low <= high:
            raise SettingsError(f"slides_per_patient is {self.slides_per_patient}; for example (1, 2) is expected")
        if self.patches_per_slide < 4 * self.fragment_pairs:
            raise SettingsError(f"patches_per_slide is {self.patches_per_slide}; a pair of fragments needs at least 4")
        if self.noise < 0 or self.batch_effect < 0 or self.dominance <= 0 or min(self.spatial_periods) <= 0:
            raise SettingsError("noise and batch_effect must be 0 or more, dominance and spatial_periods positive")
        if self.dominant is not None and self.dominant not in MODALITIES:
            raise SettingsError(f"dominant is {self.dominant!r}; it must be one of {', '.join(MODALITIES)}")
        for name, rate in self.missing.items():
            if name not in MODALITIES or not 0 <= rate <= 1:
                raise SettingsError(f"missing is {rate} for {name!r}; a share is expected, of {', '.join(MODALITIES)}")

    def gain(self, modality: str) -> float:
        """Strength of the programmes in a modality."""
        return 1.0 if self.dominant in (None, modality) else 1.0 / self.dominance

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "missing": dict(sorted(self.missing.items()))}


def write_synthetic_cohort(folder: str | os.PathLike[str], settings: SyntheticCohortSettings | None = None) -> Path:
    """Write `cohort.h5mu`, `slides.csv`, `features/*.h5`, `labels.csv` and `README.json` (settings and truth).

    A folder that already has the same cohort is not changed; an incomplete one is completed.

    Args:
        folder: output folder; created if it does not exist.
        settings: settings of the cohort; None: the defaults.

    Returns:
        The folder.

    Raises:
        OutputCollisionError: the folder has other content. OutputError: it cannot be written.
        MissingDependencyError: mudata (extra `train`) is not installed.
    """
    settings = settings or SyntheticCohortSettings()
    key = settings_hash({"format": _FORMAT, **settings.as_dict()})
    out = ensure_folder(folder)
    if _is_finished(out, key):
        logger.info("%s already has this cohort", out)
        return out
    # This file is written first, so that the folder of a killed run is recognised and completed.
    write_text(out / "README.json", json.dumps({"format": _FORMAT, "settings_hash": key, "complete": False}))
    patients = [f"P{at:05d}" for at in range(settings.patients)]
    latents = draw_latents(settings.patients, settings.programmes, settings.subtypes, settings.batches, settings.seed)
    available = draw_availability(settings.patients, dict(settings.missing), settings.seed)
    _write_slides(out, patients, latents, available[:, 0], settings, key)
    _write_labels(out / "labels.csv", patients, latents)
    _write_omics(out / "cohort.h5mu", patients, latents, available, settings)
    write_text(out / "README.json", json.dumps(_truth(patients, latents, settings, key), indent=1) + "\n")
    return out


def draw_patient_slides(
    at: int, latents: Latents, appearance: Appearance, settings: SyntheticCohortSettings
) -> list[PatchCloud]:
    """The slides of patient number `at`; they depend only on the settings and the number."""
    rng = np.random.default_rng([settings.seed, 5, at])
    low, high = settings.slides_per_patient
    programmes = seen_programmes(latents, "wsi", settings.gain("wsi"))[at]
    return [
        draw_slide(
            programmes,
            settings.spatial_periods[latents.spatial[at]],
            appearance,
            int(latents.batch[at]),
            settings.patches_per_slide,
            settings.fragment_pairs,
            settings.noise,
            rng,
        )
        for _ in range(int(rng.integers(low, high + 1)))
    ]


def _is_finished(out: Path, key: str) -> bool:
    marker = out / "README.json"
    if not marker.is_file():
        if any(out.iterdir()):
            raise OutputCollisionError(f"{out} is not empty and has no synthetic cohort; name another folder")
        return False
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise DataFileError(f"{marker} cannot be read ({exc}); name another folder") from exc
    if not isinstance(found, dict) or found.get("settings_hash") != key:
        raise OutputCollisionError(f"{out} has a cohort with other settings; name another folder, or delete it")
    return bool(found.get("complete"))


def _write_slides(
    out: Path, patients: list[str], latents: Latents, available: np.ndarray, settings: SyntheticCohortSettings, key: str
) -> None:
    folder = ensure_folder(out / "features")
    appearance = draw_appearance(
        settings.programmes, settings.batches, settings.feature_dim, settings.batch_effect, settings.seed
    )
    rows = []
    for at in np.flatnonzero(available):
        for number, cloud in enumerate(draw_patient_slides(int(at), latents, appearance, settings)):
            slide = f"{patients[at]}-{number}"
            write_features(
                folder / f"{slide}.h5",
                [(np.arange(len(cloud.features)), cloud.features)],
                cloud.coords,
                cloud.contour_index,
                settings.feature_dim,
                (),
                {"weights": "synthetic", "weights_fingerprint": key, "patch_size": PATCH_SIZE, "settings_hash": key},
            )
            rows.append((patients[at], slide, f"features/{slide}.h5"))
    _write_csv(out / "slides.csv", ("patient", "slide", "features"), rows)


def _write_labels(path: Path, patients: list[str], latents: Latents) -> None:
    columns = ("patient", "subtype", "spatial", "batch", "time", "event")
    rows = [
        (
            patient,
            f"subtype{latents.subtype[at]}",
            ("intermixed", "nested")[latents.spatial[at]],
            f"centre{latents.batch[at]}",
            f"{latents.time[at]:.1f}",
            int(latents.event[at]),
        )
        for at, patient in enumerate(patients)
    ]
    _write_csv(path, columns, rows)


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def _write_omics(
    path: Path, patients: list[str], latents: Latents, available: np.ndarray, settings: SyntheticCohortSettings
) -> None:
    try:
        import anndata
        import mudata
        import pandas as pd
        from scipy import sparse
    except ImportError as exc:
        raise MissingDependencyError(f"a cohort needs {exc.name}: pip install 'exaonepath[train]'") from exc
    tables = {}
    for column, name in enumerate(OMICS, start=1):
        rows = np.flatnonzero(available[:, column])
        if not len(rows):
            continue
        values = measure_modality(
            name,
            latents,
            getattr(settings, name),
            noise=settings.noise,
            gain=settings.gain(name),
            batch_effect=settings.batch_effect,
            seed=settings.seed,
        )[rows].astype(np.float32)
        names = pd.DataFrame(index=[f"{_PREFIX[name]}{number:05d}" for number in range(values.shape[1])])
        tables[name] = anndata.AnnData(
            sparse.csr_matrix(values) if name == "snp" else values,
            obs=pd.DataFrame(index=[patients[at] for at in rows]),
            var=names,
        )
    if not tables:
        raise SettingsError("no patient has any molecular modality: lower `missing`")
    with mudata.set_options(pull_on_update=False):
        cohort = mudata.MuData(tables)
        with atomic_path(path) as temporary:
            mudata.write_h5mu(temporary, cohort)


def _truth(patients: list[str], latents: Latents, settings: SyntheticCohortSettings, key: str) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "about": "A synthetic cohort: no real patients, no real tissue. `truth` holds the planted values.",
        "settings_hash": key,
        "settings": settings.as_dict(),
        "truth": {
            patient: {
                "subtype": int(latents.subtype[at]),
                "spatial": int(latents.spatial[at]),
                "batch": int(latents.batch[at]),
                "programmes": [round(float(value), 6) for value in latents.programmes[at]],
            }
            for at, patient in enumerate(patients)
        },
        "complete": True,
    }
