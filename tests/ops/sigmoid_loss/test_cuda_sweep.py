"""The sweep in one call: against float64, captured, repeated, on other streams, and what it takes of memory.

The tests of results also run with the loop in Python on the CPU, so that what they compare with is known to be right
before a card meets them.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exaonepath import log_once
from exaonepath.errors import BackendError
from exaonepath.ops.extension import load_extension
from exaonepath.ops.sigmoid_loss import cuda_sweep, engine
from exaonepath.ops.sigmoid_loss.cuda_sweep import CUDA_TILE, CudaSweep
from exaonepath.ops.sigmoid_loss.engine import choose_engine
from exaonepath.ops.sigmoid_loss.sweep import N_SUMS, Engine, PairConstants, PairTask, Tile, TileLoop, Workspace

SCALE, BIAS, POS_WEIGHT = 12.5, -10.125, 3.5
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU = pytest.mark.gpu


def on_card(dtype, tile=CUDA_TILE, overlapped=False):
    """The engine of CUDA with another tile."""
    chosen = choose_engine("cuda", torch.device("cuda", torch.cuda.current_device()), dtype)
    return replace(chosen, sweep=CudaSweep(tile, overlapped))


def make_task(rows, columns, dim, device, chosen, *, seed=0, gradients=True):
    """A pair of random unit rows, where two thirds of the rows have a partner."""
    generator = torch.Generator().manual_seed(seed)

    def units(n):
        x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=1).to(device, chosen.operand)

    def ids(n):
        return torch.randint(0, max(1, 2 * rows // 3), (n,), generator=generator).to(device)

    zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
    on_device = torch.tensor([SCALE, BIAS, POS_WEIGHT], dtype=torch.float64, device=device)
    slopes = (zeros(rows, dim, dtype=chosen.accumulator), zeros(columns, dim, dtype=chosen.accumulator))
    return PairTask(
        units(rows),
        units(columns),
        ids(rows),
        ids(columns),
        PairConstants(SCALE, BIAS, POS_WEIGHT, on_device),
        chosen,
        zeros(N_SUMS, dtype=torch.float64),
        slopes if gradients else None,
        Workspace(),
    )


def run(task):
    """(sums, dU, dV), which were zero before."""
    for tensor in results(task):
        tensor.zero_()
    task.engine.sweep(task)
    return [tensor.clone() for tensor in results(task)]


def results(task):
    return [task.sums, *(task.gradients or ())]


class Expected:
    """Sums and gradients of a task in float64, and by how much roundings can move them.

    Products of d terms and sums of n terms err by at most d and n units of 2^-23 relative to the sum of the sizes of
    their terms, in any order and with an addition that truncates. A logit's error moves softplus and sigmoid by as
    much, relatively; their own evaluation, and the product with the weight, is within 8 units. G is stored in
    `gradient_operand`, rounded once. Sums run in float32 over at most 32 elements, then in float64.
    """

    def __init__(self, task):
        unit = 2.0**-23
        u, v = task.u.double(), task.v.double()
        # float16 operands are rounded again, to bfloat16, for the products of the gradients.
        gradient_u, gradient_v = (x.to(task.engine.gradient_operand).double() for x in (task.u, task.v))
        same = task.row_ids[:, None] == task.column_ids
        dots = u @ v.T
        logits = SCALE * dots + BIAS
        g = torch.where(same, -POS_WEIGHT * (-logits).sigmoid(), logits.sigmoid())
        losses = torch.where(same, POS_WEIGHT, 1.0) * torch.where(same, -logits, logits).exp().log1p()
        logit_error = unit * (SCALE * (u.abs() @ v.abs().T) * (u.shape[1] + 1) + 2 * logits.abs())
        error = logit_error + 8 * unit
        terms = [
            (losses, losses.abs() * error),
            (g, g.abs() * error),
            (g * dots, (g * dots).abs() * error),
            (same.double(), torch.zeros_like(g)),
            (logits * same, logit_error * same),
            (logits * ~same, logit_error * ~same),
        ]
        self.sums = [(x.sum().item(), (slack + 32 * unit * x.abs()).sum().item()) for x, slack in terms]
        stored = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[task.engine.gradient_operand]
        self.gradients = []
        for slopes, relative, operand in ((g, error, gradient_v), (g.T, error.T, gradient_u)):
            slack = (slopes.abs() * (relative + stored + slopes.shape[1] * unit)) @ operand.abs()
            self.gradients.append((slopes @ operand, slack))

    def check(self, found):
        sums = found[0].tolist()
        for index, (wanted, slack) in enumerate(self.sums):
            assert abs(sums[index] - wanted) <= slack, f"sum {index}: {sums[index]}, {wanted} +- {slack}"
        assert sums[6:] == [0, 0]
        for name, mine, (wanted, slack) in zip(("dU", "dV"), found[1:], self.gradients, strict=True):
            worst = ((mine.double() - wanted).abs() / slack.clamp(min=1e-300)).max().item()
            assert worst <= 1, f"{name}: {worst:.3g} times what roundings can add up to"


SHAPES = [(1, 1, 1), (3, 5, 2), (67, 67, 37), (1, 300, 8), (300, 1, 8), (301, 257, 33), (700, 900, 64)]
TILES = [Tile(16, 24), Tile(128, 256), CUDA_TILE]


def tiles_for(shape, most):
    """Those of TILES that a sweep of this shape has at most `most` of."""
    return [tile for tile in TILES if shape[0] * shape[1] <= most * tile.rows * tile.columns]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loop_equals_float64(shape):
    chosen = choose_engine("torch", CPU, torch.float32)
    expected = None
    for tile in tiles_for(shape, 200):
        task = make_task(*shape, CPU, replace(chosen, sweep=TileLoop(chosen.sweep.run_pass, tile)))
        expected = expected or Expected(task)
        expected.check(run(task))


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 3001, 256), (4097, 2049, 64)], ids=str)
def test_equals_float64(shape, dtype, card):
    expected = None
    for overlapped in (False, True):
        for tile in tiles_for(shape, 2000):
            task = make_task(*shape, card, on_card(dtype, tile, overlapped))
            expected = expected or Expected(task)
            expected.check(run(task))


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_alone_are_the_same(dtype, card):
    task = make_task(700, 900, 64, card, on_card(dtype, Tile(256, 128)))
    alone = make_task(700, 900, 64, card, task.engine, gradients=False)
    assert torch.equal(run(alone)[0], run(task)[0])


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overlapped", [False, True], ids=["one stream", "two streams"])
def test_repeats_bit_for_bit(overlapped, dtype, card):
    task = make_task(5000, 3001, 128, card, on_card(dtype, Tile(1024, 512), overlapped))
    first = run(task)
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip(first, run(task), strict=True))
    other = make_task(5000, 3001, 128, card, on_card(dtype, Tile(1024, 512), not overlapped))
    assert all(torch.equal(x, y) for x, y in zip(first, run(other), strict=True))


@GPU
@pytest.mark.parametrize("overlapped", [False, True], ids=["one stream", "two streams"])
def test_runs_on_the_current_stream(overlapped, card):
    task = make_task(3000, 2000, 64, card, on_card(torch.bfloat16, Tile(1024, 512), overlapped))
    first = run(task)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The operands are not there before the stream gets to it: work on any other stream would see zeros.
        u = task.u.clone()
        task.u.zero_()
        torch.cuda._sleep(100_000_000)
        task.u.copy_(u)
        second = run(task)
        task.u.zero_()  # and not after it
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overlapped", [False, True], ids=["one stream", "two streams"])
def test_captured_in_a_graph(overlapped, dtype, card):
    chosen = on_card(dtype, Tile(512, 256), overlapped)
    task = make_task(1500, 1100, 64, card, chosen, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(task)  # loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = replace(task, workspace=Workspace())  # its memory is the graph's own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensor in results(captured):
            tensor.zero_()
        captured.engine.sweep(captured)
    for seed in (2, 3):
        other = make_task(1500, 1100, 64, card, chosen, seed=seed)
        wanted = run(other)
        for name in ("u", "v", "row_ids", "column_ids"):
            getattr(captured, name).copy_(getattr(other, name))
        graph.replay()
        torch.cuda.synchronize()
        Expected(other).check(results(captured))
        assert all(torch.equal(x, y) for x, y in zip(results(captured), wanted, strict=True))


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [8192, 40_960])
def test_memory_beyond_inputs_and_gradients(rows, dtype, card):
    """At any number of rows at most 128 MB, workspaces of cuBLAS included."""
    task = make_task(rows, rows, 128, card, choose_engine("cuda", card, dtype))
    # Those that other tests left would not be seen.
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    task.engine.sweep(task)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_reserved() - before
    copies = 2 * 2 * task.u.numel() if dtype == torch.float16 else 0  # the operands once more, in bfloat16
    assert taken >= CUDA_TILE.rows * CUDA_TILE.columns * (4 if dtype == torch.float32 else 6)
    # Each copy may be rounded up to 2 MB.
    assert taken <= (128 << 20) + (copies + (4 << 20) if copies else 0)


class FakeExtension:
    """Takes the place of the extension: reads and writes float32 memory at the addresses that it is given."""

    def __init__(self):
        self.calls = []

    def sigmoid_sweep_workspace_cuda(self, *sizes):
        self.sizes = sizes
        return 1024

    def sigmoid_sweep_cuda(self, **given):
        self.calls.append(given)
        m, n, d = given["rows"], given["cols"], given["dim"]

        def at(name, shape, kind=ctypes.c_float):
            array = np.ctypeslib.as_array((kind * math.prod(shape)).from_address(given[name]))
            return torch.from_numpy(array).view(shape)

        scale, bias, pos_weight = at("params", (3,), ctypes.c_double).tolist()
        row_ids, column_ids = at("row_ids", (m,), ctypes.c_int64), at("col_ids", (n,), ctypes.c_int64)
        u, v = at("u", (m, d)), at("v", (n, d))
        same = row_ids[:, None] == column_ids
        logits = scale * (u @ v.T) + bias
        g = torch.where(same, -pos_weight * (-logits).sigmoid(), logits.sigmoid())
        losses = torch.where(same, pos_weight, 1.0) * torch.where(same, -logits, logits).exp().log1p()
        sums = at("sums", (8,), ctypes.c_double)
        parts = [losses, g, g * (u @ v.T), same, logits * same, logits * ~same]
        sums[:6] += torch.stack([x.double().sum() for x in parts])
        if given["du"]:
            at("du", (m, d)).add_(g @ at("gradient_v", (n, d)))
            at("dv", (n, d)).add_(g.T @ at("gradient_u", (m, d)))


@pytest.fixture
def fake(monkeypatch):
    extension = FakeExtension()
    monkeypatch.setattr(cuda_sweep, "require_extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=11))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=12))
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 13)
    return extension


FLOAT32 = (torch.float32, torch.float32, torch.float32)


@pytest.mark.parametrize("overlapped", [False, True])
def test_every_argument_gets_to_the_extension(overlapped, fake):
    task = make_task(70, 50, 8, CPU, Engine(CudaSweep(Tile(32, 16), overlapped), *FLOAT32))
    Expected(task).check(run(task))
    (given,) = fake.calls
    assert fake.sizes == (70, 50, 32, 16, "float32", overlapped)
    assert (given["stream"], given["side_stream"], given["blas_handle"]) == (11, 12 if overlapped else 0, 13)
    assert (given["tile_rows"], given["tile_cols"]) == (32, 16)
    assert given["workspace"] == task.workspace.bytes(1024, CPU).data_ptr()
    sums = make_task(70, 50, 8, CPU, task.engine, gradients=False)
    assert torch.equal(run(sums)[0], task.sums)
    assert fake.calls[1]["du"] == fake.calls[1]["dv"] == 0


def test_float16_is_copied_to_bfloat16_for_the_gradients(fake, monkeypatch):
    given = {}
    monkeypatch.setattr(fake, "sigmoid_sweep_cuda", lambda **arguments: given.update(arguments))
    chosen = Engine(CudaSweep(CUDA_TILE, False), torch.float16, torch.bfloat16, torch.float32)
    task = make_task(5, 4, 3, CPU, chosen)
    chosen.sweep(task)
    assert (given["dtype"], given["gradient_dtype"]) == ("float16", "bfloat16")
    assert given["u"] == task.u.data_ptr() != given["gradient_u"]
    same = make_task(5, 4, 3, CPU, replace(chosen, operand=torch.bfloat16))
    same.engine.sweep(same)
    assert given["gradient_u"] == same.u.data_ptr()
    assert given["gradient_v"] == same.v.data_ptr()


def test_an_empty_sweep_calls_nothing(fake):
    chosen = Engine(CudaSweep(CUDA_TILE, False), *FLOAT32)
    for rows, columns in ((0, 4), (4, 0)):
        chosen.sweep(make_task(rows, columns, 3, CPU, chosen))
    assert not fake.calls


@pytest.mark.parametrize(
    "change",
    [
        lambda task: {"u": task.u.double()},
        lambda task: {"v": task.v[:, :2]},
        lambda task: {"v": task.v[::2]},
        lambda task: {"row_ids": task.row_ids.int()},
        lambda task: {"column_ids": task.column_ids[:-1]},
        lambda task: {"sums": task.sums[:6]},
        lambda task: {"gradients": task.gradients[::-1]},
        lambda task: {"gradients": (task.gradients[0].to("meta"), task.gradients[1])},
        lambda task: {"constants": replace(task.constants, on_device=task.constants.on_device.float())},
    ],
)
def test_what_the_extension_cannot_read_is_refused(change, fake):
    task = make_task(6, 4, 3, CPU, Engine(CudaSweep(CUDA_TILE, False), *FLOAT32))
    with pytest.raises(TypeError, match=r"csrc/sigmoid_loss\.h"):
        task.engine.sweep(replace(task, **change(task)))
    assert not fake.calls


def test_without_cublas_torch_serves_and_says_so_once(monkeypatch, caplog):
    reason = "cuBLAS is not loaded (made up)"
    monkeypatch.setattr(engine, "why_no_cuda_half", lambda: "")
    monkeypatch.setattr(engine, "why_no_cublas", lambda: reason)
    log_once.forget()
    for _ in range(2):
        chosen = choose_engine("auto", torch.device("cuda"), torch.bfloat16)
        assert isinstance(chosen.sweep, TileLoop)
    assert len([record for record in caplog.records if reason in record.message]) == 1
    with pytest.raises(BackendError, match="made up"):
        choose_engine("cuda", torch.device("cuda"), torch.bfloat16)


def test_workspace_is_kept_and_grows():
    workspace = Workspace()
    first = workspace.bytes(100, CPU)
    assert workspace.bytes(50, CPU).data_ptr() == first.data_ptr()
    assert workspace.bytes(1000, CPU).numel() >= 1000


def test_the_compiled_sweep_without_a_card():
    extension, reason = load_extension()
    if extension is None or not hasattr(extension, "sigmoid_sweep_cuda"):
        pytest.skip(reason or "the C++ extension was built without CUDA")
    tile = 4096 * 2048
    held = extension.sigmoid_sweep_workspace_cuda(1 << 20, 1 << 20, 4096, 2048, "bfloat16", False)
    assert 6 * tile < held < 6 * tile + (1 << 20)
    with pytest.raises(ValueError, match="tile_rows"):
        extension.sigmoid_sweep_workspace_cuda(1, 1, 0, 2048, "bfloat16", False)
    with pytest.raises(ValueError, match="gradient_operand"):
        extension.sigmoid_sweep_workspace_cuda(1, 1, 1, 1, "float16", False)
    if torch.version.cuda is None:
        assert "libtorch_cuda" in extension.cublas_reason()
