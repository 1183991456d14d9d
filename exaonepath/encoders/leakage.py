"""A test for leakage: whether information passes from one tissue fragment to another inside a RoPE block.

Blocks without positions mix the whole slide on purpose, so only RoPE blocks are tested. If the input of a RoPE block
changes at one fragment only, its output at all other fragments must stay the same, bit for bit. The test runs the
encoder's own blocks, with any attention backend: hooks record their inputs, one fragment of an input is changed, and
the block is called again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exaonepath.device import evaluating
from exaonepath.errors import SettingsError
from exaonepath.ops.attention.layout import build_fragment_layout

_PERTURBATION = 8.0  # in standard deviations of the stream: large enough to detect an attention weight of 1e-6


@dataclass(frozen=True)
class BlockLeakage:
    """Leakage measured in one RoPE block.

    Attributes:
        block: index of the block.
        fragment: contour index of the fragment that was changed.
        change: largest absolute change of the block's output at tokens of other fragments; 0 without leakage.
        tokens: number of tokens of other fragments that changed.
    """

    block: int
    fragment: int
    change: float
    tokens: int


def fragment_leakage(
    encoder: Any, features: Tensor, coords: Tensor, contour_index: Tensor, *, fragment: int | None = None
) -> list[BlockLeakage]:
    """Change one fragment in the input of every RoPE block, and measure the change at the others in its output.

    Args:
        encoder: `ExaonePathSlideEncoderModel`; it is in evaluation mode for the call, because dropout adds noise.
        features: [N, C] of one slide; coords: [N, 2]; contour_index: [N].
        fragment: the fragment to change; default: the largest.

    Returns:
        One entry per RoPE block; `change` is 0 in each if there is no leakage.

    Raises:
        SettingsError: the slide has fewer than two fragments, or does not have `fragment`.
    """
    names, sizes = contour_index.unique(return_counts=True)
    if len(names) < 2:
        raise SettingsError("leakage between fragments needs a slide with at least two of them")
    chosen = int(names[sizes.argmax()]) if fragment is None else fragment
    if chosen not in names.tolist():
        raise SettingsError(f"the slide has no fragment {chosen}; it has {names.tolist()}")
    transformer = encoder.transformer
    mask = torch.ones(1, len(features), dtype=torch.bool, device=features.device)
    layout = build_fragment_layout(transformer.n_prefix, mask, contour_index[None])
    contour = torch.cat([contour_index.new_full((transformer.n_prefix,), -1), contour_index])[layout.source]

    results = []
    with evaluating(encoder), torch.enable_grad():
        calls = block_calls(encoder, features, coords, contour_index)
        for index in rope_blocks(encoder):
            block, (args, kwargs, before) = transformer.blocks[index], calls[index]
            stream = args[0].detach()
            changed = stream.clone()
            generator = torch.Generator(device="cpu").manual_seed(index)
            noise = torch.randn(stream.shape, generator=generator).to(stream)
            inside = contour == chosen
            changed[inside] += _PERTURBATION * stream.std().clamp(min=1e-3) * noise[inside]
            # `before` comes from a call with the same arguments. So only the input can cause a difference.
            difference = (block(changed, *args[1:], **kwargs) - before).detach()[~inside].abs()
            results.append(BlockLeakage(index, chosen, float(difference.max()), int((difference > 0).any(dim=1).sum())))
    return results


def rope_blocks(encoder: Any) -> list[int]:
    """Indices of the blocks that are restricted to fragments."""
    cfg = encoder.transformer.cfg
    return [i for i in range(cfg["depth"]) if i % cfg["nope_interval"] != 0]


def block_calls(
    encoder: Any, features: Tensor, coords: Tensor | None, contour_index: Tensor | None
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Arguments and output of every block in one forward pass over a slide [N, C], on the code path of training."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def remember(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls[index] = (args, kwargs, output.detach())

        return hook

    handles = [
        block.register_forward_hook(remember(i), with_kwargs=True) for i, block in enumerate(encoder.transformer.blocks)
    ]
    try:
        # An input that requires a gradient selects the code path of training, in which every block is called.
        encoder(
            features[None].clone().requires_grad_(),
            patch_coords=None if coords is None else coords[None],
            patch_contour_index=None if contour_index is None else contour_index[None],
        )
    finally:
        for handle in handles:
            handle.remove()
    return calls
