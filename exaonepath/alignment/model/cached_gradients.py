"""A contrastive training step with a batch that is too large for the memory of the encoders.

The loss needs all embeddings together, but the encoders do not. First, all chunks are embedded without a graph. Then
the loss and its gradient with respect to the embeddings are computed. Finally, each chunk is embedded again with a
graph, and its rows of that gradient are propagated back through the encoder (gradient caching, arXiv 2101.06983). The
memory is that of one chunk plus the embeddings; the cost is a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from exaonepath.errors import SettingsError
from exaonepath.random_state import RandomState

Chunk = TypeVar("Chunk")
Output = TypeVar("Output")
Embeddings = Mapping[str, Tensor]


def cached_gradient_step(
    encode: Callable[[Chunk], Embeddings],
    chunks: Sequence[Chunk],
    loss: Callable[[dict[str, Tensor]], Output],
    *,
    backward: Callable[[Tensor], Any] | None = None,
    no_sync: Sequence[nn.Module] = (),
) -> Output:
    """Forward and backward pass of `loss(encode(all chunks))`, with one chunk in memory at a time.

    The gradients that are added to every parameter's `.grad` equal those of a plain step, up to rounding: both passes
    of a chunk draw the same random numbers, dropout included. Layers that use the whole batch (BatchNorm) get one
    chunk, as in any gradient accumulation, and update their running statistics twice.

    Args:
        encode: returns embeddings [b, E_m] by modality name of one chunk of b rows, with the same names for every
            chunk. Rows without a modality are kept; `loss` must know which they are.
        chunks: at least one; `loss` gets the rows in their order.
        loss: from embeddings [B, E_m] of all rows to an output with a scalar `loss` (an attribute, or the output
            itself). Its own parameters get their gradients as usual.
        backward: called instead of `loss.backward()`, e.g. `lambda x: scaler.scale(x).backward()`.
        no_sync: DistributedDataParallel modules that `encode` runs: they exchange gradients in the last chunk only.

    Returns:
        The result of `loss`, detached from the encoders.

    Raises:
        SettingsError: there is no chunk, chunks have different modalities, or the output has no loss.
    """
    if not chunks:
        raise SettingsError("a cached-gradient step needs at least one chunk")
    states: list[RandomState] = []
    parts: list[dict[str, Tensor]] = []
    for chunk in chunks:
        states.append(RandomState())
        with torch.no_grad():
            parts.append(dict(encode(chunk)))
        # Autocast caches the half-precision copies of weights. They have no graph here, so the second pass must not use
        # them.
        torch.clear_autocast_cache()
        if set(parts[-1]) != set(parts[0]):
            raise SettingsError(
                f"chunk {len(parts) - 1} gives {', '.join(sorted(parts[-1]))}, the first {', '.join(sorted(parts[0]))}"
            )
    cached = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
    lengths = [{name: len(x) for name, x in part.items()} for part in parts]
    del parts
    output = loss(cached)
    value = getattr(output, "loss", output)
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise SettingsError("loss must return a scalar, or an output with a scalar `loss`")
    (backward or torch.Tensor.backward)(value)
    starts = dict.fromkeys(cached, 0)
    for index, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        gradients = {}
        for name, length in lengths[index].items():
            gradient = cached[name].grad
            if gradient is not None:
                gradients[name] = gradient[starts[name] : starts[name] + length]
            starts[name] += length
        # Later random numbers are the same as after a plain step.
        with state.restored(), _synchronised_by(no_sync, last=index == len(chunks) - 1):
            embeddings = encode(chunk)
            wanted = [name for name in gradients if embeddings[name].requires_grad]
            if wanted:
                torch.autograd.backward(
                    [embeddings[name] for name in wanted],
                    [gradients[name].to(embeddings[name].dtype) for name in wanted],
                )
        del embeddings
    return output


@contextmanager
def _synchronised_by(modules: Sequence[nn.Module], *, last: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if not last:
            for module in modules:
                stack.enter_context(module.no_sync())  # type: ignore[operator]
        yield
