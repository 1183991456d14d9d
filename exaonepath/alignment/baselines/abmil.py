"""Attention-based multiple instance learning on patch features, the usual supervised baseline on slides.

Gated attention (Ilse et al. 2018, arXiv 1802.04712): a patch gets a weight from its features, and a linear classifier
reads the weighted mean of the slide. It is trained end to end on the labels, unlike probes of frozen embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exaonepath.alignment.baselines.bags import Bag
from exaonepath.errors import SettingsError


@dataclass(frozen=True)
class AbmilSettings:
    """Settings of the training.

    Attributes:
        hidden: width of the hidden layers. dropout: on the patches' hidden layer.
        lr, weight_decay: of AdamW, with a cosine decay. epochs: most passes; the best one on validation patients is
            kept.
        batch_size: patients of a step.
        patches: largest number of patches of a slide in a step, at random; evaluation uses all.
        seed: seed of weights, order and patches.
    """

    hidden: int = 128
    dropout: float = 0.25
    lr: float = 5e-4
    weight_decay: float = 1e-2
    epochs: int = 40
    batch_size: int = 16
    patches: int = 1024
    seed: int = 0


class GatedAttention(nn.Module):
    """Class scores [K] of one bag of patches [N, C]."""

    def __init__(self, width: int, classes: int, settings: AbmilSettings) -> None:
        super().__init__()
        hidden = settings.hidden
        self.embed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(settings.dropout)
        )
        self.value, self.gate, self.weight = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.classify = nn.Linear(hidden, classes)

    def forward(self, bag: Tensor) -> Tensor:
        """[N, C] to [K]."""
        h = self.embed(bag)
        share = self.weight(torch.tanh(self.value(h)) * torch.sigmoid(self.gate(h))).softmax(0)
        out: Tensor = self.classify((share * h).sum(0))
        return out


def fit_abmil(
    bags: Sequence[Bag],
    labels: np.ndarray,
    validation: tuple[Sequence[Bag], np.ndarray] | None,
    classes: int,
    settings: AbmilSettings | None = None,
) -> Callable[[Sequence[Bag]], np.ndarray]:
    """A function from bags of patches to class probabilities [m, K].

    Args:
        bags: patch features [N, C] of each training patient (of all slides together).
        labels: int64 [n], 0 .. classes - 1.
        validation: bags and labels that choose the epoch; None: the last one.
        classes: K.
        settings: settings of the training.

    Raises:
        SettingsError: there is no training patient, or a bag is empty.
    """
    settings = settings or AbmilSettings()
    if not len(bags) or any(not len(bag) for bag in (*bags, *(validation[0] if validation else ()))):
        raise SettingsError("attention MIL needs training patients, each with at least one patch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GatedAttention(bags[0][:1].shape[1], classes, settings)
        # Rare classes count as much as frequent ones, as in the linear probes.
        weight = torch.from_numpy(len(labels) / np.maximum(np.bincount(labels, minlength=classes), 1)).float()
        optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
        rng = np.random.default_rng(settings.seed)
        best, kept = -np.inf, copy.deepcopy(model.state_dict())
        for _ in range(settings.epochs):
            model.train()
            order = rng.permutation(len(bags))
            for start in range(0, len(order), settings.batch_size):
                rows = order[start : start + settings.batch_size]
                scores = torch.stack([model(_some(bags[row], settings.patches, rng)) for row in rows])
                loss = F.cross_entropy(scores, torch.from_numpy(labels[rows]), weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            if validation is not None:
                quality = -_loss(_probabilities(model, validation[0]), validation[1], weight.numpy())
                if quality > best:
                    best, kept = quality, copy.deepcopy(model.state_dict())
        if validation is not None:
            model.load_state_dict(kept)
    return lambda rows: _probabilities(model, rows)


@torch.no_grad()
def _probabilities(model: GatedAttention, bags: Sequence[Bag]) -> np.ndarray:
    model.eval()
    scores = torch.stack([model(torch.from_numpy(np.asarray(bag[:], np.float32))) for bag in bags])
    return np.asarray(scores.softmax(1).double().numpy())


def _loss(probability: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> float:
    own = np.log(np.maximum(probability[np.arange(len(labels)), labels], 1e-12))
    return float(-(own * weight[labels]).sum() / weight[labels].sum())


def _some(bag: Bag, most: int, rng: np.random.Generator) -> Tensor:
    rows = bag[:] if len(bag) <= most else bag[np.sort(rng.choice(len(bag), most, replace=False))]
    return torch.from_numpy(np.asarray(rows, np.float32))
