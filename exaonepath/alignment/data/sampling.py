"""Fewer patches of a slide without tearing its fragments apart, and reproducible draws."""

from __future__ import annotations

import hashlib

import numpy as np

from exaonepath.errors import SettingsError


def stream(*key: int | str) -> np.random.Generator:
    """Random numbers that depend on the key alone: not on the process, the order of work, or what was drawn before."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in key)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))


def choose_patches(coords: np.ndarray, contour_index: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of at most `budget` patches: whole fragments, so that attention inside a fragment sees what is there.

    Fragments come in a random order in which larger ones tend to be earlier (each patch has the same chance to be the
    first), and those that still fit are taken. Where the first one alone is larger than the budget, the patches nearest
    to a random one of its patches are taken: one region in space, of one fragment.

    Args:
        coords: integers [N, 2], (x, y).
        contour_index: integers [N].
        budget: patches wanted at most, 1 or more.
        rng: where the draws come from.

    Returns:
        int64 [min(N, ...)], increasing.
    """
    if budget < 1:
        raise SettingsError(f"the patch budget is {budget}; it must be 1 or more")
    if len(coords) <= budget:
        return np.arange(len(coords))
    fragments, owner, sizes = np.unique(contour_index, return_inverse=True, return_counts=True)
    # Exponential races: the fragment of the smallest of `size` exponential draws comes first.
    order = np.argsort(rng.exponential(size=len(fragments)) / sizes, kind="stable")
    if sizes[order[0]] > budget:
        rows = np.flatnonzero(owner == order[0])
        offset = coords[rows].astype(np.float64) - coords[rows[rng.integers(len(rows))]]
        distance = (offset**2).sum(1)
        return np.sort(rows[np.argsort(distance, kind="stable")[:budget]])
    left, taken = budget, []
    for fragment in order:
        if sizes[fragment] <= left:
            taken.append(fragment)
            left -= int(sizes[fragment])
    return np.flatnonzero(np.isin(owner, taken))


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n]: the order rows are visited in during an epoch."""
    return stream("order", seed, epoch).permutation(n)
