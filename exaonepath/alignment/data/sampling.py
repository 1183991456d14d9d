"""Selection of a part of a slide's patches in whole fragments, and reproducible random numbers."""

from __future__ import annotations

import hashlib

import numpy as np

from exaonepath.errors import SettingsError


def stream(*key: int | str) -> np.random.Generator:
    """Random numbers that depend only on the key, not on the process, the order of work, or earlier random numbers."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in key)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))


def choose_patches(coords: np.ndarray, contour_index: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of at most `budget` patches: whole fragments, so that attention inside a fragment gets complete fragments.

    Fragments are in a random order in which larger ones tend to be earlier (each patch has the same probability to be
    in the first fragment). Each fragment that still fits is taken. If the first fragment alone is larger than the
    budget, the patches nearest to a random patch of it are taken: one region of one fragment.

    Args:
        coords: integers [N, 2], (x, y).
        contour_index: integers [N].
        budget: largest number of patches, 1 or more.
        rng: source of the random numbers.

    Returns:
        int64 [min(N, ...)], increasing.
    """
    if budget < 1:
        raise SettingsError(f"the patch budget is {budget}; it must be 1 or more")
    if len(coords) <= budget:
        return np.arange(len(coords))
    fragments, owner, sizes = np.unique(contour_index, return_inverse=True, return_counts=True)
    # The minimum of n exponential random numbers is distributed like one of them divided by n. So this order equals
    # that of the smallest of one random number per patch, and one number per fragment is enough.
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
    """int64 [n]: the order of the rows in an epoch."""
    return stream("order", seed, epoch).permutation(n)
