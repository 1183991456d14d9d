"""Which patches a patch attends to, per block, as computed by the attention backend that the encoder uses.

No backend stores its probabilities. But the output of attention is linear in the values: the derivative of query q's
output with respect to the value of token k is the probability p(q, k). The D columns of a head do not mix, so one
backward pass serves up to D queries: its cotangent has a one in a separate column for each query. The gradient of the
values then holds the rows of all these queries, exactly, for any backend.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    transformer = encoder.transformer
    n, n_prefix, depth = len(features), transformer.n_prefix, transformer.cfg["depth"]
    chosen = torch.as_tensor(list(queries), dtype=torch.int64)
    wanted = list(range(depth)) if blocks is None else list(blocks)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= n:
        raise SettingsError(f"queries must be patches 0 to {n - 1} of the slide, got {list(queries)}")
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
        maps = []
        for index in wanted:
            args, kwargs, _ = calls[index]
            rows = _rows(transformer.blocks[index], args, kwargs, packed[n_prefix + chosen.to(packed.device)])
            rows = rows[:, :, packed].float().cpu()  # into the caller's order
            restricted = index in rope_blocks(encoder)
            maps.append(AttentionMap(index, restricted, chosen, rows[:, :, n_prefix:], rows[:, :, :n_prefix]))
    return maps


def _rows(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], queries: Tensor) -> Tensor:
    """Probabilities [Q, H, T] of packed queries in one block, from the inputs that the block was called with."""
    given = [*args, *kwargs.values()]
    segments = next(x for x in given if isinstance(x, Segments))
    rotation = next((x for x in given if isinstance(x, Rotation)), None)
    backend = next(x for x in given if isinstance(x, str))
    weight = block.attn.qkv.weight
    with torch.no_grad():
        qkv = block.attn.split(block.attn.qkv(block.norm1(args[0].detach()).to(weight.dtype)))
    width = qkv.shape[-1]
    found = []
    for part in queries.split(width):
        with torch.enable_grad():
            values = qkv[:, 2].clone().requires_grad_()
            whole = torch.stack([qkv[:, 0], qkv[:, 1], values], 1)
            out = fragment_attention(whole, segments, rotation, backend=backend)
        cotangent = torch.zeros_like(out)
        columns = torch.arange(len(part), device=part.device)
        cotangent[part, :, columns] = 1
        (gradient,) = torch.autograd.grad(out, values, cotangent)  # [T, H, D]
        found.append(gradient[:, :, : len(part)].permute(2, 1, 0))
    return torch.cat(found)
