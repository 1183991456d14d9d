"""Both encoders exported by `torch.export`, against the models themselves."""

import pytest
import torch

from exaonepath import (
    ExaonePathPatchEncoderConfig,
    ExaonePathPatchEncoderModel,
    ExaonePathSlideEncoderConfig,
    ExaonePathSlideEncoderModel,
)
from exaonepath.encoders.exporting import encode_padded
from exaonepath.encoders.loading import randomize

B, N, C = 2, 13, 8


def slide_encoder(**options):
    wsi = {"input_dim": C, "embed_dim": 32, "depth": 4, "num_heads": 2, "n_storage_tokens": 2, **options}
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=wsi))
    randomize(model, 0)
    return model.eval()


def slides(n=N, seed=0):
    """Two slides, the second one padded with NaN; fragments that are not in order, and one that joins the prefix."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, n, C, generator=g)
    mask = torch.ones(B, n, dtype=torch.bool)
    mask[1, n - 4 :] = False
    features[1, n - 4 :] = torch.nan
    coords = torch.randint(0, 60_000, (B, n, 2), generator=g)
    contour = torch.randint(-1, 3, (B, n), generator=g)
    return features, mask, coords, contour


def close(one, two):
    for name in ("slide_embedding", "patch_embedding"):
        torch.testing.assert_close(one[name], two[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"norm_layer": "rmsnorm", "nope_interval": 3, "embed_use_norm": True}])
@pytest.mark.parametrize("given", ["everything", "no coords", "no contours", "features alone"])
def test_padded_tokens_with_a_mask_are_the_packed_ones(options, given):
    model = slide_encoder(**options).double()
    features, mask, coords, contour = slides()
    features = features.double()
    if given == "features alone":
        features, mask, coords, contour = torch.nan_to_num(features), torch.ones_like(mask), None, None
    coords = None if given == "no coords" else coords
    contour = None if given == "no contours" else contour
    with torch.no_grad():
        expected = model(features, mask, coords, contour)["patch_embedding"][..., C:]
        found = encode_padded(model.transformer, features, mask, coords, contour)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_slide_encoder(strict):
    """The graph holds for other values: other fragments, other padding, another seed."""
    model = slide_encoder()
    with torch.no_grad():
        exported = torch.export.export(model, slides(), strict=strict).module()
        for seed in (0, 1):
            inputs = slides(seed=seed)
            inputs[1][0, seed] = False
            close(exported(*inputs), model(*inputs))


def test_periods_stored_in_half_precision_are_the_exact_ones_in_the_graph_too():
    model, inputs = slide_encoder(), slides()
    with torch.no_grad():
        expected = model(*inputs)
        model.transformer.rope_embed.periods.copy_(model.transformer.rope_embed.periods.bfloat16())
        close(torch.export.export(model, inputs).module()(*inputs), expected)


def test_export_of_the_slide_encoder_for_any_number_of_patches():
    model = slide_encoder()
    n = torch.export.Dim("n", min=5, max=4096)
    shapes = tuple({1: n} for _ in range(4))
    with torch.no_grad():
        exported = torch.export.export(model, slides(), dynamic_shapes=shapes, strict=False).module()
        for count in (6, N, 29):
            inputs = slides(count, seed=count)
            close(exported(*inputs), model(*inputs))


def test_export_of_the_patch_encoder():
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig(img_size=28)).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        assert torch.allclose(exported(images), model(images), rtol=0, atol=1e-5)
