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

With three modalities or more, the directions of all pairs may be estimated together (`joint_directions`). Once the
slide encoder has learned something, its output takes part in those of the slide's pairs that it helps.

What only the arrangement of patches shows is not in the mean features. So the molecular side of a slide's pair has
further columns: what the molecular modalities share with each other beyond the mean features. A column is the same
process of the tumour in all pairs of the slide, so their gradients agree on what the slide encoder has to find. The
slide's side of these columns is 0, except for small random weights of the encoder's output, without which the encoder
would have no gradient at first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from exaonepath.alignment.baselines.cca import (
    FEWEST_TO_CHOOSE,
    Directions,
    Principal,
    choose_directions,
    choose_weights,
    reciprocal_ranks,
)
from exaonepath.alignment.baselines.profiles import Profiles, read_profiles
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.data import TrainingData
from exaonepath.alignment.training.joint_directions import Whitened, beyond, joint_directions
from exaonepath.alignment.training.settings import ModelSettings
from exaonepath.encoders.block import LayerNorm

logger = logging.getLogger(__name__)

# More patients hardly change the directions, and would need more memory than a training step.
_MOST_PATIENTS = 4096
_MOST_VALUES = 1 << 28  # of one modality: 1 GiB
# Shrinkage of the whitening in the linear layers. The projections contain the difference to that of their pair.
_WHITENING = 0.1
# Energy of the further columns of a slide's pair, relative to the shared directions, and their number.
_FURTHER = 0.5
_FURTHER_FACTORS = 8  # the rest hardly holds more than noise
# Norm of the weights of the encoder's output in these columns, relative to that of the weights of the mean features.
_ENCODER = 0.01
# Noise on the inputs in training, relative to the noise that has the same effect on a covariance as its shrinkage.
_NOISE = 0.5
_TINY = 1e-30


class ClosedForm:
    """The linear parts of a model in closed form: all trained pairs, except those without enough patients.

    A pair is left as it is if fewer than two training patients have both modalities, or if its slide encoder has given
    weights or no LayerNorm at its end.

    Attributes:
        noise: modality to the standard deviation of the noise on its standardised inputs that keeps the training from
            memorising its patients, as the shrinkage does here: noise of variance s / (1 - s) has the effect of a
            shrinkage s on a covariance (Bishop 1995). s is the median over the modality's pairs.
    """

    def __init__(
        self,
        model: ExaonePathAlignmentModel,
        data: TrainingData,
        settings: ModelSettings,
        slides: tuple[Profiles, Profiles] | None = None,
    ) -> None:
        """Compute everything; the model is not changed yet.

        Args:
            model: the model on any device. The FFN of its molecular encoders is zero or absent.
            data: training and validation patients.
            settings: settings of the model.
            slides: slide embeddings [n, C + E] of training and validation patients by the model; None: the encoder is
                new, and the mean patch features alone are used.
        """
        self.model = model
        train, validation = chosen_patients(data)
        names = [name for name in model.modalities if name != WSI or _slides_can_start(model, settings)]
        known = {name: read_profiles(data, train, name) for name in names if name != WSI or slides is None}
        held_out = {name: read_profiles(data, validation, name) for name in known}
        if slides is not None and WSI in names:
            known[WSI], held_out[WSI] = slides
        self.axes = {
            name: Principal.of(known[name].values, _room(model, name))
            for name in names
            if len(known[name].patients) > 1
        }
        self.pairs: dict[tuple[str, str], Directions] = {}
        for a, b in model.trained_pairs:
            if a not in self.axes or b not in self.axes:
                continue
            both = Profiles.common(known[a], known[b])
            if len(both[0]) > 1:
                chosen = Profiles.common(held_out[a], held_out[b])
                own = choose_directions(self.axes[a], self.axes[b], both, chosen, model.config.projection_dim)
                self.pairs[a, b] = choose_weights(self.axes[a], self.axes[b], both, chosen, own)
        shrinkages: dict[str, list[float]] = {}
        for pair, directions in self.pairs.items():
            for name, shrinkage in zip(pair, directions.shrinkage, strict=True):
                shrinkages.setdefault(name, []).append(shrinkage)
        middle = {name: median(values) for name, values in shrinkages.items()}
        self.further: dict[str, np.ndarray] = {}
        if self.pairs:
            white = Whitened.of(self.axes, known, list(self.pairs), middle)
            self.pairs, ranks = joint_directions(white, self.axes, held_out, self.pairs, model.config.projection_dim)
            for pair, rank in ranks.items():
                logger.info("%s-%s: %s", *pair, f"{rank} factors of all modalities" if rank else "the pair by itself")
            if WSI in middle and slides is None:
                factors = beyond(white, WSI, middle[WSI], _FURTHER_FACTORS)
                self.further = {name: white.factor[name][:, None] * factor for name, factor in factors.items()}
        self.noise = {
            name: _NOISE * math.sqrt(value / (1 - value) * self.axes[name].scale)
            for name, value in middle.items()
            if name != WSI
        }
        self._sides = {name: _Side(model, name, axes, trained=slides is not None) for name, axes in self.axes.items()}
        self._mean_only: set[tuple[str, str]] = set()
        if slides is not None and WSI in self.axes:
            self._use_mean_features(ClosedForm(model, data, settings), held_out)

    def _use_mean_features(self, start: ClosedForm, held_out: Mapping[str, Profiles]) -> None:
        """Let pairs of the slide use the mean features alone (`start`) if the encoder's output does not clearly help.

        The encoder has seen the training patients, so that its output looks better on them than it is: a pair with a
        noisy modality may get worse by it. Clearly is by more than a standard error, paired over validation patients.
        """
        for pair in [pair for pair in self.pairs if WSI in pair and pair in start.pairs]:
            both = Profiles.common(held_out[pair[0]], held_out[pair[1]])
            gain = self._ranks(pair, both) - start._ranks(pair, both)
            if len(gain) >= FEWEST_TO_CHOOSE and gain.mean() < gain.std() / math.sqrt(len(gain) - 1):
                self.pairs[pair] = start.pairs[pair]
                self._mean_only.add(pair)
        if self._mean_only:
            self._mean_side = _Side(self.model, WSI, start.axes[WSI], trained=True)
            names = ", ".join("-".join(pair) for pair in self._mean_only)
            logger.info("the slide encoder's output does not help %s: mean features alone", names)

    def _ranks(self, pair: tuple[str, str], both: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Reciprocal ranks [n] of patients by their profiles of both modalities."""
        directions = self.pairs[pair]
        coordinates = []
        for name, values, own in zip(pair, both, (directions.left, directions.right), strict=True):
            width = len(self.axes[name].mean)  # a slide embedding begins with the mean features
            coordinates.append(self.axes[name].scores(values[:, :width]) @ own)
        return reciprocal_ranks(*coordinates)

    def apply(self, further: bool = False) -> None:
        """Set the linear layers and the projections of the model, in place.

        Args:
            further: also add the columns that the slide encoder has to learn.
        """
        for side in self._sides.values():
            side.apply()
        for pair, directions in self.pairs.items():
            sides = {**self._sides, WSI: self._mean_side} if pair in self._mean_only else self._sides
            _set_pair(self.model, pair, directions, sides, self.further if further else {})
            logger.info("%s-%s has %d directions in closed form", *pair, len(directions.correlations))


class _Side:
    """Conversion between the principal axes of a modality and the encoder's embedding; sets its linear layer."""

    def __init__(self, model: ExaonePathAlignmentModel, name: str, axes: Principal, *, trained: bool) -> None:
        self.name, self.model = name, model
        rank = axes.axes.shape[1]
        self.linear: tuple[Tensor, Tensor] | None = None
        if name == WSI:
            self.norm = model.slide_encoder.transformer.norm
            self.matrix = torch.from_numpy(axes.axes)  # [C or C + E, r]: from directions to rows of W
            self.mean = torch.from_numpy(axes.mean)
            # The norm's output, divided by its weights, has a constant sum over channels: that of bias / weight.
            scale = self.norm.weight.detach().double().cpu()
            scale = torch.where(scale.abs() > _TINY, scale, _TINY)
            bias = self.norm.bias.detach().double().cpu() if trained else torch.ones_like(scale)
            self.bias = bias
            total = (bias / scale).sum()
            self.constant = (1 / scale / torch.where(total.abs() > _TINY, total, _TINY))[:, None]
            return
        width = model.omics_encoder(name).proj.weight.shape[0]
        scale = torch.from_numpy(axes.whitening(_WHITENING))
        # Orthogonal to the vector of ones, because the encoder's norm subtracts the mean over channels.
        random = torch.randn(width, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rotation = torch.linalg.qr(random - random.mean(0)).Q * math.sqrt(width / rank)  # [E, r], |z| near sqrt(E)
        weight = rotation @ (scale * torch.from_numpy(axes.axes)).T
        self.linear = weight, -weight @ torch.from_numpy(axes.mean)
        self.matrix = rotation / scale * (rank / width)  # [E, r]: its product with z are scores along the axes

    @torch.no_grad()
    def apply(self) -> None:
        """Set the linear layer; of the slide, the bias of the encoder's last norm."""
        if self.linear is None:
            self.norm.bias.copy_(self.bias)
            return
        proj = self.model.omics_encoder(self.name).proj
        proj.weight.copy_(self.linear[0])
        proj.bias.copy_(self.linear[1])

    def projection(self, directions: np.ndarray) -> Tensor:
        """W [E, k] whose product with the embedding are the coordinates along directions [r, k]."""
        rows = self.matrix @ torch.from_numpy(directions)
        if self.name != WSI:
            return rows
        centre = -self.constant * (self.mean @ rows)
        width = len(rows) - len(self.constant)
        if width == self.model.config.widths[WSI] - len(self.constant):  # the encoder's output is part of the profile
            return torch.cat([rows[:width], rows[width:] + centre])
        return torch.cat([rows, centre])

    def random_rows(self, k: int) -> Tensor:
        """W [C + E, k] of the slide for k further directions: random weights of the encoder's output, without its sum.

        They are the same at every call, so in all pairs of the slide. Their norm is 1.
        """
        rows = torch.zeros(len(self.mean) + len(self.constant), k, dtype=torch.float64)
        random = torch.randn(len(self.constant), k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rows[len(self.mean) :] = random - random.mean(0)
        return rows / rows.norm().clamp(min=_TINY)


def _set_pair(
    model: ExaonePathAlignmentModel,
    pair: tuple[str, str],
    found: Directions,
    sides: Mapping[str, _Side],
    further: Mapping[str, np.ndarray],
) -> None:
    """Set W of both sides; `further`: directions [r, k] of molecular modalities for the slide encoder to find."""
    a, b = pair
    for name, other, directions in ((a, b, found.left), (b, a, found.right)):
        weight = model.loss.projections[f"{name}_to_{other}"]
        start = sides[name].projection(directions)
        wide, k = weight.shape[1], directions.shape[1]
        if other == WSI and name in further and wide > k:
            more = sides[name].projection(further[name][:, : wide - k])
            more *= math.sqrt(_FURTHER) * start.norm() / more.norm().clamp(min=_TINY)
            start = torch.cat([start, more], 1)
        elif name == WSI and other in further and wide > k:
            more = sides[WSI].random_rows(further[other][:, : wide - k].shape[1])
            start = torch.cat([start, _ENCODER * start.norm() * more], 1)
        # The scale has no effect on the similarities. It is that of a random start, to which the learning rate fits.
        start *= math.sqrt(wide) / start.norm().clamp(min=_TINY)
        with torch.no_grad():
            weight.zero_()
            weight[:, : start.shape[1]] = start


def _room(model: ExaonePathAlignmentModel, name: str) -> int:
    """Principal axes that fit into an embedding; one dimension is lost to the norm, which subtracts the mean."""
    return model.config.widths[name] if name == WSI else max(1, model.config.widths[name] - 1)


def _slides_can_start(model: ExaonePathAlignmentModel, settings: ModelSettings) -> bool:
    if settings.slide_weights is not None:
        logger.info("the slide encoder has given weights: its projections start random")
        return False
    return isinstance(model.slide_encoder.transformer.norm, LayerNorm)


def chosen_patients(data: TrainingData) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training patients, chosen by the seed, and validation patients: as many as have profiles that fit into memory."""
    patients = data.train
    widest = max((len(scaling.features) for scaling in data.standardizer.scalings.values()), default=1)
    most = max(2, min(_MOST_PATIENTS, _MOST_VALUES // widest))
    held_out = tuple(data.validation[:_MOST_PATIENTS])
    if len(patients) <= most:
        return tuple(patients), held_out
    chosen = np.random.default_rng((data.seed, 1)).choice(len(patients), most, replace=False)
    return tuple(patients[at] for at in np.sort(chosen)), held_out


def zero_ffn(model: ExaonePathAlignmentModel) -> None:
    """Set the last layer of every molecular encoder's FFN to zero: the encoders are linear at first."""
    for name in model.modalities:
        if name != WSI and not (encoder := model.omics_encoder(name)).is_linear:
            nn.init.zeros_(encoder.ffn.w3.weight)
            nn.init.zeros_(encoder.ffn.w3.bias)
