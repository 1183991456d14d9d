"""The all-pairwise sigmoid loss, forward and backward of ten pairs, compared with common torch code.

Each peer is timed in turns with ours; before that both must agree. Sizes: seconds by default, the README's with
EXAONEPATH_BENCH=full. `limit_share` is the time that the 6 B^2 d operations of a pair would take at the rate of the
fastest plain matrix product measured in the same run, over the time that ours took, projections included.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from itertools import combinations, permutations

import pytest
import torch
from harness.memory import free_bytes
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from exaonepath.ops.sigmoid_loss.loss import sigmoid_loss
from exaonepath.ops.sigmoid_loss.products import product_nt

MODALITIES = 5
PAIRS = list(combinations(range(MODALITIES), 2))
CHUNK = 1024
# (B, d, full only)
CPU = [(512, 256, False), (2048, 256, False), (8192, 256, True), (4096, 512, True), (4096, 1024, True)]
GPU = [(2048, 256, False), (8192, 256, False), (32768, 256, True), (65536, 256, True)]
GPU += [(8192, 512, False), (32768, 512, True), (8192, 1024, False), (32768, 1024, True)]
SIZES = [pytest.param("cpu", *size, id="cpu-B{}-d{}".format(*size)) for size in CPU]
SIZES += [pytest.param("cuda", *size, id="cuda-B{}-d{}".format(*size), marks=pytest.mark.gpu) for size in GPU]


class Problem:
    """Five modalities of width d, ten pairs, nothing missing, every row its own patient."""

    def __init__(self, device: str, n_rows: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        leaf = lambda x: x.to(device, dtype).requires_grad_()  # noqa: E731
        self.h = [leaf(torch.randn(n_rows, dim, generator=generator)) for _ in range(MODALITIES)]
        self.w = {
            pair: leaf(torch.randn(dim, dim, generator=generator) * dim**-0.5)
            for pair in permutations(range(MODALITIES), 2)
        }
        self.t = torch.full((len(PAIRS),), 2.3026, device=device, requires_grad=True)
        self.b = torch.full((len(PAIRS),), -10.0, device=device, requires_grad=True)
        self.patient = torch.arange(n_rows, device=device)
        self.leaves = [*self.h, *self.w.values(), self.t, self.b]
        self.device, self.n_rows, self.dim = device, n_rows, dim

    def units(self, pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
        i, j = pair
        return F.normalize(self.h[i] @ self.w[i, j], dim=1), F.normalize(self.h[j] @ self.w[j, i], dim=1)

    def step(self, loss: Callable[[Problem], Tensor]) -> tuple[Tensor, ...]:
        """Loss, then every gradient."""
        value = loss(self)
        out = (value.detach(), *torch.autograd.grad(value, self.leaves))
        if self.device == "cuda":
            torch.cuda.synchronize()
        return out


def ours(problem: Problem) -> Tensor:
    return sigmoid_loss(problem.h, problem.w, problem.t, problem.b, problem.patient).loss


def _pair_loss(u: Tensor, v: Tensor, t: Tensor, b: Tensor, first: int, n_rows: int) -> Tensor:
    """Columns `first` and on against all rows: labels +1 on the diagonal, -1 elsewhere (SigLIP's listing)."""
    logits = t.exp() * (u @ v.T).float() + b
    labels = -torch.ones_like(logits)
    columns = torch.arange(v.shape[0], device=v.device)
    labels[first + columns, columns] = 1
    return -F.logsigmoid(labels * logits).sum() / n_rows


def naive(problem: Problem) -> Tensor:
    """All B x B logits of a pair at once, under autograd."""
    return torch.stack(
        [
            _pair_loss(*problem.units(pair), problem.t[k], problem.b[k], 0, problem.n_rows)
            for k, pair in enumerate(PAIRS)
        ]
    ).mean()


def _chunks(problem: Problem, run: Callable[..., Tensor]) -> Tensor:
    losses = []
    for k, pair in enumerate(PAIRS):
        u, v = problem.units(pair)
        parts = v.split(CHUNK)
        losses += [
            run(u, part, problem.t[k], problem.b[k], CHUNK * index, problem.n_rows) for index, part in enumerate(parts)
        ]
    return torch.stack(losses).sum() / len(PAIRS)


def chunked(problem: Problem) -> Tensor:
    """As open_clip goes through its ranks' texts: one chunk of columns after the other, each kept by autograd."""
    return _chunks(problem, _pair_loss)


def checkpointed(problem: Problem) -> Tensor:
    """The same chunks, computed again in the backward pass instead of kept."""
    return _chunks(problem, lambda *arguments: checkpoint(_pair_loss, *arguments, use_reentrant=False))


def compiled(problem: Problem) -> Tensor:
    return _compiled()(problem)


_CACHE: dict[str, Callable[[Problem], Tensor]] = {}


def _compiled() -> Callable[[Problem], Tensor]:
    if "naive" not in _CACHE:
        _CACHE["naive"] = torch.compile(naive, dynamic=False)
    return _CACHE["naive"]


def torch_backend(problem: Problem) -> Tensor:
    """Our own sweep without the compiled pass."""
    return sigmoid_loss(problem.h, problem.w, problem.t, problem.b, problem.patient, backend="torch").loss


PEERS = {f.__name__: f for f in (naive, compiled, chunked, checkpointed, torch_backend)}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("device", "n_rows", "dim", "large"), SIZES)
def test_loss_and_gradients(device, n_rows, dim, large, peer, compare, benchmark, full, session):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if large and not full:
        pytest.skip("takes minutes: EXAONEPATH_BENCH=full runs it")
    if peer == "compiled" and device == "cpu" and not full:
        pytest.skip("compiles for a minute: EXAONEPATH_BENCH=full runs it")
    if peer == "compiled" and device == "cuda" and importlib.util.find_spec("triton") is None:
        pytest.skip("torch.compile needs triton here")
    # What a peer keeps: logits, labels, and what autograd saves of each, in float32 and all ten pairs at once.
    needed = 24 * n_rows**2 * len(PAIRS) if peer in ("naive", "compiled", "chunked") else 0
    if needed > free_bytes(device):
        pytest.skip(f"{peer} would keep about {needed / 1e9:.0f} GB")
    problem = Problem(device, n_rows, dim)
    rate = _product_rate(device, dim)
    baseline = PEERS[peer]
    _agree(problem.step(ours), problem.step(baseline), device)
    compare(
        "sigmoid loss",
        lambda: problem.step(ours),
        lambda: problem.step(baseline),
        rounds=3 if large else 5,
        device=device,
        peer=peer,
        dtype=str(problem.h[0].dtype).removeprefix("torch."),
        rows=n_rows,
        dim=dim,
        inputs_and_gradients_mb=round(2 * sum(x.numel() * x.element_size() for x in problem.leaves) / 1e6, 1),
    )
    operations = 6 * n_rows**2 * dim * len(PAIRS)
    benchmark.extra_info["limit_share"] = float(f"{operations / rate / benchmark.extra_info['seconds']:.3g}")


def _agree(found: tuple[Tensor, ...], peer: tuple[Tensor, ...], device: str) -> None:
    """Both are within their own rounding of the truth: the loss to 1e-5, gradients to what their operands carry."""
    loss_bound, bound = (1e-5, 1e-4) if device == "cpu" else (2e-2, 0.1)  # bfloat16 logits on the peers' side
    assert abs(found[0] - peer[0]) <= loss_bound * abs(peer[0])
    for x, y in zip(found[1:], peer[1:], strict=True):
        assert (x.float() - y.float()).norm() <= bound * y.float().norm()


def _product_rate(device: str, dim: int) -> float:
    """Operations a second of the fastest of the plain products that a sweep is made of."""
    if device == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        return 2 * 8192**3 / _best(lambda: (a @ a, torch.cuda.synchronize()))
    rows, columns = torch.randn(512, dim), torch.randn(2048, dim)
    tile = torch.randn(512, 2048)
    with torch.no_grad():
        best = min(_best(lambda: product_nt(rows, columns)), _best(lambda: product_nt(tile, columns.t().contiguous())))
    return 2 * 512 * 2048 * dim / best


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
