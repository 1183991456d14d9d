"""Small encoders with reproducible, peaked weights."""

from __future__ import annotations

import copy

import pytest
import torch

from exaonepath import (
    ExaonePathPatchEncoderConfig,
    ExaonePathPatchEncoderModel,
    ExaonePathSlideEncoderConfig,
    ExaonePathSlideEncoderModel,
)

TINY = {
    "input_dim": 24,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "ffn_layer": "swiglu",
    "n_storage_tokens": 3,
}


@pytest.fixture
def tiny_config() -> dict:
    return dict(TINY)


@pytest.fixture
def make_slide_encoder():
    """Build a small slide encoder in eval mode, float64, biases non-zero and attention peaked so that mistakes show."""

    def make(**changes) -> ExaonePathSlideEncoderModel:
        generator = torch.Generator().manual_seed(0)
        model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg={**TINY, **changes})).eval().double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.5 if parameter.ndim != 2 else (2.0 if "qkv" in name else 1.0) / parameter.shape[1] ** 0.5
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
                parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else noise)
        return model

    return make


@pytest.fixture
def make_slide():
    """A batch of synthetic slides: features, mask, coords, contour_index."""

    def make(batch=2, n=40, contours=4, dtype=torch.float64, seed=0, masked=True):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(batch, n, TINY["input_dim"], generator=generator, dtype=torch.float64).to(dtype)
        mask = torch.rand(batch, n, generator=generator) > 0.25 if masked else torch.ones(batch, n, dtype=torch.bool)
        coords = torch.randint(0, 200_000, (batch, n, 2), generator=generator)
        contour = torch.randint(0, contours, (batch, n), generator=generator)
        return features, mask, coords, contour

    return make


@pytest.fixture(scope="session")
def make_peaked():
    """Copy a patch encoder of two blocks, for speed, in which mistakes show: norms far from one, biases far from zero,
    attention far from uniform."""
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig(img_size=56)).eval()
    model.patch_encoder.backbone.blocks = model.patch_encoder.backbone.blocks[:2]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else (2.0 if "qkv" in name else 1.0) / parameter[0].numel() ** 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return lambda: copy.deepcopy(model)
