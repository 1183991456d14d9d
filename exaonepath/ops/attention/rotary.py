"""2D rotary position embedding (RoPE, arXiv 2104.09864) from level-0 pixel coordinates.

Angles are computed in revolutions, in float64, and whole revolutions are subtracted before the multiplication by 2 pi:
at x = 200,000 pixels, the same product in float32 is wrong from the fourth digit on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exaonepath.errors import SettingsError

# Rows of the tables that are computed at once: the temporary float64 angles are several times the size of the tables.
_TABLE_ROWS = 1 << 16


def rotary_periods(
    head_dim: int,
    base: float | None = 10_000.0,
    min_period: float | None = None,
    max_period: float | None = None,
) -> Tensor:
    """Periods of the rotation, in patches per revolution.

    Args:
        head_dim: D, a multiple of 4 (two axes, pairs).
        base: periods are base ** (2j / (D/2)) for j = 0 .. D/4 - 1.
        min_period, max_period: instead of `base`, periods spaced geometrically from one to the other.

    Returns:
        float32 [D/4] on the CPU. They are computed in float32, because published checkpoints contain these rounded
        numbers: they are the model's exact periods, and angles are computed from them in higher precision.

    Raises:
        SettingsError: neither or both forms are given, or a value is not positive.
    """
    if head_dim % 4:
        raise SettingsError(f"2D RoPE needs a head dimension divisible by 4, got {head_dim}")
    both = min_period is not None and max_period is not None
    if (base is None) != both or (min_period is None) != (max_period is None):
        raise SettingsError("give either pos_embed_rope_base or both pos_embed_rope_min_period and ..._max_period")
    n = head_dim // 4
    if base is not None:
        if base <= 0:
            raise SettingsError(f"pos_embed_rope_base must be positive, got {base}")
        return base ** (2 * torch.arange(n, dtype=torch.float32, device="cpu") / (head_dim // 2))
    assert min_period is not None
    assert max_period is not None
    if not 0 < min_period <= max_period:
        raise SettingsError(f"RoPE periods must satisfy 0 < min <= max, got {min_period} and {max_period}")
    exponents = torch.linspace(0, 1, n, dtype=torch.float32, device="cpu")
    return min_period * (max_period / min_period) ** exponents


@dataclass(frozen=True)
class Rotation:
    """Positions of packed tokens and the periods of their rotation.

    Attributes:
        positions: float64 [T, 2], (x, y) in patches; (0, 0) does not change a token (prefix tokens).
        periods: float64 [D/4], patches per revolution.
    """

    positions: Tensor
    periods: Tensor
    _tables: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def from_coords(coords: Tensor, periods: Tensor, patch_size: int) -> Rotation:
        """Rotation of patches at level-0 pixels [T, 2]: position is the patch centre, in units of `patch_size`.

        Raises:
            SettingsError: a coordinate or a period is not finite, or a period is not positive. A compiled graph does
                not check the values; NaN then stays in the segment of its token.
        """
        if not torch.compiler.is_compiling():
            if coords.is_floating_point() and not bool(coords.isfinite().all()):
                bad = int((~coords.isfinite()).any(-1).nonzero()[0])
                raise SettingsError(f"coordinates must be finite; row {bad} holds {coords[bad].tolist()}")
            if not bool((periods.isfinite() & (periods > 0)).all()):
                raise SettingsError(f"RoPE periods must be positive and finite, got {periods.tolist()}")
        positions = (coords.to(torch.float64) + patch_size // 2) / patch_size
        return Rotation(positions, periods.to(positions.device, torch.float64))

    def require(self, tokens: int, head_dim: int, device: torch.device) -> None:
        """Raise SettingsError unless this is a rotation of `tokens` tokens of `head_dim` dimensions on `device`."""
        if self.positions.shape != (tokens, 2) or self.periods.numel() * 4 != head_dim:
            raise SettingsError(
                f"rotation is for {self.positions.shape[0]} tokens of head dimension {4 * self.periods.numel()}, "
                f"but there are {tokens} of head dimension {head_dim}"
            )
        if self.positions.device != device or self.periods.device != device:
            raise SettingsError(f"rotation is on {self.positions.device}, but the tokens are on {device}")

    def rows(self, rows: slice) -> Rotation:
        """The rotation of some of the tokens, with the tables that are already computed."""
        tables = {dtype: (cos[rows], sin[rows]) for dtype, (cos, sin) in self._tables.items()}
        return Rotation(self.positions[rows], self.periods, tables)

    def cos_sin(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, D/2]: the D/4 angles of x, then those of y. Computed once, used by every layer."""
        if dtype not in self._tables:
            if torch.compiler.is_compiling():
                # Not in parts: a compiled graph would unroll the loop. And not stored: the result belongs to the graph,
                # and the next run of a CUDA graph overwrites it.
                return self._angles(self.positions, dtype)
            cos, sin = self.positions.new_empty((2, self.positions.shape[0], 2 * self.periods.numel()), dtype=dtype)
            for start in range(0, cos.shape[0], _TABLE_ROWS):
                rows = slice(start, start + _TABLE_ROWS)
                cos[rows], sin[rows] = self._angles(self.positions[rows], dtype)
            self._tables[dtype] = (cos, sin)
        return self._tables[dtype]

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Whole revolutions do not change an angle. Without them the argument of cos is small, and keeps its precision.
        revolutions = (positions[:, :, None] / self.periods).flatten(1)
        angles = (revolutions - revolutions.round()).mul_(2 * math.pi)
        return angles.cos().to(dtype), angles.sin_().to(dtype)


def apply_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads: dimensions (d, d + D/2) form a pair that is rotated by one angle.

    Args:
        x: [T, H, D] in any floating dtype; computed in float32 (float64 for float64 input).
        cos, sin: [T, D/2].

    Returns:
        [T, H, D] in x's dtype. Differentiable in x.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    c, s = cos.to(work)[:, None], sin.to(work)[:, None]
    a, b = x.to(work).chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)


def rotate_inplace(x: Tensor, cos: Tensor, sin: Tensor, chunk: int = 8192) -> None:
    """`apply_rotation` written back into `x` [T, H, D], `chunk` tokens at a time; not differentiable."""
    for start in range(0, x.shape[0], chunk):
        rows = slice(start, start + chunk)
        x[rows] = apply_rotation(x[rows], cos[rows], sin[rows])
