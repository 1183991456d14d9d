"""A small trained run that the tests of this room look at."""

import pytest

pytest.importorskip("mudata", reason="needs the extra `train`")

from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import build_settings
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort


@pytest.fixture(scope="session")
def cohort_dials():
    return SyntheticCohortSettings(
        patients=90, subtypes=2, slides_per_patient=(1, 1), patches_per_slide=16, feature_dim=8,
        rna=30, snp=15, cnv=15, methylation=20,
    )  # fmt: skip


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory, cohort_dials):
    return write_synthetic_cohort(tmp_path_factory.mktemp("cohort"), cohort_dials)


@pytest.fixture(scope="session")
def base(cohort_folder):
    wsi = {"embed_dim": 16, "depth": 2, "num_heads": 1, "n_storage_tokens": 1, "ffn_layer": "swiglu"}
    return build_settings(
        {
            "data": {
                "mudata": str(cohort_folder / "cohort.h5mu"),
                "slides": str(cohort_folder / "slides.csv"),
                "labels": str(cohort_folder / "labels.csv"),
                "stratify": "subtype",
                "validation_share": 0.1,
                "test_share": 0.3,
            },
            "model": {"projection_dim": 8, "wsi": wsi, "omics": {"embed_dim": 16, "ffn_ratio": 1.0}},
            "optimizer": {"lr": 1e-2},
            "run": {"steps": 20, "batch_size": 50, "device": "cpu", "tensorboard": False, "validate_every": 0},
        }
    )


@pytest.fixture(scope="session")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(base, folder)
    return folder
