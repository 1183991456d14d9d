"""Inputs and the truth for the tests of the fused attention: shapes that bite, float64, error measures."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch

from exaonepath.ops.attention import cpu_kernel
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, rotary_periods
from exaonepath.reference.fragment_attention import dense_fragment_attention, rotate

SHAPES = {
    "no token": [],
    "one token": [1],
    "one fragment": [37],
    "exactly a tile": [32],
    "exactly three": [96],
    "odd sizes": [1, 2, 3, 33, 65, 5, 31, 64],
    "prefix and giant": [8, 150, 8, 1],
}


SDPA_BY_TORCH = "sdpa by torch"


@contextmanager
def attending(backend):
    """The name of a backend; SDPA_BY_TORCH is "sdpa" on a machine without the C++ extension."""
    if backend != SDPA_BY_TORCH:
        yield backend
        return
    with patch.object(cpu_kernel, "max_length", lambda: 0):
        yield "sdpa"


def inputs(lengths, dtype=torch.float32, heads=2, dim=32, rope=True, device="cpu", seed=0):
    """qkv [T, 3, H, D], segments of these lengths, and a rotation by positions anywhere on a slide (or None)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, 3, heads, dim, generator=generator).mul(1.5).to(device, dtype)
    segments = Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64, device=device))
    coords = torch.randint(0, 200_000, (tokens, 2), generator=generator).to(device)
    return qkv, segments, Rotation.from_coords(coords, rotary_periods(dim), 256) if rope else None


def exact(qkv, segments, rotation):
    """Attention in float64; differentiable."""
    q, k, v = qkv.double().unbind(1)
    if rotation is not None:
        q, k = (rotate(t, rotation.positions, rotation.periods) for t in (q, k))
    return dense_fragment_attention(q, k, v, segments.ids(), qkv.shape[-1] ** -0.5)


def relative(ours, truth):
    """Error by RMS, as a share of the truth's."""
    return ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item() if truth.numel() else 0.0


def with_gradient(attend, qkv, weight):
    """What `attend(qkv)` gives, and the gradient of its product with `weight`."""
    leaf = qkv.clone().requires_grad_()
    out = attend(leaf)
    (out * weight.to(out.dtype)).sum().backward()
    return out.detach(), leaf.grad
