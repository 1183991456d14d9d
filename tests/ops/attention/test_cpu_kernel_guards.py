"""The C++ kernel of attention on the CPU reads raw memory: states of torch that must not reach it, or change it."""

import math
from contextlib import contextmanager

import pytest
import torch
from attention_cases import exact, inputs, relative, with_gradient
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from exaonepath.errors import SettingsError
from exaonepath.ops import Segments, fragment_attention, varlen_attention
from exaonepath.ops.attention import cpu_kernel
from exaonepath.ops.attention.rows import attend_rows, cut_rows
from exaonepath.ops.extension import load_extension
from exaonepath.ops.linear import onednn_available

pytestmark = pytest.mark.skipif(not cpu_kernel.max_length(), reason="no extension, or a CPU without AVX2")
LENGTHS = [5, 40, 1]


def weight_of(qkv):
    return torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "state",
    [
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
    ],
    ids=["bfloat16", "float64", "meta"],
)
def test_memory_is_float32_on_the_cpu_whatever_torchs_default_is(state, calls):
    qkv, segments, rotation = inputs(LENGTHS)
    weight = weight_of(qkv)
    expected = with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight)
    calls.clear()
    again = Segments(segments.offsets, segments.lengths)  # nothing computed yet
    onednn_available.cache_clear()
    with state():
        found = with_gradient(lambda x: fragment_attention(x, again, rotation), qkv, weight)
        separate = varlen_attention(*qkv.unbind(1), Segments(segments.offsets, segments.lengths), rotation)
        available = onednn_available()
    assert calls == ["attention_cpu", "attention_backward_cpu", "attention_cpu"]
    assert all(torch.equal(a, b) for a, b in zip((*found, separate), (*expected, expected[0]), strict=True))
    onednn_available.cache_clear()
    assert available == onednn_available()


def test_the_interface_refuses_other_memory():
    """What a bug of this package, or a mode of the caller that changes allocations, could give it."""
    x = torch.zeros(8, 2, 16)
    for other in (x.double(), x.to("meta"), x.transpose(1, 2)):
        with pytest.raises(TypeError, match=r"csrc/attention\.h"):
            cpu_kernel._strided(other)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("packed", [True, False])
def test_hooks_are_called_once_by_a_differentiable_backward_pass(packed):
    qkv, segments, rotation = inputs(LENGTHS, rope=True)
    weight = weight_of(qkv)
    leaf = qkv.clone().requires_grad_()
    scaled = leaf * 1.0
    tokens = [scaled] if packed else [x * 1.0 for x in scaled.unbind(1)]
    seen = [0] * len(tokens)

    def count(i):
        def hook(gradient):
            seen[i] += 1
            return 2 * gradient

        return hook

    for i, x in enumerate(tokens):
        x.retain_grad()
        x.register_hook(count(i))
    attend = fragment_attention if packed else varlen_attention
    out = attend(*tokens, segments, rotation)
    (found,) = torch.autograd.grad((out * weight).sum(), leaf, create_graph=True)
    assert seen == [1] * len(tokens)
    _, right = with_gradient(lambda x: exact(x, segments, rotation), qkv.double(), weight)
    assert relative(found.detach(), 2 * right) <= 1e-5
    kept = tokens[0].grad if packed else torch.stack([x.grad for x in tokens], 1)
    assert relative(kept.detach(), 2 * right) <= 1e-5
    again = qkv.clone().requires_grad_()
    out = fragment_attention(again, segments, rotation)
    times = []
    again.register_hook(lambda gradient: times.append(1))
    (out * weight).sum().backward(create_graph=True)
    assert len(times) == 1
    assert relative(again.grad.detach(), right) <= 1e-5


def test_hooks_are_called_once_for_many_gradients_at_once():
    qkv, segments, rotation = inputs(LENGTHS)
    leaf = qkv.clone().requires_grad_()
    times = []
    leaf.register_hook(lambda gradient: times.append(1))
    out = fragment_attention(leaf, segments, rotation)
    torch.autograd.grad(out, leaf, torch.stack([weight_of(qkv)] * 2), is_grads_batched=True)
    assert len(times) == 1


@pytest.mark.filterwarnings("ignore:Input #")
def test_second_derivatives_reach_the_inputs():
    """Against finite differences of float32; gradients in all inputs, and one that is not needed."""
    qkv, segments, rotation = inputs([2, 5], heads=1, dim=16)
    q, k, v = (x.clone().mul_(0.5).requires_grad_() for x in qkv.unbind(1))
    torch.autograd.gradgradcheck(
        lambda q, k, v: varlen_attention(q, k, v, segments, rotation),
        (q, k, v), eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=1e-6,
    )  # fmt: skip
    out = varlen_attention(q, k.detach(), v, segments, rotation)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    first, second = torch.autograd.grad(dq.square().sum(), (q, v))
    assert first.abs().max() > 0
    assert second.abs().max() > 0


class Recorder(TorchDispatchMode):
    """The largest float tensor, and the dtypes, that torch's operations give."""

    def __init__(self):
        super().__init__()
        self.largest, self.dtypes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.largest = max(self.largest, x.numel())
                self.dtypes.add(x.dtype)
        return out


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_backward_pass_inside_autocast_is_float32(differentiable, calls):
    qkv, segments, rotation = inputs([300], heads=1, dim=16)
    weight = weight_of(qkv)
    _, expected = with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight)
    leaf = qkv.clone().requires_grad_()
    loss = (fragment_attention(leaf, segments, rotation) * weight).sum()
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), Recorder() as seen:
        (found,) = torch.autograd.grad(loss, leaf, create_graph=differentiable)
    assert seen.dtypes == {torch.float32}
    if differentiable:
        assert relative(found.detach(), expected.double()) <= 1e-6
    else:
        assert calls == ["attention_backward_cpu"]
        assert seen.largest <= 300 * 3 * 16  # no tensor of all scores
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "change", [torch.Tensor.double, torch.Tensor.bfloat16, lambda x: x[:1], lambda x: x.to("meta")]
)
def test_saved_tensors_that_a_hook_has_changed_are_refused(change):
    qkv, segments, rotation = inputs(LENGTHS)
    leaf = qkv.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, change):
        out = fragment_attention(leaf, segments, rotation)
    with pytest.raises(SettingsError, match="saved-tensor hook"):
        out.sum().backward()


def test_saved_tensors_in_another_layout_give_the_same_gradient():
    qkv, segments, rotation = inputs(LENGTHS)
    weight = weight_of(qkv)
    _, expected = with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight)
    for unpack in (lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), lambda x: x.detach().clone()):
        leaf = qkv.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            (fragment_attention(leaf, segments, rotation) * weight).sum().backward()
        assert torch.equal(leaf.grad, expected)
    leaf = qkv.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        (fragment_attention(leaf, segments, rotation) * weight).sum().backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("scale", [1e-46, 1e-40, 1e39])
def test_a_scale_that_float32_does_not_hold_is_left_to_torch(scale, calls):
    qkv, segments, _ = inputs(LENGTHS)
    out = fragment_attention(qkv, segments, scale=scale)
    if scale < 1:  # all scores are 0: the mean of the values
        means = [x.mean(0, keepdim=True).expand_as(x) for x in qkv[:, 2].split(segments.lengths)]
        assert torch.allclose(out, torch.cat(means), atol=1e-6)
    q, k, v = (x.contiguous() for x in qkv.unbind(1))
    (chunk,) = cut_rows(segments, len(qkv))
    attend_rows(q, k, v, segments, chunk, None, backend="sdpa", scale=scale)
    assert torch.equal(q, out) or scale > 1  # torch computes scale * 0 = NaN
    assert not calls


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_graph_computes_the_attention_of_its_argument(mode, calls):
    qkv, segments, _ = inputs([3, 9])
    graph = make_fx(lambda x: fragment_attention(x, segments), tracing_mode=mode)(qkv)
    other = inputs([3, 9], seed=1)[0]
    assert torch.allclose(graph(other), exact(other, segments, None).float(), atol=1e-5)
    assert not calls


def test_other_dispatch_modes_see_the_kernel(calls):
    """A mode that measures memory has to measure what is computed without it."""
    qkv, segments, _ = inputs(LENGTHS)
    with Recorder() as seen:
        fragment_attention(qkv, segments)
    assert calls == ["attention_cpu"]
    assert seen.largest == qkv.numel() // 3


def test_tensors_without_memory_count_as_zeros():
    qkv, segments, rotation = inputs(LENGTHS)
    leaf = qkv.clone().requires_grad_()
    out = fragment_attention(leaf, segments, rotation)
    zero = torch._efficientzerotensor(out.shape)
    (gradient,) = torch.autograd.grad(out, leaf, zero)
    assert gradient.shape == leaf.shape
    assert not gradient.any()
    assert not fragment_attention(torch._efficientzerotensor(qkv.shape), segments, rotation).any()
    q = torch._efficientzerotensor(out.shape)
    found = varlen_attention(q, qkv[:, 1], qkv[:, 2], segments, rotation)
    assert torch.allclose(found[:5], qkv[:5, 2].mean(0).expand_as(found[:5]), atol=1e-6)


def test_a_write_in_place_is_noticed_by_autograd():
    qkv, segments, _ = inputs(LENGTHS)
    (chunk,) = cut_rows(segments, len(qkv))
    q, k, v = (x.contiguous() for x in qkv.unbind(1))
    product = q * torch.ones_like(q).requires_grad_()  # saves q for its gradient
    attend_rows(q, k, v, segments, chunk, None, backend="sdpa")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():  # such tensors have no version
        q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in qkv.unbind(1))
        attend_rows(q, k, v, segments, chunk, None, backend="sdpa")
    assert torch.equal(q, fragment_attention(qkv, segments))


def test_one_line_is_logged_if_the_extension_is_missing(monkeypatch, caplog):
    qkv, segments, rotation = inputs(LENGTHS)
    load_extension()
    monkeypatch.setattr(cpu_kernel, "load_extension", lambda: (None, "the C++ extension cannot be loaded (a test)"))
    monkeypatch.setattr(cpu_kernel, "max_length", lambda: 0)
    for _ in range(2):
        fragment_attention(qkv, segments, rotation)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "attention on the CPU runs through torch: the C++ extension cannot be loaded (a test)" in caplog.text


def test_scales_and_head_dimensions_that_cannot_be_are_refused():
    segments = Segments.from_lengths(torch.tensor([4]))
    with pytest.raises(SettingsError, match="head dimension"):
        fragment_attention(torch.zeros(4, 3, 2, 0), segments)
    x = torch.zeros(4, 2, 16)
    (chunk,) = cut_rows(segments, 4)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SettingsError, match="scale"):
            attend_rows(x, x, x, segments, chunk, None, backend="sdpa", scale=scale)
