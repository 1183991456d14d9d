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


@pytest.fixture(scope="module")
def golden_encoder(golden, fill_weights):
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig()).eval()
    seed = int(golden("patch_encoder")["weight_seed"])
    weights = fill_weights({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return model


@pytest.mark.golden
@pytest.mark.parametrize(("x", "embedding"), [("x", "embedding"), ("y", "embedding_y")])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_golden(golden, golden_encoder, x, embedding, backend, device):
    data = golden("patch_encoder")
    golden_encoder.set_attn_implementation(backend)
    with torch.inference_mode():
        ours = golden_encoder.to(device)(torch.from_numpy(data[x]).to(device)).cpu().numpy()
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


# The last block, of which only the CLS token is used


def all_tokens(model, images):
    """The embedding through the modules alone: a hook on the last block makes the encoder call them."""
    handle = model.patch_encoder.backbone.blocks[-1].register_forward_hook(lambda *_: None)
    try:
        return model(images)
    finally:
        handle.remove()


@pytest.fixture
def peaked(make_peaked):
    return make_peaked()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [(56, 56), (28, 70)])
def test_the_last_block_of_the_cls_token_alone_gives_the_same(peaked, backend, size, device):
    model = peaked.double().to(device)
    model.set_attn_implementation(backend)
    images = torch.randn(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        # The position embedding is resized in the weights' dtype, so this is exact up to float64 rounding.
        torch.testing.assert_close(model(images), all_tokens(model, images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_last_block_in_half_precision(peaked, dtype, autocast, device):
    exact, images = peaked.double(), torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = exact(images.double())
    model = peaked.float().to(device)
    if not autocast:
        model = model.to(dtype)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=autocast):
        short, full = model(images.to(device)).cpu().double(), all_tokens(model, images.to(device)).cpu().double()
    # The same roundings in another order: neither is further from the exact result than the other by more than a half.
    assert (short - expected).norm() <= 1.5 * (full - expected).norm()


def test_gradients_of_the_last_block_of_the_cls_token_alone(peaked, device):
    model = peaked.double().to(device)
    images = torch.randn(2, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    direction = torch.randn(2, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    found = []
    for call in (lambda x: model(x), lambda x: all_tokens(model, x)):
        model.zero_grad()
        leaf = images.clone().requires_grad_()
        (call(leaf) * direction).sum().backward()
        found.append({"images": leaf.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}})
    assert all(gradient is not None for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("part", ["", ".norm1", ".attn", ".attn.qkv", ".attn.proj", ".norm2", ".mlp", ".mlp.fc1"])
def test_a_hook_in_the_last_block_sees_all_tokens(peaked, part):
    shapes = []
    module = peaked.get_submodule(f"patch_encoder.backbone.blocks.1{part}")
    module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    with torch.inference_mode():
        peaked(torch.zeros(2, 3, 56, 56))
    assert shapes == [(2, 17)]


def test_adapters_in_the_last_block_act(peaked):
    peft = pytest.importorskip("peft")
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = peaked(images)
    options = {"layers_to_transform": [1], "layers_pattern": "blocks", "init_lora_weights": False}
    tuned = peft.get_peft_model(peaked, peft.LoraConfig(target_modules=["qkv", "fc1"], **options)).eval()
    with torch.no_grad():
        adapted = tuned(images)
        merged = tuned.merge_and_unload()(images)
    assert not torch.allclose(adapted, plain, rtol=0, atol=1e-3)
    assert (merged - adapted).norm() <= 1e-4 * adapted.norm()
