"""Nothing of order B x B is allocated: measured, operation by operation."""

import importlib.util
from itertools import permutations
from pathlib import Path

import pytest
import torch

from exaonepath.ops.sigmoid_loss_checks import check_inputs
from exaonepath.ops.sigmoid_loss_engine import choose_engine, why_not
from exaonepath.ops.sigmoid_loss_pairs import LocalBatch, pairwise_sigmoid

MEASURED = Path(__file__).with_name("live_bytes.py")


@pytest.fixture(scope="module")
def live_bytes():
    spec = importlib.util.spec_from_file_location("live_bytes", MEASURED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LiveBytes


def measure(live_bytes, backend, n_rows, width=8, dim=16):
    """(largest storage, peak of what was alive) of a forward with gradients, in bytes."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs = check_inputs(
        [draw(n_rows, width) for _ in range(3)],
        {pair: draw(width, dim) for pair in permutations(range(3), 2)},
        torch.full((3,), 2.3),
        torch.full((3,), -10.0),
        torch.arange(n_rows),
        torch.rand(3, n_rows, generator=generator) > 0.1,
        None,
        "balanced",
        None,
    )
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
