"""The fused kernels on a GPU: every dtype against torch's own error, a million tokens, memory checked by NVIDIA's tool.

The shapes, strides and graphs of test_triton_attention.py and test_triton_compiled_graph.py run on the GPU too; here is
what only makes sense on one.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from attention_cases import exact, inputs, relative, with_gradient

from exaonepath.ops.attention import triton as kernels
from exaonepath.ops.attention.fragment_attention import fragment_attention
from exaonepath.ops.attention.rows import attend_rows, cut_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = {
    "long": [2048],
    "mixed": [8, 700, 33] * 3,
    "tiny": [3] * 700,
    "edges of tiles": [1, 64, 127, 128, 129, 255, 257],
}
NORMS = {"max": lambda e: e.abs().max().item(), "rms": lambda e: e.square().mean().sqrt().item()}


@pytest.fixture(autouse=True)
def card():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = kernels.unsupported_device(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)


def attend(segments, rotation, backend, **options):
    return lambda qkv: fragment_attention(qkv, segments, rotation, backend=backend, **options)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_twice_that_of_torch(shape, dtype, dim, rope, monkeypatch):
    """Forward and every part of the gradient, by maximum and by RMS, against float64."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    qkv, segments, rotation = inputs(SHAPES[shape], dtype, heads=2, dim=dim, rope=rope, device="cuda")
    weight = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    truth = with_gradient(lambda t: exact(t, segments, rotation), qkv.double(), weight)
    ours = with_gradient(attend(segments, rotation, "triton"), qkv, weight)
    theirs = with_gradient(attend(segments, rotation, "sdpa"), qkv, weight)
    with torch.no_grad():
        inferred = attend(segments, rotation, "triton")(qkv)
        in_place = attend(segments, rotation, "triton", overwrite_qkv=True)(qkv.clone())
    pairs = [("training", ours[0], theirs[0], truth[0]), ("inference", inferred, theirs[0], truth[0])]
    pairs += [("in place", in_place, theirs[0], truth[0])]
    pairs += [(f"gradient {i}", ours[1][:, i], theirs[1][:, i], truth[1][:, i]) for i in range(3)]
    eps = torch.finfo(dtype).eps
    for what, our, their, true in pairs:
        assert our.dtype == dtype
        for name, norm in NORMS.items():
            # DESIGN's rule; one last bit is allowed where torch happens to be luckier than the dtype.
            allowed = 2 * norm(their.double() - true) + eps * norm(true)
            assert norm(our.double() - true) <= allowed, (what, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cudnn_for_one_long_segment(dtype):
    """As a whole and by rows; forward it is as deterministic as ours."""
    qkv, segments, _ = inputs([1999], dtype, heads=3, dim=64, rope=False, device="cuda")
    weight = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    truth = with_gradient(lambda t: exact(t, segments, None), qkv.double(), weight)
    ours = with_gradient(attend(segments, None, "cudnn"), qkv, weight)
    theirs = with_gradient(attend(segments, None, "sdpa"), qkv, weight)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        for norm in NORMS.values():
            allowed = 2 * norm(their.double() - true) + torch.finfo(dtype).eps * norm(true)
            assert norm(our.double() - true) <= allowed
    q, k, v = (t.clone() for t in qkv.unbind(1))
    for chunk in cut_rows(segments, 700):
        attend_rows(q[chunk.first : chunk.first + chunk.count], k, v, segments, chunk, None, backend="cudnn")
    assert relative(q, truth[0]) <= 2 * relative(theirs[0], truth[0]) + torch.finfo(dtype).eps
    with torch.no_grad():
        first = attend(segments, None, "cudnn")(qkv)
        assert all(torch.equal(attend(segments, None, "cudnn")(qkv), first) for _ in range(20))
        qkv[5, 1] = float("nan")
        assert attend(segments, None, "cudnn")(qkv).isnan().all()
        qkv[:, 0], qkv[:, 1] = 1.0, -float("inf")
        assert attend(segments, None, "cudnn")(qkv).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_every_buffer_is_written(dtype, monkeypatch):
    qkv, segments, rotation = inputs([8, 700, 33, 1, 3, 3], dtype, dim=64, device="cuda")
    weight = torch.ones_like(qkv[:, 0])
    expected = with_gradient(attend(segments, rotation, "triton"), qkv, weight)
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return call

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    for ours, theirs in zip(with_gradient(attend(segments, rotation, "triton"), qkv, weight), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeat_runs_are_bit_identical(dtype):
    qkv, segments, rotation = inputs([8, 3000, 33, 700] + [3] * 200, dtype, heads=4, dim=64, device="cuda")
    weight = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    first = with_gradient(attend(segments, rotation, "triton"), qkv, weight)
    for _ in range(5):
        for ours, theirs in zip(with_gradient(attend(segments, rotation, "triton"), qkv, weight), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_million_tokens(dtype):
    """Packed qkv of 2.3e9 elements, past 2^31: offsets are 64-bit. A few rows at both ends against float64."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB free")
    tokens, heads, dim = 1_000_000, 12, 64
    lengths = [8, 20_000, 3, 79_989] + [10_000] * 90
    generator = torch.Generator("cuda").manual_seed(0)
    _, segments, rotation = inputs(lengths, heads=1, dim=dim, device="cuda")
    qkv = torch.empty((tokens, 3, heads, dim), dtype=dtype, device="cuda")
    for start in range(0, tokens, 100_000):
        part = qkv[start : start + 100_000]
        part.copy_(torch.randn(part.shape, device="cuda", generator=generator))
    with torch.no_grad():
        out = attend(segments, rotation, "triton")(qkv)
        rows = torch.tensor([0, 7, 8, 20_007, 20_008, 20_010, 20_011, 99_999, 500_000, 989_999, 990_000, 999_999])
        offsets = torch.tensor(segments.offsets.tolist())
        for row in rows.tolist():
            at = int(torch.searchsorted(offsets, row, right=True)) - 1
            one = slice(int(offsets[at]), int(offsets[at + 1]))
            cos, sin = (table.double() for table in rotation.cos_sin())

            def turned(x, rows, cos=cos, sin=sin):
                a, b = x.double().chunk(2, -1)
                c, s = cos[rows][:, None], sin[rows][:, None]
                return torch.cat([a * c - b * s, b * c + a * s], -1)

            q, k = turned(qkv[row : row + 1, 0], slice(row, row + 1)), turned(qkv[one, 1], one)
            weights = (torch.einsum("ihd,jhd->hij", q, k) * dim**-0.5).softmax(-1)
            truth = torch.einsum("hij,jhd->ihd", weights, qkv[one, 2].double())
            # Rounding of queries, keys, probabilities and the result to the dtype.
            assert (out[row : row + 1].double() - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.norm()


_SANITIZER_SECONDS = 150  # of a session's minutes
_SANITIZED = """
import torch
from exaonepath.ops import Rotation, Segments, fragment_attention, rotary_periods

for dtype, dim in ((torch.bfloat16, 64), (torch.float32, 32), (torch.float16, 128)):
    lengths = [1, 130, 5, 3, 3, 65]
    qkv = torch.randn(sum(lengths), 3, 2, dim, device="cuda", dtype=dtype, requires_grad=True)
    segments = Segments.from_lengths(torch.tensor(lengths, device="cuda"))
    coords = torch.randint(0, 200_000, (sum(lengths), 2), device="cuda")
    for rotation in (Rotation.from_coords(coords, rotary_periods(dim), 256), None):
        fragment_attention(qkv, segments, rotation, backend="triton").sum().backward()
        with torch.no_grad():
            fragment_attention(qkv, segments, rotation, backend="triton")
            fragment_attention(qkv.clone(), segments, rotation, backend="triton", overwrite_qkv=True)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(check, tmp_path):
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "attend.py"
    script.write_text(_SANITIZED)
    # torch's caching allocator would hide an access beyond a tensor inside a larger block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [tool, "--tool", check, "--error-exitcode", "99", sys.executable, str(script)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
            timeout=_SANITIZER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{check} was not done after {_SANITIZER_SECONDS} s; bench/gpu_session.sh sanitize has more time")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
