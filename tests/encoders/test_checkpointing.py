"""Activation checkpointing: the same step bit for bit, in a fraction of the memory."""

import pytest
import torch

from exaonepath import ExaonePathSlideEncoderConfig, ExaonePathSlideEncoderModel
from exaonepath.encoders import block, inference, memory_plan, slide_encoder, slide_transformer
from exaonepath.encoders.row_checkpoint import by_rows
from exaonepath.ops.attention.layout import FragmentLayout, Segments
from exaonepath.ops.attention.rotary import Rotation

META = torch.device("meta")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def step(model, inputs, autocast):
    """Loss, gradients of parameters and features, and the random number that would be drawn next."""
    model.zero_grad()
    features = inputs[0].clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(features, *inputs[1:])
    loss = output.slide_embedding.square().sum() + output.patch_embedding.square().sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return [loss.detach(), features.grad, *gradients, torch.rand(2)]


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_checkpointed_step_is_the_plain_step(make_slide_encoder, make_slide, monkeypatch, masked, autocast, kwargs):
    """With dropout on, and chunks that do not divide the number of tokens."""
    monkeypatch.setattr(memory_plan, "_ROWS_CPU", 16)
    model = make_slide_encoder().float().train()
    inputs = make_slide(n=35, dtype=torch.float32, masked=masked)
    plain = step(model, inputs, autocast)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    checkpointed = step(model, inputs, autocast)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.transformer.gradient_checkpointing


def test_frozen_parts_get_no_gradient(make_slide_encoder, make_slide):
    model = make_slide_encoder().train()
    model.gradient_checkpointing_enable()
    model.transformer.blocks[:2].requires_grad_(False)
    model.transformer.patch_embed.requires_grad_(False)
    model(*make_slide()).slide_embedding.sum().backward()
    assert all(p.grad is None for p in model.transformer.blocks[1].parameters())
    assert all(p.grad is not None for p in model.transformer.blocks[2].parameters())


def test_rows_without_any(make_slide_encoder, make_slide):
    model = make_slide_encoder().train()
    model.gradient_checkpointing_enable()
    features, mask, coords, contour = make_slide(n=0, masked=False)
    output = model(features, mask, coords, contour)
    assert output.patch_embedding.shape == (2, 0, 56)
    output.patch_embedding.sum().backward()


def test_a_parameter_used_by_no_row_gets_none():
    used, unused = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    x = torch.randn(5, 3, requires_grad=True)
    by_rows(used, (x,), (used, unused), 2, True).sum().backward()
    assert unused.weight.grad is None
    assert torch.allclose(used.bias.grad, torch.full((3,), 5.0))


@pytest.mark.parametrize(("n", "target"), [(100_000, 5.0e9), (250_000, 10.5e9)])
def test_training_fits_its_target(live_memory, monkeypatch, n, target):
    """Forward and backward of the published encoder on tensors without storage: every allocation is seen.

    The peak lies in the backward pass of the last block, while the inputs of all blocks are there: it goes no further.
    """
    for module in (block, inference, slide_transformer, slide_encoder):
        monkeypatch.setattr(module, "compute_dtype", lambda _: torch.bfloat16)
    with META:
        model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig()).train()
    model.gradient_checkpointing_enable()
    model.config._attn_implementation = "triton"
    tokens = n + 8

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device=META)

    lengths = (8, n // 2, tokens - 8 - n // 2)
    layout = FragmentLayout(
        empty(tokens), Segments(empty(2), (tokens,)), Segments(empty(4), lengths), 1, model.transformer.n_prefix, n
    )
    rotation = Rotation(empty(tokens, 2, dtype=torch.float64), empty(16, dtype=torch.float64))
    monkeypatch.setattr(slide_encoder, "build_fragment_layout", lambda *_: layout)
    monkeypatch.setattr(model.transformer, "rotation", lambda *_: rotation)
    features, coords, contour = empty(1, n, 768, dtype=torch.float32), empty(1, n, 2), empty(1, n)
    live = live_memory("meta", *model.parameters(), features, coords, contour)
    with live:
        loss = model(features, None, coords, contour).slide_embedding.square().sum()
        forward = live.peak
        gradients = torch.autograd.grad(loss, list(model.transformer.blocks[-1].parameters()))
    assert all(gradient is not None for gradient in gradients)
    assert live.peak > forward
    # All gradients and the optimiser's two moments, and a twentieth for what the allocator loses between blocks.
    other = 3 * sum(p.nbytes for p in model.parameters())
    assert 1.05 * live.peak + other <= target
