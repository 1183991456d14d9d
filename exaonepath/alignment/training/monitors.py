"""Monitors of the training that detect failures which a decreasing loss can hide.

The training loop passes embeddings, their gradients and the losses of pairs to `HealthMonitors`; at validation also the
retrieval pairs and a slide. The monitors keep running means, and return a `HealthWarning` if a limit is exceeded: an
embedding collapses, one modality or pair dominates, retrieval fails in one of several ways (`retrieval_checks`), or
attention crosses tissue fragments. They never change the training. Their state is plain JSON, so that a resumed run
logs the same warnings as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from exaonepath.alignment.metrics.geometry import effective_rank, uniformity
from exaonepath.alignment.metrics.retrieval import PairEmbeddings
from exaonepath.alignment.training.health import HealthWarning as HealthWarning
from exaonepath.alignment.training.health import MonitorSettings as MonitorSettings
from exaonepath.alignment.training.health import monitor_settings as monitor_settings
from exaonepath.alignment.training.information import Information
from exaonepath.alignment.training.retrieval_checks import (
    Checks,
    check_chance,
    check_few,
    check_information,
    check_memorising,
    check_rare,
    check_site,
    share_found,
)
from exaonepath.encoders.leakage import fragment_leakage

logger = logging.getLogger(__name__)


class HealthMonitors:
    """Monitors of one training run; see the module's description.

    The training loop calls `observe_information` at its start, `observe` for training steps, and `observe_retrieval`
    and `observe_leakage` at validation. Each returns the new warnings, which are also logged. `metrics()` returns the
    latest numbers by name, for the run's log.
    """

    def __init__(self, settings: MonitorSettings | None = None) -> None:
        self.settings = settings or MonitorSettings()
        self._shares: dict[str, dict[str, float]] = {"gradient": {}, "loss": {}}
        self._observed = 0
        self._validations = 0
        self._start_recall: float | None = None
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
        self,
        step: int,
        pairs: Sequence[PairEmbeddings],
        modalities: Mapping[Any, Iterable[str]],
        *,
        training: Sequence[PairEmbeddings] = (),
        sites: Mapping[Any, str] | None = None,
    ) -> list[HealthWarning]:
        """Check retrieval on held-out patients: for few modalities, a rare modality, memorising, chance, and site.

        Args:
            step: training step.
            pairs: pairs of modalities, as for `cross_modal_retrieval`.
            modalities: patient -> available modalities.
            training: the same pairs for about as many training patients; empty: not checked for memorising.
            sites: patient -> site, as far as it is known.
        """
        self._validations += 1
        present = {patient: frozenset(names) for patient, names in modalities.items()}
        if not present or not pairs:
            return []
        checks = Checks(self.settings, self._metrics)
        found = check_few(checks, step, pairs, {patient: len(names) for patient, names in present.items()})
        found += check_rare(checks, step, pairs, list(present.values()))
        held_out = share_found(pairs)
        if not step:
            self._start_recall = held_out[0]
        if step and self._validations >= self.settings.min_validations:
            found += check_chance(checks, step, held_out)
            found += check_memorising(checks, step, held_out, share_found(training), self._start_recall)
        found += check_site(checks, step, pairs, sites or {})
        return self._log_new(found)

    def observe_information(self, step: int, information: Mapping[str, Information]) -> list[HealthWarning]:
        """Check whether one modality dominates by what it tells about patients (`measure_information`)."""
        return self._log_new(check_information(Checks(self.settings, self._metrics), step, information))

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
            "validations": self._validations,
            "start_recall": self._start_recall,
            "last_told": dict(self._last_logged),  # the key of existing checkpoints
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict()`; the settings of this object are kept."""
        self._shares = {kind: dict(state["shares"].get(kind, {})) for kind in self._shares}
        self._observed = int(state["observed"])
        self._validations = int(state.get("validations", 0))  # earlier checkpoints have neither of the two
        self._start_recall = state.get("start_recall")
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


def _rows(values: Tensor, available: Tensor | None) -> Tensor:
    rows = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return rows if available is None else rows[available.to(rows.device, torch.bool)]


def _pull(rows: Tensor, gradient: Tensor) -> float:
    """Root mean square over rows of |h| |dL/dh|: the effect of a relative change of the embedding on the loss.

    The loss normalises projections, so gradients become smaller if embeddings become larger. The product does not
    depend on this scale.
    """
    return float((rows.norm(dim=1) * gradient.norm(dim=1)).square().mean().sqrt())
