"""A folder with the results of a slide, from encoders that cost nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stand_in_encoders import stand_in_patch_encoder, stand_in_slide_encoder

from exaonepath.encoders import loading
from exaonepath.slides.encode import encode_slide
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="session")
def small_slide_encoder() -> loading.LoadedEncoder:
    return stand_in_slide_encoder()


@pytest.fixture(scope="session")
def encode(small_slide_encoder):
    """`encode(slide, out)`: all stages."""
    patch_encoder = stand_in_patch_encoder()

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
