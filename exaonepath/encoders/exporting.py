"""The slide encoder as `torch.export` can record it: padded tokens and a dense mask, so that no size depends on values.

Packing sorts the tokens by fragment, and the number and lengths of the fragments are values of the input: an exported
graph cannot hold them. Here every slide keeps its padded rows, and a mask [B, L, L] says which keys a query attends to.
That takes memory of N x N; it is the form for graphs that leave Python, never the one that runs here. Checks of values
(whole contour numbers, finite coordinates) are not part of a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from exaonepath.encoders.block import Attention, Block, compute_dtype, stream_dtype
from exaonepath.ops.attention.layout import PREFIX_CONTOUR
from exaonepath.ops.attention.rotary import Rotation, apply_rotation

if TYPE_CHECKING:
    from exaonepath.encoders.slide_transformer import SlideTransformer


def encode_padded(
    transformer: SlideTransformer, features: Tensor, mask: Tensor, coords: Tensor | None, contour: Tensor | None
) -> Tensor:
    """The encoder's output [B, N, E] of padded patches; that of masked patches means nothing.

    Args:
        transformer: of the slide encoder; each of its modules is called.
        features: [B, N, C]. mask: bool [B, N], True for valid patches.
        coords: [B, N, 2] or None. contour: [B, N] of whole numbers, or None.
    """
    batch, n, _ = features.shape
    prefix = transformer.n_prefix
    dtype, stream = compute_dtype(transformer.weight), stream_dtype(transformer.weight)
    # Values of padding must not reach a product: 0 * NaN is NaN.
    clean = torch.where(mask[..., None], features, 0)
    embedded = transformer.patch_embed(clean.flatten(0, 1), dtype, stream).unflatten(0, (batch, n))
    x = torch.cat([transformer.prefix_tokens(stream).expand(batch, -1, -1), embedded], 1)

    valid = torch.cat([mask.new_ones((batch, prefix)), mask], 1)
    whole = valid[:, None, :].expand(-1, prefix + n, -1)
    fragment = whole
    if contour is not None:
        # A padded query joins the prefix tokens, so that there is a key for it; nobody reads its result.
        labels = torch.where(mask, contour.to(torch.int64), PREFIX_CONTOUR)
        labels = torch.cat([labels.new_full((batch, prefix), PREFIX_CONTOUR), labels], 1)
        fragment = whole & (labels[:, :, None] == labels[:, None, :])
    tables = None if coords is None else _tables(transformer, coords, mask, stream)
    for i, module in enumerate(transformer.blocks):
        block, nope = cast(Block, module), transformer.is_nope(i)
        x = x + _attend(block.attn, block.norm1(x).to(dtype), whole if nope else fragment, None if nope else tables)
        x = x + block.mlp(block.norm2(x).to(dtype))
    out: Tensor = transformer.norm(x)
    return out[:, prefix:]


def _tables(transformer: SlideTransformer, coords: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B * L, D/2] of all padded tokens; position 0 does not rotate prefix tokens and padding."""
    size = transformer.cfg["patch_size"]
    positions = (coords.to(torch.float64) + size // 2) / size
    positions = torch.where(mask[..., None], positions, 0)
    positions = torch.cat([positions.new_zeros((len(coords), transformer.n_prefix, 2)), positions], 1)
    periods = transformer.rope_embed.exact(transformer.rope_embed.periods)
    return Rotation(positions.flatten(0, 1), periods).cos_sin(dtype)


def _attend(attention: Attention, x: Tensor, mask: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    batch, tokens, _ = x.shape
    q, k, v = attention.split(attention.qkv(x).flatten(0, 1)).unbind(1)
    if tables is not None:
        q, k = apply_rotation(q, *tables), apply_rotation(k, *tables)
    q, k, v = (part.unflatten(0, (batch, tokens)).transpose(1, 2) for part in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    result: Tensor = attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))
    return result
