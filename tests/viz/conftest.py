"""A folder with the results of a slide, from encoders that cost nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from exaonepath.encoders import loading
from exaonepath.encoders.configuration import ExaonePathSlideEncoderConfig
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.slides.encode import encode_slide
from exaonepath.synthetic import make_slide

WIDTH, EMBED = 24, 32


class PatchEncoderStub(torch.nn.Module):
    """Simple numbers of each patch, in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Parameter(torch.randn(WIDTH, 48, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.mix.T


@pytest.fixture(scope="session")
def small_slide_encoder() -> loading.LoadedEncoder:
    cfg = {"input_dim": WIDTH, "embed_dim": EMBED, "depth": 2, "num_heads": 2, "ffn_layer": "swiglu32"}
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=cfg))
    loading.randomize(model, 0)
    return loading.LoadedEncoder(model.eval(), "random:0", "slide", True)


@pytest.fixture(scope="session")
def encode(small_slide_encoder):
    """`encode(slide, out)`: all stages."""
    patch_encoder = loading.LoadedEncoder(PatchEncoderStub().eval(), "random:0", "patch", True)

    def run(slide: Path, out: Path, **more):
        patching = {"step_size": 128, "patch_size": 128, "close": 20, "a_t": 0.1, "a_h": 0.1}
        keep = more.pop("keep", "all")
        return encode_slide(
            slide, out, patch_encoder, small_slide_encoder, patching=patching, keep=keep, num_workers=0, **more
        )

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory, encode) -> Path:
    """Results of the slide `slides/one.svs`; not to be changed (see `results`)."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "slides").mkdir()
    slide = make_slide(folder / "slides" / "one.svs", 1900, 1300, fragments=2, holes=False, seed=4, levels=(1, 4))
    encode(slide, folder / "out")
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of the folder that a test may change; its results state where the slide of `made` is."""
    return Path(shutil.copytree(made, tmp_path / "copied"))


@pytest.fixture
def own_weights(monkeypatch, small_slide_encoder):
    """The slide encoder that the results were made with is what is loaded."""
    monkeypatch.setattr(loading, "load_slide_encoder", lambda weights, device: small_slide_encoder)
