"""Reader of a small text table (slides, labels), with every cell as written."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from exaonepath.alignment.data.dialect import sample_of
from exaonepath.alignment.data.matrices import not_swallowed
from exaonepath.alignment.data.names import clean_name
from exaonepath.alignment.data.text_files import UNREADABLE, check_file, is_parquet, short_reason
from exaonepath.errors import DataFileError


def read_frame(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A small text table (slides, labels) from CSV, TSV or Parquet, with all columns; ids stay text.

    Lines that begin with "#" before the header (in files of cBioPortal) are skipped.

    Raises:
        DataFileError: the file is missing, empty or not a table.
    """
    path = Path(path)
    check_file(path)
    try:
        if is_parquet(path):
            return pd.read_parquet(path)
        sample = sample_of(path)
        # No cell is converted to a number or a missing value, so ids such as "0012" or "NA" are not changed.
        frame = pd.read_csv(
            path, sep=sample.separator, skiprows=sample.skip, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    except UNREADABLE as exc:
        raise DataFileError(
            f"{path} cannot be read as a table ({short_reason(exc)}); CSV, TSV or Parquet is expected"
        ) from exc
    if sample.separator == "\t":
        for name in frame.columns:
            not_swallowed(path, (cell for cell in frame[name] if isinstance(cell, str) and "\t" in cell))
    return frame.rename(columns=clean_name)
