"""Which DICOM files are one slide: its levels, label and overview are files of one series."""

from __future__ import annotations

from pathlib import Path

_HEADER_BYTES = 1 << 20
_PREAMBLE = 128
_SERIES = b"\x20\x00\x0e\x00UI"  # (0020,000E), explicit little endian as in every file on disk, value a UID


def series_identity(path: Path) -> str | None:
    """The series a DICOM file belongs to; None for a file that is not DICOM or does not say.

    Only the beginning of the file is read: the attribute comes before the pixels.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError:
        return None
    if head[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
        return None
    at = head.find(_SERIES)
    if at < 0:
        return None
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    value = head[at + 8 : at + 8 + length].rstrip(b"\0 ").decode("ascii", "replace")
    return value or None
