"""One sweep over the tiles of one pair of modalities: loss and gradients together, without a tensor of size B x B.

This module loops over the tiles in Python, with products by torch: on the CPU a tile takes milliseconds. On CUDA it
takes microseconds, and the loop is in the extension (`cuda_sweep.py`).

A softmax normalises over a row, but a sigmoid does not. So dL/ds of an element depends on that element only, and each
tile can be finished immediately: it adds its part of the loss, is overwritten with dL/ds, adds its part of both
gradients, and is freed.

    dots = U[r] V[c]^T      G = dL/ds(dots)      dU[r] += G V[c]      dV[c] += G^T U[r]

Loss and gradients need 6 * m * n * d operations; with a recomputation in the backward pass it would be 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from exaonepath.ops.extension import require_extension
from exaonepath.ops.sigmoid_loss.products import product_nt, product_tn

N_SUMS = 8
LOSS, SUM_G, SUM_G_DOTS, N_POSITIVE, POSITIVE_LOGITS, NEGATIVE_LOGITS = range(6)


@dataclass(frozen=True)
class Tile:
    """Rows and columns of one step."""

    rows: int
    columns: int


# 4 MB of float32: it stays in or near the second-level cache between the product that writes it and the two products
# that read it. The three products are within 5% of their best speed. Larger tiles (16 MB and more) are half as fast,
# because the operating system must provide new memory pages.
CPU_TILE = Tile(512, 2048)


@dataclass(frozen=True)
class PairConstants:
    """Constants of one pair: three numbers for the CPU, and the same three on the device for CUDA."""

    scale: float
    bias: float
    pos_weight: float
    on_device: Tensor  # [3] float64, contiguous


class Pass(Protocol):
    """Computes dL/ds from a tile of products, in place if possible, and adds its sums to `sums` [8] float64."""

    def __call__(
        self, dots: Tensor, row_ids: Tensor, column_ids: Tensor, constants: PairConstants, sums: Tensor
    ) -> Tensor: ...


def torch_pass(dots: Tensor, row_ids: Tensor, column_ids: Tensor, constants: PairConstants, sums: Tensor) -> Tensor:
    """The pass in plain torch: any device, float32 or float64.

    First all elements are computed as negatives; then the few positives are overwritten. This is ten times faster than
    masks over the tile (3.3 ms instead of 39 ms for 512 x 2048 on one core).
    """
    at = _same(row_ids, column_ids)
    logits = torch.add(dots.new_tensor(constants.bias), dots, alpha=constants.scale)
    positive_logits = logits[at]
    # Overwritten, not corrected by a difference: softplus(s) of a good positive is 10^4 times its true term, so a
    # difference would lose four digits.
    terms = F.softplus(logits, threshold=50.0)
    terms[at] = constants.pos_weight * F.softplus(-positive_logits, threshold=50.0)
    negative_logits = logits.index_put(at, logits.new_zeros(()))
    grad = logits.sigmoid_()
    grad[at] = -constants.pos_weight * (-positive_logits).sigmoid()
    # Rows are summed in the precision of the tile (torch adds pairwise), then the row sums are added in float64.
    found = [terms.sum(1), grad.sum(1), torch.linalg.vecdot(grad, dots), None, positive_logits, negative_logits.sum(1)]
    sums[: len(found)] += torch.stack(
        [sums.new_tensor(at[0].numel()) if part is None else part.sum(dtype=torch.float64) for part in found]
    )
    return grad


def _same(row_ids: Tensor, column_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (k, l) with row_ids[k] == column_ids[l].

    Columns are sorted, and a binary search finds the range of equal ids for each row. So not all pairs are compared.
    """
    ordered, order = column_ids.sort()
    first = torch.searchsorted(ordered, row_ids)
    count = torch.searchsorted(ordered, row_ids, right=True) - first
    k = torch.arange(len(row_ids), device=row_ids.device).repeat_interleave(count)
    within = torch.arange(len(k), device=k.device) - (count.cumsum(0) - count)[k]
    return k, order[first[k] + within]


def cpu_pass(dots: Tensor, row_ids: Tensor, column_ids: Tensor, constants: PairConstants, sums: Tensor) -> Tensor:
    """The C++ pass: float32 on the CPU, in place."""
    _require(dots, row_ids, column_ids, sums)
    require_extension().sigmoid_pass_cpu(
        dots.data_ptr(),
        dots.shape[0],
        dots.shape[1],
        dots.stride(0),
        row_ids.data_ptr(),
        column_ids.data_ptr(),
        constants.scale,
        constants.bias,
        constants.pos_weight,
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return dots


def _require(dots: Tensor, row_ids: Tensor, column_ids: Tensor, sums: Tensor) -> None:
    """Check tensors before their raw pointers go to the extension. A failure is a bug of this package."""
    tensors = (dots, row_ids, column_ids, sums)
    fits = (
        all(tensor.device.type == "cpu" for tensor in tensors)
        and dots.dtype == torch.float32
        and dots.stride(1) == 1
        and row_ids.dtype == column_ids.dtype == torch.int64
        and row_ids.is_contiguous()
        and column_ids.is_contiguous()
        and (row_ids.numel(), column_ids.numel()) == tuple(dots.shape)
        and sums.dtype == torch.float64
        and sums.numel() == N_SUMS
    )
    if not fits:
        raise TypeError("tile does not match the interface in csrc/sigmoid_loss.h")


@dataclass(frozen=True)
class Engine:
    """Settings for one device and dtype: the sweep, and dtypes of the operands of both kinds of products."""

    # Adds the sums over all pairs of rows of u and v to `task.sums`, and G V and G^T U to `task.gradients`.
    sweep: Callable[[PairTask], None]
    operand: torch.dtype
    gradient_operand: torch.dtype
    # Dtype of the results of products, and of their sums.
    accumulator: torch.dtype


class Workspace:
    """Memory that the sweeps of one loss call use one after another. It is allocated once, and grows if it must."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def bytes(self, size: int, device: torch.device) -> Tensor:
        """[at least `size`] uint8 on `device`. Contents are undefined."""
        if self._memory is None or self._memory.numel() < size:
            # Before the new allocation: two of them are never needed.
            self._memory = None
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        return self._memory


@dataclass(frozen=True)
class PairTask:
    """The rows of one pair, and the tensors to which sums and gradients are added."""

    u: Tensor  # [m, d] unit rows in `engine.operand`
    v: Tensor  # [n, d]
    row_ids: Tensor  # [m] int64
    column_ids: Tensor  # [n] int64
    constants: PairConstants
    engine: Engine
    sums: Tensor  # [8] float64
    # (du [m, d], dv [n, d]) in `engine.accumulator`, without the factor exp(t) / n_positive; None: only the loss.
    gradients: tuple[Tensor, Tensor] | None
    workspace: Workspace


@dataclass(frozen=True)
class TileLoop:
    """The sweep as a loop over tiles in Python."""

    run_pass: Pass
    tile: Tile

    def __call__(self, task: PairTask) -> None:
        u, v, gradients = task.u, task.v, task.gradients
        if u.shape[0] == 0 or v.shape[0] == 0:
            return
        dtype = task.engine.gradient_operand
        for first_column in range(0, v.shape[0], self.tile.columns):
            columns = slice(first_column, first_column + self.tile.columns)
            v_c = v[columns]
            if gradients is not None:
                v_transposed = v_c.to(dtype).t().contiguous()
            dv_transposed = None
            for first_row in range(0, u.shape[0], self.tile.rows):
                rows = slice(first_row, first_row + self.tile.rows)
                dots = product_nt(u[rows], v_c)  # `run_pass` overwrites it if possible
                grad = self.run_pass(dots, task.row_ids[rows], task.column_ids[columns], task.constants, task.sums)
                del dots
                if gradients is None:
                    continue
                grad = grad.to(dtype)
                gradients[0][rows] += product_nt(grad, v_transposed)
                part = product_tn(u[rows].to(dtype), grad)  # [d, columns]
                dv_transposed = part if dv_transposed is None else dv_transposed.add_(part)
                del grad, part
            if gradients is not None and dv_transposed is not None:
                gradients[1][columns] += dv_transposed.t()
