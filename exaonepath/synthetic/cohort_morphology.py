"""Simulated slides of a cohort: the mean of the patch features shows the programmes, their arrangement the spatial
state.

Fragments are pairs of registered serial sections: the same patch positions twice, with the opposite type at each
position. Each fragment has the same number of patches of both types, for any arrangement. So the spatial state cannot
be inferred from a bag of patches, from bags per fragment (without positions), or from positions and types of both
fragments together, where both types are at every position. It can only be inferred from positions inside a fragment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PATCH_SIZE = 256  # level-0 pixels; the slide encoder's unit of position


@dataclass(frozen=True)
class PatchCloud:
    """Patches of a simulated slide.

    Attributes:
        features: float32 [N, C].
        coords: int32 [N, 2], level-0 pixels.
        contour_index: int32 [N].
        types: int64 [N], -1 or 1: the true types.
    """

    features: np.ndarray
    coords: np.ndarray
    contour_index: np.ndarray
    types: np.ndarray


@dataclass(frozen=True)
class Appearance:
    """Effects of programmes, types and centres on patch features; the same for a whole cohort.

    Attributes:
        programmes: float64 [K, C], shift of every patch per unit of a programme.
        patch_type: float64 [C], half the difference of the two types.
        batches: float64 [B, C], shift of every patch of a centre.
    """

    programmes: np.ndarray
    patch_type: np.ndarray
    batches: np.ndarray


def draw_appearance(programmes: int, batches: int, dim: int, batch_effect: float, seed: int) -> Appearance:
    """`Appearance` of a cohort whose patch features are `dim` wide."""
    rng = np.random.default_rng([seed, 4])
    # Orthogonal directions if there are enough dimensions: otherwise programmes would be confused with each other.
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    if programmes + 1 <= dim:
        rows, patch_type = basis[:programmes], basis[programmes]
    else:
        rows = rng.standard_normal((programmes, dim)) / np.sqrt(dim)
        patch_type = basis[0]
    return Appearance(1.2 * rows, 4.0 * patch_type, rng.standard_normal((batches, dim)) * 0.3 * batch_effect)


def fragment_positions(n: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [n, 2]: grid positions of an approximately round fragment, starting at (0, 0)."""
    side = int(np.ceil(np.sqrt(n))) + 4
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="xy"), -1).reshape(-1, 2)
    offset = grid - (side - 1) / 2
    angle = np.arctan2(offset[:, 1], offset[:, 0])
    waves = np.arange(2, 5)
    edge = 1 + (0.08 * rng.standard_normal(3) * np.cos(waves * angle[:, None] + rng.uniform(0, 2 * np.pi, 3))).sum(1)
    inside = np.argsort(np.hypot(*offset.T) / edge, kind="stable")[:n]
    chosen = grid[np.sort(inside)]
    return chosen - chosen.min(0)


def arrange(positions: np.ndarray, period: float, rng: np.random.Generator) -> np.ndarray:
    """int64 [n]: types -1 and 1, half of each (n even), alternating along both axes with a period of `period`
    patches."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    field = np.cos(2 * np.pi * positions / period + phase).sum(1) + 1e-3 * rng.standard_normal(len(positions))
    types = np.full(len(positions), -1, np.int64)
    types[np.argsort(field, kind="stable")[len(positions) // 2 :]] = 1
    return types


def draw_slide(
    programmes: np.ndarray,
    period: float,
    appearance: Appearance,
    batch: int,
    n_patches: int,
    pairs: int,
    noise: float,
    rng: np.random.Generator,
) -> PatchCloud:
    """One slide.

    Args:
        programmes: float64 [K], as visible in morphology.
        period: patches per period of the arrangement.
        appearance: appearance of the cohort.
        batch: the centre.
        n_patches: approximate number of patches; each fragment gets an even number.
        pairs: pairs of fragments.
        noise: standard deviation of the random variation of patches and of the slide.
        rng: random generator of the slide.
    """
    per_fragment = max(2, 2 * round(n_patches / (4 * pairs)))
    # A section shows the programmes of the tumour with an error.
    shown = programmes + 0.6 * noise * rng.standard_normal(len(programmes))
    base = shown @ appearance.programmes + appearance.batches[batch]
    corner = rng.integers(1_000, 40_000, 2)
    coords, contours, types = [], [], []
    for pair in range(pairs):
        positions = fragment_positions(per_fragment, rng)
        first = arrange(positions, period, rng)
        pixels = corner + positions * PATCH_SIZE
        corner[0] += (int(positions[:, 0].max()) + 4) * PATCH_SIZE + int(rng.integers(2_000))
        for section, sign in enumerate((1, -1)):
            coords.append(pixels)
            contours.append(np.full(per_fragment, 2 * pair + section))
            types.append(sign * first)
    kinds = np.concatenate(types)
    features = base + kinds[:, None] * appearance.patch_type
    features = features + 0.3 * noise * rng.standard_normal(features.shape)
    return PatchCloud(
        features.astype(np.float32),
        np.concatenate(coords).astype(np.int32),
        np.concatenate(contours).astype(np.int32),
        kinds,
    )
