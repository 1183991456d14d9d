"""How much each modality tells about patients, and how much is left without it, before a training.

If one modality shows strongly what the others show weakly, all pairs with it look healthy, and the others hardly learn
from each other. This is a property of the data, so it is measured on them: regularised canonical correlation analysis
of each modality with all others together, cross-validated within the training patients. Differences between sites are
removed first, because weak signals would be lost behind them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exaonepath.alignment.baselines.cca import Principal
from exaonepath.alignment.baselines.profiles import Profiles, read_profiles
from exaonepath.alignment.metrics.retrieval import unit_rows
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.training.data import TrainingData
from exaonepath.errors import SettingsError

# Enough for a standard error of about 0.012. Only few patients' slides are read, as this is done before the training.
_MOST_PATIENTS = 600
_MOST_PATCHES = 1 << 21
_MOST_VALUES = 1 << 27  # of one modality: 1 GiB in float64
_FEWEST_PATIENTS = 50
_FOLDS = 5
# A strong shrinkage finds weak signals best. Of 16 cohorts of the generator with a dominance of 8, the check finds the
# dominant modality in all with 0.7 or 0.8, in 15 with 0.9, in 14 with 0.5, and in none with 0.2.
_SHRINKAGE = 0.8
_AXES, _DIRECTIONS = 128, 32
_FEWEST_OF_SITE = 10


@dataclass(frozen=True)
class Information:
    """What a modality tells about patients.

    The number is how often a patient's own row is more similar than that of another patient of the same site, less one
    half: 0 is chance, 0.5 is perfect.

    Attributes:
        own: of the modality with the others, mean over leaving out one of them.
        others: of each other modality with the others, without this one, mean over them.
        error: standard error of own - others, over patients.
        partner: that one of the others without which the modality tells least. least: what it tells without it.
    """

    own: float
    others: float
    error: float
    partner: str
    least: float


def read_for_information(data: TrainingData) -> dict[str, Profiles]:
    """Profiles of some training patients, chosen by the seed, for `measure_information`.

    Slides are those of fewer of these patients if they are large, and profiles those of fewer if they are wide.

    Raises:
        DataFileError: a features file cannot be read.
    """
    order = np.random.default_rng((data.seed, 3)).permutation(len(data.train))
    widest = max((len(scaling.features) for scaling in data.standardizer.scalings.values()), default=1)
    chosen = [data.train[at] for at in order[: max(_FEWEST_PATIENTS, min(_MOST_PATIENTS, _MOST_VALUES // widest))]]
    patches: dict[str, int] = {}
    for slide in data.cohort.slides.slides:
        patches[slide.patient] = patches.get(slide.patient, 0) + slide.n_patches
    number = np.cumsum([patient in patches for patient in chosen])
    read = np.cumsum([patches.get(patient, 0) for patient in chosen])
    few = (read <= _MOST_PATCHES) | (number <= _FEWEST_PATIENTS)  # fewer could not be compared
    with_slides = [patient for patient, flag in zip(chosen, few.tolist(), strict=True) if flag]
    return {name: read_profiles(data, with_slides if name == WSI else chosen, name) for name in data.modalities}


def measure_information(profiles: Mapping[str, Profiles], sites: Mapping[str, str]) -> dict[str, Information]:
    """Modality to what it tells about patients.

    Args:
        profiles: modality to profiles. Modalities of fewer than 50 patients are left out.
        sites: patient to site; patients without one count as one site.

    Returns:
        Nothing for fewer than three modalities: nothing is left without one of two.
    """
    profiles = {name: found for name, found in profiles.items() if len(found.patients) >= _FEWEST_PATIENTS}
    if len(profiles) < 3:
        return {}
    patients = sorted({patient for found in profiles.values() for patient in found.patients})
    place = {patient: at for at, patient in enumerate(patients)}
    rows = {name: np.array([place[p] for p in found.patients]) for name, found in profiles.items()}
    site = np.unique([sites.get(patient, "") for patient in patients], return_inverse=True)[1]
    fold = np.random.default_rng(0).permutation(len(patients)) % _FOLDS
    # What a modality tells with all others except a second one, so that own and others have as many partners.
    scores_of = {pair: np.full(len(patients), np.nan) for pair in itertools.permutations(profiles, 2)}
    for number in range(_FOLDS):
        inside = fold != number
        white = {name: _whitened(found.values, rows[name], site, inside) for name, found in profiles.items()}
        for (name, without), found in scores_of.items():
            _score_held_out(
                white[name], [white[other] for other in white if other not in (name, without)], inside, site, found
            )
    out = {}
    for name in profiles:
        own = _mean_over([scores_of[name, without] for without in profiles if without != name])
        others = _mean_over([scores_of[other, name] for other in profiles if other != name])
        known = np.isfinite(own) & np.isfinite(others)
        if known.sum() > 1:
            error = float((own - others)[known].std() / math.sqrt(known.sum()))
            least, partner = min((_mean(scores_of[name, without]), without) for without in profiles if without != name)
            out[name] = Information(float(own[known].mean()), float(others[known].mean()), error, partner, least)
    return out


def _mean_over(values: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of each patient, over what is known."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    return np.where(known, stacked, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def _mean(values: np.ndarray) -> float:
    """Of what is known; infinite if nothing is, which is not the least."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.inf


@dataclass(frozen=True)
class _White:
    """Whitened scores [patients, r] along principal axes, 0 without the modality; whether each patient has it."""

    scores: np.ndarray
    has: np.ndarray


def _whitened(values: np.ndarray, rows: np.ndarray, site: np.ndarray, inside: np.ndarray) -> _White:
    """Fitted on the patients `inside`; the mean of each site of enough patients is subtracted."""
    centred, used, of = values.astype(np.float64), inside[rows], site[rows]
    scores, has = np.zeros((len(site), 1)), np.zeros(len(site), bool)
    large = [number for number in np.unique(of) if (used & (of == number)).sum() >= _FEWEST_OF_SITE]
    for members in [of == number for number in large] + [~np.isin(of, large)]:
        if (members & used).any():
            centred[members] -= centred[members & used].mean(0)
    try:
        axes = Principal.of(centred[used], _AXES)
    except SettingsError:  # too few patients, or no difference between them but rounding errors
        return _White(scores, has)
    scores = np.zeros((len(site), axes.axes.shape[1]))
    scores[rows] = axes.scores(centred) * axes.whitening(_SHRINKAGE)
    has[rows] = True
    return _White(scores, has)


def _score_held_out(
    one: _White, others: Sequence[_White], inside: np.ndarray, site: np.ndarray, found: np.ndarray
) -> None:
    """Set `found` [patients] for the patients who are not inside and have the modality and one of the others."""
    scores = np.concatenate([other.scores for other in others], 1)
    has = one.has & np.any([other.has for other in others], axis=0)
    used, asked = np.flatnonzero(has & inside), np.flatnonzero(has & ~inside)
    if len(used) < 2 or len(asked) < 2:
        return
    u, s, vt = np.linalg.svd(one.scores[used].T @ scores[used] / len(used), full_matrices=False)
    u, s, vt = u[:, :_DIRECTIONS], s[:_DIRECTIONS], vt[:_DIRECTIONS]
    left, right = one.scores[asked] @ (u * s), scores[asked] @ (vt.T * s)
    similarity = unit_rows(left, "patients") @ unit_rows(right, "patients").T
    same = site[asked][:, None] == site[asked]
    np.fill_diagonal(same, False)
    compared = same.sum(1)
    better = np.zeros(len(asked))
    for matrix in (similarity, similarity.T):
        own = np.diag(matrix)[:, None]
        better += ((own > matrix) & same).sum(1) / 2 + ((own == matrix) & same).sum(1) / 4
    found[asked[compared > 0]] = (better / np.maximum(compared, 1))[compared > 0] - 0.5
