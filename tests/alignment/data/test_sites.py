"""Where the site of a patient is told, and splits that keep a site together."""

from types import SimpleNamespace

import pandas as pd
import pytest

from exaonepath.alignment.data.sites import sites_of
from exaonepath.alignment.data.splits import split_patients
from exaonepath.errors import SettingsError

BARCODES = [f"TCGA-{site}-{number:04d}" for site in ("3C", "A2", "BH") for number in range(4)]


def cohort(patients, **columns):
    return SimpleNamespace(patients=tuple(patients), labels=pd.DataFrame(columns, index=list(patients)))


def test_barcodes_a_column_and_neither():
    tcga = cohort(BARCODES, age=range(12))
    assert sites_of(tcga)["TCGA-A2-0003"] == sites_of(tcga, "tcga")["TCGA-A2-0003"] == "A2"
    plain = cohort([f"P{k}" for k in range(4)], Centre=["x", "y", None, "y"])
    assert sites_of(plain) == {"P0": "x", "P1": "y", "P3": "y"}
    assert sites_of(cohort(["P0", "P1"], age=[3, 4])) == {}
    # A column with a usual name is more certain than barcodes, and one that is named is used.
    both = cohort(BARCODES, site=["s"] * 12, other=["o"] * 12)
    assert set(sites_of(both).values()) == {"s"}
    assert set(sites_of(both, "other").values()) == {"o"}


def test_what_tells_no_site_is_named():
    with pytest.raises(SettingsError, match="no column 'ward' tells the site; the labels have age"):
        sites_of(cohort(["P0"], age=[3]), "ward")
    with pytest.raises(SettingsError, match="no patient of the cohort has a TCGA barcode"):
        sites_of(cohort(["P0"], age=[3]), "tcga")


def test_a_site_is_never_divided():
    patients = [f"P{k:03d}" for k in range(200)]
    groups = {p: f"S{(k * k) % 23}" for k, p in enumerate(patients)}
    fractions = {"train": 0.7, "val": 0.1, "test": 0.2}
    split = split_patients(patients, fractions=fractions, groups=groups)
    assert sorted(p for part in split.parts.values() for p in part) == patients
    owners = {}
    for name, part in split.parts.items():
        for patient in part:
            assert owners.setdefault(groups[patient], name) == name
    largest = max(sum(g == s for g in groups.values()) for s in set(groups.values()))
    for name, share in fractions.items():
        assert abs(len(split[name]) - 200 * share) <= largest
    assert split == split_patients(patients[::-1], fractions=fractions, groups=groups)
    assert split != split_patients(patients, fractions=fractions, groups=groups, seed=1)
    with pytest.raises(SettingsError, match="2 groups are too few"):
        split_patients(patients, fractions=fractions, groups={p: f"S{k % 2}" for k, p in enumerate(patients)})
