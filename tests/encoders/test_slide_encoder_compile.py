"""The encoder's blocks under torch.compile: one graph each, with the numbers of the plain block."""

import pytest
import torch

from exaonepath.encoders.block import Block, LayerNorm
from exaonepath.encoders.inference import block_in_place
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, rotary_periods
from exaonepath.ops.attention.rows import cut_rows

CFG = {
    "embed_dim": 64, "num_heads": 2, "qkv_bias": True, "proj_bias": True, "ffn_bias": True, "attn_drop": 0.0,
    "ffn_drop": 0.0,
}  # fmt: skip


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block(CFG, 96, LayerNorm, 1e-5)


@pytest.fixture
def stream():
    generator = torch.Generator().manual_seed(1)
    segments = Segments.from_lengths(torch.tensor([3, 20, 17]))
    coords = torch.randint(0, 9000, (40, 2), generator=generator)
    rotation = Rotation.from_coords(coords, rotary_periods(32), 256)
    rotation.cos_sin()
    return torch.randn(40, 64, generator=generator), segments, rotation


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("rope", [True, False])
def test_training_is_one_graph(block, stream, backend, rope):
    x, segments, rotation = stream
    rotation = rotation if rope else None
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for call in (block, compiled):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf, segments, rotation, backend).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in block.parameters())])
    # The same operators; the compiled graph may add up gradients in another order.
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("rope", [True, False])
def test_inference_is_one_graph(block, stream, backend, rope):
    x, segments, rotation = stream
    rotation = rotation if rope else None
    chunks = cut_rows(segments, 16)
    torch._dynamo.reset()
    compiled = torch.compile(block_in_place, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        plain = block_in_place(block, x.clone(), segments, rotation, backend, chunks, 8)
        graph = compiled(block, x.clone(), segments, rotation, backend, chunks, 8)
        called = block(x, segments, rotation, backend)
        whole = torch.compile(block, fullgraph=True, backend="aot_eager")(x, segments, rotation, backend)
    assert torch.allclose(plain, graph, rtol=0, atol=1e-5 * plain.abs().max())
    assert torch.allclose(plain, called, rtol=0, atol=1e-5 * plain.abs().max())
    assert torch.allclose(plain, whole, rtol=0, atol=1e-5 * plain.abs().max())
