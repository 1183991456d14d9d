"""Simulated tumours: latent programmes per patient, and simulated measurements of molecular assays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OMICS = ("rna", "snp", "cnv", "methylation")
MODALITIES = ("wsi", *OMICS)

_SUBTYPE_SPREAD = 2.5  # distance of subtype centres, in units of the spread inside a subtype
_BLIND = 0.1  # strength of a programme in a modality that hardly shows it
# Share of features that depend on the arrangement of cells, and their effect in units of a programme's effect. It is
# the largest single difference between patients, so that a model benefits from learning it although it is hard to find.
_SPATIAL_SHARE = {"rna": 0.3, "methylation": 0.3}
_SPATIAL_EFFECT = 2.5
# Standard deviation of an assay's error in a patient's programmes. It is common to all features, so no average removes
# it.
_ERROR = {"rna": 0.3, "snp": 0.6, "cnv": 0.6, "methylation": 0.5}
_ARM = 12  # genes of one chromosome arm, gained and lost together


@dataclass(frozen=True)
class Latents:
    """The true properties of every patient.

    Attributes:
        subtype: int64 [P].
        programmes: float64 [P, K], activity of each tumour programme, with a standard deviation near 1.
        spatial: int64 [P], 0 (intermixed) or 1 (nested): arrangement of patch types inside a fragment.
        batch: int64 [P], the centre that measured the patient.
        time: float64 [P], days to death or last visit.
        event: int64 [P], 1 if the patient died.
    """

    subtype: np.ndarray
    programmes: np.ndarray
    spatial: np.ndarray
    batch: np.ndarray
    time: np.ndarray
    event: np.ndarray


def draw_latents(n: int, programmes: int, subtypes: int, batches: int, seed: int) -> Latents:
    """`Latents` of n patients. The programmes depend on the subtype; the spatial state is independent of both."""
    rng = np.random.default_rng([seed, 1])
    subtype = rng.permutation(np.arange(n) % subtypes)
    centres = rng.standard_normal((subtypes, programmes))
    centres *= _SUBTYPE_SPREAD / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-9)
    activity = centres[subtype] + rng.standard_normal((n, programmes))
    # Half of every subtype, so that the subtype has no information about the arrangement.
    spatial = np.zeros(n, np.int64)
    for value in range(subtypes):
        members = rng.permutation(np.flatnonzero(subtype == value))
        spatial[members[: (len(members) + value % 2) // 2]] = 1
    batch = rng.integers(batches, size=n)
    # The first programme and the nested state shorten survival; about a third are alive at their last visit.
    hazard = np.exp(0.9 * activity[:, 0] + 0.7 * (spatial - 0.5))
    death, last_visit = rng.exponential(900 / hazard), rng.exponential(1500, n)
    return Latents(
        subtype, activity, spatial, batch, np.maximum(1.0, np.minimum(death, last_visit)), (death <= last_visit) * 1
    )


def visibility(modality: str, programmes: int) -> np.ndarray:
    """float64 [K]: strength of each programme in a modality.

    Each modality hardly shows every fifth programme, and a different fifth in each. So no single modality has all
    information.
    """
    weights = np.ones(programmes)
    weights[np.arange(programmes) % len(MODALITIES) == MODALITIES.index(modality)] = _BLIND
    return weights


def seen_programmes(latents: Latents, modality: str, gain: float) -> np.ndarray:
    """float64 [P, K]: the programmes as visible in a modality; `gain` is a factor on all of them."""
    return latents.programmes * visibility(modality, latents.programmes.shape[1]) * gain


def measure_modality(
    modality: str, latents: Latents, n_features: int, *, noise: float, gain: float, batch_effect: float, seed: int
) -> np.ndarray:
    """[P, F] of one assay: rna counts int64, snp 0/1 uint8, cnv -2..2 int8, methylation beta values float32.

    Args:
        modality: one of `OMICS`.
        latents: true properties of the patients.
        n_features: F.
        noise: standard deviation of other variation than programmes; the default is 1.
        gain: strength of the programmes; the default is 1.
        batch_effect: standard deviation of each centre's shift per feature, in units of a programme's effect.
        seed: the same arguments give the same values.
    """
    rng = np.random.default_rng([seed, 2, OMICS.index(modality)])
    n, k = latents.programmes.shape
    # A feature depends on about two programmes.
    loadings = rng.standard_normal((k, n_features)) * (rng.random((k, n_features)) < min(1.0, 2 / k))
    if modality == "cnv":
        loadings = np.repeat(loadings[:, ::_ARM], _ARM, axis=1)[:, :n_features]
    error = _ERROR[modality] * noise * rng.standard_normal((n, k))
    signal = (seen_programmes(latents, modality, gain) + error) @ loadings
    answering = rng.random(n_features) < _SPATIAL_SHARE.get(modality, 0.0)
    effect = np.where(rng.random(n_features) < 0.5, -1.0, 1.0) * answering * gain
    signal += _SPATIAL_EFFECT * np.outer(2 * latents.spatial - 1, effect)
    shifts = rng.standard_normal((int(latents.batch.max(initial=0)) + 1, n_features)) * batch_effect
    signal += shifts[latents.batch] + 0.7 * noise * rng.standard_normal((n, n_features))
    if modality == "rna":
        level = rng.normal(np.log(60), 1.0, n_features) + 0.45 * signal
        depth = rng.lognormal(0, 0.3, (n, 1))
        return rng.poisson(np.exp(np.clip(level, -5, 14)) * depth)
    if modality == "snp":
        usual = rng.normal(-2.0, 0.7, n_features)
        return (rng.random((n, n_features)) < 1 / (1 + np.exp(-(usual + 1.2 * signal)))).astype(np.uint8)
    if modality == "cnv":
        return np.clip(np.round(0.9 * signal), -2, 2).astype(np.int8)
    usual = np.where(rng.random(n_features) < 0.5, -1.5, 1.5)
    return (1 / (1 + np.exp(-(usual + 0.8 * signal)))).astype(np.float32)


def draw_availability(n: int, missing: dict[str, float], seed: int) -> np.ndarray:
    """bool [P, 5] in the order of `MODALITIES`: each is missing at its rate, but at least two are available."""
    rng = np.random.default_rng([seed, 3])
    rates = np.array([missing.get(name, 0.0) for name in MODALITIES])
    lead = rng.random((n, len(MODALITIES))) - rates
    best_two = np.argsort(-lead, axis=1)[:, :2]
    available = lead >= 0
    np.put_along_axis(available, best_two, True, axis=1)
    return available
