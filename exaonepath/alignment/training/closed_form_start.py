"""A closed-form start of the linear parts: the encoders' linear layers whiten, the projections hold shared directions.

For a pair (i, j), canonical correlation analysis gives directions in the principal axes of each modality
(`baselines.cca`). The linear layer of a molecular encoder computes the whitened principal axes, which all pairs of the
modality share, and W_ij the directions of the pair. So the model starts with the cosine similarities of the analysis,
up to rounding, if its FFN adds nothing (`ffn_ratio` 0, or a last layer of zeros). Only training patients are used;
validation patients choose the shrinkage of the covariances.

The slide's embedding is the mean of its patch features, followed by the encoder's output, so W_ij of the slide has the
directions in its rows for the mean features. These have to be centred, but a projection has no bias. The encoder's
output has a mean of zero over its channels, because of the last LayerNorm: with a bias of 1 there, its sum is a
constant, and the rows for the encoder's output, all equal, subtract the mean.

What only the arrangement of patches shows is not in the mean features. So the molecular side of a slide's pair has
further columns, with the directions that it shares with the other molecular modalities; those of the slide are 0
there, and the slide encoder learns them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from exaonepath.alignment.baselines.cca import Directions, Principal, choose_directions, choose_weights
from exaonepath.alignment.baselines.profiles import Profiles, read_profiles
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.data import TrainingData
from exaonepath.alignment.training.settings import ModelSettings
from exaonepath.encoders.block import LayerNorm

logger = logging.getLogger(__name__)

# More patients hardly change the directions, and would need more memory than a training step.
_MOST_PATIENTS = 4096
_MOST_VALUES = 1 << 28  # of one modality: 1 GiB
# Shrinkage of the whitening in the linear layers. The projections contain the difference to that of their pair.
_WHITENING = 0.1
# Energy of the further columns of a slide's pair, relative to the shared directions.
_FURTHER = 0.5
_MOST_FURTHER = 8  # of each other modality; the rest hardly holds more than noise
# Noise on the inputs in training, relative to the noise that has the same effect on a covariance as its shrinkage.
_NOISE = 0.5
_TINY = 1e-30


def start_in_closed_form(
    model: ExaonePathAlignmentModel, data: TrainingData, settings: ModelSettings
) -> dict[str, float]:
    """Set the linear layers and the projections of all trained pairs, in place.

    A pair is left as it is if fewer than two training patients have both modalities, or if its slide encoder has given
    weights or no LayerNorm at its end.

    Args:
        model: a new model on any device, of which the FFN of linear starts is zero or absent.
        data: training and validation patients.
        settings: settings of the model.

    Returns:
        Modality to the standard deviation of the noise on its standardised inputs that keeps the training from
        memorising its patients, as the shrinkage does in the closed form: noise of variance s / (1 - s) has the effect
        of a shrinkage s on a covariance (Bishop 1995). The median over the modality's pairs is used.
    """
    train, validation = _limited(data, data.train), data.validation[:_MOST_PATIENTS]
    names = [name for name in model.modalities if name != WSI or _slides_can_start(model, settings)]
    known = {name: read_profiles(data, train, name) for name in names}
    held_out = {name: read_profiles(data, validation, name) for name in names}
    axes = {
        name: Principal.of(profiles.values, _room(model, name))
        for name, profiles in known.items()
        if len(profiles.patients) > 1
    }
    sides = {name: _Side(model, name, found) for name, found in axes.items()}
    shrinkages: dict[str, list[float]] = {}
    shared: dict[str, list[np.ndarray]] = {}  # directions of a modality that it shares with other molecular ones
    for a, b in sorted(model.trained_pairs, key=lambda pair: WSI in pair):  # those of the slide use the others
        if a not in sides or b not in sides:
            continue
        both = Profiles.common(known[a], known[b])
        if len(both[0]) < 2:
            continue
        chosen = Profiles.common(held_out[a], held_out[b])
        found = choose_directions(axes[a], axes[b], both, chosen, model.config.projection_dim)
        found = choose_weights(axes[a], axes[b], both, chosen, found)
        if WSI not in (a, b):
            shared.setdefault(a, []).append(found.left)
            shared.setdefault(b, []).append(found.right)
        _set_pair(model, (a, b), found, sides, shared)
        for name, shrinkage in zip((a, b), found.shrinkage, strict=True):
            shrinkages.setdefault(name, []).append(shrinkage)
        logger.info("%s-%s starts with %d directions, shrinkage %s", a, b, len(found.correlations), found.shrinkage)
    return {
        name: _NOISE * math.sqrt(median(values) / (1 - median(values)) * axes[name].scale)
        for name, values in shrinkages.items()
        if name != WSI
    }


class _Side:
    """Conversion between the principal axes of a modality and the encoder's embedding; sets its linear layer."""

    def __init__(self, model: ExaonePathAlignmentModel, name: str, axes: Principal) -> None:
        self.name = name
        rank = axes.axes.shape[1]
        if name == WSI:
            self.matrix = torch.from_numpy(axes.axes)  # [C, r]: from directions to rows of W
            self.mean = torch.from_numpy(axes.mean)
            width = model.config.widths[WSI] - len(axes.mean)
            norm = model.slide_encoder.transformer.norm
            with torch.no_grad():
                norm.bias.fill_(1.0)
            # A sum over channels that are all 1 at the start.
            self.constant = torch.full((width, 1), 1 / width, dtype=torch.float64)
            return
        encoder = model.omics_encoder(name)
        width = encoder.proj.weight.shape[0]
        scale = torch.from_numpy(axes.whitening(_WHITENING))
        # Orthogonal to the vector of ones, because the encoder's norm subtracts the mean over channels.
        random = torch.randn(width, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rotation = torch.linalg.qr(random - random.mean(0)).Q * math.sqrt(width / rank)  # [E, r], |z| near sqrt(E)
        weight = rotation @ (scale * torch.from_numpy(axes.axes)).T
        with torch.no_grad():
            encoder.proj.weight.copy_(weight)
            encoder.proj.bias.copy_(-weight @ torch.from_numpy(axes.mean))
        self.matrix = rotation / scale * (rank / width)  # [E, r]: its product with z are scores along the axes

    def projection(self, directions: np.ndarray) -> Tensor:
        """W [E, k] whose product with the embedding are the coordinates along directions [r, k]."""
        rows = self.matrix @ torch.from_numpy(directions)
        if self.name != WSI:
            return rows
        return torch.cat([rows, -self.constant * (self.mean @ rows)])


def _set_pair(
    model: ExaonePathAlignmentModel,
    pair: tuple[str, str],
    found: Directions,
    sides: Mapping[str, _Side],
    shared: Mapping[str, Sequence[np.ndarray]],
) -> None:
    a, b = pair
    for name, other, directions in ((a, b, found.left), (b, a, found.right)):
        weight = model.loss.projections[f"{name}_to_{other}"]
        start = sides[name].projection(directions)
        wide, k = weight.shape[1], directions.shape[1]
        if other == WSI and name in shared and wide > k:
            each = min(_MOST_FURTHER, -(-(wide - k) // len(shared[name])))
            further = sides[name].projection(np.concatenate([_equal(found[:, :each]) for found in shared[name]], 1))
            further = further[:, : wide - k]
            further *= math.sqrt(_FURTHER) * start.norm() / further.norm().clamp(min=_TINY)
            start = torch.cat([start, further], 1)
        # The scale has no effect on the similarities. It is that of a random start, to which the learning rate fits.
        start *= math.sqrt(wide) / start.norm().clamp(min=_TINY)
        with torch.no_grad():
            weight.zero_()
            weight[:, : start.shape[1]] = start


def _equal(directions: np.ndarray) -> np.ndarray:
    """Directions with the same energy for each other modality."""
    return np.asarray(directions / max(float(np.linalg.norm(directions)), _TINY))


def _room(model: ExaonePathAlignmentModel, name: str) -> int:
    """Principal axes that fit into an embedding; one dimension is lost to the norm, which subtracts the mean."""
    return model.config.widths[name] if name == WSI else max(1, model.config.widths[name] - 1)


def _slides_can_start(model: ExaonePathAlignmentModel, settings: ModelSettings) -> bool:
    if settings.slide_weights is not None:
        logger.info("the slide encoder has given weights: its projections start random")
        return False
    return isinstance(model.slide_encoder.transformer.norm, LayerNorm)


def _limited(data: TrainingData, patients: Sequence[str]) -> tuple[str, ...]:
    """Some training patients, chosen by the seed, so that their profiles fit into memory."""
    widest = max((len(scaling.features) for scaling in data.standardizer.scalings.values()), default=1)
    most = max(2, min(_MOST_PATIENTS, _MOST_VALUES // widest))
    if len(patients) <= most:
        return tuple(patients)
    chosen = np.random.default_rng((data.seed, 1)).choice(len(patients), most, replace=False)
    return tuple(patients[at] for at in np.sort(chosen))


def zero_ffn(model: ExaonePathAlignmentModel) -> None:
    """Set the last layer of every molecular encoder's FFN to zero: the encoders are linear at first."""
    for name in model.modalities:
        if name != WSI and not (encoder := model.omics_encoder(name)).is_linear:
            nn.init.zeros_(encoder.ffn.w3.weight)
            nn.init.zeros_(encoder.ffn.w3.bias)
