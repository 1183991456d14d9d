"""One rank of test_ring.py: runs every scenario and writes what it found as JSON.

python ring_worker.py RANK WORLD RENDEZVOUS_FILE OUTPUT
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from live_bytes import LiveBytes
from torch.nn.parallel import DistributedDataParallel

from exaonepath.alignment.model.loss import PairwiseSigmoidLoss
from exaonepath.errors import BackendError, ExaonePathError, SettingsError

WIDTHS = {"wsi": 12, "rna": 8, "cnv": 5}


def make_batch(n_rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(n_rows, width, generator=generator, dtype=dtype) for name, width in WIDTHS.items()}
    patient = torch.randint(0, max(1, 2 * n_rows // 3), (n_rows,), generator=generator)
    return embeddings, patient, torch.rand(3, n_rows, generator=generator) > 0.3


def make_loss(dtype=torch.float64, **options):
    torch.manual_seed(1)
    return PairwiseSigmoidLoss(WIDTHS, 16, **options).to(dtype)


def relative(found, truth):
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def compare(group, cuts, *, dtype=torch.float64, absent=(), **options):
    """Largest relative error of loss, statistics and gradients against one process, this rank's rows."""
    rank = dist.get_rank(group)
    embeddings, patient, available = make_batch(cuts[-1])
    for name, at in absent:
        available[list(WIDTHS).index(name), cuts[at] : cuts[at + 1]] = False
    alone = make_loss(**options)
    whole = {name: x.clone().requires_grad_() for name, x in embeddings.items()}
    truth = alone(whole, patient, available)
    truth.loss.backward()

    rows = slice(cuts[rank], cuts[rank + 1])
    mine = {name: x[rows].to(dtype).requires_grad_() for name, x in embeddings.items() if (name, rank) not in absent}
    shared = make_loss(dtype, distributed=True, process_group=group, gradients_for="sum", **options)
    output = shared(mine, patient[rows], available[:, rows])
    output.loss.backward()
    errors = {"loss": relative(output.loss, truth.loss)}
    for name in ("pair_losses", "n_positive", "n_valid", "missing", "positive_logit", "negative_logit"):
        errors[name] = relative(output[name], truth[name].double())
    for parameter, exact in zip(shared.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(parameter.grad, group=group)
        errors["parameters"] = max(errors.get("parameters", 0.0), relative(parameter.grad, exact.grad))
    for name, x in mine.items():
        # Against the whole gradient: a rank may hold no row, or rows that nobody needs.
        error = (x.grad - whole[name].grad[rows]).norm() / whole[name].grad.norm()
        errors["embeddings"] = max(errors.get("embeddings", 0.0), error.item())
    return errors


def averaged_by_ddp(group, cuts):
    """DistributedDataParallel averages: `gradients_for="mean"` makes that the gradient of one process."""
    rank = dist.get_rank(group)
    embeddings, patient, available = make_batch(cuts[-1])
    alone = make_loss()
    alone(embeddings, patient, available).loss.backward()
    wrapped = DistributedDataParallel(make_loss(distributed=True, process_group=group), process_group=group)
    rows = slice(cuts[rank], cuts[rank + 1])
    wrapped({name: x[rows] for name, x in embeddings.items()}, patient[rows], available[:, rows]).loss.backward()
    pairs = zip(wrapped.module.parameters(), alone.parameters(), strict=True)
    return max(relative(found.grad, exact.grad) for found, exact in pairs)


def without_gradients(group, cuts):
    rank = dist.get_rank(group)
    embeddings, patient, available = make_batch(cuts[-1])
    rows = slice(cuts[rank], cuts[rank + 1])
    loss = make_loss(distributed=True, process_group=group)
    mine = {name: x[rows] for name, x in embeddings.items()}
    with torch.no_grad():
        found = loss(mine, patient[rows], available[:, rows]).loss
        return relative(found, make_loss()(embeddings, patient, available).loss)


def refusal(group, spoil):
    """The error on this rank when `spoil` has changed something on one of them."""
    rank = dist.get_rank(group)
    embeddings, patient, available = make_batch(6)
    loss = make_loss(distributed=True, process_group=group, check_finite=True)
    embeddings, patient = spoil(rank, loss, embeddings, patient)
    try:
        loss(embeddings, patient, available)
    except ExaonePathError as exc:
        return [type(exc) in (SettingsError, BackendError), type(exc).__name__, str(exc)]
    return [False, "no error", ""]


def short_patients(rank, loss, embeddings, patient):
    return embeddings, patient[:2] if rank == 0 else patient


def unknown_modality(rank, loss, embeddings, patient):
    return ({**embeddings, "mri": patient} if rank == 0 else embeddings), patient


def not_finite(rank, loss, embeddings, patient):
    if rank == 0:
        embeddings["rna"] = embeddings["rna"] * float("nan")
    return embeddings, patient


def other_temperature(rank, loss, embeddings, patient):
    with torch.no_grad():
        loss.log_t += rank
    return embeddings, patient


def peak_memory(group, n_rows):
    """Bytes alive at one time, forward and backward, with `n_rows` on every rank."""
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    mine = {name: torch.randn(n_rows, width, generator=generator).requires_grad_() for name, width in WIDTHS.items()}
    loss = make_loss(torch.float32, distributed=True, process_group=group)
    with LiveBytes() as mode:
        loss(mine).loss.backward()
    return mode.peak


def main(rank, world, rendezvous, output):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    found = {}
    two = dist.new_group([0, 1])
    for name, group, cuts in (("two", two, [0, 9, 23]), ("three", None, [0, 9, 9, 23])):
        if name == "two" and rank > 1:
            continue
        found[name] = {
            "uneven": compare(group, cuts),
            "balanced": compare(group, cuts, pos_weight="balanced", pair_weights={("rna", "cnv"): 3.0}),
            "absent": compare(group, cuts, absent=[("rna", 0)]),
            "float32": compare(group, cuts, dtype=torch.float32),
            "ddp": averaged_by_ddp(group, cuts),
            "no_grad": without_gradients(group, cuts),
            "peak": peak_memory(group, 400),
            "refusals": {
                spoil.__name__: refusal(group, spoil)
                for spoil in (short_patients, unknown_modality, not_finite, other_temperature)
            },
        }
    Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
