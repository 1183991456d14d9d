"""What health monitors report, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from exaonepath.errors import SettingsError


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
        memorised: training patients are memorised if this share of them is found, and the held-out patients less often
            than `max_memorised_ratio` times that.
        max_memorised_ratio: see `memorised`. max_lost_ratio: after a start in closed form, they also have to be found
            less often than this share of what the start finds.
        min_validations: validations before retrieval at chance, or memorising, is reported.
        max_information_ratio: largest ratio of what one modality tells about patients with the others to what is left
            without it. min_information: a modality that tells less than this dominates nothing (`Information.own`).
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
    memorised: float = 0.5
    max_memorised_ratio: float = 0.25
    min_validations: int = 3
    max_information_ratio: float = 4.0
    min_information: float = 0.15
    max_lost_ratio: float = 0.75
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
        check: "collapse", "dominant_modality", "dominant_pair", "few_modalities", "rare_modality", "at_chance",
            "memorising", "dominant_information", "site" or "leakage".
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


def monitor_settings(values: Mapping[str, Any]) -> MonitorSettings:
    """Settings from a table of a config; raises `SettingsError` for an unknown key."""
    known = {field.name for field in fields(MonitorSettings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingsError(f"unknown monitor settings {unknown}; known are {sorted(known)}")
    return MonitorSettings(**values)
