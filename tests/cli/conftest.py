"""The command in this process, with a patch encoder that costs nothing."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from exaonepath.cli.app import app
from exaonepath.encoders import loading
from exaonepath.synthetic import make_slide


class ColourEncoder(torch.nn.Module):
    """Stands in for the ViT: mean colours spread over 768 numbers, in no time."""

    def forward(self, x):
        return x.mean((2, 3)).repeat(1, 256)


@pytest.fixture(scope="session")
def slide_encoder():
    """The real slide encoder with random weights, made once: making it takes longer than most commands here."""
    return loading.load_slide_encoder("random:0", device="cpu")


@pytest.fixture
def run(monkeypatch, slide_encoder):
    """Run the command with these arguments; the result has exit_code, stdout and stderr."""
    load = loading.load_slide_encoder

    def loaded_once(weights="random:0", *, device="cpu", **arguments):
        if weights == "random:0" and str(device) == "cpu" and not arguments:
            return slide_encoder
        return load(weights, device=device, **arguments)

    def fake(weights="random:0", *, device="cpu", **_):
        return loading.LoadedEncoder(ColourEncoder(), weights, f"colour:{weights}", weights.startswith("random:"))

    monkeypatch.setattr(loading, "load_patch_encoder", fake)
    monkeypatch.setattr(loading, "load_slide_encoder", loaded_once)
    monkeypatch.setattr(loading.LoadedEncoder, "device", torch.device("cpu"))
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slides") / "one.svs", 1200, 1000, fragments=1, holes=False)
