"""Finds the DICOM files that form one slide: its levels, label and overview are files of one series."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exaonepath.errors import SlideOpenError

_HEADER_BYTES = 1 << 20
_PREAMBLE, _MAGIC = 128, b"DICM"
_META_BYTES = 1024  # the file meta information begins with the class of the stored object
_WHOLE_SLIDE = b"1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_SERIES = b"\x20\x00\x0e\x00UI"  # (0020,000E), explicit little endian as in every file on disk, value representation UI


def is_dicom(path: Path, *, whole_slide: bool = False) -> bool:
    """Whether a file is DICOM, whatever its name is; 132 bytes are read.

    Args:
        path: any path.
        whole_slide: also check that it holds a part of a whole slide, not another kind of scan or a directory.
    """
    try:
        if not path.is_file():  # opening a pipe would block forever
            return False
        with path.open("rb") as file:
            head = file.read(_PREAMBLE + len(_MAGIC))
            if head[_PREAMBLE:] != _MAGIC:
                return False
            return not whole_slide or _WHOLE_SLIDE in file.read(_META_BYTES)
    except OSError:
        return False


def series_identity(path: Path) -> str | None:
    """The series that a DICOM file belongs to; None for a file that is not DICOM or does not state a series.

    Only the beginning of the file is read: the attribute comes before the pixels.
    """
    if not is_dicom(path):
        return None
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError:
        return None
    at = head.find(_SERIES)
    if at < 0:
        return None
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    value = head[at + 8 : at + 8 + length].rstrip(b"\0 ").decode("ascii", "replace")
    return value or None


def dicom_slide_in(folder: Path) -> Path | None:
    """The largest file of the one slide whose DICOM files a folder holds; None for other folders, and for files.

    Raises:
        SlideOpenError: the folder holds several slides.
    """
    if not folder.is_dir():
        return None
    series: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        uid = series_identity(file) if is_dicom(file, whole_slide=True) else None
        if uid is not None:
            series.setdefault(uid, []).append(file)
    if len(series) > 1:
        raise SlideOpenError(f"{folder} holds {len(series)} DICOM slides; name a file of one, or encode the folder")
    return next((max(files, key=lambda file: file.stat().st_size) for files in series.values()), None)


def lacks_full_resolution(properties: Mapping[str, str]) -> bool:
    """Whether level 0 of an opened DICOM slide is marked as resampled: the file of full resolution is missing."""
    return (
        properties.get("openslide.vendor") == "dicom"
        and properties.get("dicom.ImageType[3]", "").strip().upper() == "RESAMPLED"
    )
