"""A small cohort written once, and helpers to write tables of any kind."""

from __future__ import annotations

import csv

import numpy as np
import pytest

pytest.importorskip("mudata", reason="needs the extra `train`")

from exaonepath.alignment.data.cohort import load_cohort
from exaonepath.alignment.data.config import CohortConfig
from exaonepath.files.features import write_features
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort

SMALL = SyntheticCohortSettings(
    patients=40, patches_per_slide=40, rna=60, snp=30, cnv=36, methylation=40, feature_dim=8, programmes=3
)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    return write_synthetic_cohort(tmp_path_factory.mktemp("cohort") / "small", SMALL)


@pytest.fixture(scope="session")
def small(small_folder):
    return load_cohort(CohortConfig.from_folder(small_folder))


@pytest.fixture
def write_csv(tmp_path):
    """`write_csv(name, header, rows)` to a file of that name; commas for .csv, tabs otherwise."""

    def write(name, header, rows):
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if name.endswith(".csv") else "\t")
            writer.writerow(header)
            writer.writerows(rows)
        return path

    return write


@pytest.fixture
def write_slide(tmp_path):
    """`write_slide(name, n, dim)`: a features file of n patches in two fragments."""

    def write(name, n=6, dim=4, **attrs):
        features = np.random.default_rng(n).standard_normal((n, dim)).astype(np.float32)
        coords = np.stack([np.arange(n), np.zeros(n)], 1).astype(np.int32) * 256
        contours = (np.arange(n) >= n // 2).astype(np.int32)
        write_features(tmp_path / name, [(np.arange(n), features)], coords, contours, dim, (), attrs)
        return tmp_path / name

    return write
