"""Whether retrieval finds the patient, or the site that treated and measured the patient.

Staining, scanners and assays differ between hospitals, in slides and in molecular profiles at once. A model can learn
this and find patients of the same hospital, which looks like retrieval and is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import Estimate, bootstrap_mean
from exaonepath.alignment.metrics.retrieval import PairEmbeddings, unit_rows

# Share of wrong first answers from the patient's own site, between that of chance (0) and all (1). The generator's weak
# default differences between centres give up to 0.95, strong ones 1.
MOST_EXCESS = 0.97
_FEWEST_WRONG = 20


@dataclass(frozen=True)
class SiteRetrieval:
    """Retrieval of all pairs and directions, by site.

    Attributes:
        wrong_from_own_site: among first answers that are another patient's, the share from the query's own site.
        chance: that share for a random other patient.
        recall: recall@1 over all sites. within: recall@1 if only patients of the query's own site are asked.
        within_chance: chance of `within`. n_sites: number of sites.
    """

    wrong_from_own_site: Estimate
    chance: float
    recall: Estimate
    within: Estimate
    within_chance: float
    n_sites: int

    @property
    def excess(self) -> float:
        """`wrong_from_own_site` between chance (0) and all (1)."""
        return (self.wrong_from_own_site.value - self.chance) / max(1 - self.chance, 1e-9)

    @property
    def is_suspicious(self) -> bool:
        """Whether nearly all wrong answers are from the patient's own site, for enough patients."""
        return self.wrong_from_own_site.n >= _FEWEST_WRONG and self.excess > MOST_EXCESS

    def advice(self) -> str:
        """One line for the user."""
        return (
            f"{self.wrong_from_own_site.value:.0%} of the wrong first answers are patients of the query's own site "
            f"(chance {self.chance:.0%}, {self.n_sites} sites): retrieval uses differences between sites. Recall@1 is "
            f"{self.recall.value:.3f} over all sites, and {self.within.value:.3f} within the patient's own site "
            f"(chance {self.within_chance:.3f}); split by site (data.split_sites = true) to see what remains"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "wrong_from_own_site": self.wrong_from_own_site.as_dict(),
            "chance": _finite(self.chance),
            "recall": self.recall.as_dict(),
            "within": self.within.as_dict(),
            "within_chance": _finite(self.within_chance),
            "sites": self.n_sites,
            "suspicious": self.is_suspicious,
        }


def site_retrieval(
    pairs: Iterable[PairEmbeddings], site_of: Mapping[Any, str], *, seed: int = 0
) -> SiteRetrieval | None:
    """Retrieval by site; None if fewer than two sites have queries.

    Args:
        pairs: the pairs, one row per patient and side.
        site_of: patient to site; patients without one are left out, as queries and in the gallery.
        seed: seed of the intervals.
    """
    found: dict[str, list[np.ndarray]] = {
        name: [] for name in ("own", "chance", "hit", "inside", "inside_chance", "who")
    }
    sites: set[str] = set()
    for pair in pairs:
        for u, v, queries, gallery in (
            (pair.u, pair.v, pair.left_patients, pair.right_patients),
            (pair.v, pair.u, pair.right_patients, pair.left_patients),
        ):
            for key, values in _direction(u, v, np.asarray(queries), np.asarray(gallery), site_of).items():
                found[key].append(values)
            sites |= {site_of[patient] for patient in np.asarray(queries).tolist() if patient in site_of}
    column = {key: np.concatenate(values) if values else np.zeros(0) for key, values in found.items()}
    if len(sites) < 2 or not len(column["who"]):
        return None
    wrong = column["hit"] == 0
    return SiteRetrieval(
        bootstrap_mean(column["own"][wrong], column["who"][wrong], shares=True, seed=seed),
        float(column["chance"][wrong].mean()) if wrong.any() else float("nan"),
        bootstrap_mean(column["hit"], column["who"], shares=True, seed=seed),
        bootstrap_mean(column["inside"], column["who"], shares=True, seed=seed),
        float(column["inside_chance"].mean()),
        len(sites),
    )


def _direction(
    u: np.ndarray, v: np.ndarray, queries: np.ndarray, gallery: np.ndarray, site_of: Mapping[Any, str]
) -> dict[str, np.ndarray]:
    """Columns of `site_retrieval` for one direction: one entry per query whose patient is in the gallery."""
    place = {patient: at for at, patient in enumerate(gallery.tolist()) if patient in site_of}
    rows = [at for at, patient in enumerate(queries.tolist()) if patient in place]
    kept = np.array(sorted(place.values()), np.int64)
    columns: dict[str, list[float]] = {name: [] for name in ("own", "chance", "hit", "inside", "inside_chance")}
    similarity = unit_rows(u, "queries")[rows] @ unit_rows(v, "gallery")[kept].T if rows else np.zeros((0, 0))
    gallery_sites = np.array([site_of[patient] for patient in gallery[kept].tolist()])
    where = {int(at): k for k, at in enumerate(kept)}
    for row, at in zip(similarity, rows, strict=True):
        patient = queries[at].item() if hasattr(queries[at], "item") else queries[at]
        own, same = where[place[patient]], gallery_sites == site_of[patient]
        first = int(row.argmax())
        columns["own"].append(float(same[first]))
        columns["chance"].append((same.sum() - 1) / max(len(same) - 1, 1))
        columns["hit"].append(float(first == own))
        columns["inside"].append(float(np.flatnonzero(same)[row[same].argmax()] == own))
        columns["inside_chance"].append(1 / same.sum())
    out = {key: np.array(values, np.float64) for key, values in columns.items()}
    return {**out, "who": queries[rows] if rows else np.zeros(0, queries.dtype)}


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else value
