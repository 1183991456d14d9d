"""Attention maps equal the softmax written out, and nothing crosses from fragment to fragment in RoPE blocks."""

import pytest
import torch

from exaonepath.encoders.attention_map import attention_map, mean_attention
from exaonepath.encoders.configuration import ExaonePathSlideEncoderConfig
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SettingsError
from exaonepath.reference.slide_encoder import slide_encoder

CFG = {"input_dim": 12, "embed_dim": 32, "depth": 4, "num_heads": 2, "ffn_layer": "swiglu", "n_storage_tokens": 3}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(CFG))


@pytest.fixture(scope="module")
def slide():
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(50, 12, generator=g),
        torch.randint(0, 30, (50, 2), generator=g) * 256,
        torch.randint(0, 3, (50,), generator=g),
    )


def written_out(model, features, coords, contour):
    """Probabilities [block][H, T, T] of the reference encoder, in the caller's order: prefix tokens, then patches."""
    found = []

    def attention(q, k, v, mask):
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        found.append(p[0])
        return p @ v

    prefix = "slide_encoder.wsi_encoder.transformer."
    state = {name.removeprefix(prefix): value for name, value in model.state_dict().items()}
    config = {**model.config.wsi, "periods": model.transformer.rope_embed(), "norm_eps": 1e-5}
    slide_encoder(
        state,
        config,
        features[None],
        torch.ones(1, len(features), dtype=torch.bool),
        None if coords is None else coords[None],
        None if contour is None else contour[None],
        attention=attention,
    )
    return found


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["coords and fragments", "no coords", "no fragments"])
def test_equals_the_softmax_written_out(encoder, slide, backend, positions):
    features, coords, contour = slide
    coords = None if positions == "no coords" else coords
    contour = None if positions == "no fragments" else contour
    queries = [0, 7, 49, *range(10, 30)]  # more than the head dimension of 16: two backward passes
    encoder.set_attn_implementation(backend)
    maps = attention_map(encoder, features, coords, contour, queries)
    expected = written_out(encoder, features, coords, contour)
    assert [m.block for m in maps] == [0, 1, 2, 3]
    assert [m.restricted for m in maps] == [False, True, False, True]
    for found, p in zip(maps, expected, strict=True):
        rows = p[:, 4:][:, found.queries].transpose(0, 1)
        # Weights are float32; probabilities to the error of float32 scores of size 10.
        torch.testing.assert_close(found.patches, rows[:, :, 4:].float(), atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(found.prefix, rows[:, :, :4].float(), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_nothing_crosses_in_rope_blocks(encoder, slide, backend):
    features, coords, contour = slide
    encoder.set_attn_implementation(backend)
    for found in attention_map(encoder, features, coords, contour, range(50)):
        total = found.patches.sum(-1) + found.prefix.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
        other = contour[:, None] != contour
        across = found.patches.transpose(0, 1)[:, other]
        if found.restricted:
            assert (across == 0).all()  # exactly, not nearly
            assert (found.prefix == 0).all()
            assert (found.crossing(contour) == 0).all()
        else:
            assert (across > 0).any()
            assert found.crossing(contour).min() > 0.1


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["coords and fragments", "no fragments"])
def test_the_mean_is_that_of_all_queries(encoder, slide, backend, positions):
    features, coords, contour = slide
    contour = None if positions == "no fragments" else contour
    encoder.set_attn_implementation(backend)
    single = attention_map(encoder, features, coords, contour, range(50))
    mean = mean_attention(encoder, features, coords, contour)
    assert [(m.block, m.restricted) for m in mean] == [(m.block, m.restricted) for m in single]
    for one, found in zip(single, mean, strict=True):
        # Sums of 50 float32 numbers in another order: 50 roundings of the sum.
        error = 50 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(found.patches, one.patches.mean(0), atol=error, rtol=error)
        torch.testing.assert_close(found.prefix, one.prefix.mean(0), atol=error, rtol=error)
        total = found.patches.sum(-1) + found.prefix.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    assert [m.block for m in mean_attention(encoder, features, coords, contour, blocks=[2])] == [2]


def test_the_mean_of_one_patch_and_of_none(encoder, slide):
    features, coords, contour = (array[:1] for array in slide)
    one, mean = (
        attention_map(encoder, features, coords, contour, [0]),
        mean_attention(encoder, features, coords, contour),
    )
    for single, found in zip(one, mean, strict=True):
        torch.testing.assert_close(found.patches, single.patches[0])
    with pytest.raises(SettingsError, match="no patches"):
        mean_attention(encoder, *(array[:0] for array in slide))


def test_bad_queries_are_named(encoder, slide):
    with pytest.raises(SettingsError, match="0 to 49"):
        attention_map(encoder, *slide, [50])
    with pytest.raises(SettingsError, match="blocks 0 to 3"):
        attention_map(encoder, *slide, [0], blocks=[4])
