"""The patch encoder with converted weights: the same embedding, and only for encoders that compute nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from exaonepath import ExaonePathPatchEncoderModel
from exaonepath.encoders.prepared import PreparedPatchEncoder, can_prepare


@pytest.fixture(scope="module")
def model(make_peaked):
    return make_peaked()


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exact(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).double()(images.double())


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_float32_is_the_encoder_up_to_rounding(model, images, backend, device):
    model = copy.deepcopy(model).to(device)
    model.set_attn_implementation(backend)
    with torch.inference_mode():
        # On the same device: convolutions of a GPU are in TF32 by default, here and there.
        found, expected = PreparedPatchEncoder(model, torch.float32)(images.to(device)), model(images.to(device))
    assert (found - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_one_graph(model, images, dtype, device):
    prepared = PreparedPatchEncoder(copy.deepcopy(model).to(device), dtype)
    torch._dynamo.reset()
    compiled = torch.compile(prepared, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.inference_mode():
        found, expected = compiled(images.to(device)), prepared(images.to(device))
    torch._dynamo.reset()
    assert (found - expected).norm() <= (2e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_less_exact_than_autocast(model, images, exact, dtype, device):
    model = copy.deepcopy(model).to(device)
    with torch.inference_mode():
        found = PreparedPatchEncoder(model, dtype)(images.to(device))
        with torch.autocast(device.type, dtype):
            autocast = model(images.to(device))
    assert found.dtype == torch.float32
    # As many roundings, of other numbers.
    assert (found.cpu() - exact).norm() <= 1.25 * (autocast.cpu() - exact).norm()


def test_other_image_sizes(model):
    images = torch.randn(2, 3, 28, 70, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, expected = PreparedPatchEncoder(model, torch.float32)(images), model(images)
    assert (found - expected).norm() <= 2e-5 * expected.norm()


def test_what_can_be_prepared(model):
    assert can_prepare(model)
    assert not can_prepare(model.patch_encoder.backbone)
    assert not can_prepare(copy.deepcopy(model).bfloat16())

    class Own(ExaonePathPatchEncoderModel):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not can_prepare(Own(model.config))
    for name in ("", "patch_encoder.backbone.norm", "patch_encoder.backbone.patch_embed.proj"):
        handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
        assert not can_prepare(model)
        handle.remove()
    assert can_prepare(model)
