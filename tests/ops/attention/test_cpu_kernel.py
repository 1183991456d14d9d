"""The C++ kernel of attention on the CPU, which `sdpa` uses for float32: exact, and used only where it may be."""

import pytest
import torch
from attention_cases import SHAPES, exact, inputs, relative, with_gradient
from torch.autograd import forward_ad

from exaonepath.ops import Segments, fragment_attention, varlen_attention
from exaonepath.ops.attention import cpu_kernel
from exaonepath.ops.attention.rows import attend_rows, cut_rows, rotate_rows
from exaonepath.ops.extension import load_extension

EXTENSION, _ = load_extension()
pytestmark = pytest.mark.skipif(not cpu_kernel.max_length(), reason="no extension, or a CPU without AVX2")


def weight_of(qkv):
    return torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1))


def by_torch(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernel, "max_length", lambda: 0)
        return run()


CASES = [*SHAPES.values(), [700, 1, 300], [3] * 50, [48, 47, 49, 95, 97]]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse2", "generic"])
@pytest.mark.parametrize(("dim", "rope"), [(16, True), (48, False), (64, True), (128, True), (208, False), (256, True)])
def test_error_is_within_twice_that_of_torch(isa, dim, rope, monkeypatch, device):
    """With every instruction set, result and gradient, at the sizes of blocks, vectors and panels, and next to them."""
    for name in ("attention_cpu", "attention_backward_cpu"):
        real = getattr(EXTENSION, name)
        monkeypatch.setattr(EXTENSION, name, lambda real=real, **kw: real(**kw, isa=isa))
    for lengths in CASES if dim == 64 else CASES[-2:]:
        qkv, segments, rotation = inputs(lengths, dim=dim, rope=rope)
        weight = weight_of(qkv)
        truth = with_gradient(lambda x: exact(x, segments, rotation), qkv.double(), weight)  # noqa: B023
        run = lambda: with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight)  # noqa: B023, E731
        try:
            ours = run()
        except ValueError as exc:
            if "no instruction set" not in str(exc):
                raise
            pytest.skip(str(exc))
        theirs = by_torch(monkeypatch, run)
        for found, torchs, right in zip(ours, theirs, truth, strict=True):
            assert relative(found, right) <= 2 * relative(torchs, right) + 1e-7, lengths
            limit = 2 * (torchs - right).abs().max() + 1e-6 * right.abs().max() if right.numel() else 0
            assert not found.numel() or (found - right).abs().max() <= limit, lengths


@pytest.mark.parametrize("dim", [208, 256, 512])
def test_the_error_of_wide_heads_is_within_twice_that_of_torch(dim, monkeypatch):
    """Scores are sums of as many terms as a head has dimensions."""
    qkv, segments, rotation = inputs([300], heads=1, dim=dim)
    weight = weight_of(qkv)
    truth = with_gradient(lambda x: exact(x, segments, rotation), qkv.double(), weight)
    run = lambda: with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight)  # noqa: E731
    for found, torchs, right in zip(run(), by_torch(monkeypatch, run), truth, strict=True):
        assert relative(found, right) <= 2 * relative(torchs, right)


@pytest.mark.parametrize("length", [1000, 4000])
def test_the_error_of_long_segments_is_within_twice_that_of_torch(length, monkeypatch):
    """Sums of thousands of terms: in one chain they would be off by several times the error of torch."""
    monkeypatch.setattr(cpu_kernel, "max_length", lambda: 8192)  # with AVX2, too
    qkv, segments, _ = inputs([length], heads=1, dim=64, rope=False)
    weight = weight_of(qkv)
    truth = with_gradient(lambda x: exact(x, segments, None), qkv.double(), weight)
    run = lambda: with_gradient(lambda x: fragment_attention(x, segments, None), qkv, weight)  # noqa: E731
    for found, torchs, right in zip(run(), by_torch(monkeypatch, run), truth, strict=True):
        assert relative(found, right) <= 2 * relative(torchs, right)


def test_bits_do_not_depend_on_threads_neighbours_or_strides():
    qkv, segments, rotation = inputs([5, 400, 3, 130], dim=64)
    weight = weight_of(qkv)
    first = with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight)
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            again = with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for begin, length in ((0, 5), (5, 400), (405, 3), (408, 130)):
        rows = slice(begin, begin + length)
        alone = Segments.from_lengths(torch.tensor([length]))
        part = type(rotation)(rotation.positions[rows], rotation.periods)
        found = with_gradient(lambda x: fragment_attention(x, alone, part), qkv[rows], weight[rows])  # noqa: B023
        assert all(torch.equal(a[rows], b) for a, b in zip(first, found, strict=True))
    # Heads before tokens, and three tensors.
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in qkv.unbind(1))
    out = varlen_attention(q, k, v, segments, rotation)
    gradients = torch.autograd.grad(out, (q, k, v), weight.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(out, first[0])
    assert torch.equal(torch.stack(gradients, 1), first[1])


@pytest.mark.parametrize("rope", [True, False])
def test_rows_in_place_give_the_same_bits_as_one_call(rope, calls):
    """Chunks that cut a segment, queries that are overwritten with the result, and keys that torch has rotated."""
    qkv, segments, rotation = inputs([5, 400, 3, 130], dim=64, rope=rope)
    whole = fragment_attention(qkv, segments, rotation)
    q, k, v = (x.contiguous() for x in qkv.unbind(1))
    if rotation is not None:
        rotate_rows(k, rotation, 0, backend="sdpa")
    for chunk in cut_rows(segments, 100):
        attend_rows(q[chunk.first : chunk.first + chunk.count], k, v, segments, chunk, rotation, backend="sdpa")
    assert torch.equal(q, whole)
    assert len(calls) == 1 + len(cut_rows(segments, 100))


def test_one_call_of_the_extension_for_all_segments(calls):
    qkv, segments, rotation = inputs([3, 1, 90, 7] * 20)
    with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight_of(qkv))
    assert calls == ["attention_cpu", "attention_backward_cpu"]


def test_gradients_that_torch_makes_awkward():
    """Broadcast, negated lazily, of one input alone, and accumulated over two uses."""
    qkv, segments, rotation = inputs([5, 40])
    q, k, v = (x.clone() for x in qkv.unbind(1))
    k.requires_grad_()
    out = varlen_attention(q, k, v, segments, rotation)
    (summed,) = torch.autograd.grad(out.sum(), k, retain_graph=True)  # strides 0
    (dense,) = torch.autograd.grad(out, k, torch.ones_like(out).contiguous(), retain_graph=True)
    assert torch.equal(summed, dense)
    negated = torch.view_as_complex(torch.stack([torch.zeros_like(out), -torch.ones_like(out)], -1)).conj().imag
    assert negated.is_neg()
    (found,) = torch.autograd.grad(out, k, negated, retain_graph=True)
    assert torch.equal(found, dense)
    (twice,) = torch.autograd.grad(out.sum() + varlen_attention(q, k, v, segments, rotation).sum(), k)
    assert torch.allclose(twice, 2 * dense)


@pytest.mark.parametrize("rope", [True, False])
def test_second_derivatives(rope):
    qkv, segments, rotation = inputs([1, 9, 40], rope=rope)
    weight = weight_of(qkv)

    def penalty(attend, x):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((attend(leaf) * weight.to(x)).sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    found = penalty(lambda x: fragment_attention(x, segments, rotation), qkv)
    right = penalty(lambda x: exact(x, segments, rotation), qkv.double())
    assert relative(found, right) <= 1e-5
    # Many gradients at once.
    leaf = qkv.clone().requires_grad_()
    out = fragment_attention(leaf, segments, rotation)
    (many,) = torch.autograd.grad(
        out, leaf, torch.stack([weight, 2 * weight]), retain_graph=True, is_grads_batched=True
    )
    (one,) = torch.autograd.grad(out, leaf, weight)
    assert relative(many[1], 2 * one.double()) <= 1e-5


def test_torchs_transformations_get_torchs_operations(calls):
    qkv, segments, rotation = inputs([4, 9])

    def attend(x):
        return fragment_attention(x, segments, rotation)

    whole = attend(qkv)
    calls.clear()
    assert torch.allclose(torch.func.vmap(attend)(qkv[None])[0], whole, atol=1e-5)
    torch.func.grad(lambda x: attend(x).sum())(qkv)
    with forward_ad.dual_level():
        dual = fragment_attention(forward_ad.make_dual(qkv, qkv), segments, rotation, backend="eager")
        assert forward_ad.unpack_dual(dual).tangent is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attend(qkv)
    traced = torch.jit.trace(attend, qkv, check_trace=False)
    assert torch.allclose(traced(qkv), whole, atol=1e-5)
    for other in (qkv.double(), qkv.bfloat16(), inputs([4, 9], dim=20)[0]):
        fragment_attention(other, segments, None)
    assert not calls


@pytest.mark.parametrize(
    ("lengths", "runs"), [([3, 5, 60, 5, 41, 3], 3), ([50], 0), ([3, 40], 1), ([50, 41], 0), ([41, 40], 1)]
)
@pytest.mark.parametrize("rope", [True, False])
def test_a_segments_own_length_decides_whether_torch_computes_it(lengths, runs, rope, monkeypatch, calls):
    """Bits do not depend on whether a neighbour is above the limit: in training, in inference, and in row chunks."""
    monkeypatch.setattr(cpu_kernel, "max_length", lambda: 40)
    qkv, segments, rotation = inputs(lengths, rope=rope)
    weight = weight_of(qkv)
    found = with_gradient(lambda x: fragment_attention(x, segments, rotation), qkv, weight)
    assert calls == ["attention_cpu"] * runs + ["attention_backward_cpu"] * runs
    calls.clear()
    apart = [x.clone().requires_grad_() for x in qkv.unbind(1)]
    separate = varlen_attention(*apart, segments, rotation)
    (separate * weight).sum().backward()
    assert torch.equal(separate, found[0])
    assert torch.equal(torch.stack([x.grad for x in apart], 1), found[1])
    calls.clear()
    plain = fragment_attention(qkv, segments, rotation)
    assert calls == ["attention_cpu"] * (runs > 0)
    assert torch.equal(fragment_attention(qkv.clone(), segments, rotation, overwrite_qkv=True), plain)
    q, k, v = (x.contiguous() for x in qkv.unbind(1))
    if rotation is not None:
        rotate_rows(k, rotation, 0, backend="sdpa")
    for chunk in cut_rows(segments, 50):
        attend_rows(q[chunk.first : chunk.first + chunk.count], k, v, segments, chunk, rotation, backend="sdpa")
    truth = with_gradient(lambda x: exact(x, segments, rotation), qkv.double(), weight)
    for got, right in zip((*found, plain, q), (*truth, truth[0], truth[0]), strict=True):
        assert relative(got, right) <= 2e-6
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        alone = Segments.from_lengths(torch.tensor([length]))
        part = None if rotation is None else type(rotation)(rotation.positions[rows], rotation.periods)
        expected = with_gradient(lambda x: fragment_attention(x, alone, part), qkv[rows], weight[rows])  # noqa: B023
        assert all(torch.equal(a[rows], b) for a, b in zip(found, expected, strict=True)), length
        assert torch.equal(plain[rows], fragment_attention(qkv[rows], alone, part)), length
        if length <= 40:
            assert torch.equal(q[rows], plain[rows]), length
        begin += length


def test_what_cannot_be_is_refused():
    x = torch.zeros(8, 2, 16)
    pieces = torch.tensor([[0, 8, 0, 8]])
    good = dict(cpu_kernel._arguments(x, x, x, pieces, 0.25, None, None), out=cpu_kernel._strided(x), threads=1)
    EXTENSION.attention_cpu(**good)
    for change, words in (
        ({"dim": 20}, "multiple of 16"),
        ({"threads": 0}, "threads"),
        ({"heads": -1}, "negative"),
        ({"pieces": 0}, "null"),
        ({"q": (0, 1, 1)}, "null"),
        ({"q_angles": (x.data_ptr(), 0)}, "go together"),
        ({"pieces": torch.tensor([[0, 8, 0, 0]]).data_ptr()}, "needs a key"),
        ({"isa": "mmx"}, "no instruction set"),
    ):
        with pytest.raises(ValueError, match=words):
            EXTENSION.attention_cpu(**{**good, **change})
    good |= dict.fromkeys(("dout", "dq", "dk", "dv"), good["out"])
    del good["out"]
    other = torch.tensor([[0, 4, 0, 8]])
    with pytest.raises(ValueError, match="same tokens"):
        EXTENSION.attention_backward_cpu(**{**good, "pieces": other.data_ptr()})
