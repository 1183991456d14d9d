"""A batch spread over 2 and 3 processes (gloo) gives the loss and gradients of one process that holds it all."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from exaonepath.errors import SettingsError
from exaonepath.ops.sigmoid_loss.ring import Ring

WORKER = Path(__file__).with_name("ring_worker.py")
WORLD = 3
# Rounding of float64 sums in another order; of float32 ones, the bounds of the loss itself.
EXACT, LOSS_ERROR, GRADIENT_ERROR = 1e-12, 1e-6, 5e-6
GROUPS = [("two", rank) for rank in range(2)] + [("three", rank) for rank in range(3)]

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def found(warm_package, tmp_path_factory):
    """What each rank found, all scenarios in one start of three processes."""
    folder = tmp_path_factory.mktemp("ring")
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(WORKER.parent)!r}); "
        f"runpy.run_path({str(WORKER)!r}, run_name='__main__')"
    )
    workers = [warm_package.start(code, rank, WORLD, folder / "meet", folder / f"{rank}.json") for rank in range(WORLD)]
    try:
        said = ["".join(worker.communicate(timeout=240)) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("scenario", ["uneven", "balanced", "absent"])
@pytest.mark.parametrize(("group", "rank"), GROUPS)
def test_equals_one_process(found, group, rank, scenario):
    """Uneven rows (in the group of three one rank has none), weights, and a modality that one rank lacks."""
    errors = found[rank][group][scenario]
    assert set(errors) >= {"loss", "pair_losses", "missing", "parameters", "embeddings"}
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize(("group", "rank"), GROUPS)
def test_float32(found, group, rank):
    errors = found[rank][group]["float32"]
    assert errors["loss"] <= LOSS_ERROR
    assert max(errors["parameters"], errors["embeddings"]) <= GRADIENT_ERROR


@pytest.mark.parametrize(("group", "rank"), GROUPS)
def test_ddp_averages_to_the_gradient_of_one_process(found, group, rank):
    assert found[rank][group]["ddp"] <= EXACT
    assert found[rank][group]["no_grad"] <= EXACT


@pytest.mark.parametrize(
    ("scenario", "own", "others"),
    [
        ("short_patients", "patient must be", "rank 0 refused"),
        ("unknown_modality", "unknown modality mri", "rank 0 refused"),
        ("not_finite", "embeddings of rna hold NaN", "rank 0 refused"),
        ("other_temperature", "log_t of the loss differ", "log_t of the loss differ"),
    ],
)
@pytest.mark.parametrize(("group", "rank"), GROUPS)
def test_one_bad_rank_stops_all_with_a_reason(found, group, rank, scenario, own, others):
    expected, kind, message = found[rank][group]["refusals"][scenario]
    assert expected, (kind, message)
    assert (own if rank == 0 else others) in message


def test_memory_does_not_grow_with_the_number_of_ranks(found):
    two, three = (max(found[rank][group]["peak"] for rank in range(2)) for group in ("two", "three"))
    # From three ranks on one block of 400 x 16 floats with its ids is under way while another is worked on. Whoever
    # gathered blocks and gradients would add 54 kB a rank.
    assert three - two <= 400 * (16 * 4 + 8)


def test_needs_a_process_group():
    assert not dist.is_initialized()
    with pytest.raises(SettingsError, match="init_process_group"):
        Ring()


def test_one_rank_is_a_ring_too(tmp_path):
    from exaonepath.alignment.model.loss import PairwiseSigmoidLoss

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        loss = PairwiseSigmoidLoss({"a": 4, "b": 3}, 8)
        h = {"a": torch.randn(9, 4, requires_grad=True), "b": torch.randn(9, 3)}
        alone = loss(h).loss
        (exact,) = torch.autograd.grad(alone, h["a"])
        loss.distributed = True
        together = loss(h).loss
        assert torch.equal(together, alone)
        assert torch.equal(torch.autograd.grad(together, h["a"])[0], exact)
    finally:
        dist.destroy_process_group()
