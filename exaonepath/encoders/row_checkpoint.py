"""Row-wise functions under autograd, one chunk of rows at a time, with or without storing their activations.

The norms and linear layers of a transformer act on each row alone. If they run in chunks, and are computed again in the
backward pass, the wide hidden activations of all rows never exist at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from exaonepath.random_state import RandomState


def by_rows(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    modules: Sequence[nn.Module],
    rows: int,
    recompute: bool,
) -> Tensor:
    """`function(*inputs)`, by chunks of rows.

    With and without `recompute`, the same random numbers are drawn, and gradients are summed in the same order. So both
    results are equal, bit for bit.

    Args:
        function: [R, ...] tensors to [R, M], each row of the result from the same row of the inputs alone.
        inputs: [T, ...] each.
        modules: the modules that `function` calls; their parameters get gradients.
        rows: number of rows of a chunk.
        recompute: keep only the inputs, and call `function` again in the backward pass.

    Returns:
        [T, M]
    """
    total = inputs[0].shape[0]
    if recompute and not torch.compiler.is_compiling():
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        out: Tensor = _RowCheckpoint.apply(function, max(1, rows), len(inputs), *inputs, *parameters)
        return out
    if total <= rows:
        return function(*inputs)
    return torch.cat([function(*chunk) for chunk in zip(*(t.split(rows) for t in inputs), strict=True)])


class _RowCheckpoint(torch.autograd.Function):
    """Gradient checkpointing by chunks of rows: each chunk is computed again just before its gradient.

    The parameters are passed as tensors in addition to the inputs, although `function` does not take them: autograd
    gives gradients only to the tensors that are arguments of `apply`.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], rows: int, count: int, *tensors: Tensor) -> Tensor:
        inputs = tensors[:count]
        ctx.function, ctx.rows, ctx.parameters = function, rows, tensors[count:]
        ctx.ambient, ctx.random = _Ambient(inputs[0].device), []
        ctx.save_for_backward(*inputs)
        out: Tensor | None = None
        total = inputs[0].shape[0]
        for first in range(0, max(1, total), rows):
            # Stored per chunk, so that dropout draws the same numbers again in the backward pass.
            ctx.random.append(RandomState(*inputs))
            part = _call(function, [t[first : first + rows] for t in inputs], ctx.needs_input_grad[3:])[0].detach()
            if total <= rows:
                return part
            if out is None:
                out = part.new_empty((total, *part.shape[1:]))
            out[first : first + rows] = part
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        of_inputs = [torch.empty_like(t) if need else None for t, need in zip(inputs, needed, strict=False)]
        parameters = [p for p, need in zip(ctx.parameters, needed[len(inputs) :], strict=True) if need]
        sums: list[Tensor | None] = [None] * len(parameters)
        # Last chunk first, which is the order of autograd itself: a sum of rounded numbers depends on the order.
        for index in reversed(range(len(ctx.random))):
            rows = slice(index * ctx.rows, (index + 1) * ctx.rows)
            with ctx.ambient.restored(), ctx.random[index].restored():
                out, leaves = _call(ctx.function, [t[rows] for t in inputs], needed)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(out, [*wanted, *parameters], gradient[rows], allow_unused=True)
            targets = [t for t in of_inputs if t is not None]
            for target, value in zip(targets, found, strict=False):
                target[rows] = 0 if value is None else value
            for i, value in enumerate(found[len(wanted) :]):
                if value is not None:
                    before = sums[i]
                    sums[i] = value if before is None else before + value
        found_sums = iter(sums)
        of_parameters = [next(found_sums) if need else None for need in needed[len(inputs) :]]
        return (None, None, None, *of_inputs, *of_parameters)


def _call(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """The result with its own small graph, and the leaves of that graph. It runs the same kernels as plain autograd."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=False)]
    with torch.enable_grad():
        return function(*leaves), leaves


class _Ambient:
    """The autocast state of the forward pass. It is restored in the backward pass, which may run in another thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device.type
        self.known = torch.amp.is_autocast_available(device.type)
        self.enabled = self.known and torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if self.enabled else None

    def restored(self) -> AbstractContextManager[Any]:
        if not self.known:
            return nullcontext()
        return torch.autocast(self.device, self.dtype, enabled=self.enabled)
