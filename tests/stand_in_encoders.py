"""Encoders that cost nothing, for tests of what is done with their numbers."""

from __future__ import annotations

import torch

from exaonepath.encoders.configuration import ExaonePathSlideEncoderConfig
from exaonepath.encoders.loading import LoadedEncoder, randomize
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel

WIDTH, EMBED = 24, 32


class PatchEncoderStub(torch.nn.Module):
    """[B, 3, side, side] to [B, WIDTH]: simple numbers of each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Parameter(torch.randn(WIDTH, 48, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.mix.T


def stand_in_patch_encoder(weights: str = "random:0", is_random: bool = True) -> LoadedEncoder:
    return LoadedEncoder(PatchEncoderStub().eval(), weights, "patch", is_random)


def stand_in_slide_encoder(weights: str = "random:0", is_random: bool = True) -> LoadedEncoder:
    cfg = {"input_dim": WIDTH, "embed_dim": EMBED, "depth": 2, "num_heads": 2, "ffn_layer": "swiglu32"}
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=cfg))
    randomize(model, 0)
    return LoadedEncoder(model.eval(), weights, "slide", is_random)
