"""Default settings of `exaonepath ablate`: a small model and a synthetic cohort, with one minute per run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from exaonepath.alignment.training.settings import TrainSettings, build_settings
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort

COHORT = SyntheticCohortSettings(patients=1000, slides_per_patient=(1, 1))
LABELS = ("subtype", "spatial")

_SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"stratify": "subtype", "check_features": "header", "validation_share": 0.1, "test_share": 0.2},
    "model": {
        # The figures of docs/ablations.md are those of this preset, whatever becomes the default.
        "preset": "published",
        "projection_dim": 32,
        "wsi": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "n_storage_tokens": 1,
            "ffn_layer": "swiglu64",
            "attn_drop": 0.0,
            "ffn_drop": 0.0,
            # Periods that suit slides of a hundred patches; with base 10,000, half of the pairs would hardly rotate.
            "pos_embed_rope_min_period": 2,
            "pos_embed_rope_max_period": 20,
        },
        "omics": {"embed_dim": 64, "ffn_ratio": 2.0, "dropout": 0.3, "input_dropout": 0.2},
    },
    "optimizer": {"lr": 6e-3, "weight_decay": 0.3},
    "run": {
        "steps": 300,
        "batch_size": 100,
        "device": "cpu",
        "precision": "float32",
        "tensorboard": False,
        "validate_every": 0,
        "log_every": 10,
    },
}


def synthetic_base(folder: Path, draw: int = 0) -> TrainSettings:
    """Base settings with draw number `draw` of the synthetic cohort, which is written into `folder` if it is not there.

    Draws differ in everything that is random: patients, the effects of programmes on features, and slides.
    """
    write_synthetic_cohort(folder, replace(COHORT, seed=COHORT.seed + draw))
    files = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
    data = {**_SETTINGS["data"], **{key: str(folder / name) for key, name in files.items()}}
    return build_settings({**_SETTINGS, "data": data})
