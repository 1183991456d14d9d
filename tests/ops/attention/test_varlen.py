"""`varlen_attention` keeps its contract (docs/attention.md): a test for each line, on every backend."""

import gc

import pytest
import torch
from attention_cases import relative

from exaonepath.errors import BackendError, SettingsError
from exaonepath.ops import Rotation, Segments, fragment_attention, rotary_periods, varlen_attention
from exaonepath.ops.attention import cpu_kernel, tiles, triton_varlen, varlen
from exaonepath.ops.attention.fragment_attention import resolve_backend
from exaonepath.reference.fragment_attention import dense_fragment_attention, rotate

BACKENDS = ["sdpa", "eager", "triton"]
SHAPES = {
    "no token": [],
    "empty segments only": [0, 0],
    "one token": [1],
    "odd sizes": [1, 2, 33, 65, 5, 31],
    "empty segments between": [0, 7, 0, 0, 40, 3, 0],
    "short ones of equal length": [5, 3, 5, 3, 5],
}


def cumulative(lengths, dtype=torch.int32, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def tokens(lengths, dtype=torch.float32, heads=2, dim=32, device="cpu", seed=0):
    """q, k and v [T, H, D], and coordinates anywhere on a slide."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, sum(lengths), heads, dim, generator=generator).mul(1.5).to(device, dtype)
    return *drawn.unbind(0), torch.randint(0, 200_000, (sum(lengths), 2), generator=generator).to(device)


def exact(q, k, v, cu_seqlens, coords=None, patch_size=256):
    q, k, v = q.double(), k.double(), v.double()
    if coords is not None:
        positions = (coords.double() + patch_size // 2) / patch_size
        q, k = (rotate(x, positions, rotary_periods(q.shape[2]).to(q.device)) for x in (q, k))
    lengths = cu_seqlens.long().diff()
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    return dense_fragment_attention(q, k, v, ids, q.shape[2] ** -0.5)


def with_gradients(attend, q, k, v, weight):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(weight.to(out))
    return out.detach(), *(x.grad for x in leaves)


def on(backend, device):
    if backend == "triton":
        pytest.importorskip("triton")
    return {"backend": backend}


@pytest.mark.parametrize(("rope", "offsets"), [(True, torch.int32), (False, torch.int64)])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_result_and_gradients_against_float64(backend, name, rope, offsets, device):
    options = on(backend, device)
    lengths = SHAPES[name]
    q, k, v, coords = tokens(lengths, device=device)
    cu_seqlens = cumulative(lengths, offsets, device)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    coords, options = (coords, {**options, "patch_size": 256}) if rope else (None, options)
    ours = with_gradients(lambda *x: varlen_attention(*x, cu_seqlens, coords, **options), q, k, v, weight)
    truth = with_gradients(
        lambda *x: exact(*x, cu_seqlens, coords), q.double(), k.double(), v.double(), weight.double()
    )
    inferred = varlen_attention(q, k, v, cu_seqlens, coords, **options)
    assert inferred.shape == q.shape
    assert inferred.dtype == q.dtype
    assert inferred.is_contiguous()
    # Float32 sums of up to 65 terms; a lone token's query and key gradients are two rounded sums that cancel.
    rounding = 1e-6 * sum(x.norm() for x in truth)
    for got, expected in zip((inferred, *ours), (truth[0], *truth), strict=True):
        assert (got.double() - expected).norm() <= 3e-6 * expected.norm() + rounding


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_gradcheck_in_all_three(backend):
    q, k, v, coords = tokens([1, 4, 0, 2, 2], torch.float64, heads=1, dim=4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = cumulative([1, 4, 0, 2, 2])
    attend = lambda *x: varlen_attention(*x, cu_seqlens, coords, patch_size=256, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves)
    if backend == "eager":
        leaves = [x.detach()[:3].requires_grad_() for x in leaves]
        few = cumulative([1, 0, 2])
        assert torch.autograd.gradgradcheck(lambda *x: varlen_attention(*x, few, backend=backend), leaves)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_keeps_its_dtype_under_autocast(backend, training, device):
    options = on(backend, device)
    q, k, v, _ = tokens([5, 9], device=device)
    q.requires_grad_(training)
    with torch.autocast(device.type, torch.bfloat16):
        out = varlen_attention(q, k, v, cumulative([5, 9], device=device), **options)
    assert out.dtype == torch.float32
    assert relative(out.detach(), exact(q, k, v, cumulative([5, 9], device=device))) < 0.02  # bfloat16: 8 bits


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_one_of_them_alone(backend, device):
    options = on(backend, device)
    q, k, v, _ = tokens([5, 9], device=device)
    cu_seqlens = cumulative([5, 9], device=device)
    _, *every = with_gradients(lambda *x: varlen_attention(*x, cu_seqlens, **options), q, k, v, torch.ones_like(q))
    for axis in range(3):
        inputs = [q, k, v]
        inputs[axis] = inputs[axis].clone().requires_grad_()
        varlen_attention(*inputs, cu_seqlens, **options).sum().backward()
        torch.testing.assert_close(inputs[axis].grad, every[axis])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_auto_is_within_twice_the_error_of_dense_torch(dtype, device):
    lengths = [8, 130, 1]
    q, k, v, _ = tokens(lengths, dtype, dim=64, device=device)
    cu_seqlens = cumulative(lengths, device=device)
    truth = exact(q, k, v, cu_seqlens)
    ids = torch.repeat_interleave(torch.arange(3, device=device), torch.tensor(lengths, device=device))
    plain = relative(dense_fragment_attention(q, k, v, ids, 64**-0.5), truth)
    ours = varlen_attention(q, k, v, cu_seqlens)
    assert ours.dtype == dtype
    assert relative(ours, truth) <= 2 * plain + torch.finfo(dtype).eps


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_as_fragment_attention(backend, training, device):
    """Bit for bit: packed or not, by coordinates or by a Rotation, by cumulative lengths or by Segments."""
    options = on(backend, device)
    lengths = [8, 40, 0, 3]
    q, k, v, coords = tokens(lengths, device=device)
    cu_seqlens = cumulative(lengths, device=device)
    segments = Segments.from_lengths(torch.tensor(lengths, device=device))
    periods = rotary_periods(32, 100.0)
    rotation = Rotation.from_coords(coords, periods, 512)
    with torch.set_grad_enabled(training):
        qkv = torch.stack([q, k, v], 1).requires_grad_(training)
        expected = fragment_attention(qkv, segments, rotation, **options, scale=0.2)
        by_coords = {"coords": coords, "patch_size": 512, "periods": periods}
        for given, positions in ((cu_seqlens, by_coords), (segments, {"coords": rotation})):
            leaves = [x.clone().requires_grad_(training) for x in (q, k, v)]
            out = varlen_attention(*leaves, given, **positions, scale=0.2, **options)
            assert torch.equal(out, expected)
            if training:
                gradients = torch.autograd.grad(out.square().sum(), leaves)
                (of_packed,) = torch.autograd.grad(expected.square().sum(), qkv, retain_graph=True)
                assert torch.equal(torch.stack(gradients, 1), of_packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_untouched_inputs(backend, device):
    options = on(backend, device)
    lengths = [40, 7]
    q, k, v, coords = tokens(lengths, device=device)
    cu_seqlens = cumulative(lengths, device=device)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    by_dimension = k.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    sliced = torch.stack([v, v], 1)[:, 1]

    def attend(*x):
        return varlen_attention(*x, cu_seqlens, coords, patch_size=256, **options)

    given = [x.detach() for x in (by_head, by_dimension, sliced)]
    before = [x.clone() for x in given]
    expected = attend(q, k, v)
    torch.testing.assert_close(attend(*given), expected)
    for x, copy in zip(given, before, strict=True):
        assert torch.equal(x, copy)
    leaves = [x.requires_grad_() for x in given]
    out = attend(*leaves)
    out.backward(weight)
    for leaf, gradient in zip(leaves, with_gradients(attend, q, k, v, weight)[1:], strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, device):
    options = on(backend, device)
    lengths = [70, 3, 3, 20]
    q, k, v, _ = tokens(lengths, device=device)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    if backend == "sdpa" and device.type == "cuda":
        pytest.skip("torch's own backward pass on CUDA promises this with use_deterministic_algorithms only")
    runs = [
        with_gradients(lambda *x: varlen_attention(*x, cumulative(lengths, device=device), **options), q, k, v, weight)
        for _ in range(3)
    ]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_segment(backend, device):
    options = on(backend, device)
    lengths = [5, 40, 3, 3]
    q, k, v, _ = tokens(lengths, device=device)
    cu_seqlens = cumulative(lengths, device=device)
    weight = torch.ones_like(q)
    inside = torch.zeros(sum(lengths), dtype=torch.bool)
    inside[45:48] = True

    def attend(*x):
        return varlen_attention(*x, cu_seqlens, **options)

    clean = with_gradients(attend, q, k, v, weight)
    k[46] = float("nan")
    spoilt = with_gradients(attend, q, k, v, weight)
    assert spoilt[0][inside].isnan().all()
    for before, after in zip(clean, spoilt, strict=True):
        assert after[~inside].isfinite().all()
        torch.testing.assert_close(after[~inside], before[~inside], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_segment_does_not_depend_on_the_rest_of_the_batch(backend, device):
    """Bit for bit in the C++ kernel, and for a segment that fills a tile or is computed alone; else up to rounding."""
    options = on(backend, device)
    lengths = [3, 200, 5, 3]
    q, k, v, _ = tokens(lengths, device=device)
    together = varlen_attention(q, k, v, cumulative(lengths, device=device), **options)
    for first, length in ((0, 3), (3, 200), (203, 5), (208, 3)):
        rows = slice(first, first + length)
        alone = varlen_attention(q[rows], k[rows], v[rows], cumulative([length], device=device), **options)
        if length == 200 or (backend == "sdpa" and device.type == "cpu" and cpu_kernel.max_length()):
            assert torch.equal(together[rows], alone)
        torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-6)


def test_lengths_are_read_again_when_the_tensor_was_written_to(device):
    q, k, v, _ = tokens([40], device=device)
    buffer = cumulative([10, 30], device=device)

    def check():
        return torch.testing.assert_close(
            varlen_attention(q, k, v, buffer, backend="eager").double(), exact(q, k, v, buffer), rtol=1e-4, atol=1e-5
        )

    check()
    before = varlen._read_segments(buffer)
    check()
    assert varlen._read_segments(buffer) is before
    buffer.copy_(cumulative([25, 15], device=device))
    check()
    with torch.inference_mode():  # inference tensors count no writes
        buffer = cumulative([10, 30], device=device)
        check()
        buffer.copy_(cumulative([25, 15], device=device))
        check()
        before = varlen._read_segments(buffer)
        assert varlen._read_segments(buffer) is before
    if device.type == "cpu":  # memory that another library writes to
        buffer = cumulative([10, 30])
        check()
        buffer.numpy()[1] = 3
        check()


def test_what_was_read_is_forgotten_with_the_tensor():
    q, k, v, _ = tokens([5])
    gc.collect()
    before = len(varlen._READ), len(tiles._KNOWN)
    varlen_attention(q, k, v, cumulative([2, 3]), backend="eager")
    gc.collect()
    assert (len(varlen._READ), len(tiles._KNOWN)) == before


def test_segments_from_cumulative_lengths():
    made = Segments.from_cu_seqlens(cumulative([0, 3, 0, 2]))
    assert made.lengths == (3, 2)
    assert made.offsets.tolist() == [0, 3, 5]
    assert made.offsets.dtype == torch.int64
    assert Segments.from_cu_seqlens(cumulative([3]), "meta").offsets.device.type == "meta"


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0.0, 8.0]), r"int32 or int64 \[S \+ 1\], got torch.float32"),
        (torch.tensor([[0, 8]]), r"int32 or int64 \[S \+ 1\], got torch.int64 \[1, 2\]"),
        (torch.tensor([], dtype=torch.int64), r"got torch.int64 \[0\]"),
        (torch.tensor([0, 5, 3, 8]), "entry 2 is 3, after 5"),
        (torch.tensor([1, 8]), "begin with 0, got 1"),
        (torch.tensor([3, 5]), "begin with 0, got 3"),
        (torch.tensor([0, 5, 7]), "covers 7, but q holds 8"),
        (torch.tensor([0, 9]), "covers 9, but q holds 8"),
        (torch.tensor([0]), "covers 0, but q holds 8"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "cu_seqlens is on meta, but q is on cpu"),
        (Segments(torch.zeros(2, dtype=torch.int64, device="meta"), (8,)), "segments are on meta, but q is on cpu"),
        (Segments.from_lengths(torch.tensor([7])), "covers 7, but q holds 8"),
    ],
)
def test_bad_cumulative_lengths_are_refused(cu_seqlens, message):
    q, k, v, _ = tokens([8])
    with pytest.raises(SettingsError, match=message):
        varlen_attention(q, k, v, cu_seqlens)


def test_bad_tokens_are_refused():
    q, k, v, _ = tokens([8])
    cu_seqlens = cumulative([8])

    def refused(message, *args, **options):
        with pytest.raises(SettingsError, match=message):
            varlen_attention(*args, **options)

    refused(r"q must be floating point \[T, H, D\].*\[1, 8, 2, 32\]", q[None], k[None], v[None], cu_seqlens)
    refused("q must be floating point", q.long(), k.long(), v.long(), cu_seqlens)
    refused(r"\[8, 2, 0\]", q[..., :0], k[..., :0], v[..., :0], cu_seqlens)
    refused("k has 1 heads, but q has 2; grouped heads are not supported", q, k[:, :1], v[:, :1], cu_seqlens)
    refused("k is .7, 2, 32., but q is .8, 2, 32.; this is self-attention", q, k[:7], v[:7], cu_seqlens)
    refused("v is .8, 2, 16., but q is", q, k, v[..., :16], cu_seqlens)
    refused("v is torch.float64, but q is torch.float32", q, k, v.double(), cu_seqlens)
    refused("k is on meta, but q is on cpu", q, k.to("meta"), v, cu_seqlens)
    refused("unknown attention backend 'flash'", q, k, v, cu_seqlens, backend="flash")
    refused("scale must be a positive finite number", q, k, v, cu_seqlens, scale=0.0)


def test_bad_coordinates_are_refused():
    q, k, v, coords = tokens([8])
    rotation = Rotation.from_coords(coords, rotary_periods(32), 256)
    rest = {"patch_size": 256}

    def refused(message, coords, **options):
        with pytest.raises(SettingsError, match=message):
            varlen_attention(q, k, v, cumulative([8]), coords, **options)

    refused(r"coords must be .* T = 8, got torch.int64 \[7, 2\]", coords[:7], **rest)
    refused("got torch.bool", coords > 3, **rest)
    refused("got torch.bfloat16", coords.bfloat16(), **rest)
    refused("needs patch_size", coords)
    refused("needs patch_size, a positive number", coords, patch_size=0)
    refused("belong to coords", rotation, **rest)
    refused("belong to coords", None, **rest)
    refused("coords is on meta", coords.to("meta"), **rest)
    refused("row 3 holds", coords.double().index_fill(0, torch.tensor([3]), float("nan")), **rest)
    refused("head dimension 64", coords, periods=rotary_periods(64), **rest)
    refused("rotation is for 7 tokens", Rotation.from_coords(coords[:7], rotary_periods(32), 256))


def test_what_the_kernels_do_not_take_is_refused(device):
    pytest.importorskip("triton")
    for dim, dtype in ((48, torch.float32), (32, torch.float64)):
        q, k, v, _ = tokens([8], dtype, dim=dim, device=device)
        with pytest.raises(BackendError, match='use the "sdpa" backend'):
            varlen_attention(q, k, v, cumulative([8], device=device), backend="triton")


def compiled(function, device):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_in_a_compiled_graph(backend, rope, device):
    options = on(backend, device)

    def step(q, k, v, segments, coords):
        extra = {"patch_size": 256} if rope else {}
        return varlen_attention(q * 1.5, k, v, segments, coords if rope else None, **extra, **options).square()

    graph = compiled(step, device)
    for lengths in ([9, 3, 40], [40, 1]):
        q, k, v, coords = tokens(lengths, heads=1, device=device)
        segments = Segments.from_cu_seqlens(cumulative(lengths, device=device))
        rest = (segments, coords)
        # The graph first: it must not need what an ordinary call left behind. On the CPU its kernels are others.
        runs = [
            with_gradients(lambda *x, f=f, rest=rest: f(*x, *rest), q, k, v, torch.ones_like(q)) for f in (graph, step)
        ]
        for ours, theirs in zip(*runs, strict=True):
            assert relative(ours, theirs.double()) <= 3e-6


@pytest.mark.parametrize("training", [True, False])
def test_cumulative_lengths_in_a_compiled_graph_of_the_kernels(training, device):
    """Read when the graph runs: one buffer, other segments, empty ones too, one graph; wrong ones are refused."""
    pytest.importorskip("triton")
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    def step(q, k, v, cu_seqlens, rotation):
        return varlen_attention(q * 1.5, k, v, cu_seqlens, rotation, backend="triton").square()

    torch._dynamo.reset()
    graph = torch.compile(step, fullgraph=True, backend=counting)
    q, k, v, coords = tokens([52], heads=1, device=device)
    rotation = Rotation.from_coords(coords, rotary_periods(32), 256)
    buffer = cumulative([9, 3, 40], device=device)
    for lengths in ([9, 3, 40], [40, 0, 12], [3, 9, 40]):
        buffer.copy_(cumulative(lengths, device=device))
        if training:
            runs = [
                with_gradients(lambda *x, f=f: f(*x, buffer, rotation), q, k, v, torch.ones_like(q))
                for f in (step, graph)
            ]
        else:
            with torch.inference_mode():
                runs = [[f(q, k, v, buffer.clone(), rotation)] for f in (step, graph)]
        for ours, theirs in zip(*runs, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 1
    buffer.copy_(cumulative([9, 3, 41], device=device))
    with torch.no_grad() if not training else torch.enable_grad(), pytest.raises(SettingsError, match="covers 53"):
        graph(q, k, v, buffer, rotation)


def test_the_error_of_a_graph_that_needs_lengths_says_what_to_give():
    q, k, v, _ = tokens([5, 3])
    graph = compiled(lambda *x: varlen_attention(*x, backend="sdpa"), q.device)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"give Segments\.from_cu_seqlens"):
        graph(q, k, v, cumulative([5, 3]))
    torch._dynamo.reset()
    loose = torch.compile(lambda *x: varlen_attention(*x, backend="sdpa"), backend="eager")
    cu_seqlens = cumulative([5, 3])
    torch.testing.assert_close(loose(q, k, v, cu_seqlens), varlen_attention(q, k, v, cu_seqlens))


@pytest.mark.parametrize("operator", ["varlen_attention", "checked_offsets"])
def test_operators_that_look_up_tiles_are_left_out_of_cuda_graphs(operator):
    pytest.importorskip("triton")
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.exaonepath, operator).default.tags


@pytest.mark.parametrize(("rope", "training", "tensors"), [(0, 0, 1), (1, 0, 2), (0, 1, 4), (1, 1, 4)])
def test_memory_of_the_kernels(rope, training, tensors, device, live_memory):
    """In tensors [T, H, D]: the result; rotated keys; with gradients, the packed copy instead. Nothing else."""
    pytest.importorskip("triton")
    q, k, v, coords = tokens([100], device=device)
    segments = Segments.from_cu_seqlens(cumulative([100], device=device))
    rotation = Rotation.from_coords(coords, rotary_periods(32), 256) if rope else None
    tables = triton_varlen.kernels._tables(q, rotation)
    inside = triton_varlen._forward._init_fn  # what a mode sees of an operator is its results only
    inside(q, k, v, *tables, segments.offsets, 0.2, bool(training))  # lists of tiles are made once
    with live_memory(device.type, q, k, v, *tables) as memory:
        held = memory.now
        kept = inside(q, k, v, *tables, segments.offsets, 0.2, bool(training))
    lse = kept[1].nbytes
    assert tensors <= (memory.peak - held - lse) / q.nbytes < tensors + 0.05  # the lists of tiles


def test_auto_is_resolved_as_for_fragment_attention(device):
    assert resolve_backend("auto", torch.device("cpu"), torch.float32, 32) == "sdpa"
    q, k, v, _ = tokens([9, 4], device=device)
    cu_seqlens = cumulative([9, 4], device=device)
    named = resolve_backend("auto", q.device, q.dtype, 32)
    assert torch.equal(varlen_attention(q, k, v, cu_seqlens), varlen_attention(q, k, v, cu_seqlens, backend=named))
