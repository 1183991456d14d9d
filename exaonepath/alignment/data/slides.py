"""The table of slides, with the patient and the features file of each slide, and checks of these files."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from exaonepath.alignment.data.feature_checks import FeatureCheck, FeatureChecks, FileState
from exaonepath.alignment.data.frames import read_frame
from exaonepath.alignment.data.id_columns import patient_column_of_slides
from exaonepath.alignment.data.names import clean_name
from exaonepath.alignment.data.patient_ids import PatientIds, tcga_patient
from exaonepath.alignment.data.report import CohortReport
from exaonepath.errors import DataFileError, ExaonePathError
from exaonepath.text import few

_COLUMNS = ("patient", "slide", "features")


@dataclass(frozen=True)
class Slide:
    """One slide of a patient.

    Attributes:
        patient, slide: ids.
        features: the features file.
        n_patches: rows in it.
        dim: width of a row.
        half: whether features are stored as float16.
        header, state: `OpenFeatures.header` and `file_state` of the file when it was checked; empty or None: not known.
    """

    patient: str
    slide: str
    features: Path
    n_patches: int
    dim: int
    half: bool = False
    header: str = ""
    state: FileState | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the features, coordinates and fragments in memory, as stored."""
        return self.n_patches * (self.dim * (2 if self.half else 4) + 12)


@dataclass(frozen=True)
class SlideTable:
    """Slides of a cohort, sorted by (patient, slide); all of one feature width."""

    slides: tuple[Slide, ...] = ()

    def __len__(self) -> int:
        return len(self.slides)

    @property
    def dim(self) -> int | None:
        """Width of the patch features; None without slides."""
        return self.slides[0].dim if self.slides else None

    @property
    def patients(self) -> tuple[str, ...]:
        """Patients with a slide, sorted, each once."""
        return tuple(dict.fromkeys(slide.patient for slide in self.slides))

    def of(self, patient: str) -> tuple[Slide, ...]:
        """The slides of a patient."""
        return tuple(slide for slide in self.slides if slide.patient == patient)


def read_slides(
    path: str | os.PathLike[str],
    report: CohortReport,
    *,
    patient_ids: PatientIds = "as_is",
    expected_dim: int | None = None,
    id_column: str | None = None,
    check: FeatureCheck = "full",
) -> SlideTable:
    """Read the table of slides and check every features file.

    Args:
        path: CSV, TSV or Parquet with the columns `patient`, `features` (path, relative to the table's folder unless
            absolute) and, optionally, `slide` (else the file's stem); other columns are ignored.
        report: receives the findings; a slide that cannot be used is named there and left out.
        patient_ids: "tcga": patients are extracted from barcodes.
        expected_dim: input width of the slide encoder; None: any width, but the same for all slides.
        id_column: a name of the column of patient ids that is used if the table has it.
        check: "full": reads every file completely, so that a NaN is found before training; a file that was checked
            before and has not changed is not read again (see `feature_checks`). "again": reads all of them. "header":
            reads shapes only.
    """
    path = Path(path)
    try:
        frame = read_frame(path)
    except ExaonePathError as exc:
        report.add("error", "unreadable", "slides", str(exc))
        return SlideTable()
    frame.columns = [clean_name(name).lower() for name in frame.columns]
    try:
        if "features" not in frame.columns:
            raise DataFileError(f"{path} lacks the column features; it has {list(frame)}")
        wanted = None if id_column is None else id_column.lower()
        frame = frame.rename(columns={patient_column_of_slides(list(frame.columns), str(path), wanted): "patient"})
    except ExaonePathError as exc:
        report.add("error", "no-column", "slides", str(exc))
        return SlideTable()
    frame = frame.astype(object).where(frame.notna(), "")  # None or NaN in Parquet, by the version of pandas
    rows = []
    for at, entry in enumerate(frame.itertuples(index=False), start=2):
        record = {name: clean_name(getattr(entry, name, "") or "") for name in _COLUMNS}
        if not record["patient"] or not record["features"]:
            report.add("error", "empty-cell", "slides", f"{path}, line {at}: patient or features is empty")
            continue
        features = path.parent / record["features"]
        rows.append((record["patient"], record["slide"] or features.stem, features))
    if patient_ids == "tcga":
        rows = _from_barcodes(rows, report)
    _check_unique(rows, report)
    checks = FeatureChecks(path, check)
    try:
        slides = _check_files(sorted(rows), report, expected_dim, checks)
    except BaseException:
        checks.save()  # an interrupted check of a large cohort continues where it was
        raise
    checks.save(file for _, _, file in rows)
    if not slides and not report.errors:
        report.add("error", "no-slides", "slides", f"{path} lists no slide that can be used")
    return SlideTable(tuple(slides))


def _from_barcodes(rows: list[tuple[str, str, Path]], report: CohortReport) -> list[tuple[str, str, Path]]:
    parsed = [tcga_patient(patient) for patient, _, _ in rows]
    strange = [row[0] for row, entry in zip(rows, parsed, strict=True) if entry is None]
    if strange:
        report.add(
            "error",
            "no-tcga-barcode",
            "slides",
            f"{len(strange)} patient id(s) are no TCGA barcodes: {few(strange)}",
            patients=strange,
        )
    return [(entry[0], *row[1:]) for row, entry in zip(rows, parsed, strict=True) if entry is not None]


def _check_unique(rows: list[tuple[str, str, Path]], report: CohortReport) -> None:
    for what, counts in (
        ("slide id", Counter(slide for _, slide, _ in rows)),
        ("features file", Counter(str(features) for _, _, features in rows)),
    ):
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            report.add(
                "error",
                "duplicate-slides",
                "slides",
                f"{len(twice)} {what}(s) are listed more than once: {few(twice)}",
            )


def _check_files(
    rows: list[tuple[str, str, Path]], report: CohortReport, expected_dim: int | None, checks: FeatureChecks
) -> list[Slide]:
    absent = [row for row in rows if not row[2].is_file()]
    if absent:
        report.add(
            "error",
            "no-features-file",
            "slides",
            f"the features file of {len(absent)} slide(s) is missing: "
            f"{few([f'{slide} (patient {patient}): {file}' for patient, slide, file in absent])}",
            patients=[patient for patient, _, _ in absent],
        )
    slides: list[Slide] = []
    makers: dict[tuple[str, str], list[str]] = {}
    for patient, slide, file in rows:
        if not file.is_file():
            continue
        try:
            found = checks.check(file)
        except ExaonePathError as exc:
            report.add("error", "unreadable", "slides", f"{slide} (patient {patient}): {exc}", patients=[patient])
            continue
        slides.append(Slide(patient, slide, file, found.n_patches, found.dim, found.half, found.header, found.state))
        maker = (str(found.attrs.get("weights_fingerprint")), str(found.attrs.get("preprocessing")))
        makers.setdefault(maker, []).append(slide)
        if str(found.attrs.get("weights", "")).startswith("random:"):
            report.add("warning", "random-weights", "slides", f"{slide}: features of an encoder with random weights")
    if len(makers) > 1:
        shown = "; ".join(f"{len(names)} like {names[0]}" for names in makers.values())
        report.add(
            "warning",
            "mixed-features",
            "slides",
            f"features come from {len(makers)} encoders or preprocessings: {shown}",
        )
    empty = [slide for slide in slides if slide.n_patches == 0]
    if empty:
        report.add(
            "warning",
            "empty-slide",
            "slides",
            f"{len(empty)} slide(s) have no patch and were left out: {few([slide.slide for slide in empty])}",
            patients=[slide.patient for slide in empty],
        )
        slides = [slide for slide in slides if slide.n_patches]
    return _one_width(slides, report, expected_dim)


def _one_width(slides: list[Slide], report: CohortReport, expected_dim: int | None) -> list[Slide]:
    if not slides:
        return slides
    usual = expected_dim or Counter(slide.dim for slide in slides).most_common(1)[0][0]
    others = [slide for slide in slides if slide.dim != usual]
    if others:
        whose = "the slide encoder needs" if expected_dim else "most slides have"
        report.add(
            "error",
            "feature-width",
            "slides",
            f"{len(others)} slide(s) have features of another width than {usual}, which {whose}: "
            f"{few([f'{slide.slide} ({slide.dim})' for slide in others])}",
            patients=[slide.patient for slide in others],
        )
    return [slide for slide in slides if slide.dim == usual]
