"""The patch encoder: golden, names, sizes, bad input."""

import numpy as np
import pytest
import torch

from exaonepath import ExaonePathPatchEncoderConfig, ExaonePathPatchEncoderModel
from exaonepath.encoders.loading import randomize
from exaonepath.errors import SettingsError


@pytest.fixture(scope="module")
def encoder():
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig()).eval()
    randomize(model, 0)
    return model


@pytest.mark.golden
@pytest.mark.parametrize(("x", "embedding"), [("x", "embedding"), ("y", "embedding_y")])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_golden(golden, fill_weights, x, embedding, backend, device):
    data = golden("patch_encoder")
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig()).eval()
    weights = fill_weights({k: tuple(v.shape) for k, v in model.state_dict().items()}, int(data["weight_seed"]))
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    model.set_attn_implementation(backend)
    with torch.inference_mode():
        ours = model.to(device)(torch.from_numpy(data[x]).to(device)).cpu().numpy()
    assert np.linalg.norm(ours - data[embedding]) <= 2e-5 * np.linalg.norm(data[embedding])


def test_parameter_names_and_shapes_are_the_published_ones(encoder):
    prefix = "patch_encoder.backbone."
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert all(name.startswith(prefix) for name in shapes)
    assert shapes[prefix + "cls_token"] == (1, 1, 768)
    assert shapes[prefix + "pos_embed"] == (1, 257, 768)
    assert shapes[prefix + "patch_embed.proj.weight"] == (768, 3, 14, 14)
    assert shapes[prefix + "blocks.11.attn.qkv.bias"] == (2304,)
    assert shapes[prefix + "blocks.11.mlp.fc1.weight"] == (3072, 768)
    assert shapes[prefix + "norm.bias"] == (768,)
    assert len(shapes) == 3 + 2 + 12 * 12 + 1


def test_both_spellings_and_batch_independence(encoder):
    images = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        positional, named = encoder(images), encoder(pixel_values=images)
        alone = encoder(images[1:2])
    assert positional.shape == (3, 768)
    assert torch.equal(positional, named)
    # float32 products may be split differently for another batch size; measured 1e-6.
    assert (alone - positional[1:2]).norm() <= 1e-5 * alone.norm()


def test_inference_and_training_paths_agree(encoder):
    images = torch.randn(1, 3, 56, 70, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        fast = encoder(images)
    slow = encoder(images)
    assert slow.requires_grad
    assert (fast - slow).norm() <= 1e-5 * fast.norm()


def test_empty_batch(encoder):
    with torch.inference_mode():
        assert encoder(torch.zeros(0, 3, 224, 224)).shape == (0, 768)


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 1, 224, 224), (1, 3, 225, 224), (1, 3, 0, 224)])
def test_shapes_that_do_not_fit_are_refused(encoder, shape):
    with pytest.raises(SettingsError):
        encoder(torch.zeros(shape))


def test_images_given_twice_or_not_at_all(encoder):
    with pytest.raises(SettingsError, match="once"):
        encoder()
    with pytest.raises(SettingsError, match="once"):
        encoder(torch.zeros(1, 3, 224, 224), pixel_values=torch.zeros(1, 3, 224, 224))
    with pytest.raises(SettingsError, match="unknown arguments: labels"):
        encoder(torch.zeros(1, 3, 224, 224), labels=None)
