"""Cross-modal retrieval: for example, find the RNA profile of a slide's patient among those of all patients.

Several rows may belong to one patient (several slides); the best rank of them counts. Rows with equal similarity are
ties: recall is the expectation over a random order of the tied rows, so collapsed embeddings score exactly chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exaonepath.alignment.metrics.intervals import Estimate, bootstrap_mean, check_rows
from exaonepath.errors import SettingsError

RECALL_AT = (1, 5, 10)
# Similarities are float64 products of unit vectors, with rounding errors below 1e-12. Smaller differences than this
# count as ties.
_TIE = 1e-9
_CHUNK_ENTRIES = 1 << 22  # similarities in memory at once: 32 MiB


@dataclass(frozen=True)
class PairEmbeddings:
    """Two modalities in the shared space of their projections.

    Attributes:
        left, right: names of the modalities.
        u: [n, d] rows of the left modality, v: [m, d] of the right; only rows that have the modality.
        left_patients, right_patients: patient of each row.
    """

    left: str
    right: str
    u: np.ndarray
    v: np.ndarray
    left_patients: Sequence[Any] | np.ndarray
    right_patients: Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Ranks:
    """Result of each query, for the Q queries whose patient is in the gallery.

    Attributes:
        query: int64 [Q], rows of the queries.
        rank: float64 [Q], expected rank of the patient's first row, from 1.
        hits: recall level k -> float64 [Q], probability of being among the first k.
        chance: recall level k -> float64 [Q], the same for a random order.
        chance_rank: float64 [Q], expected rank for a random order.
    """

    query: np.ndarray
    rank: np.ndarray
    hits: dict[int, np.ndarray]
    chance: dict[int, np.ndarray]
    chance_rank: np.ndarray


@dataclass(frozen=True)
class RetrievalScores:
    """Retrieval in one direction.

    Attributes:
        n_queries, n_gallery: rows; queries whose patient is not in the gallery are not counted.
        recall: k -> recall@k with its interval over patients.
        chance: k -> recall@k of a random order.
        median_rank, chance_rank: median over queries of the (expected) rank, and of that of a random order.
    """

    n_queries: int
    n_gallery: int
    recall: dict[int, Estimate]
    chance: dict[int, float]
    median_rank: float
    chance_rank: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "n_queries": self.n_queries,
            "n_gallery": self.n_gallery,
            "median_rank": _number(self.median_rank),
            "chance_rank": _number(self.chance_rank),
            "recall": {str(k): value.as_dict() for k, value in self.recall.items()},
            "chance": {str(k): _number(value) for k, value in self.chance.items()},
        }


def rank_queries(
    queries: Any,
    gallery: Any,
    query_patients: Sequence[Any] | np.ndarray,
    gallery_patients: Sequence[Any] | np.ndarray,
    *,
    recall_at: Iterable[int] = RECALL_AT,
) -> Ranks:
    """Rank the gallery for every query by cosine similarity.

    Args:
        queries: [n, d]; gallery: [m, d], arrays or tensors, not necessarily normalised.
        query_patients, gallery_patients: patient of each row.
        recall_at: levels k, positive.

    Raises:
        SettingsError: shapes do not match, or an embedding is not finite (the row is named).
    """
    levels = tuple(recall_at)
    if any(k < 1 for k in levels):
        raise SettingsError(f"recall levels must be positive, got {levels}")
    u, v = unit_rows(queries, "queries"), unit_rows(gallery, "gallery")
    if u.shape[1] != v.shape[1]:
        raise SettingsError(f"queries are {u.shape[1]} wide, the gallery is {v.shape[1]}")
    check_rows(queries=u, query_patients=query_patients)
    check_rows(gallery=v, gallery_patients=gallery_patients)
    wanted, owner = _codes(query_patients, gallery_patients)
    positives = np.bincount(owner, minlength=int(wanted.max(initial=-1)) + 1)[wanted] if len(v) else np.zeros(len(u))
    query = np.flatnonzero(positives)

    above, tied, tied_own = (np.zeros(len(query), np.int64) for _ in range(3))
    step = max(1, _CHUNK_ENTRIES // max(len(v), 1))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        similarity = u[query[part]] @ v.T
        own = wanted[query[part]][:, None] == owner
        best = np.where(own, similarity, -np.inf).max(axis=1, keepdims=True)
        equal = np.abs(similarity - best) <= _TIE
        above[part] = ((similarity > best + _TIE) & ~own).sum(axis=1)
        tied[part] = (equal & ~own).sum(axis=1)
        tied_own[part] = (equal & own).sum(axis=1)

    p = positives[query].astype(np.float64)
    others = len(v) - p
    return Ranks(
        query,
        above + (tied + tied_own + 1) / (tied_own + 1),
        {k: _found(k - above, tied, tied_own) for k in levels},
        {k: _found(np.full(len(query), k), others, p) for k in levels},
        (len(v) + 1) / (p + 1),
    )


def retrieval(
    queries: Any,
    gallery: Any,
    query_patients: Sequence[Any] | np.ndarray,
    gallery_patients: Sequence[Any] | np.ndarray,
    *,
    recall_at: Iterable[int] = RECALL_AT,
    seed: int = 0,
) -> RetrievalScores:
    """Recall@k with intervals (bootstrap over query patients), median rank, and chance; arguments of `rank_queries`."""
    ranks = rank_queries(queries, gallery, query_patients, gallery_patients, recall_at=recall_at)
    patients = np.asarray(query_patients)[ranks.query]
    empty = not len(ranks.query)
    return RetrievalScores(
        len(ranks.query),
        len(gallery_patients),
        {k: bootstrap_mean(hits, patients, shares=True, seed=seed) for k, hits in ranks.hits.items()},
        {k: float("nan") if empty else float(chance.mean()) for k, chance in ranks.chance.items()},
        float("nan") if empty else float(np.median(ranks.rank)),
        float("nan") if empty else float(np.median(ranks.chance_rank)),
    )


def cross_modal_retrieval(
    pairs: Iterable[PairEmbeddings], *, recall_at: Iterable[int] = RECALL_AT, seed: int = 0
) -> dict[str, RetrievalScores]:
    """Retrieval of every pair in both directions, by "left->right"; a pair without a common patient is left out."""
    levels = tuple(recall_at)
    scores: dict[str, RetrievalScores] = {}
    for pair in pairs:
        for name, (q, g, q_patients, g_patients) in {
            f"{pair.left}->{pair.right}": (pair.u, pair.v, pair.left_patients, pair.right_patients),
            f"{pair.right}->{pair.left}": (pair.v, pair.u, pair.right_patients, pair.left_patients),
        }.items():
            result = retrieval(q, g, q_patients, g_patients, recall_at=levels, seed=seed)
            if result.n_queries:
                scores[name] = result
    return scores


@dataclass(frozen=True)
class GroupRecall:
    """Retrieval of one group of query patients over all pairs and directions.

    Attributes:
        recall: recall@k.
        excess: recall@k minus that of all queries of the same direction, so that groups with different pairs can be
            compared.
    """

    recall: Estimate
    excess: Estimate


def recall_by_group(
    pairs: Iterable[PairEmbeddings], group_of: Mapping[Any, Any], *, recall_at: int = 1, seed: int = 0
) -> dict[Any, GroupRecall]:
    """Recall@k over all pairs and directions, for groups of query patients (for example, by number of modalities)."""
    hits, excess, owners = [], [], []
    for pair in pairs:
        for q, g, q_patients, g_patients in (
            (pair.u, pair.v, pair.left_patients, pair.right_patients),
            (pair.v, pair.u, pair.right_patients, pair.left_patients),
        ):
            ranks = rank_queries(q, g, q_patients, g_patients, recall_at=(recall_at,))
            if len(ranks.query):
                found = ranks.hits[recall_at]
                hits.append(found)
                excess.append(found - found.mean())
                owners.append(np.asarray(q_patients)[ranks.query])
    if not hits:
        return {}
    all_hits, all_excess, all_owners = np.concatenate(hits), np.concatenate(excess), np.concatenate(owners)
    groups = np.array([group_of[patient] for patient in all_owners.tolist()])
    groups_found = {}
    for group in np.unique(groups).tolist():
        rows = groups == group
        recall = bootstrap_mean(all_hits[rows], all_owners[rows], shares=True, seed=seed)
        gap = bootstrap_mean(all_excess[rows], all_owners[rows], seed=seed)
        if recall.value in (0.0, 1.0):
            # Without a hit, only the chance of the directions varies between resamples. The certainty is that of the
            # recall.
            shift = gap.value - recall.value
            gap = Estimate(gap.value, recall.low + shift, recall.high + shift, gap.n)
        groups_found[group] = GroupRecall(recall, gap)
    return groups_found


def unit_rows(embedding: Any, name: str) -> np.ndarray:
    """float64 [n, d] with rows of length 1 (zero rows stay zero); raises `SettingsError` if a row is not finite."""
    values = torch.as_tensor(embedding).detach().to("cpu", torch.float64).numpy()
    if values.ndim != 2:
        raise SettingsError(f"{name} must be a matrix [n, d], got shape {list(values.shape)}")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise SettingsError(f"{name} holds {len(bad)} rows that are not finite, the first is row {bad[0]}")
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norm > 0, norm, 1)


def _codes(left: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
    """Patients of both sides as common integers."""
    both = np.concatenate([np.asarray(left), np.asarray(right)])
    codes = np.unique(both, return_inverse=True)[1]
    return codes[: len(left)], codes[len(left) :]


def _found(drawn: np.ndarray, others: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Probability that `drawn` of others + own rows, drawn without replacement, contain at least one own row."""
    missed = np.ones(len(drawn))
    for i in range(int(drawn.max(initial=0))):
        share = np.clip((others - i) / np.maximum(others + own - i, 1), 0, 1)
        missed = np.where(i < drawn, missed * share, missed)
    return 1 - missed


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
