"""The oneDNN route for float32 products: same numbers, and never where a gradient is wanted."""

import pytest
import torch
from torch.nn import functional as F

from exaonepath.ops import linear


@pytest.mark.parametrize("shape", [(1, 64), (7, 3, 64), (0, 64), (513, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_in_float32(shape, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight, b = torch.randn(40, 64, generator=generator), torch.randn(40, generator=generator) if bias else None
    with torch.no_grad():
        ours = linear.linear(x, weight, b)
    truth = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert ours.shape == truth.shape
    # 64 products of float32 round to at most 64 ulp of the row's norm; measured near 2e-7.
    assert (ours.double() - truth).norm() <= 1e-6 * truth.norm() or truth.numel() == 0


def test_gradients_flow():
    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(3, 8, requires_grad=True)
    linear.linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(5, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype):
    x, weight = torch.randn(5, 8).to(dtype), torch.randn(3, 8).to(dtype)
    with torch.no_grad():
        assert torch.equal(linear.linear(x, weight), F.linear(x, weight))


def test_falls_back_where_the_operator_is_missing(monkeypatch):
    def absent(*_):
        raise AttributeError("no such operator")

    linear.onednn_available.cache_clear()
    monkeypatch.setattr(linear, "_onednn_linear", absent)
    try:
        assert not linear.onednn_available()
        x, weight = torch.randn(5, 8), torch.randn(3, 8)
        with torch.no_grad():
            assert torch.equal(linear.linear(x, weight), F.linear(x, weight))
    finally:
        linear.onednn_available.cache_clear()


def test_a_process_that_asked_for_less_precision_is_noticed(monkeypatch):
    linear.onednn_available.cache_clear()
    monkeypatch.setattr(linear, "_onednn_linear", lambda x, w, b: (x.bfloat16() @ w.bfloat16().T).float())
    try:
        assert not linear.onednn_available()
    finally:
        linear.onednn_available.cache_clear()
