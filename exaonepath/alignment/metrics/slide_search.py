"""Retrieval of slides by slides: those of other patients with the same label, or the same patient's other slides.

The measures are those of slide search engines: mean average precision, whether one of the first k has the label, and
the majority vote of the first k (Kalra et al. 2020, Yottixel). In the search for a label, all slides of the query's own
patient are left out: they are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import Estimate, bootstrap_mean, check_rows
from exaonepath.alignment.metrics.retrieval import unit_rows
from exaonepath.errors import SettingsError

VOTES = (1, 3, 5)
_SHUFFLES = 100  # random orders for the chance of a vote
_SMALL = 200  # slides


@dataclass(frozen=True)
class SlideSearch:
    """What every query found; one entry per query that has something to find.

    Attributes:
        query: int64 [Q], rows of the queries.
        measures: name ("mAP", "hit@1", "vote@3", ...) to float64 [Q].
        chance: name to the mean of the measure for a random order of the gallery.
    """

    query: np.ndarray
    measures: dict[str, np.ndarray]
    chance: dict[str, float]

    def estimates(self, patients: Sequence[Any] | np.ndarray, seed: int = 0) -> dict[str, Estimate]:
        """Means with intervals; patients are resampled with all their slides."""
        owners = np.asarray(patients)[self.query]
        return {name: bootstrap_mean(values, owners, shares=True, seed=seed) for name, values in self.measures.items()}


def search_label(
    embedding: Any, patients: Sequence[Any] | np.ndarray, labels: Sequence[str] | np.ndarray, *, seed: int = 0
) -> SlideSearch:
    """Slides of other patients with the label of the query's patient.

    Args:
        embedding: [n, d], one row per slide. patients: [n]. labels: [n] text, of the patients.
        seed: seed of the order of equal similarities, and of the chance of votes.

    Raises:
        SettingsError: lengths differ, or no label has slides of two patients.
    """
    owner = np.unique(np.asarray(patients), return_inverse=True)[1]
    name = np.unique(np.asarray(labels), return_inverse=True)[1]
    check_rows(embedding=embedding, patients=owner, labels=name)
    allowed = owner[:, None] != owner
    relevant = allowed & (name[:, None] == name)
    if not relevant.any():
        raise SettingsError("no label has slides of two patients: there is nothing to find")
    found, orders = _search(embedding, allowed, relevant, seed)
    rng = np.random.default_rng([seed, 1])
    votes: dict[int, list[float]] = {k: [] for k in VOTES}
    for row in found.query:
        gallery = name[allowed[row]]
        order = _random_orders(gallery, rng)
        for k in VOTES:
            votes[k].append(float(np.mean([_vote(line) == name[row] for line in order[:, :k]])))
    for k in VOTES:
        found.measures[f"vote@{k}"] = np.array(
            [float(_vote(name[order[:k]]) == name[row]) for row, order in zip(found.query, orders, strict=True)]
        )
        found.chance[f"vote@{k}"] = float(np.mean(votes[k]))
    return found


def search_patient(embedding: Any, patients: Sequence[Any] | np.ndarray, *, seed: int = 0) -> SlideSearch:
    """The other slides of the query's patient; arguments of `search_label`.

    Raises:
        SettingsError: lengths differ, or no patient has two slides.
    """
    owner = np.unique(np.asarray(patients), return_inverse=True)[1]
    check_rows(embedding=embedding, patients=owner)
    allowed = ~np.eye(len(owner), dtype=bool)
    relevant = allowed & (owner[:, None] == owner)
    if not relevant.any():
        raise SettingsError("no patient has two slides: there is nothing to find")
    return _search(embedding, allowed, relevant, seed)[0]


def _search(
    embedding: Any, allowed: np.ndarray, relevant: np.ndarray, seed: int
) -> tuple[SlideSearch, list[np.ndarray]]:
    """What every query found, and its gallery in the order of similarity."""
    unit = unit_rows(embedding, "slide embeddings")
    # Equal similarities are in random order, another one for each query, so that collapsed embeddings score chance.
    query = np.flatnonzero(relevant.any(1))
    measures: dict[str, list[float]] = {"mAP": [], **{f"hit@{k}": [] for k in VOTES}}
    chance: dict[str, list[float]] = {name: [] for name in measures}
    orders = []
    for row in query:
        candidates = np.random.default_rng([seed, 2, int(row)]).permutation(np.flatnonzero(allowed[row]))
        similarity = np.round(unit[candidates] @ unit[row], 9)
        order = candidates[np.argsort(-similarity, kind="stable")]
        orders.append(order)
        hits = relevant[row][order]
        places = np.flatnonzero(hits) + 1
        measures["mAP"].append(float((np.arange(1, len(places) + 1) / places).mean()))
        chance["mAP"].append(random_precision(len(places), len(order)))
        for k in VOTES:
            measures[f"hit@{k}"].append(float(hits[:k].any()))
            chance[f"hit@{k}"].append(_random_hit(len(places), len(order), k))
    found = SlideSearch(
        query,
        {name: np.array(values) for name, values in measures.items()},
        {name: float(np.mean(values)) for name, values in chance.items()},
    )
    return found, orders


def random_precision(relevant: int, of: int) -> float:
    """Expected average precision of a random order of `of` slides, `relevant` (1 or more) of which are relevant."""
    harmonic = float((1 / np.arange(1, of + 1)).sum())
    if of == 1:
        return 1.0
    return harmonic / of + (relevant - 1) / (of * (of - 1)) * (of - harmonic)


def _random_hit(relevant: int, of: int, k: int) -> float:
    """Probability that k of `of` slides, drawn at random, contain a relevant one."""
    missed = 1.0
    for at in range(min(k, of)):
        missed *= max(0, of - relevant - at) / (of - at)
    return 1 - missed


def _random_orders(gallery: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The first places of random orders of a gallery, one order a row."""
    if len(gallery) <= _SMALL:
        return rng.permuted(np.broadcast_to(gallery, (_SHUFFLES, len(gallery))), axis=1)
    # Of so many, one is hardly drawn twice, and whole orders would take most of the time.
    return np.asarray(gallery[rng.integers(0, len(gallery), (_SHUFFLES, max(VOTES)))])


def _vote(names: np.ndarray) -> int:
    """The most frequent name; of equally frequent ones, the first in the order."""
    counts = np.bincount(names)
    return int(names[np.argmax(counts[names])])
