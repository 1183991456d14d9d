"""Checks of retrieval at validation: bias, memorising, chance, and site; before it, a modality that dominates.

Each returns its warnings, and adds the numbers that it compares to the metrics of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import Estimate
from exaonepath.alignment.metrics.retrieval import (
    PairEmbeddings,
    cross_modal_retrieval,
    rank_queries,
    recall_by_group,
)
from exaonepath.alignment.metrics.site import MOST_EXCESS, site_retrieval
from exaonepath.alignment.training.health import HealthWarning, MonitorSettings
from exaonepath.alignment.training.information import Information


@dataclass(frozen=True)
class Checks:
    """Limits, and the run's metrics, to which checks add their numbers."""

    settings: MonitorSettings
    metrics: dict[str, float]


def check_few(
    checks: Checks, step: int, pairs: Sequence[PairEmbeddings], count: Mapping[Any, int]
) -> list[HealthWarning]:
    """Patients with few modalities are found less often than complete ones, after correction for their pairs."""
    recalls = recall_by_group(pairs, count, recall_at=1)
    for group, value in recalls.items():
        checks.metrics[f"recall@1/{group}_modalities"] = value.recall.value
    # For very few patients, the interval of a bootstrap is too narrow.
    enough = [group for group, value in recalls.items() if value.recall.n >= checks.settings.min_group]
    if len(enough) < 2:
        return []
    fewest, most = min(enough), max(enough)
    low, high = recalls[fewest].excess, recalls[most].excess
    # Only groups whose intervals do not overlap: other differences may be chance.
    if not low.high < high.low:
        return []
    text = (
        f"patients with {fewest} modalities are found less often (recall@1 {recalls[fewest].recall}) than "
        f"those with {most} ({recalls[most].recall}), also after correction for their different pairs: training "
        "favours complete patients"
    )
    return [HealthWarning(step, "few_modalities", f"{fewest} modalities", low.value, high.low, text)]


def check_rare(
    checks: Checks, step: int, pairs: Sequence[PairEmbeddings], present: Sequence[frozenset[str]]
) -> list[HealthWarning]:
    """A modality that few patients have is found less often than the others, relative to chance."""
    gains: dict[str, list[float]] = {}
    for direction, score in cross_modal_retrieval(pairs, recall_at=(1,)).items():
        recall: Estimate = score.recall[1]
        for name in direction.split("->"):
            gains.setdefault(name, []).append(recall.value / score.chance[1])
    if len(gains) < 3:
        return []
    mean = {name: sum(values) / len(values) for name, values in gains.items()}
    found = []
    for name, gain in mean.items():
        presence = sum(name in names for names in present) / len(present)
        checks.metrics[f"recall@1_over_chance/{name}"] = gain
        others = sorted(value for key, value in mean.items() if key != name)
        limit = checks.settings.min_rare_ratio * others[len(others) // 2]
        if presence < checks.settings.rare_presence and gain < limit:
            text = (
                f"{name}, which {presence:.0%} of the patients have, is found {gain:.1f} times chance, the other "
                f"modalities {others[len(others) // 2]:.1f} times: weight its pairs up, or sample its patients more"
            )
            found.append(HealthWarning(step, "rare_modality", name, gain, limit, text))
    return found


def share_found(pairs: Sequence[PairEmbeddings]) -> tuple[float, float, float]:
    """(recall@1, chance, standard deviation of the recall by chance), over all pairs and directions."""
    hits, chance = [], []
    for pair in pairs:
        for u, v, queries, gallery in (
            (pair.u, pair.v, pair.left_patients, pair.right_patients),
            (pair.v, pair.u, pair.right_patients, pair.left_patients),
        ):
            ranks = rank_queries(u, v, queries, gallery, recall_at=(1,))
            hits.append(ranks.hits[1])
            chance.append(ranks.chance[1])
    found, expected = (np.concatenate(x) if x else np.zeros(0) for x in (hits, chance))
    if not len(found):
        return math.nan, math.nan, math.nan
    deviation = float(np.sqrt((expected * (1 - expected)).sum()) / len(found))
    return float(found.mean()), float(expected.mean()), deviation


def check_chance(checks: Checks, step: int, held_out: tuple[float, float, float]) -> list[HealthWarning]:
    """Retrieval over all pairs (`share_found`) is that of a random order."""
    recall, chance, deviation = held_out
    limit = chance + 2 * deviation
    if math.isnan(recall) or recall >= limit:
        return []
    text = (
        f"held-out patients are found as by chance (recall@1 {recall:.3f} over all pairs, chance {chance:.3f}): "
        "the modalities may not belong to the same patients (check ids), or share too little; a higher optimizer.lr "
        "and model.start = cca are the first things to try"
    )
    return [HealthWarning(step, "at_chance", "all pairs", recall, limit, text)]


def check_memorising(
    checks: Checks,
    step: int,
    held_out: tuple[float, float, float],
    training: tuple[float, float, float],
    start: float | None,
) -> list[HealthWarning]:
    """Training patients are found, and as many held-out ones hardly (`share_found` of both).

    After a start in closed form (`start`: what it finds), weak signals are no fault of the training: only what the
    training lost is.
    """
    known, recall = training[0], held_out[0]
    if math.isnan(known) or math.isnan(recall):
        return []
    checks.metrics["recall@1/train"] = known
    limit = checks.settings.max_memorised_ratio * known
    if start is not None:
        limit = min(limit, checks.settings.max_lost_ratio * start)
    if known < checks.settings.memorised or recall >= limit:
        return []
    text = (
        f"{known:.0%} of the training patients are found, and {recall:.0%} of as many held-out ones (recall@1 over all "
        "pairs): the encoders memorise; model.preset = small, larger batches, and input noise help"
    )
    return [HealthWarning(step, "memorising", "all pairs", recall, limit, text)]


def check_information(checks: Checks, step: int, information: Mapping[str, Information]) -> list[HealthWarning]:
    """Without one modality, the others hardly tell patients apart (`measure_information`); if it hardly does so itself
    without one of them, both are named."""
    for name, found in information.items():
        checks.metrics[f"information/{name}"] = found.own
        checks.metrics[f"information_without/{name}"] = found.others
    if not information:
        return []
    # Next to a dominant modality, a second one may also be far above the others: the one without which least is left.
    name = min(information, key=lambda key: information[key].others)
    found = information[name]
    limit = checks.settings.max_information_ratio * max(found.others, 0.0)
    # Five errors, because the largest of several differences is compared.
    clear = found.own - found.others > 5 * found.error
    if found.own <= limit or found.own < checks.settings.min_information or not clear:
        return []
    text = (
        f"without {name}, the other modalities hardly tell patients of a site apart (own row ahead in "
        f"{0.5 + found.others:.0%} of the comparisons; {0.5 + found.own:.0%} for {name} with the others)"
    )
    # If two modalities only tell about each other, little is left without either, and chance decides between them.
    if found.least - max(found.others, 0.0) > 4 * found.error:
        text += ": it dominates by its information, and the other modalities can learn little from each other"
        return [HealthWarning(step, "dominant_information", name, found.own, limit, text)]
    first, second = sorted((name, found.partner))
    text += (
        f", and {name} hardly does without {found.partner} ({0.5 + found.least:.0%}): these two tell about each other, "
        "and the other modalities can learn little"
    )
    return [HealthWarning(step, "dominant_information", f"{first} and {second}", found.own, limit, text)]


def check_site(
    checks: Checks, step: int, pairs: Sequence[PairEmbeddings], sites: Mapping[Any, str]
) -> list[HealthWarning]:
    """Nearly all wrong answers are patients of the query's own site."""
    by_site = site_retrieval(pairs, sites) if sites else None
    if by_site is None:
        return []
    checks.metrics["wrong_from_own_site"] = by_site.wrong_from_own_site.value
    if not by_site.is_suspicious:
        return []
    return [HealthWarning(step, "site", "all pairs", by_site.excess, MOST_EXCESS, by_site.advice())]
