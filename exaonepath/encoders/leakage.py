"""Does anything cross from one tissue fragment to another inside a RoPE block?

Blocks without positions mix the whole slide on purpose, so leakage means: with a RoPE block's input changed at one
fragment only, its output elsewhere must stay as it was, bit for bit. Measured on the very blocks that run, whatever
the attention backend: their inputs are taken by hooks, changed, and the block is called again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exaonepath.errors import SettingsError
from exaonepath.ops.attention.layout import build_fragment_layout

_PERTURBATION = 8.0  # in standard deviations of the stream: an attention weight of 1e-6 would still show


@dataclass(frozen=True)
class BlockLeakage:
    """What a RoPE block let through.

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
    """Change one fragment in front of every RoPE block of a slide encoder, and look at the others behind it.

    Args:
        encoder: `ExaonePathSlideEncoderModel`; its training mode is switched off for the call, dropout being noise.
        features: [N, C] of one slide; coords: [N, 2]; contour_index: [N].
        fragment: the fragment to change; default: the largest.

    Returns:
        One entry per RoPE block; `change` is 0 in each where nothing crosses.

    Raises:
        SettingsError: the slide has fewer than two fragments, or not the asked one.
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
            # Twice with the same call: what differs is the input alone.
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
    """Arguments and output of every block in one forward pass over a slide [N, C], in the differentiable path."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def remember(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls[index] = (args, kwargs, output.detach())

        return hook

    handles = [
        block.register_forward_hook(remember(i), with_kwargs=True) for i, block in enumerate(encoder.transformer.blocks)
    ]
    try:
        # A leaf that wants a gradient keeps every block on the path that training takes.
        encoder(
            features[None].clone().requires_grad_(),
            patch_coords=None if coords is None else coords[None],
            patch_contour_index=None if contour_index is None else contour_index[None],
        )
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the block, the training flag as it was after it."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)
