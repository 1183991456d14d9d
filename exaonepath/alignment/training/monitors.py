"""Is the training healthy? Signs of the failures that a falling loss can hide.

`HealthMonitors` is fed by the training loop with what it has at hand (embeddings, the loss's gradient with respect to
them, losses per pair; at validation the retrieval pairs; now and then a slide), keeps running means, and returns a
`HealthWarning` when a limit is crossed: collapse of an embedding, a modality or a pair that takes over, patients with
few modalities or a rare modality left behind, attention that crosses between tissue fragments. It never changes the
training, and its state is plain JSON, so that a resumed run warns as an uninterrupted one would.
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
    """Limits beyond which a warning is given.

    Attributes:
        smoothing: weight of the past in the running means of shares (one batch must not raise an alarm).
        warmup: observations before shares are judged.
        min_effective_rank: of an embedding; fewer directions than this is a collapse.
        max_uniformity: of an embedding; 0 is one point, -4 the whole sphere.
        max_modality_share: of the gradient that one modality may receive, where at least three have one.
        max_pair_ratio: a pair's share of the loss over its fair share 1 / pairs (never above `max_pair_share`).
        max_pair_share: of the loss that one pair may make up, where at least three pairs have one.
        min_group: patients that a number of modalities must have for it to be compared.
        rare_presence: a modality that fewer patients than this have counts as rare.
        min_rare_ratio: retrieval with a rare modality over that of the others, both in units of chance.
        repeat_after: observations after which a warning that still holds is given again.
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
        step: of the training.
        check: "collapse", "dominant_modality", "dominant_pair", "few_modalities", "rare_modality" or "leakage".
        subject: the modality, pair, group or block concerned.
        value, limit: what was measured, and the limit it crossed.
        message: one line for a reader, with what to look at.
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
    """Watches one training run; see the module's description.

    The loop calls `observe` every few steps, `observe_retrieval` at validation, `observe_leakage` now and then; each
    returns the new warnings (also logged). `metrics()` are the latest numbers by name, for the run's log.
    """

    def __init__(self, settings: MonitorSettings | None = None) -> None:
        self.settings = settings or MonitorSettings()
        self._shares: dict[str, dict[str, float]] = {"gradient": {}, "loss": {}}
        self._observed = 0
        self._last_told: dict[str, int] = {}
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
        """Look at one batch.

        Args:
            step: of the training.
            embeddings: modality -> [B, E], as they enter the loss.
            availability: modality -> bool [B], rows that count; None, or a modality left out: all of them.
            pair_losses: (modality, modality) -> loss of the pair; pairs without a positive are to be left out or NaN.
            gradients: modality -> [B, E], gradient of the loss with respect to `embeddings`.

        Returns:
            New warnings.
        """
        self._observed += 1
        found: list[HealthWarning] = []
        pull: dict[str, float] = {}
        for name, embedding in embeddings.items():
            there = None if availability is None else availability.get(name)
            rows = _rows(embedding, there)
            found += self._check_collapse(step, name, rows)
            if gradients is not None and gradients.get(name) is not None and len(rows):
                pull[name] = _pull(rows, _rows(gradients[name], there))
        if pull:
            found += self._check_shares(step, "gradient", pull)
        losses = {" x ".join(pair): float(value) for pair, value in (pair_losses or {}).items()}
        losses = {pair: value for pair, value in losses.items() if math.isfinite(value)}
        if losses:
            found += self._check_shares(step, "loss", losses)
        return self._tell(found)

    def observe_retrieval(
        self, step: int, pairs: Sequence[PairEmbeddings], modalities: Mapping[Any, Iterable[str]]
    ) -> list[HealthWarning]:
        """Look at retrieval on held-out patients: are those with few modalities, or a rare modality, left behind?

        Args:
            step: of the training.
            pairs: of modalities, as `cross_modal_retrieval` takes them.
            modalities: patient -> the modalities that are there.
        """
        present = {patient: frozenset(names) for patient, names in modalities.items()}
        if not present or not pairs:
            return []
        found = self._check_few(step, pairs, {patient: len(names) for patient, names in present.items()})
        found += self._check_rare(step, pairs, list(present.values()))
        return self._tell(found)

    def observe_leakage(
        self, step: int, encoder: Any, features: Tensor, coords: Tensor, contour_index: Tensor
    ) -> list[HealthWarning]:
        """Look whether a RoPE block lets anything through between fragments of one slide [N, C], [N, 2], [N].

        A slide of one fragment tells nothing and is passed over.
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
        return self._tell(found)

    def metrics(self) -> dict[str, float]:
        """The latest numbers: effective_rank/<modality>, uniformity/<modality>, gradient_share/<modality>, ..."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain JSON types."""
        return {
            "settings": asdict(self.settings),
            "shares": {kind: dict(shares) for kind, shares in self._shares.items()},
            "observed": self._observed,
            "last_told": dict(self._last_told),
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the settings stay those of this object."""
        self._shares = {kind: dict(state["shares"].get(kind, {})) for kind in self._shares}
        self._observed = int(state["observed"])
        self._last_told = {key: int(value) for key, value in state["last_told"].items()}
        self._metrics = {key: float(value) for key, value in state["metrics"].items()}

    def _check_collapse(self, step: int, name: str, rows: Tensor) -> list[HealthWarning]:
        # Two rows or three span as many directions at most, however healthy.
        if len(rows) < 2 * self.settings.min_effective_rank:
            return []
        rank, spread = effective_rank(rows), uniformity(rows)
        self._metrics[f"effective_rank/{name}"] = rank
        self._metrics[f"uniformity/{name}"] = spread
        found = []
        # NaN compares as false, and an embedding of NaN is no healthy one.
        if not rank >= self.settings.min_effective_rank:
            text = (
                f"embedding of {name} uses {rank:.2f} directions for {len(rows)} rows: it collapsed; a smaller "
                "learning rate, a larger batch, or the loss's pos_weight are the first things to look at"
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
            text = f"{name} receives {share:.0%} of the gradient: it dominates, the other modalities hardly train"
        else:
            fair = self.settings.max_pair_ratio / len(running)
            check, limit = "dominant_pair", min(fair, self.settings.max_pair_share)
            text = f"{name} makes up {share:.0%} of the loss over {len(running)} pairs; consider pair weights"
        return [HealthWarning(step, check, name, share, limit, text)] if share > limit else []

    def _check_few(self, step: int, pairs: Sequence[PairEmbeddings], count: Mapping[Any, int]) -> list[HealthWarning]:
        recalls = recall_by_group(pairs, count, recall_at=1)
        for group, value in recalls.items():
            self._metrics[f"recall@1/{group}_modalities"] = value.recall.value
        # A handful of patients has an interval that a bootstrap makes too narrow.
        enough = [group for group, value in recalls.items() if value.recall.n >= self.settings.min_group]
        if len(enough) < 2:
            return []
        fewest, most = min(enough), max(enough)
        low, high = recalls[fewest].excess, recalls[most].excess
        # Apart beyond both intervals: groups differ by chance alone.
        if not low.high < high.low:
            return []
        text = (
            f"patients with {fewest} modalities are found less often (recall@1 {recalls[fewest].recall}) than "
            f"those with {most} ({recalls[most].recall}), the pairs they take part in allowed for: "
            "the training favours complete patients"
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

    def _tell(self, found: Iterable[HealthWarning]) -> list[HealthWarning]:
        told = []
        for warning in found:
            key = f"{warning.check}/{warning.subject}"
            last = self._last_told.get(key)
            if last is None or self._observed - last >= self.settings.repeat_after:
                self._last_told[key] = self._observed
                logger.warning("step %d: %s", warning.step, warning.message)
                told.append(warning)
        return told


def monitor_settings(values: Mapping[str, Any]) -> MonitorSettings:
    """Settings from a config's table; raises `SettingsError` naming an unknown key."""
    known = {field.name for field in fields(MonitorSettings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingsError(f"unknown monitor settings {unknown}; known are {sorted(known)}")
    return MonitorSettings(**values)


def _rows(values: Tensor, there: Tensor | None) -> Tensor:
    rows = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return rows if there is None else rows[there.to(rows.device, torch.bool)]


def _pull(rows: Tensor, gradient: Tensor) -> float:
    """Root mean square over rows of |h| |dL/dh|: what a relative change of the embedding does to the loss.

    The loss normalises projections, so gradients shrink as embeddings grow; the product does not depend on that scale.
    """
    return float((rows.norm(dim=1) * gradient.norm(dim=1)).square().mean().sqrt())
