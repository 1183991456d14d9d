"""A contrastive step whose batch is larger than what the encoders can hold at once.

The loss needs all embeddings together, the encoders do not: embed chunk by chunk without a graph, take the loss and its
gradient at the cached embeddings, then embed each chunk again with a graph and send its rows of that gradient back
(gradient caching, arXiv 2101.06983). Memory is that of one chunk plus the embeddings; the price is a second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from exaonepath.errors import SettingsError

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
    """Forward and backward of `loss(encode(all chunks))`, one chunk in memory at a time.

    Afterwards every parameter's `.grad` holds (added to) what a plain step would have given, within rounding: a chunk
    draws the same random numbers, dropout included, both times it is embedded. Layers that look across the batch
    (BatchNorm) see a chunk, as in any accumulation, and update their running statistics twice.

    Args:
        encode: embeddings [b, E_m] by modality name of one chunk of b rows; every chunk gives the same names. A
            modality that is missing in some rows keeps them, and `loss` knows which.
        chunks: at least one; their order is that of the rows `loss` sees.
        loss: from embeddings [B, E_m] of all rows to an output with a scalar `loss` (an attribute, or the output
            itself). Its own parameters get their gradients as usual.
        backward: in place of `loss.backward()`, e.g. `lambda x: scaler.scale(x).backward()`.
        no_sync: DistributedDataParallel modules that `encode` runs: they exchange gradients in the last chunk only.

    Returns:
        What `loss` returned, detached from the encoders.

    Raises:
        SettingsError: no chunk, or chunks with different modalities, or an output without a loss.
    """
    if not chunks:
        raise SettingsError("a cached-gradient step needs at least one chunk")
    states: list[_RandomState] = []
    parts: list[dict[str, Tensor]] = []
    for chunk in chunks:
        states.append(_RandomState())
        with torch.no_grad():
            parts.append(dict(encode(chunk)))
        # Autocast keeps the half-precision copies made here, without a graph: the second pass would take those.
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
    # What a plain step would have drawn next is drawn next.
    after = _RandomState()
    starts = dict.fromkeys(cached, 0)
    for index, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        gradients = {}
        for name, length in lengths[index].items():
            gradient = cached[name].grad
            if gradient is not None:
                gradients[name] = gradient[starts[name] : starts[name] + length]
            starts[name] += length
        state.restore()
        with _synchronised_by(no_sync, last=index == len(chunks) - 1):
            embeddings = encode(chunk)
            wanted = [name for name in gradients if embeddings[name].requires_grad]
            if wanted:
                torch.autograd.backward(
                    [embeddings[name] for name in wanted],
                    [gradients[name].to(embeddings[name].dtype) for name in wanted],
                )
        del embeddings
    after.restore()
    return output


class _RandomState:
    """Of the CPU and every CUDA device in use, as it is now."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def _synchronised_by(modules: Sequence[nn.Module], *, last: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if not last:
            for module in modules:
                stack.enter_context(module.no_sync())  # type: ignore[operator]
        yield
