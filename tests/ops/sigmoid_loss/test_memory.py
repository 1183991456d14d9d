"""Nothing of order B x B is allocated: measured, operation by operation."""

import importlib.util
from itertools import permutations
from pathlib import Path

import pytest
import torch

from exaonepath.ops.sigmoid_loss.checks import check_inputs
from exaonepath.ops.sigmoid_loss.engine import choose_engine, why_not
from exaonepath.ops.sigmoid_loss.pairs import LocalBatch, pairwise_sigmoid

MEASURED = Path(__file__).with_name("live_bytes.py")


@pytest.fixture(scope="module")
def live_bytes():
    spec = importlib.util.spec_from_file_location("live_bytes", MEASURED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LiveBytes


def make_inputs(n_rows, width, dim, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    return check_inputs(
        [draw(n_rows, width) for _ in range(3)],
        {pair: draw(width, dim) for pair in permutations(range(3), 2)},
        torch.full((3,), 2.3, device=device),
        torch.full((3,), -10.0, device=device),
        torch.arange(n_rows, device=device),
        torch.rand(3, n_rows, generator=generator).to(device) > 0.1,
        None,
        "balanced",
        None,
    )


def measure(live_bytes, backend, n_rows, width=8, dim=16):
    """(largest storage, peak of what was alive) of a forward with gradients, in bytes."""
    inputs = make_inputs(n_rows, width, dim)
    engine = choose_engine(backend, torch.device("cpu"), torch.float32)
    with torch.no_grad(), live_bytes() as mode:
        pairwise_sigmoid(inputs, engine, LocalBatch(), [True] * 3)
    return mode.largest, mode.peak


@pytest.mark.parametrize(("backend", "tiles"), [("torch", 6), ("cpu", 1)])
def test_memory_is_a_few_tiles_and_a_few_batches(backend, tiles, live_bytes):
    reason = "" if backend == "torch" else why_not(backend, torch.device("cpu"), torch.float32)
    if reason:
        pytest.skip(reason)
    n_rows, dim = 4400, 16
    largest, peak = measure(live_bytes, backend, n_rows, dim=dim)
    tile = 512 * 2048 * 4
    assert largest <= tile  # the whole matrix would be 77 MB
    # u, v, their gradients, the three embeddings' gradients, ids, the table of patients, and copies of two of them.
    rows = n_rows * (12 * dim * 4 + 3 * 8 * 4 + 12 * 8)
    assert peak <= tiles * tile + rows
    _, half = measure(live_bytes, backend, n_rows // 2, dim=dim)
    # Linear in B: a quadratic part of even a hundredth of B x B floats would be seen.
    assert peak - half <= rows / 2 + 0.01 * n_rows**2 * 4


def test_the_measure_sees_a_matrix_of_all_pairs(live_bytes):
    u = torch.randn(600, 4)
    with live_bytes() as mode:
        (u @ u.T).sigmoid()
    assert mode.largest == 600 * 600 * 4
    assert mode.peak >= 2 * mode.largest
    assert mode.live == 0


@pytest.mark.gpu
def test_a_sweep_never_waits_for_the_card(card):
    class Watched(LocalBatch):
        def sweep(self, modality, task):
            torch.cuda.set_sync_debug_mode("error")
            try:
                super().sweep(modality, task)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    inputs = make_inputs(5000, 64, 64, card, torch.bfloat16)
    with torch.no_grad():
        result = pairwise_sigmoid(inputs, choose_engine("cuda", card, torch.bfloat16), Watched(), [True] * 3)
    assert result.loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_on_the_card(card, dtype):
    n_rows, width, dim = 30_000, 64, 128  # the whole matrix would be 3.6 GB
    inputs = make_inputs(n_rows, width, dim, card, dtype)
    engine = choose_engine("cuda", card, dtype)
    with torch.no_grad():
        pairwise_sigmoid(inputs, engine, LocalBatch(), [True] * 3)
        torch.cuda.synchronize()
        # What cuBLAS and cuBLASLt were given before would not be counted.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        result = pairwise_sigmoid(inputs, engine, LocalBatch(), [True] * 3)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved() - before
    own = sum(gradient.numel() * gradient.element_size() for gradient in result.gradients)
    # u, v and their gradients in float32, their copies in the operands' dtype, and one more of each on the way.
    of_one_pair = n_rows * dim * (4 * 4 + 2 * 4 + 4 * 4)
    assert peak <= own + of_one_pair + (128 << 20)
