"""Quality of a trained model if some modalities are missing at inference.

Patients with all modalities are evaluated with every subset of their modalities, so that curves over the number of
modalities compare the same patients. Two measures are used: retrieval of one modality from the others, and a probe for
a label on the fused embedding, fitted on training patients with all modalities.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import Estimate, bootstrap_weighted
from exaonepath.alignment.metrics.probes import ProbeScores, fit_probe
from exaonepath.alignment.metrics.retrieval import RetrievalScores, retrieval
from exaonepath.errors import SettingsError

Subset = tuple[str, ...]


def subsets(modalities: Sequence[str]) -> list[Subset]:
    """Every non-empty subset, small ones first, in the given order of modalities."""
    return [s for k in range(1, len(modalities) + 1) for s in itertools.combinations(modalities, k)]


def retrieval_from_subsets(
    spaces: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], patients: Sequence[Any], target: str
) -> dict[Subset, RetrievalScores]:
    """Retrieve a patient's `target` among those of all patients, from every subset of the other modalities.

    The similarity of a subset is the mean of the similarities of its modalities to the target, each in the space of its
    pair.

    Args:
        spaces: (i, j) -> (u, v) unit vectors [n, d] of the same n patients.
        patients: [n].
        target: the modality to retrieve.

    Raises:
        SettingsError: no pair has the target.
    """
    views: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for (a, b), (u, v) in spaces.items():
        if target in (a, b):
            views[b if a == target else a] = (v, u) if a == target else (u, v)
    if not views:
        raise SettingsError(f"no pair was trained with {target}; pairs are {list(spaces)}")
    # The inner product of concatenated vectors is the sum of the pairs' inner products. All rows have the same length,
    # so normalisation does not change the order.
    return {
        subset: retrieval(
            np.concatenate([views[m][0] for m in subset], axis=1),
            np.concatenate([views[m][1] for m in subset], axis=1),
            patients,
            patients,
        )
        for subset in subsets(sorted(views, key=_order(spaces)))
    }


def probe_from_subsets(
    fused: Callable[[Subset], tuple[np.ndarray, np.ndarray]],
    modalities: Sequence[str],
    train_labels: Sequence[Any],
    test_labels: Sequence[Any],
    *,
    refit: bool,
    seed: int = 0,
) -> dict[Subset, ProbeScores]:
    """Balanced accuracy of a label from the fused embedding of every subset of modalities.

    Args:
        fused: subset -> (train [n, D], test [m, D]) fused embeddings with those modalities only.
        modalities: modalities of the model.
        train_labels: [n]; test_labels: [m].
        refit: True: a separate probe for each subset (the remaining information); False: the probe of the full set is
            applied to the embedding of a subset (a deployed probe with a missing modality).
        seed: seed of the intervals.
    """
    whole = tuple(modalities)
    probe = fit_probe(fused(whole)[0], train_labels, seed=seed)
    found = {}
    for subset in subsets(whole):
        train, test = fused(subset)
        chosen = fit_probe(train, train_labels, seed=seed) if refit else probe
        found[subset] = chosen.score(test, test_labels, seed=seed)
    return found


def gain_over_single(
    fused: Callable[[Subset], tuple[np.ndarray, np.ndarray]],
    modalities: Sequence[str],
    train_labels: Sequence[Any],
    test_labels: Sequence[Any],
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The gain of all modalities together compared with each one alone.

    Args: as `probe_from_subsets`, with a separate probe for each subset.

    Returns:
        Modality to balanced accuracy with all modalities minus that with this one alone. The interval is paired: it
        resamples patients (within their class), each with both predictions.

    Raises:
        SettingsError: see `fit_probe`; a test patient has a class that no training patient has.
    """

    def hits(subset: Subset) -> tuple[np.ndarray, np.ndarray]:
        train, test = fused(subset)
        return fit_probe(train, train_labels, seed=seed).hits(test, test_labels)

    (whole, classes), gains = hits(tuple(modalities)), {}
    member = np.eye(int(classes.max(initial=0)) + 1)[classes]  # [n, K]
    for name in modalities:
        difference = whole - hits((name,))[0]

        def statistic(weights: np.ndarray, difference: np.ndarray = difference) -> np.ndarray:
            share: np.ndarray = ((weights * difference) @ member / (weights @ member)).mean(1)
            return share

        gains[name] = bootstrap_weighted(statistic, np.arange(len(classes)), strata=classes, seed=seed)
    return gains


def by_size(values: Mapping[Subset, float]) -> dict[int, tuple[float, float, float]]:
    """Subset size -> (mean, lowest, highest) over its subsets: the curve and its band."""
    sizes = sorted({len(subset) for subset in values})
    grouped = {size: [value for subset, value in values.items() if len(subset) == size] for size in sizes}
    return {size: (float(np.mean(v)), min(v), max(v)) for size, v in grouped.items()}


def _order(spaces: Iterable[tuple[str, str]]) -> Callable[[str], int]:
    seen: list[str] = []
    for pair in spaces:
        seen += [name for name in pair if name not in seen]
    return seen.index
