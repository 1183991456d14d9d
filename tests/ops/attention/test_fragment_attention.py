"""Every backend against float64 over the shapes that bite, with gradients."""

import dataclasses
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exaonepath import log_once
from exaonepath.errors import SettingsError
from exaonepath.ops.attention import cpu as cpu_attention
from exaonepath.ops.attention import cpu_kernel
from exaonepath.ops.attention.fragment_attention import fragment_attention, resolve_backend
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, apply_rotation, rotary_periods
from exaonepath.reference.fragment_attention import dense_fragment_attention, rotate

module = importlib.import_module(
    "exaonepath.ops.attention.fragment_attention"
)  # the name `ops` exports is the function

SHAPES = {
    "one token": [1],
    "one fragment": [37],
    "odd sizes": [1, 2, 3, 63, 129, 5, 64, 65],
    "many tiny": [3] * 200,
    "tiny and giant": [1, 2, 700, 1, 3, 2],
    "prefix, then fragments": [8, 130, 8, 1, 8, 255],
}


def segments(lengths, device="cpu"):
    return Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64, device=device))


def inputs(lengths, dtype=torch.float64, heads=2, dim=16, seed=0, rope=True, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, 3, heads, dim, generator=generator).mul(1.5).to(device, dtype)
    rotation = None
    if rope:
        coords = torch.randint(0, 150_000, (tokens, 2), generator=generator).to(device)
        rotation = Rotation.from_coords(coords, rotary_periods(dim), 256)
    return qkv, segments(lengths, device), rotation


def exact(qkv, segs, rotation):
    q, k, v = qkv.double().unbind(1)
    if rotation is not None:
        q, k = (rotate(t, rotation.positions, rotation.periods) for t in (q, k))
    return dense_fragment_attention(q, k, v, segs.ids(), qkv.shape[-1] ** -0.5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("rope", [True, False])
def test_float64_is_exact(name, backend, rope, device):
    qkv, segs, rotation = inputs(SHAPES[name], rope=rope, device=device)
    out = fragment_attention(qkv, segs, rotation, backend=backend)
    assert out.shape == (qkv.shape[0], 2, 16)
    assert torch.allclose(out, exact(qkv, segs, rotation), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[8, 600, 33], [1500], [2] * 50 + [513]])
def test_error_is_within_twice_that_of_dense_torch(dtype, lengths, device):
    qkv, segs, rotation = inputs(lengths, dtype, heads=3, dim=64, device=device)
    truth = exact(qkv, segs, rotation)
    q, k, v = qkv.unbind(1)
    cos, sin = rotation.cos_sin()
    plain = dense_fragment_attention(apply_rotation(q, cos, sin), apply_rotation(k, cos, sin), v, segs.ids(), 64**-0.5)
    ours = fragment_attention(qkv, segs, rotation)
    assert ours.dtype == dtype
    for norm in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
        # DESIGN's rule; the last bit of the output dtype is allowed where torch happens to be luckier than it.
        allowed = 2 * norm(plain.double() - truth) + torch.finfo(dtype).eps * norm(truth)
        assert norm(ours.double() - truth) <= allowed


def test_long_segments_take_the_tiled_path_and_stay_exact(monkeypatch):
    monkeypatch.setattr(cpu_kernel, "max_length", lambda: 0)
    qkv, segs, rotation = inputs([1300, 8, 520], torch.float32, heads=2, dim=32)
    if not cpu_attention.can_attend(qkv[:, 0], 1300):
        pytest.skip("this torch has no float32 oneDNN product")
    ours = fragment_attention(qkv, segs, rotation)
    truth = exact(qkv, segs, rotation)
    assert (ours.double() - truth).norm() <= 2e-6 * truth.norm()


@pytest.mark.parametrize("name", ["one token", "odd sizes", "many tiny", "tiny and giant"])
def test_gradients_match_the_dense_ones(name, device):
    qkv, segs, rotation = inputs(SHAPES[name], device=device)
    grads = []
    weight = torch.randn(qkv.shape[0], 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(
        device
    )
    for run in (lambda t: fragment_attention(t, segs, rotation), lambda t: exact(t, segs, rotation)):
        leaf = qkv.clone().requires_grad_()
        (run(leaf) * weight).sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, rtol=0, atol=1e-10)


def test_gradcheck():
    qkv, segs, rotation = inputs([1, 4, 2], heads=1, dim=4)
    leaf = qkv.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: fragment_attention(t, segs, rotation), (leaf,))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_no_token_at_all(requires_grad):
    qkv = torch.zeros(0, 3, 2, 16, requires_grad=requires_grad)
    out = fragment_attention(qkv, segments([]))
    assert out.shape == (0, 2, 16)
    if requires_grad:
        out.sum().backward()
        assert qkv.grad.shape == qkv.shape


@pytest.fixture(params=["extension", "torch"])
def cpu_path(request, monkeypatch):
    """The C++ kernel, and what replaces it without the extension."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_kernel, "max_length", lambda: 0)


@pytest.mark.usefixtures("cpu_path")
def test_nothing_leaks_between_segments(device):
    """Changing one segment, to NaN even, leaves every other segment bit for bit the same."""
    lengths = [5, 600, 3, 3, 130]
    qkv, segs, rotation = inputs(lengths, torch.float32, device=device)
    before = fragment_attention(qkv, segs, rotation)
    bounds = segs.offsets.tolist()
    for i in range(len(lengths)):
        changed = qkv.clone()
        changed[bounds[i] : bounds[i + 1]] = float("nan")
        after = fragment_attention(changed, segs, rotation)
        rest = torch.ones(qkv.shape[0], dtype=torch.bool)
        rest[bounds[i] : bounds[i + 1]] = False
        assert torch.equal(after[rest], before[rest])
        assert after[~rest].isnan().all()


@pytest.mark.usefixtures("cpu_path")
def test_result_of_a_segment_does_not_depend_on_its_neighbours():
    long, short = 600, 3
    qkv, _, rotation = inputs([long, short, short], torch.float32)
    alone = fragment_attention(qkv[:long], segments([long]), Rotation(rotation.positions[:long], rotation.periods))
    assert torch.equal(fragment_attention(qkv, segments([long, short, short]), rotation)[:long], alone)


@pytest.mark.usefixtures("cpu_path")
def test_non_contiguous_tokens_and_untouched_input():
    qkv, segs, rotation = inputs([40, 7, 520], torch.float32)
    strided = torch.empty(qkv.shape[0], 2, *qkv.shape[1:])[:, 0]
    strided.copy_(qkv)
    before = strided.clone()
    assert torch.equal(fragment_attention(strided, segs, rotation), fragment_attention(qkv, segs, rotation))
    assert torch.equal(strided, before)
    assert torch.equal(
        fragment_attention(strided.clone(), segs, rotation, overwrite_qkv=True), fragment_attention(qkv, segs, rotation)
    )


@pytest.mark.usefixtures("cpu_path")
def test_repeat_runs_are_bit_identical(device):
    qkv, segs, rotation = inputs([900, 3, 3, 140], torch.float32, device=device)
    first = fragment_attention(qkv, segs, rotation)
    for _ in range(3):
        assert torch.equal(fragment_attention(qkv, segs, rotation), first)


def test_bad_input_is_refused():
    qkv, segs, rotation = inputs([5, 3])
    with pytest.raises(SettingsError, match="unknown attention backend"):
        fragment_attention(qkv, segs, backend="flash")
    with pytest.raises(SettingsError, match=r"\[T, 3, H, D\]"):
        fragment_attention(qkv[:, 0], segs)
    with pytest.raises(SettingsError, match=r"\[T, 3, H, D\]"):
        fragment_attention(qkv.long(), segs)
    with pytest.raises(SettingsError, match="cover 8 tokens"):
        fragment_attention(qkv[:7], segs)
    with pytest.raises(SettingsError, match="rotation is for 8 tokens"):
        fragment_attention(qkv[:7], segments([7]), rotation)
    with pytest.raises(SettingsError, match="head dimension 64"):
        fragment_attention(qkv, segs, Rotation(rotation.positions, rotary_periods(64)))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="positive finite"):
            fragment_attention(qkv, segs, scale=scale)
    elsewhere = Segments(segs.offsets.to("meta"), segs.lengths)
    with pytest.raises(SettingsError, match="segments are on meta, but qkv is on cpu"):
        fragment_attention(qkv, elsewhere)
    with pytest.raises(SettingsError, match="rotation is on meta, but the tokens are on cpu"):
        fragment_attention(qkv, segs, Rotation(rotation.positions.to("meta"), rotation.periods))


class Card:
    """What resolve_backend asks of a CUDA machine, answered without one."""

    def __init__(self, monkeypatch, capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        log_once.forget()


def test_auto_takes_the_kernels_on_a_card_that_can_run_them(monkeypatch):
    pytest.importorskip("triton")
    Card(monkeypatch, (9, 0))
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert resolve_backend("auto", cuda, torch.bfloat16, 64) == "triton"
    assert resolve_backend("auto", cpu, torch.bfloat16, 64) == "sdpa"
    for named in ("sdpa", "eager", "triton"):
        assert resolve_backend(named, cpu, torch.float64, 7) == named
    with pytest.raises(SettingsError, match="unknown attention backend 'flash'; choose one of auto, sdpa"):
        resolve_backend("flash", cpu, torch.float32, 64)


def test_auto_says_once_why_it_takes_sdpa_on_a_card(monkeypatch, caplog):
    pytest.importorskip("triton")
    Card(monkeypatch, (7, 5))
    cuda = torch.device("cuda:0")
    for _ in range(3):
        assert resolve_backend("auto", cuda, torch.float16, 64) == "sdpa"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "compute capability 8.0, this GPU has 7.5" in caplog.text
    assert resolve_backend("auto", cuda, torch.float16, 48) == "sdpa"
    assert "head dimensions 32, 64, 128, not 48" in caplog.text


def test_auto_leaves_one_long_segment_to_cudnn_where_that_measured_faster(monkeypatch):
    pytest.importorskip("triton")
    Card(monkeypatch, (9, 0))
    measured = dataclasses.replace(module.attention_config((9, 0), 2, 64), cudnn_from=100)
    monkeypatch.setattr(module, "attention_config", lambda *_: measured)

    def chosen(lengths, **how):
        return resolve_backend("auto", torch.device("cuda:0"), torch.bfloat16, 64, segments(lengths), **how)

    assert [chosen(lengths) for lengths in ([99], [100], [100, 1])] == ["triton", "cudnn", "triton"]
    assert chosen([100], rotated=True) == "triton"
    assert chosen([100], training=True) == "triton"  # cuDNN's gradients differ from run to run


def test_cudnn_is_for_one_long_segment_and_never_breaks_the_promise_to_be_deterministic(monkeypatch):
    pytest.importorskip("triton")
    Card(monkeypatch, (9, 0))

    def chosen(lengths, dtype=torch.bfloat16, device="cuda:0", **how):
        return resolve_backend("cudnn", torch.device(device), dtype, 64, segments(lengths), **how)

    assert chosen([1024]) == chosen([1024], training=True) == "cudnn"
    for other in (chosen([1023]), chosen([1024, 1]), chosen([1024], torch.float32), chosen([1024], rotated=True)):
        assert other == "triton"
    assert chosen([1024], device="cpu") == "sdpa"
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen([1024], training=True) == "triton"
        assert chosen([1024]) == "cudnn"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_backward_pass_of_many_segments_writes_no_more_than_that_of_one(monkeypatch):
    """A slice per segment would write one gradient of all tokens each: forty times the work for forty slides."""

    class Written(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                # Views write nothing; their storage is somebody's output already.
                self.elements += x.numel() if isinstance(x, torch.Tensor) and x._base is None else 0
            return out

    def written(lengths):
        qkv, segs, _ = inputs(lengths, dtype=torch.float32, rope=False)
        out = fragment_attention(qkv.requires_grad_(), segs, None, backend="sdpa").sum()
        with Written() as mode:
            out.backward()
        return mode.elements

    monkeypatch.setattr(cpu_kernel, "max_length", lambda: 0)
    assert written([130] * 40) < 2 * written([130 * 40])
