"""Attention problems: how many tokens, in which fragments, of what numbers. Everything follows from the seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, rotary_periods

SPREADS = ("equal", "lognormal", "zipf")
PATCH = 256


def fragment_lengths(n: int, fragments: int, spread: str, seed: int) -> list[int]:
    """`fragments` lengths of at least 1 that add up to `n`.

    "equal" differs by one at most; "lognormal" (sigma 1.5) is what tissue looks like; "zipf" (length ~ 1/rank) is
    heavier still. The order of the fragments is random: longest-first is for a schedule to find.
    """
    if not 1 <= fragments <= n:
        raise ValueError(f"{fragments} fragments do not fit {n} tokens")
    rng = np.random.default_rng(seed)
    if spread == "equal":
        weights = np.ones(fragments)
    elif spread == "lognormal":
        weights = rng.lognormal(0.0, 1.5, fragments)
    elif spread == "zipf":
        weights = rng.permutation(1.0 / np.arange(1, fragments + 1))
    else:
        raise ValueError(f"unknown spread {spread!r}; choose one of {', '.join(SPREADS)}")
    ideal = weights / weights.sum() * (n - fragments)
    lengths = 1 + np.floor(ideal).astype(np.int64)
    short = n - int(lengths.sum())
    lengths[np.argsort(np.floor(ideal) - ideal, kind="stable")[:short]] += 1
    return lengths.tolist()


@dataclass(frozen=True)
class Problem:
    """One attention problem of `n` tokens; `inputs(i)` are fresh numbers for every i."""

    n: int
    fragments: int
    spread: str
    dtype: torch.dtype
    device: str
    heads: int = 12
    head_dim: int = 64
    seed: int = 0

    @cached_property
    def lengths(self) -> list[int]:
        return fragment_lengths(self.n, self.fragments, self.spread, self.seed)

    @property
    def sum_l2(self) -> int:
        """Sum over fragments of their squared length: the only work that counts."""
        return sum(length * length for length in self.lengths)

    def operations(self, backward: bool) -> int:
        """Two products of 2 H D L^2 forward; backward counts 2.5 times that, as everywhere."""
        forward = 4 * self.heads * self.head_dim * self.sum_l2
        return int(2.5 * forward) if backward else forward

    def segments(self) -> Segments:
        """A fresh layout, with nothing derived from it yet."""
        return Segments.from_lengths(torch.tensor(self.lengths, device=self.device))

    @cached_property
    def rotation(self) -> Rotation:
        """Random patch corners on a slide of 100,000 pixels."""
        rng = np.random.default_rng(self.seed + 1)
        coords = torch.from_numpy(rng.integers(0, 400, (self.n, 2)) * PATCH).to(self.device)
        return Rotation.from_coords(coords, rotary_periods(self.head_dim).to(self.device), PATCH)

    def inputs(self, index: int) -> tuple[Tensor, Tensor]:
        """Packed qkv [T, 3, H, D] and the gradient of the output [T, H, D], standard normal."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + index)
        options = {"dtype": self.dtype, "device": self.device}
        qkv = torch.empty((self.n, 3, self.heads, self.head_dim), **options).normal_(generator=generator)
        dout = torch.empty((self.n, self.heads, self.head_dim), **options).normal_(generator=generator)
        return qkv, dout

    def describe(self) -> dict[str, object]:
        """The columns of a results row that say what was computed."""
        return {
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "n": self.n,
            "fragments": self.fragments,
            "spread": self.spread,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "seed": self.seed,
            "sum_l2": self.sum_l2,
        }
