"""The transformer of the slide encoder, over the packed tokens of a batch of slides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exaonepath.encoders.block import Block, LayerNorm, Linear, RMSNorm, RopePeriods, compute_dtype, stream_dtype
from exaonepath.encoders.configuration import FFN_ALIGN
from exaonepath.encoders.inference import block_by_rows, block_in_place, projection
from exaonepath.encoders.memory_plan import attention_rows, default_rows
from exaonepath.encoders.row_checkpoint import by_rows
from exaonepath.encoders.streaming import RowReader
from exaonepath.encoders.unmodified import is_unmodified, own
from exaonepath.errors import SettingsError
from exaonepath.ops.attention.fragment_attention import resolve_backend
from exaonepath.ops.attention.layout import FragmentLayout, Segments
from exaonepath.ops.attention.rotary import Rotation
from exaonepath.ops.attention.rows import cut_rows

_EPS = 1e-5  # of every norm, layer norm or RMS norm


def ffn_hidden(embed_dim: int, ffn_ratio: float, ffn_layer: str) -> int:
    """SwiGLU hidden width: two thirds of the plain width, rounded up to a multiple that the layer's name gives."""
    align = FFN_ALIGN[ffn_layer]
    hidden = int(int(embed_dim * ffn_ratio) * 2 / 3)
    return -(-hidden // align) * align


@dataclass(frozen=True)
class TokenOrder:
    """Packed tokens by kind: patches, and P prefix tokens per slide.

    Attributes:
        patch_positions: int64 [T - B * P], packed positions of the patches, ascending.
        patch_rows: int64 [T - B * P], their rows among the caller's patches.
        prefix_positions: int64 [B * P], packed positions of the prefix tokens, ascending.
        prefix_kinds: int64 [B * P], which of the P tokens each one is.
        n_rows: rows of the caller's patches.
    """

    patch_positions: Tensor
    patch_rows: Tensor
    prefix_positions: Tensor
    prefix_kinds: Tensor
    n_rows: int

    @staticmethod
    def of(layout: FragmentLayout) -> TokenOrder:
        """The order of a layout.

        A stable sort by kind replaces a boolean index: the size of its result is known beforehand, so the host does not
        wait for the GPU.
        """
        n_patches = layout.source.numel() - layout.batch * layout.n_prefix
        by_kind = torch.argsort(layout.is_prefix.to(torch.uint8), stable=True)
        patches, prefix = by_kind[:n_patches], by_kind[n_patches:]
        return TokenOrder(patches, layout.patch_rows[patches], prefix, layout.prefix_kinds[prefix], layout.n_rows)

    @property
    def n_tokens(self) -> int:
        """T, the number of packed tokens."""
        return self.patch_positions.numel() + self.prefix_positions.numel()

    @property
    def all_valid(self) -> bool:
        """Whether all of the caller's patches are valid (no padding)."""
        return self.patch_rows.numel() == self.n_rows

    def positions(self) -> Tensor:
        """int64 [rows]: packed position of each of the caller's patches, -1 for masked patches."""
        out = torch.full((self.n_rows,), -1, dtype=torch.int64, device=self.patch_rows.device)
        return out.index_copy_(0, self.patch_rows, self.patch_positions)


@own
class PatchEmbed(nn.Module):
    """Linear projection of patch features, with an optional layer norm."""

    def __init__(self, input_dim: int, embed_dim: int, use_norm: bool) -> None:
        super().__init__()
        self.proj = Linear(input_dim, embed_dim)
        self.norm = LayerNorm(embed_dim, eps=_EPS) if use_norm else nn.Identity()

    def forward(self, features: Tensor, dtype: torch.dtype, stream: torch.dtype) -> Tensor:
        out: Tensor = self.norm(self.proj(features.to(dtype)).to(stream))
        return out

    def lean(self, features: Tensor, dtype: torch.dtype, stream: torch.dtype) -> Tensor:
        """The same without a call of `proj`: autocast would cache its cast weight, and keep a graph between chunks."""
        out: Tensor = self.norm(projection(self.proj, dtype)(features.to(dtype)).to(stream))
        return out


@own
class SlideTransformer(nn.Module):
    """Transformer over CLS, storage and patch tokens, with NoPE blocks (whole slide) and RoPE blocks (per fragment)."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        dim = cfg["embed_dim"]
        self.cfg = cfg
        self.n_prefix = 1 + cfg["n_storage_tokens"]
        self.hidden = ffn_hidden(dim, cfg["ffn_ratio"], cfg["ffn_layer"])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if cfg["n_storage_tokens"]:
            self.storage_tokens = nn.Parameter(torch.zeros(1, cfg["n_storage_tokens"], dim))
        self.patch_embed = PatchEmbed(cfg["input_dim"], dim, cfg["embed_use_norm"])
        self.rope_embed = RopePeriods(dim // cfg["num_heads"], cfg)
        norm = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[cfg["norm_layer"]]
        self.blocks = nn.ModuleList(Block(cfg, self.hidden, norm, _EPS) for _ in range(cfg["depth"]))
        self.norm = norm(dim, eps=_EPS)
        # transformers' switch; see `ExaonePathPreTrainedModel`.
        self.gradient_checkpointing = False

    def _checkpoint(self, block: Callable[..., Tensor], *arguments: Any) -> Tensor:
        # `gradient_checkpointing_enable` may have stored a function. With `use_reentrant=True`, the block would run
        # without autograd, and the row checkpoints inside it would store nothing.
        function: Callable[..., Tensor] = self.__dict__.get("_gradient_checkpointing_func", checkpoint)
        return function(block, *arguments, use_reentrant=False)

    @property
    def weight(self) -> Tensor:
        """A parameter whose dtype and device are those of the whole encoder."""
        return self.patch_embed.proj.weight

    def forward(self, features: Tensor, layout: FragmentLayout, coords: Tensor | None, backend: str) -> Tensor:
        """Features to tokens, all on one device.

        Args:
            features: [rows, C], patches in the caller's order.
            layout: layout of the packed tokens.
            coords: [B, N, 2] of the same patches, or None.
            backend: attention backend.

        Returns:
            The encoder's output over packed tokens, [T, E] (`layout.unpack_patches` restores the caller's order).
        """
        order = TokenOrder.of(layout)
        rotation = self.rotation(order, coords)
        unmodified = is_unmodified(self)
        if unmodified and not torch.is_grad_enabled():
            rows = default_rows(order.n_tokens, features.device.type)
            queries = attention_rows(rows, order.n_tokens, features.device.type)
            reader = RowReader(features, features.device, rows)
            out: Tensor = self.norm(self.encode(reader, layout, order, rotation, backend, rows, queries))
            return out
        return self._encode_whole(features, layout, order, rotation, backend, lean=unmodified)

    def rotation(self, order: TokenOrder, coords: Tensor | None) -> Rotation | None:
        """Rotation of the packed tokens from the caller's coordinates [B, N, 2], on their device.

        Raises:
            SettingsError: a coordinate of a valid patch is not finite, or its dtype cannot represent it exactly.
        """
        if coords is None:
            return None
        valid = coords.flatten(0, 1).index_select(0, order.patch_rows)
        _check_coords(valid)
        of_patches = Rotation.from_coords(valid, self.rope_embed(), self.cfg["patch_size"])
        # Position 0 gives an angle of 0, so the rotation does not change prefix tokens.
        positions = of_patches.positions.new_zeros((order.n_tokens, 2))
        positions.index_copy_(0, order.patch_positions, of_patches.positions)
        return Rotation(positions, of_patches.periods)

    def backends(self, layout: FragmentLayout, backend: str, device: torch.device) -> dict[bool, tuple[Segments, str]]:
        """Segments and backend of the NoPE blocks (True) and of the RoPE blocks (False)."""
        dtype, head_dim = compute_dtype(self.weight), self.cfg["embed_dim"] // self.cfg["num_heads"]
        training = torch.is_grad_enabled()
        return {
            nope: (
                segments,
                resolve_backend(backend, device, dtype, head_dim, segments, rotated=not nope, training=training),
            )
            for nope, segments in ((True, layout.slides), (False, layout.fragments))
        }

    def is_nope(self, i: int) -> bool:
        """Whether block `i` attends over the whole slide, without rotation; the others attend inside fragments."""
        return bool(i % self.cfg["nope_interval"] == 0)

    def prefix_tokens(self, dtype: torch.dtype) -> Tensor:
        """CLS and storage tokens, [1, P, E]."""
        tokens: list[Tensor] = [self.cls_token, *([self.storage_tokens] if self.cfg["n_storage_tokens"] else [])]
        return torch.cat(tokens, 1).to(dtype)

    def _prefix(self, order: TokenOrder, dtype: torch.dtype) -> Tensor:
        return self.prefix_tokens(dtype)[0].index_select(0, order.prefix_kinds)

    def encode(
        self,
        features: RowReader,
        layout: FragmentLayout,
        order: TokenOrder,
        rotation: Rotation | None,
        backend: str,
        rows: int,
        attention_rows: int,
    ) -> Tensor:
        """Inference of an unmodified encoder (`is_unmodified`), without the last norm.

        Args:
            features: reader of rows of the caller's patches, numbered as in `order`.
            layout: layout of the packed tokens, on the encoder's device.
            order: order of the tokens, on the features' device.
            rotation: rotation of the packed tokens, on the encoder's device; None: positions are not used.
            backend: attention backend.
            rows, attention_rows: see `MemoryPlan`.

        Returns:
            The residual stream after the last block, [T, E] float32 or wider.
        """
        dtype, stream, device = compute_dtype(self.weight), stream_dtype(self.weight), self.weight.device
        resolved = self.backends(layout, backend, device)
        chunks = {nope: cut_rows(segments, attention_rows) for nope, (segments, _) in resolved.items()}
        if rotation is not None:
            # The tables are computed in float64, which needs much memory. So they are computed before x is allocated.
            rotation.cos_sin(torch.promote_types(dtype, torch.float32))
        x = self._embed(features, order, rows, dtype, stream)
        for i, block in enumerate(self.blocks):
            nope = self.is_nope(i)
            segments, attention = resolved[nope]
            block_in_place(cast(Block, block), x, segments, None if nope else rotation, attention, chunks[nope], rows)
        return x

    def _embed(
        self, features: RowReader, order: TokenOrder, rows: int, dtype: torch.dtype, stream: torch.dtype
    ) -> Tensor:
        """The residual stream before the first block, [T, E]. A function of its own, so that its indices are freed."""
        device = self.weight.device
        x = torch.empty((order.n_tokens, self.cfg["embed_dim"]), dtype=stream, device=device)
        prefix = self.prefix_tokens(stream)[0].index_select(0, order.prefix_kinds.to(device))
        x.index_copy_(0, order.prefix_positions.to(device), prefix)
        # `take` needs the index on the features' device, `index_copy_` needs the positions on the encoder's device.
        at = order.patch_positions.to(device)
        for index, positions in zip(order.patch_rows.split(rows), at.split(rows), strict=True):
            x.index_copy_(0, positions, self.patch_embed.lean(features.take(index), dtype, stream))
        return x

    def leave(
        self, x: Tensor, order: TokenOrder, shape: tuple[int, int], rows: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """The last norm, with patches in the caller's order, and 0 at padded patches.

        Args:
            x: [T, E] from `encode`. order: on any device. shape: (B, N). rows: at most this many at once.

        Yields:
            (slides, patches, values [slides, patches, E]): all chunks together contain each patch once.
        """
        batch, n = shape
        positions = order.positions().to(x.device).view(batch, n)
        slides = max(1, rows // max(1, n))
        for b in range(0, batch, slides):
            for first in range(0, n, rows):
                where = slice(b, b + slides), slice(first, first + rows)
                index = positions[where]
                values: Tensor = self.norm(x.index_select(0, index.reshape(-1).clamp(min=0)))
                if not order.all_valid:
                    values.masked_fill_((index.reshape(-1) < 0)[:, None], 0)
                yield *where, values.view(*index.shape, -1)

    def _encode_whole(
        self,
        features: Tensor,
        layout: FragmentLayout,
        order: TokenOrder,
        rotation: Rotation | None,
        backend: str,
        *,
        lean: bool,
    ) -> Tensor:
        """Features [rows, C] to the encoder's output [T, E]; supports gradients.

        With `lean`, linear layers run in chunks of rows, and are computed again in the backward pass if gradient
        checkpointing is on. Without it, each module is only called, once (twice if its block is checkpointed).
        """
        dtype, stream = compute_dtype(self.weight), stream_dtype(self.weight)
        resolved = self.backends(layout, backend, features.device)
        recompute = self.gradient_checkpointing
        rows = default_rows(order.n_tokens, features.device.type)

        # Without padding, the features stay in the caller's order, so no reordered copy is kept for the backward pass.
        # The order of the positions then matches that of the features.
        positions = order.patch_positions
        if order.all_valid:
            positions = order.positions()
        else:
            features = features.index_select(0, order.patch_rows)
        if lean:
            embedded = by_rows(
                lambda part: self.patch_embed.lean(part, dtype, stream),
                (features,),
                (self.patch_embed,),
                rows,
                recompute,
            )
        else:
            embedded = self.patch_embed(features, dtype, stream)
        prefix = self._prefix(order, stream)
        x = torch.cat([prefix, embedded.to(stream)]).index_select(0, _inverse(order.prefix_positions, positions))
        del embedded
        for i, block in enumerate(self.blocks):
            nope = self.is_nope(i)
            segments, attention = resolved[nope]
            arguments = (x, segments, None if nope else rotation, attention)
            run = partial(block_by_rows, cast(Block, block), rows=rows, recompute=recompute) if lean else block
            x = self._checkpoint(run, *arguments) if recompute else run(*arguments)
            del arguments
        if lean:
            return by_rows(self.norm, (x,), (self.norm,), rows, recompute)
        out: Tensor = self.norm(x)
        return out


def _inverse(*positions: Tensor) -> Tensor:
    """int64 [T]: index of each packed token in the concatenation of the tokens at these packed positions."""
    joined = torch.cat(positions)
    return torch.empty_like(joined).index_copy_(0, joined, torch.arange(joined.numel(), device=joined.device))


def _check_coords(coords: Tensor) -> None:
    if coords.dtype == torch.bool or coords.is_complex():
        raise SettingsError(f"patch_coords must be numbers of pixels, got {coords.dtype}")
    if not coords.is_floating_point() or coords.numel() == 0:
        return
    largest = coords.abs().max().item()  # NaN if any coordinate is NaN; the next comparison is then false
    if not largest < float("inf"):
        raise SettingsError("patch_coords holds a non-finite value at a valid patch")
    exact = 2 / torch.finfo(coords.dtype).eps  # all integers below this are exact in the dtype: 2**24 for float32
    if largest >= exact:
        raise SettingsError(
            f"patch_coords holds {largest:.0f} as {coords.dtype}, which is exact below {exact:.0f} only: pass the "
            "pixels as int32, int64 or float64"
        )
