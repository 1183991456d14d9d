"""Reads a manifest: a table with a row a slide, as CSV, TSV or Parquet. All problems of it are reported at once."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaonepath.errors import MissingDependencyError, SlideListError, SlideOpenError
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.slide_ids import id_collisions, why_not_an_id
from exaonepath.slides.dicom import dicom_slide_in
from exaonepath.slides.image import slide_id
from exaonepath.text import few

logger = logging.getLogger(__name__)

# Names of columns in manifests of other programs. A column with the name itself is preferred.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "slide": ("slide_path", "path", "wsi", "wsi_path", "file", "file_path", "filepath", "file_name", "filename"),
    "id": ("slide_id", "slide_name", "name"),
    "patient": ("patient_id", "case_id", "case", "subject", "subject_id", "bcr_patient_barcode"),
    "mpp": ("mpp_x", "um_per_px", "um_per_pixel", "microns_per_pixel", "pixel_size", "pixel_size_um"),
    "mask": ("mask_path", "tissue_mask"),
    "weights": ("weights_path", "repo_id"),
}
_MISSING = {"", "na", "n/a", "nan", "none", "null"}
_OTHER_KINDS = (
    (b"PK\x03\x04", "a ZIP archive, such as an Excel file"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_PARQUET = b"PAR1"

Row = tuple[str, dict[str, str]]  # where it is ("line 3"), and the values of the known columns


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        slides: in the order of the rows.
        columns: which column was read as what ("slide": "Slide Path"); only the columns that exist.
        unknown: names of the columns that are not used.
    """

    slides: tuple[CohortSlide, ...]
    columns: Mapping[str, str]
    unknown: tuple[str, ...]


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest and check all of it; slides and masks must exist, and nothing is opened.

    Columns: `slide` (required), and optionally `id` (default: the file stem), `patient`, `mpp` (micrometres per pixel
    of level 0), `mask` (file of tissue regions), `weights` (of both encoders). Other usual names of these columns are
    understood, whatever the case of letters. Relative paths are relative to the manifest's folder. An empty field, NA
    and the like mean that the value is not given.

    Args:
        path: a CSV, TSV or Parquet file. Text is UTF-8, with commas, semicolons or tabs, whatever the suffix.

    Raises:
        SlideListError: the manifest cannot be used; every reason is listed.
        MissingDependencyError: a Parquet file, and pyarrow is not installed.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise SlideListError(f"the manifest {file} cannot be read:", [exc.strerror or str(exc)]) from exc
    problems: list[str] = []
    header, rows = _parquet_rows(file, problems) if data.startswith(_PARQUET) else _text_rows(file, data, problems)
    columns = _columns(header, problems)
    slides: list[CohortSlide] = []
    named: list[tuple[str, str]] = []
    n_rows = 0
    if "slide" in columns:
        for where, values in rows:
            n_rows += 1
            slide = _slide(
                file.parent, where, {known: values.get(column, "") for known, column in columns.items()}, problems
            )
            if slide is not None:
                slides.append(slide)
                named.append((slide.id, f"{where}"))
        if not n_rows and not problems:
            problems.append("it lists no slide")
        problems += id_collisions(named)
    if problems:
        raise SlideListError(f"the manifest {file} cannot be used:", problems)
    unknown = tuple(name for name in header if name not in columns.values())
    if unknown:
        logger.warning("%s: the columns %s are not used", file, few(map(repr, unknown)))
    logger.info("%s: %s", file, ", ".join(f"{known} = column {column!r}" for known, column in columns.items()))
    return Manifest(tuple(slides), columns, unknown)


def _slide(folder: Path, where: str, row: Mapping[str, str], problems: list[str]) -> CohortSlide | None:
    """The slide of a row, or None; every problem of the row is appended."""
    before = len(problems)
    values = {known: text for known, text in row.items() if text.casefold() not in _MISSING}
    text = values.get("slide", "")
    if not text:
        problems.append(f"{where}: the slide is not given")
    path = folder / text
    if text:
        try:
            path = _existing(path)
        except SlideOpenError as exc:
            problems.append(f"{where}: {exc}")
    name = values.get("id") or slide_id(Path(text))
    if text or "id" in values:
        reason = why_not_an_id(name)
        if reason:
            what = "the id" if "id" in values else "the stem of the file, which would be the id,"
            problems.append(f"{where}: {what} {name!r} {reason}")
    mpp = _number(values["mpp"]) if "mpp" in values else None
    if "mpp" in values and mpp is None:
        problems.append(f"{where}: mpp is {values['mpp']!r}, and must be a positive number of micrometres")
    mask = folder / values["mask"] if "mask" in values else None
    if mask is not None and not _is_file(mask):
        problems.append(f"{where}: the mask {mask} is not a file")
    weights = values.get("weights")
    if weights is not None and not Path(weights).is_absolute() and _exists(folder / weights):
        weights = str(folder / weights)
    if len(problems) > before:
        return None
    return CohortSlide(path, name, values.get("patient"), mpp, mask, weights)


def _existing(path: Path) -> Path:
    """The slide file at a path: the path itself, or the file to open of the DICOM slide in a folder.

    Raises:
        SlideOpenError: there is none.
    """
    try:
        if path.is_dir():
            found = dicom_slide_in(path)
            if found is None:
                raise SlideOpenError(f"{path} is a folder, and holds no DICOM slide; name a file")
            return found
        if path.exists():
            return path
        link = path.is_symlink()
    except PermissionError as exc:
        raise SlideOpenError(f"{path} may not be read (permission denied)") from exc
    except (OSError, ValueError) as exc:  # ValueError: a null character
        raise SlideOpenError(f"{path} cannot be used ({exc})") from exc
    raise SlideOpenError(f"{path} is a link to a file that does not exist" if link else f"{path} does not exist")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < math.inf and "_" not in text else None


def _columns(header: Sequence[str], problems: list[str]) -> dict[str, str]:
    """Which column of the header is what. A column that several names could mean is a problem."""
    found: dict[str, str] = {}
    plain = {name: "_".join(name.casefold().replace("-", " ").split()) for name in header}
    twice = sorted({name for name in header if list(header).count(name) > 1})
    if twice:
        problems.append(f"the columns {few(map(repr, twice))} occur more than once")
    for known, others in _ALIASES.items():
        exact = [name for name in header if plain[name] == known]
        candidates = exact or [name for name in header if plain[name] in others]
        if len(set(candidates)) > 1:
            problems.append(
                f"the columns {' and '.join(map(repr, candidates))} could both be the {known}; call one of them {known}"
            )
        elif candidates:
            found[known] = candidates[0]
    if "slide" not in found and not any("could both be the slide" in problem for problem in problems):
        has = few(map(repr, header), 20) if header else "no column"
        problems.append(f"it lacks the column slide (the path of the slide file); it has {has}")
    return found


def _text_rows(path: Path, data: bytes, problems: list[str]) -> tuple[list[str], Iterator[Row]]:
    """The header and the rows of a CSV or TSV file."""
    for beginning, kind in _OTHER_KINDS:
        if data.startswith(beginning):
            raise SlideListError(f"the manifest {path} cannot be read:", [f"it is {kind}; save it as CSV in UTF-8"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        problem = f"it is not UTF-8 ({exc}); save it as UTF-8"
        raise SlideListError(f"the manifest {path} cannot be read:", [problem]) from exc
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines = _lines(reader, problems)
    _, header = next(lines, (0, []))

    def rows() -> Iterator[Row]:
        for line, fields in lines:
            if len(fields) != len(header):
                problems.append(f"line {line}: {len(fields)} fields, and the header has {len(header)}")
                continue
            yield f"line {line}", dict(zip(header, fields, strict=True))

    return header, rows()


def _lines(reader: Any, problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(number, fields) of every line that is not empty; a line that is no CSV ends the table."""
    while True:
        try:
            fields = [field.strip() for field in next(reader)]
        except StopIteration:
            return
        except csv.Error as exc:
            problems.append(f"line {reader.line_num}: {exc}")
            return
        if any(fields):
            yield reader.line_num, fields


def _delimiter(text: str) -> str:
    """The character that divides the header into the most columns; a comma if none does."""
    first = next((line for line in text.splitlines() if line.strip()), "")

    def fields(delimiter: str) -> int:
        try:
            return len(next(csv.reader([first], delimiter=delimiter)))
        except (csv.Error, StopIteration):
            return 0

    return max((",", "\t", ";"), key=fields)


def _parquet_rows(path: Path, problems: list[str]) -> tuple[list[str], Iterator[Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise MissingDependencyError(
            f"{path} is a Parquet file, which needs pyarrow: pip install 'exaonepath[cohort]', or save it as CSV"
        ) from exc
    try:
        with path.open("rb") as file:  # pyarrow would look for a meaning in parts of a path
            table = pyarrow.parquet.ParquetFile(file).read(use_threads=False)
        columns = [column.to_pylist() for column in table.columns]
    except (pyarrow.ArrowException, OSError, ValueError) as exc:
        raise SlideListError(f"the manifest {path} cannot be read:", [" ".join(str(exc).split())]) from exc
    header = [str(name) for name in table.column_names]

    def rows() -> Iterator[Row]:
        for number, values in enumerate(zip(*columns, strict=True), 1):
            yield f"row {number}", {name: _as_text(value) for name, value in zip(header, values, strict=True)}

    return header, rows()


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas stores whole numbers as floats if some are missing
    return str(value).strip()
