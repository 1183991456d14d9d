"""Results of two slides, made once with encoders that cost nothing, and the libraries that read the exports."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from exaonepath.encoders.configuration import ExaonePathSlideEncoderConfig
from exaonepath.encoders.loading import LoadedEncoder, randomize
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.encode import encode_slide
from exaonepath.slides.image import SlideImage
from exaonepath.synthetic import make_slide

WIDTH, EMBED = 24, 32
FIRST, SECOND = "first", "zweite Färbung.1"

# `make test-exchange` installs the tools that read the exports next to the environment: scanpy, squidpy, hs2p, ...
if (site := os.environ.get("EXAONEPATH_EXCHANGE_SITE")) and site not in sys.path:
    sys.path.append(site)


class PatchEncoderStub(torch.nn.Module):
    """Simple numbers of each patch, in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Parameter(torch.randn(WIDTH, 48, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.mix.T


@pytest.fixture(scope="session")
def slide_encoder() -> LoadedEncoder:
    cfg = {"input_dim": WIDTH, "embed_dim": EMBED, "depth": 2, "num_heads": 2, "ffn_layer": "swiglu32"}
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=cfg))
    randomize(model, 0)
    return LoadedEncoder(model.eval(), "random:0", "slide", True)


@pytest.fixture(scope="session")
def made(tmp_path_factory, slide_encoder) -> Path:
    """An output folder of two slides, and `slides/`; not to be changed (see `results`)."""
    folder = tmp_path_factory.mktemp("exchange")
    slides = folder / "slides"
    slides.mkdir()
    make_slide(slides / f"{FIRST}.svs", 1800, 1500, fragments=2, holes=False, seed=3)
    make_slide(slides / "second.svs", 1500, 1100, fragments=2, holes=False, seed=4, mpp=0.25)
    patch_encoder = LoadedEncoder(PatchEncoderStub().eval(), "some/Encoder-1", "patch", True)
    patching = {"patch_size": 128, "close": 40, "a_t": 0.2, "a_h": 0.2}
    given = (CohortSlide(slides / f"{FIRST}.svs", FIRST, "P1"), CohortSlide(slides / "second.svs", SECOND))
    for slide in given:
        with SlideImage(slide.path, name=slide.id) as image:
            encode_slide(
                image,
                folder,
                patch_encoder,
                slide_encoder,
                patching=patching,
                keep="all",
                num_workers=0,
                patient=slide.patient,
            )
    return folder


@pytest.fixture
def results(made, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "results"))
