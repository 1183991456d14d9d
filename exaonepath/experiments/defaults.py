"""What `exaonepath ablate` trains when given no settings: a small model, a synthetic cohort, half a minute a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort
from exaonepath.training.settings import TrainSettings, build_settings

COHORT = SyntheticCohortSettings(patients=400, slides_per_patient=(1, 1), patches_per_slide=96)
LABELS = ("subtype", "spatial")

_SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"stratify": "subtype", "check_features": "header", "validation_share": 0.1, "test_share": 0.2},
    "model": {
        "projection_dim": 32,
        "wsi": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 1,
            "n_storage_tokens": 1,
            "ffn_layer": "swiglu",
            "attn_drop": 0.0,
            "ffn_drop": 0.0,
        },
        "omics": {"embed_dim": 64, "ffn_ratio": 2.0, "dropout": 0.2},
    },
    "optimizer": {"lr": 3e-3},
    "run": {
        "steps": 80,
        "batch_size": 112,
        "device": "cpu",
        "precision": "float32",
        "tensorboard": False,
        "validate_every": 0,
        "log_every": 10,
    },
}


def synthetic_base(folder: Path) -> TrainSettings:
    """Base settings on the synthetic cohort in `folder`, which is written where it is not there yet."""
    write_synthetic_cohort(folder, COHORT)
    files = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
    data = {**_SETTINGS["data"], **{key: str(folder / name) for key, name in files.items()}}
    return build_settings({**_SETTINGS, "data": data})
