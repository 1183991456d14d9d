"""Monitors of the training that detect failures which a decreasing loss can hide.

The training loop passes embeddings, their gradients and the losses of pairs to `HealthMonitors`; at validation also the
retrieval pairs and a slide. The monitors keep running means, and return a `HealthWarning` if a limit is exceeded: an
embedding collapses, one modality or pair dominates, retrieval is worse for patients with few modalities or with a rare
modality, or attention crosses tissue fragments. They never change the training. Their state is plain JSON, so that a
resumed run logs the same warnings as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from exaonepath.alignment.metrics.geometry import effective_rank, uniformity
from exaonepath.alignment.metrics.intervals import Estimate
from exaonepath.alignment.metrics.retrieval import PairEmbeddings, cross_modal_retrieval, recall_by_group
from exaonepath.encoders.leakage import fragment_leakage
from exaonepath.errors import SettingsError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitorSettings:
    """Limits of the warnings.

    Attributes:
        smoothing: weight of the past in the running means of shares (so that one batch alone causes no warning).
        warmup: number of observations before shares are checked.
        min_effective_rank: smallest number of directions of an embedding; below it, the embedding has collapsed.
        max_uniformity: largest uniformity of an embedding; 0 is one point, -4 the whole sphere.
        max_modality_share: largest share of the gradient for one modality, if at least three have a gradient.
        max_pair_ratio: largest ratio of a pair's share of the loss to 1 / pairs (never above `max_pair_share`).
        max_pair_share: largest share of the loss for one pair, if at least three pairs have a loss.
        min_group: smallest number of patients with the same number of modalities, for a comparison.
        rare_presence: a modality is rare if a smaller share of patients has it.
        min_rare_ratio: smallest ratio of retrieval with a rare modality to that of the others, both relative to chance.
        repeat_after: number of observations after which a warning that is still true is repeated.
    """

    smoothing: float = 0.9
    warmup: int = 5
    min_effective_rank: float = 2.0
    max_uniformity: float = -0.1
    max_modality_share: float = 0.75
    max_pair_ratio: float = 4.0
    max_pair_share: float = 0.9
    min_group: int = 15
    rare_presence: float = 0.5
    min_rare_ratio: float = 0.5
    repeat_after: int = 100

    def __post_init__(self) -> None:
        for name in ("smoothing", "max_modality_share", "max_pair_share", "rare_presence", "min_rare_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.warmup < 0 or self.repeat_after < 1:
            raise SettingsError("warmup must be 0 or more, repeat_after 1 or more")


@dataclass(frozen=True)
class HealthWarning:
    """One finding.

    Attributes:
        step: training step.
        check: "collapse", "dominant_modality", "dominant_pair", "few_modalities", "rare_modality" or "leakage".
        subject: the affected modality, pair, group or block.
        value, limit: the measured value, and the limit that it exceeds.
        message: one line for the user, with advice.
    """

    step: int
    check: str
    subject: str
    value: float
    limit: float
    message: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class HealthMonitors:
    """Monitors of one training run; see the module's description.

    The training loop calls `observe` for training steps, and `observe_retrieval` and `observe_leakage` at validation.
    Each returns the new warnings, which are also logged. `metrics()` returns the latest numbers by name, for the run's
    log.
    """

    def __init__(self, settings: MonitorSettings | None = None) -> None:
        self.settings = settings or MonitorSettings()
        self._shares: dict[str, dict[str, float]] = {"gradient": {}, "loss": {}}
        self._observed = 0
        self._last_logged: dict[str, int] = {}
        self._metrics: dict[str, float] = {}

    def observe(
        self,
        step: int,
        embeddings: Mapping[str, Tensor],
        *,
        availability: Mapping[str, Tensor] | None = None,
        pair_losses: Mapping[tuple[str, str], float | Tensor] | None = None,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> list[HealthWarning]:
        """Check one batch.

        Args:
            step: training step.
            embeddings: modality -> [B, E], the inputs of the loss.
            availability: modality -> bool [B], rows to check; None, or a missing modality: all rows.
            pair_losses: (modality, modality) -> loss of the pair; a pair without a positive must be missing or NaN.
            gradients: modality -> [B, E], gradient of the loss with respect to `embeddings`.

        Returns:
            New warnings.
        """
        self._observed += 1
        found: list[HealthWarning] = []
        pull: dict[str, float] = {}
        for name, embedding in embeddings.items():
            available = None if availability is None else availability.get(name)
            rows = _rows(embedding, available)
            found += self._check_collapse(step, name, rows)
            if gradients is not None and gradients.get(name) is not None and len(rows):
                pull[name] = _pull(rows, _rows(gradients[name], available))
        if pull:
            found += self._check_shares(step, "gradient", pull)
        losses = {" x ".join(pair): float(value) for pair, value in (pair_losses or {}).items()}
        losses = {pair: value for pair, value in losses.items() if math.isfinite(value)}
        if losses:
            found += self._check_shares(step, "loss", losses)
        return self._log_new(found)

    def observe_retrieval(
        self, step: int, pairs: Sequence[PairEmbeddings], modalities: Mapping[Any, Iterable[str]]
    ) -> list[HealthWarning]:
        """Check whether retrieval on held-out patients is worse for few modalities, or for a rare modality.

        Args:
            step: training step.
            pairs: pairs of modalities, as for `cross_modal_retrieval`.
            modalities: patient -> available modalities.
        """
        present = {patient: frozenset(names) for patient, names in modalities.items()}
        if not present or not pairs:
            return []
        found = self._check_few(step, pairs, {patient: len(names) for patient, names in present.items()})
        found += self._check_rare(step, pairs, list(present.values()))
        return self._log_new(found)

    def observe_leakage(
        self, step: int, encoder: Any, features: Tensor, coords: Tensor, contour_index: Tensor
    ) -> list[HealthWarning]:
        """Check whether information passes between fragments of one slide [N, C], [N, 2], [N] in a RoPE block.

        A slide with one fragment is skipped.
        """
        if len(contour_index.unique()) < 2:
            return []
        leaks = fragment_leakage(encoder, features, coords, contour_index)
        self._metrics["leakage"] = max((leak.change for leak in leaks), default=0.0)
        found = [
            HealthWarning(
                step,
                "leakage",
                f"block {leak.block}",
                leak.change,
                0.0,
                f"RoPE block {leak.block}: changing fragment {leak.fragment} alone changed {leak.tokens} tokens of "
                f"others by up to {leak.change:.3g}: attention crosses fragments; check contour_index and backend",
            )
            for leak in leaks
            if leak.change > 0 or math.isnan(leak.change)
        ]
        return self._log_new(found)

    def metrics(self) -> dict[str, float]:
        """The latest numbers: effective_rank/<modality>, uniformity/<modality>, gradient_share/<modality>, ..."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run, in plain JSON types."""
        return {
            "settings": asdict(self.settings),
            "shares": {kind: dict(shares) for kind, shares in self._shares.items()},
            "observed": self._observed,
            "last_told": dict(self._last_logged),  # the key of existing checkpoints
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict()`; the settings of this object are kept."""
        self._shares = {kind: dict(state["shares"].get(kind, {})) for kind in self._shares}
        self._observed = int(state["observed"])
        self._last_logged = {key: int(value) for key, value in state["last_told"].items()}
        self._metrics = {key: float(value) for key, value in state["metrics"].items()}

    def _check_collapse(self, step: int, name: str, rows: Tensor) -> list[HealthWarning]:
        # n rows have at most n directions, also without a collapse.
        if len(rows) < 2 * self.settings.min_effective_rank:
            return []
        rank, spread = effective_rank(rows), uniformity(rows)
        self._metrics[f"effective_rank/{name}"] = rank
        self._metrics[f"uniformity/{name}"] = spread
        found = []
        # A comparison with NaN is false, and `not` makes it a warning.
        if not rank >= self.settings.min_effective_rank:
            text = (
                f"embedding of {name} uses {rank:.2f} directions for {len(rows)} rows: it collapsed; a smaller "
                "learning rate, a larger batch, or the loss's pos_weight are the first things to try"
            )
            found.append(HealthWarning(step, "collapse", name, rank, self.settings.min_effective_rank, text))
        elif not spread <= self.settings.max_uniformity:
            text = f"embedding of {name} is nearly one point (uniformity {spread:.3f}; 0 is a point): it is collapsing"
            found.append(HealthWarning(step, "collapse", name, spread, self.settings.max_uniformity, text))
        return found

    def _check_shares(self, step: int, kind: str, amounts: Mapping[str, float]) -> list[HealthWarning]:
        total = sum(amounts.values())
        if not (math.isfinite(total) and total > 0):
            return []
        running = self._shares[kind]
        for name, amount in amounts.items():
            keep = self.settings.smoothing if name in running else 0.0
            running[name] = keep * running.get(name, 0.0) + (1 - keep) * amount / total
            self._metrics[f"{kind}_share/{name}"] = running[name]
        if len(running) < 3 or self._observed <= self.settings.warmup:
            return []
        name = max(running, key=lambda key: running[key])
        share = running[name] / sum(running.values())
        if kind == "gradient":
            check, limit = "dominant_modality", self.settings.max_modality_share
            text = f"{name} receives {share:.0%} of the gradient: it dominates, and the other modalities hardly train"
        else:
            fair = self.settings.max_pair_ratio / len(running)
            check, limit = "dominant_pair", min(fair, self.settings.max_pair_share)
            text = f"{name} makes up {share:.0%} of the loss over {len(running)} pairs; consider pair weights"
        return [HealthWarning(step, check, name, share, limit, text)] if share > limit else []

    def _check_few(self, step: int, pairs: Sequence[PairEmbeddings], count: Mapping[Any, int]) -> list[HealthWarning]:
        recalls = recall_by_group(pairs, count, recall_at=1)
        for group, value in recalls.items():
            self._metrics[f"recall@1/{group}_modalities"] = value.recall.value
        # For very few patients, the interval of a bootstrap is too narrow.
        enough = [group for group, value in recalls.items() if value.recall.n >= self.settings.min_group]
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

    def _check_rare(
        self, step: int, pairs: Sequence[PairEmbeddings], present: Sequence[frozenset[str]]
    ) -> list[HealthWarning]:
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
            self._metrics[f"recall@1_over_chance/{name}"] = gain
            others = sorted(value for key, value in mean.items() if key != name)
            limit = self.settings.min_rare_ratio * others[len(others) // 2]
            if presence < self.settings.rare_presence and gain < limit:
                text = (
                    f"{name}, which {presence:.0%} of the patients have, is found {gain:.1f} times chance, the other "
                    f"modalities {others[len(others) // 2]:.1f} times: weight its pairs up, or sample its patients more"
                )
                found.append(HealthWarning(step, "rare_modality", name, gain, limit, text))
        return found

    def _log_new(self, found: Iterable[HealthWarning]) -> list[HealthWarning]:
        new = []
        for warning in found:
            key = f"{warning.check}/{warning.subject}"
            last = self._last_logged.get(key)
            if last is None or self._observed - last >= self.settings.repeat_after:
                self._last_logged[key] = self._observed
                logger.warning("step %d: %s", warning.step, warning.message)
                new.append(warning)
        return new


def monitor_settings(values: Mapping[str, Any]) -> MonitorSettings:
    """Settings from a table of a config; raises `SettingsError` for an unknown key."""
    known = {field.name for field in fields(MonitorSettings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingsError(f"unknown monitor settings {unknown}; known are {sorted(known)}")
    return MonitorSettings(**values)


def _rows(values: Tensor, available: Tensor | None) -> Tensor:
    rows = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return rows if available is None else rows[available.to(rows.device, torch.bool)]


def _pull(rows: Tensor, gradient: Tensor) -> float:
    """Root mean square over rows of |h| |dL/dh|: the effect of a relative change of the embedding on the loss.

    The loss normalises projections, so gradients become smaller if embeddings become larger. The product does not
    depend on this scale.
    """
    return float((rows.norm(dim=1) * gradient.norm(dim=1)).square().mean().sqrt())
