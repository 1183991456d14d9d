"""Opening of text tables: for files of another kind, the error names the kind and states what to do."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path
from typing import Any

from exaonepath.errors import DataFileError

# Errors for a text or Parquet file that is damaged, incomplete or of another kind: incomplete gzip raises EOFError.
UNREADABLE = (ValueError, OSError, EOFError, zlib.error, csv.Error)

_HEAD = 4096
_SAVE = "save it as CSV (UTF-8)"
_SIGNATURES = (
    (b"PK\x03\x04", f"an Excel workbook or another zip archive; {_SAVE}, or unpack it"),
    (b"\xd0\xcf\x11\xe0", f"an Excel workbook (.xls); {_SAVE}"),
    (b"\x1f\x8b", "compressed by gzip, but its name does not end in .gz; rename it"),
    (b"BZh", "compressed by bzip2; decompress it"),
    (b"\xfd7zXZ", "compressed by xz; decompress it"),
    (b"\x89HDF", "HDF5; name it .h5ad or .h5mu, or give `format: anndata`"),
    (b"PAR1", "Parquet; rename it to end in .parquet"),
    (b"##fileformat=VCF", "a VCF; convert it to MAF (vcf2maf), or to a matrix of patients x genes"),
    (b"#1.2", "GCT; remove its first two lines, and name it .tsv (its column Description is left out by itself)"),
    (b"#1.3", "GCT 1.3; remove its first two lines and the rows and columns of annotation, and name it .tsv"),
    (b"%PDF", f"a PDF; {_SAVE}"),
    (b"<", "HTML or XML, possibly a web page instead of the table; download the table itself"),
)


def open_text(path: Path) -> Any:
    """The file as lines of text, decompressed if its name ends in .gz."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def check_file(path: Path) -> None:
    """Raise `DataFileError` if the file does not exist."""
    if not path.is_file():
        raise DataFileError(f"{path}: no such file")


def short_reason(exc: BaseException) -> str:
    """The message of an exception, in one line of at most 200 characters; for a wrong encoding, with advice."""
    if isinstance(exc, UnicodeDecodeError):
        byte = exc.object[exc.start]
        return f"it is not UTF-8 (byte 0x{byte:02x}), possibly Windows cp1252; save it as UTF-8, or use iconv"
    return " ".join(str(exc).split())[:200] or type(exc).__name__


def refuse_foreign(path: Path) -> None:
    """Check the first bytes, and raise an error if they are those of another kind of file.

    Raises:
        DataFileError: the file is of another kind. One of `UNREADABLE`: it cannot be read at all.
    """
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.read(_HEAD)
    for signature, what in _SIGNATURES:
        if head.removeprefix(b"\xef\xbb\xbf").startswith(signature):
            raise DataFileError(f"{path} cannot be read: it is {what}")
    # Text with two bytes per character: it has a byte order mark, or every second byte is zero.
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(head) > 3 and 0 in (head[0], head[1]) and 0 in head[2:4]):
        raise DataFileError(
            f"{path} cannot be read: it is UTF-16 (Excel's 'Unicode text'); save it as UTF-8, or run iconv -f utf-16 "
            "-t utf-8"
        )


def is_parquet(path: Path) -> bool:
    """Whether the name is of a Parquet file."""
    return path.suffix.lower() in (".parquet", ".pq")
