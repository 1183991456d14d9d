"""Which patches a patch attends to, per block, as computed by the attention backend that the encoder uses.

No backend stores its probabilities. But the output of attention is linear in the values: the derivative of query q's
output with respect to the value of token k is the probability p(q, k). The D columns of a head do not mix, so one
backward pass serves up to D queries: its cotangent has a one in a separate column for each query. The gradient of the
values then holds the rows of all these queries, exactly, for any backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exaonepath.device import evaluating
from exaonepath.encoders.leakage import block_calls, rope_blocks
from exaonepath.errors import SettingsError
from exaonepath.ops.attention.fragment_attention import fragment_attention
from exaonepath.ops.attention.layout import Segments, build_fragment_layout
from exaonepath.ops.attention.rotary import Rotation


@dataclass(frozen=True)
class AttentionMap:
    """Attention of some patches of one slide in one block.

    Attributes:
        block: index of the block.
        restricted: whether it is a RoPE block, restricted to fragments.
        queries: int64 [Q], the patches that attend.
        patches: float32 [Q, H, N], probability of every patch, in the caller's order.
        prefix: float32 [Q, H, P], probability of the prefix tokens; with `patches` it adds up to 1.
    """

    block: int
    restricted: bool
    queries: Tensor
    patches: Tensor
    prefix: Tensor

    def crossing(self, contour_index: Tensor) -> Tensor:
        """float32 [Q]: probability that falls on other fragments (prefix tokens included), mean over heads."""
        contour = contour_index.to(self.patches.device)
        other = contour[self.queries][:, None] != contour[None, :]
        return (self.patches.mean(1) * other).sum(1) + self.prefix.mean(1).sum(1)


def attention_map(
    encoder: Any,
    features: Tensor,
    coords: Tensor | None,
    contour_index: Tensor | None,
    queries: Sequence[int],
    *,
    blocks: Sequence[int] | None = None,
) -> list[AttentionMap]:
    """Attention of the patches `queries` in every block, or in some.

    Args:
        encoder: `ExaonePathSlideEncoderModel`; dropout is off for the call.
        features: [N, C] of one slide; coords: [N, 2] or None; contour_index: [N] or None, as the encoder takes them.
        queries: indices of patches.
        blocks: indices of blocks; None: all.

    Returns:
        One map per block. Memory is that of a forward pass, and [Q, H, N] per block.

    Raises:
        SettingsError: a query or a block does not exist.
    """
    n, n_prefix = len(features), encoder.transformer.n_prefix
    chosen = torch.as_tensor(list(queries), dtype=torch.int64)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= n:
        raise SettingsError(f"queries must be patches 0 to {n - 1} of the slide, got {list(queries)}")
    maps = []
    for call in _calls(encoder, features, coords, contour_index, blocks):
        rows = _rows(call, call.packed[n_prefix + chosen.to(call.packed.device)])
        rows = rows[:, :, call.packed].float().cpu()  # into the caller's order
        maps.append(AttentionMap(call.index, call.restricted, chosen, rows[:, :, n_prefix:], rows[:, :, :n_prefix]))
    return maps


@dataclass(frozen=True)
class MeanAttention:
    """Attention that the tokens of one slide receive in one block, averaged over all its patches as queries.

    Attributes:
        block: index of the block.
        restricted: whether it is a RoPE block, restricted to fragments.
        patches: float32 [H, N], mean probability of every patch, in the caller's order.
        prefix: float32 [H, P], mean probability of the prefix tokens; with `patches` it adds up to 1.
    """

    block: int
    restricted: bool
    patches: Tensor
    prefix: Tensor


def mean_attention(
    encoder: Any,
    features: Tensor,
    coords: Tensor | None,
    contour_index: Tensor | None,
    *,
    blocks: Sequence[int] | None = None,
) -> list[MeanAttention]:
    """Mean over all patches of the attention that `attention_map` gives, in one backward pass per block.

    Args:
        encoder, features, coords, contour_index, blocks: as for `attention_map`; at least one patch.

    Raises:
        SettingsError: there is no patch, or a block does not exist.
    """
    n, n_prefix = len(features), encoder.transformer.n_prefix
    if not n:
        raise SettingsError("the slide has no patches, so none attends to anything")
    maps = []
    for call in _calls(encoder, features, coords, contour_index, blocks):
        # The mean over queries of their rows is the derivative of the mean of their outputs: one column is enough.
        received = _values_gradient(call, [(call.packed[n_prefix:], 0, 1 / n)])[:, :, 0].T
        received = received[:, call.packed].float().cpu()
        maps.append(MeanAttention(call.index, call.restricted, received[:, n_prefix:], received[:, :n_prefix]))
    return maps


@dataclass(frozen=True)
class _Call:
    """One call of a block in a forward pass over a slide; `packed` is the packed position of each of the caller's
    tokens, int64 [P + N]."""

    index: int
    restricted: bool
    block: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    packed: Tensor


def _calls(
    encoder: Any, features: Tensor, coords: Tensor | None, contour_index: Tensor | None, blocks: Sequence[int] | None
) -> Iterator[_Call]:
    """The calls of the wanted blocks; the encoder is in evaluation mode until the last one was used."""
    transformer = encoder.transformer
    n, n_prefix, depth = len(features), transformer.n_prefix, transformer.cfg["depth"]
    wanted = list(range(depth)) if blocks is None else list(blocks)
    if any(not 0 <= block < depth for block in wanted):
        raise SettingsError(f"the encoder has blocks 0 to {depth - 1}, got {wanted}")
    mask = torch.ones(1, n, dtype=torch.bool, device=features.device)
    layout = build_fragment_layout(n_prefix, mask, None if contour_index is None else contour_index[None])
    # `layout.source` lists the caller's index of each packed token. Its inverse gives the packed position of each
    # token.
    packed = torch.empty(n_prefix + n, dtype=torch.int64, device=features.device)
    packed[layout.source] = torch.arange(n_prefix + n, device=features.device)
    with evaluating(encoder):
        calls = block_calls(encoder, features, coords, contour_index)
        for index in wanted:
            args, kwargs, _ = calls[index]
            yield _Call(index, index in rope_blocks(encoder), transformer.blocks[index], args, kwargs, packed)


def _rows(call: _Call, queries: Tensor) -> Tensor:
    """Probabilities [Q, H, T] of packed queries in one block."""
    weight, found = call.block.attn.qkv.weight, []
    for part in queries.split(weight.shape[0] // (3 * call.block.attn.heads)):
        gradient = _values_gradient(call, [(part, torch.arange(len(part), device=part.device), 1.0)])  # [T, H, D]
        found.append(gradient[:, :, : len(part)].permute(2, 1, 0))
    return torch.cat(found)


def _values_gradient(call: _Call, parts: Sequence[tuple[Tensor, Tensor | int, float]]) -> Tensor:
    """Gradient [T, H, D] of the values in one block, for a cotangent of the attention's output.

    Args:
        call: the block, and the inputs that it was called with.
        parts: what is not zero in the cotangent, in every head: (packed tokens, their columns, the value).
    """
    block = call.block
    given = [*call.args, *call.kwargs.values()]
    segments = next(x for x in given if isinstance(x, Segments))
    rotation = next((x for x in given if isinstance(x, Rotation)), None)
    backend = next(x for x in given if isinstance(x, str))
    weight = block.attn.qkv.weight
    with torch.no_grad():
        qkv = block.attn.split(block.attn.qkv(block.norm1(call.args[0].detach()).to(weight.dtype)))
    with torch.enable_grad():
        values = qkv[:, 2].clone().requires_grad_()
        whole = torch.stack([qkv[:, 0], qkv[:, 1], values], 1)
        out = fragment_attention(whole, segments, rotation, backend=backend)
    cotangent = torch.zeros_like(out)
    for tokens, columns, value in parts:
        cotangent[tokens, :, columns] = value
    (gradient,) = torch.autograd.grad(out, values, cotangent)
    return gradient
