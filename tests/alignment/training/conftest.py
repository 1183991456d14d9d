"""A small synthetic cohort, and settings that train on it in a second."""

from __future__ import annotations

import pytest

pytest.importorskip("anndata", reason="needs the extra `train`")

from exaonepath.alignment.training.settings import TrainSettings, build_settings
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory):
    """30 patients with small slides of two fragments; some modalities missing."""
    folder = tmp_path_factory.mktemp("cohort")
    write_synthetic_cohort(
        folder,
        SyntheticCohortSettings(
            patients=30,
            patches_per_slide=16,
            feature_dim=8,
            rna=20,
            snp=10,
            cnv=12,
            methylation=14,
            missing={"snp": 0.3, "wsi": 0.1},
        ),
    )
    return folder


@pytest.fixture
def make_settings(cohort_folder):
    """Settings as nested tables over small defaults: `make(run={"epochs": 2})`."""

    def make(**tables) -> TrainSettings:
        base = {
            "data": {
                "mudata": str(cohort_folder / "cohort.h5mu"),
                "slides": str(cohort_folder / "slides.csv"),
                "labels": str(cohort_folder / "labels.csv"),
                "validation_share": 0.2,
                "test_share": 0.1,
            },
            "model": {
                "projection_dim": 8,
                "wsi": {"embed_dim": 16, "depth": 2, "num_heads": 2, "n_storage_tokens": 1, "ffn_layer": "swiglu"},
                "omics": {"embed_dim": 12, "ffn_ratio": 2.0, "dropout": 0.2},
            },
            "optimizer": {"lr": 3e-3, "warmup": 2},
            "run": {"epochs": 3, "batch_size": 10, "device": "cpu", "tensorboard": False, "monitor": False},
        }
        for name, table in tables.items():
            base[name] = {**base.get(name, {}), **table}
        return build_settings(base)

    return make
