"""Which site a patient comes from, and splits that keep a site together."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pandas as pd

from exaonepath.alignment.data.cohort import Cohort
from exaonepath.errors import SettingsError

#: name of the source "TCGA barcodes", where a column may be named
TCGA = "tcga"
# The second field of a barcode is the tissue source site.
_BARCODE = re.compile(r"TCGA[-.]([0-9A-Z]{2})[-.][0-9A-Z]{4}")
_COLUMNS = ("site", "centre", "center", "batch", "hospital", "tissue_source_site", "institution")
_FEWEST_BARCODES = 0.9  # share of patients


def sites_of(cohort: Cohort, source: str | None = None) -> dict[str, str]:
    """Patient to site; patients without a known site are left out.

    Args:
        cohort: the cohort.
        source: a column of the labels, or "tcga" for the second field of barcodes; None: a column with a usual name
            (site, centre, center, batch, hospital, tissue_source_site, institution), else barcodes, else nothing.

    Raises:
        SettingsError: there is no such column, or no patient has a barcode.
    """
    columns = {str(name).lower(): name for name in cohort.labels.columns}
    if source is None:
        name = next((columns[name] for name in _COLUMNS if name in columns), None)
        barcodes = _from_barcodes(cohort)
        if name is None:
            return barcodes if len(barcodes) >= _FEWEST_BARCODES * len(cohort.patients) else {}
        return _from_column(cohort, name)
    if source == TCGA:
        if not (found := _from_barcodes(cohort)):
            raise SettingsError('site = "tcga", but no patient of the cohort has a TCGA barcode')
        return found
    if source not in cohort.labels.columns:
        names = ", ".join(map(str, cohort.labels.columns)) or "none"
        raise SettingsError(f'no column {source!r} tells the site; the labels have {names}; "tcga" reads barcodes')
    return _from_column(cohort, source)


def _from_barcodes(cohort: Cohort) -> dict[str, str]:
    found = ((patient, _BARCODE.match(patient.upper())) for patient in cohort.patients)
    return {patient: match[1] for patient, match in found if match}


def _from_column(cohort: Cohort, name: object) -> dict[str, str]:
    values: Mapping[str, object] = cohort.labels[name].reindex(list(cohort.patients)).to_dict()
    return {patient: str(value) for patient, value in values.items() if not pd.isna(value)}
