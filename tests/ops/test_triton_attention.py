"""The fused kernels against float64: by Triton's interpreter on a CPU, for real where there is a GPU."""

import pytest
import torch

from exaonepath.errors import BackendError, SettingsError
from exaonepath.ops import Rotation, Segments, fragment_attention, rotary_periods
from exaonepath.ops import triton_attention as kernels
from exaonepath.reference.fragment_attention import dense_fragment_attention, rotate

pytest.importorskip("triton")

SHAPES = {
    "one token": [1],
    "one fragment": [37],
    "exactly a tile": [32],
    "odd sizes": [1, 2, 3, 33, 65, 5, 31, 64],
    "many tiny": [3] * 60,
    "prefix and giant": [8, 150, 8, 1],
}


def inputs(lengths, dtype=torch.float32, heads=2, dim=32, rope=True, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, 3, heads, dim, generator=generator).mul(1.5).to(device, dtype)
    segments = Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64, device=device))
    coords = torch.randint(0, 200_000, (tokens, 2), generator=generator).to(device)
    return qkv, segments, Rotation.from_coords(coords, rotary_periods(dim), 256) if rope else None


def exact(qkv, segments, rotation):
    q, k, v = qkv.double().unbind(1)
    if rotation is not None:
        q, k = (rotate(t, rotation.positions, rotation.periods) for t in (q, k))
    return dense_fragment_attention(q, k, v, segments.ids(), qkv.shape[-1] ** -0.5)


def relative(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward_against_float64(name, rope, device):
    qkv, segments, rotation = inputs(SHAPES[name], rope=rope, device=device)
    weight = torch.randn(qkv.shape[0], 2, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        inferred = fragment_attention(qkv, segments, rotation, backend="triton")
    leaf, reference = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out = fragment_attention(leaf, segments, rotation, backend="triton")
    truth = exact(reference, segments, rotation)
    (out * weight).sum().backward()
    (truth * weight).sum().backward()
    # float32 sums over at most 150 keys; measured up to 3e-7 forward and 5e-7 backward.
    assert relative(out, truth) <= 1e-6
    assert relative(inferred, truth) <= 1e-6
    assert relative(leaf.grad, reference.grad) <= 3e-6


@pytest.mark.parametrize("dim", [64, 128])
def test_head_dimensions(dim, device):
    qkv, segments, rotation = inputs([5, 40, 3, 3], dim=dim, heads=1, device=device)
    leaf, reference = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out = fragment_attention(leaf, segments, rotation, backend="triton")
    truth = exact(reference, segments, rotation)
    out.sum().backward()
    truth.sum().backward()
    assert relative(out, truth) <= 1e-6
    assert relative(leaf.grad, reference.grad) <= 3e-6


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("lengths", [[8, 150, 8, 1], [3] * 30, [1]])
def test_rows_at_a_time_in_place_equal_the_whole(lengths, rope, device):
    """The encoder's way: keys and values in one buffer, keys rotated in place, queries overwritten by the result."""
    qkv, segments, rotation = inputs(lengths, rope=rope, device=device)
    tokens = qkv.shape[0]
    truth = exact(qkv, segments, rotation)
    kv = qkv[:, 1:].clone()
    for start, stop in ((0, tokens // 3), (tokens // 3, tokens)):
        if rope:
            kernels.triton_rotate_rows(kv[start:stop, 0], rotation, start)
    for first in range(0, tokens, 47):
        rows = torch.full((min(47, tokens - first), 2, 2, 32), float("nan"), device=device)
        q = rows[:, 1]  # strided
        q.copy_(qkv[first : first + 47, 0])
        kernels.triton_attend_rows(q, kv[:, 0], kv[:, 1], segments, first, rotation, 32**-0.5)
        assert relative(q, truth[first : first + 47]) <= 1e-6  # as the whole in one go
        assert rows[:, 0].isnan().all()


def test_rows_refuse_what_does_not_fit(device):
    qkv, segments, rotation = inputs([9, 3], device=device)
    q, k, v = (t.clone() for t in qkv.unbind(1))
    for arguments, message in (
        ((q, k, v, segments, 1, rotation), "rows 1 to 13 are not all among 12 tokens"),
        ((q, k, v[1:], segments, 0, rotation), "do not fit"),
        ((q, k.half(), v, segments, 0, rotation), "do not fit"),
        ((q, k[:11], v[:11], segments, 0, None), "not all among 11"),
        ((q[:5], k[:11], v[:11], segments, 0, None), "segments cover 12 tokens, but there are 11 keys"),
        ((q.mT.contiguous().mT, k, v, segments, 0, rotation), "contiguous last dimension"),
        ((q, k, v.mT.contiguous().mT, segments, 0, rotation), "must be contiguous"),
        ((q[:3], k, v, segments, 0, Rotation(rotation.positions[:5], rotation.periods)), "rotation is for 5 tokens"),
    ):
        with pytest.raises(SettingsError, match=message):
            kernels.triton_attend_rows(*arguments, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[4096], [8, 700, 33] * 5, [3] * 2000])
def test_on_a_card_within_twice_the_error_of_torch(dtype, lengths):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    qkv, segments, rotation = inputs(lengths, dtype, heads=3, dim=64, device="cuda")
    weight = torch.randn(qkv.shape[0], 3, 64, device="cuda")
    reference = qkv.double().requires_grad_()
    truth = exact(reference, segments, rotation)
    (truth * weight).sum().backward()
    results = {}
    for backend in ("sdpa", "triton"):
        leaf = qkv.clone().requires_grad_()
        out = fragment_attention(leaf, segments, rotation, backend=backend)
        (out.float() * weight).sum().backward()
        results[backend] = relative(out, truth), relative(leaf.grad, reference.grad)
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(results["triton"], results["sdpa"], strict=True):
        assert ours <= 2 * theirs + eps


def test_masked_neighbours_do_not_leak(device):
    lengths = [5, 70, 3, 3, 40]
    qkv, segments, rotation = inputs(lengths, device=device)
    with torch.no_grad():
        before = fragment_attention(qkv, segments, rotation, backend="triton")
        bounds = segments.offsets.tolist()
        for i in range(len(lengths)):
            changed = qkv.clone()
            changed[bounds[i] : bounds[i + 1]] *= -3
            after = fragment_attention(changed, segments, rotation, backend="triton")
            rest = torch.ones(len(qkv), dtype=torch.bool, device=device)
            rest[bounds[i] : bounds[i + 1]] = False
            assert torch.equal(after[rest], before[rest])


def test_strided_input_repeat_runs_and_no_token(device):
    qkv, segments, rotation = inputs([40, 7], device=device)
    strided = torch.empty(47, 2, *qkv.shape[1:], device=device)[:, 0]
    strided.copy_(qkv)
    with torch.no_grad():
        first = fragment_attention(qkv, segments, rotation, backend="triton")
        assert torch.equal(fragment_attention(qkv, segments, rotation, backend="triton"), first)
        assert torch.equal(fragment_attention(strided, segments, rotation, backend="triton"), first)
    empty = torch.zeros(0, 3, 2, 32, device=device, requires_grad=True)
    out = fragment_attention(
        empty, Segments.from_lengths(torch.zeros(0, dtype=torch.int64, device=device)), backend="triton"
    )
    out.sum().backward()
    assert empty.grad.shape == empty.shape


def test_the_operators_pass_opcheck(device):
    qkv, segments, rotation = inputs([9, 3, 20], heads=1, device=device)
    tables = rotation.cos_sin()
    arguments = (qkv, *tables, segments.offsets, 32**-0.5)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    q, k, v = (t.clone() for t in qkv.unbind(1))
    torch.library.opcheck(kernels._attend_rows, (q[5:], k, v, *tables, segments.offsets, 5, False, 32**-0.5))
    torch.library.opcheck(kernels._rotate_rows, (k[5:], *tables, 5))
    torch.library.opcheck(kernels._forward, (*arguments, False), test_utils=checks)
    torch.library.opcheck(kernels._forward, (arguments[0].requires_grad_(), *arguments[1:], True), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.double(), "float32, float16 and bfloat16"),
        (lambda q: q[..., :16].contiguous(), "head dimensions 32, 64, 128"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(change, message):
    qkv, segments, _ = inputs([9, 3], rope=False)
    with pytest.raises(BackendError, match=message):
        fragment_attention(change(qkv), segments, backend="triton")


def test_a_machine_without_a_card(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    qkv, segments, _ = inputs([9, 3], rope=False)
    with pytest.raises(BackendError, match=r'need a CUDA device; use the "sdpa" backend'):
        fragment_attention(qkv, segments, backend="triton")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match="triton is not installed"):
        fragment_attention(qkv, segments, backend="triton")
