"""Checks of the arguments of the sigmoid loss, with their error messages and one warning."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from exaonepath.errors import SettingsError
from exaonepath.log_once import warn_once
from exaonepath.ops.sigmoid_loss.engine import DTYPES
from exaonepath.ops.sigmoid_loss.pairs import PairwiseInputs
from exaonepath.text import few

logger = logging.getLogger(__name__)

_SHOWN_ROWS = 8


def check_inputs(
    embeddings: Sequence[Tensor],
    projections: Mapping[tuple[int, int], Tensor],
    log_t: Tensor,
    bias: Tensor,
    patient: Tensor,
    availability: Tensor | None,
    pair_weights: Sequence[float] | None,
    pos_weight: float | str | None,
    names: Sequence[str] | None,
) -> PairwiseInputs:
    """The arguments of `sigmoid_loss` in one checked object.

    Raises:
        SettingsError: an argument is wrong; the message names it.
    """
    if len(embeddings) < 2:
        raise SettingsError(f"the pairwise loss needs at least two modalities, got {len(embeddings)}")
    names = [str(m) for m in range(len(embeddings))] if names is None else list(names)
    if len(names) != len(embeddings) or any("," in name for name in names):
        raise SettingsError(f"names must be {len(embeddings)} names without commas, one a modality, got {names}")
    _check_embeddings(embeddings, names)
    ordered = _check_projections(embeddings, projections, names)
    pairs = list(combinations(range(len(embeddings)), 2))
    device = embeddings[0].device
    for name, value in (("log_t", log_t), ("bias", bias)):
        if value.shape != (len(pairs),) or not value.is_floating_point():
            raise SettingsError(
                f"{name} must be floating point [{len(pairs)}], one value a pair, got {value.dtype} {list(value.shape)}"
            )
        if value.device != device:
            raise SettingsError(f"{name} is on {value.device}, the embeddings are on {device}")
    n_rows = embeddings[0].shape[0]
    if patient.shape != (n_rows,) or patient.is_floating_point() or patient.is_complex():
        raise SettingsError(f"patient must be integer ids [{n_rows}], got {patient.dtype} {list(patient.shape)}")
    if patient.device != device:
        raise SettingsError(f"patient is on {patient.device}, the embeddings are on {device}")
    if availability is not None:
        availability = _check_availability(availability, (len(embeddings), n_rows), device)
    weights = [1.0] * len(pairs) if pair_weights is None else [float(w) for w in pair_weights]
    if len(weights) != len(pairs) or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise SettingsError(f"pair_weights must be {len(pairs)} finite numbers >= 0, one for each pair, got {weights}")
    balanced = pos_weight == "balanced"
    if isinstance(pos_weight, str) and not balanced:
        raise SettingsError(f'pos_weight must be None, a number, or "balanced", got {pos_weight!r}')
    number = None if pos_weight is None or isinstance(pos_weight, str) else float(pos_weight)
    if number is not None and not (math.isfinite(number) and number > 0):
        raise SettingsError(f"pos_weight must be a finite number > 0, got {number}")
    return PairwiseInputs(
        list(embeddings),
        ordered,
        log_t,
        bias,
        patient.to(torch.int64).contiguous(),
        availability,
        weights,
        number,
        balanced,
        names,
    )


def _check_embeddings(embeddings: Sequence[Tensor], names: Sequence[str]) -> None:
    first = embeddings[0]
    mixed = torch.is_autocast_enabled(first.device.type)
    for name, h in zip(names, embeddings, strict=True):
        if h.ndim != 2 or h.dtype not in DTYPES:
            raise SettingsError(f"embeddings of {name} must be floating point [B, E], got {h.dtype} {list(h.shape)}")
        if h.shape[0] != first.shape[0]:
            raise SettingsError(
                f"embeddings of {name} have {h.shape[0]} rows, those of {names[0]} {first.shape[0]}: a missing "
                f"modality keeps its row, and availability marks it as missing"
            )
        if h.device != first.device:
            raise SettingsError(f"embeddings of {name} are on {h.device}, those of {names[0]} on {first.device}")
        if h.dtype != first.dtype and (not mixed or torch.float64 in (h.dtype, first.dtype)):
            raise SettingsError(
                f"embeddings of {name} are {h.dtype}, those of {names[0]} {first.dtype}: convert them, or use autocast"
            )


def _check_projections(
    embeddings: Sequence[Tensor], projections: Mapping[tuple[int, int], Tensor], names: Sequence[str]
) -> list[Tensor]:
    pairs = list(combinations(range(len(embeddings)), 2))
    wanted = [ordered for i, j in pairs for ordered in ((i, j), (j, i))]
    if set(projections) != set(wanted):
        missing, unknown = sorted(set(wanted) - set(projections)), sorted(set(projections) - set(wanted), key=str)
        raise SettingsError(f"projections must have one entry an ordered pair: missing {missing}, unexpected {unknown}")
    for i, j in wanted:
        weight, h = projections[i, j], embeddings[i]
        where = f"the projection W of ({names[i]}, {names[j]})"
        if weight.ndim != 2 or weight.shape[0] != h.shape[1] or weight.shape[1] == 0:
            raise SettingsError(
                f"{where} must be [{h.shape[1]}, d], as wide as the embeddings of {names[i]}, got {list(weight.shape)}"
            )
        if weight.shape[1] != projections[j, i].shape[-1]:
            raise SettingsError(
                f"{where} gives width {weight.shape[1]}, that of ({names[j]}, {names[i]}) {projections[j, i].shape[-1]}"
            )
        if weight.device != h.device:
            raise SettingsError(f"{where} is on {weight.device}, the embeddings are on {h.device}")
        mixed = torch.is_autocast_enabled(h.device.type) and torch.float64 not in (weight.dtype, h.dtype)
        if weight.dtype not in DTYPES or (weight.dtype != h.dtype and not mixed):
            raise SettingsError(f"{where} is {weight.dtype}, the embeddings are {h.dtype}: convert, or use autocast")
    return [projections[ordered] for ordered in wanted]


def _check_availability(availability: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    if availability.shape != shape or availability.is_floating_point() or availability.is_complex():
        raise SettingsError(
            f"availability must be bool {list(shape)} (modality, row), got "
            f"{availability.dtype} {list(availability.shape)}"
        )
    if availability.device != device:
        raise SettingsError(f"availability is on {availability.device}, the embeddings are on {device}")
    return availability.bool()


def check_finite_values(inputs: PairwiseInputs) -> None:
    """Check that all available rows and all projections are finite.

    Raises:
        SettingsError: an available row or a projection has a value that is not finite; the message names the rows and
            the affected pairs.
    """
    for m, (name, h) in enumerate(zip(inputs.names, inputs.embeddings, strict=True)):
        bad = ~h.isfinite().all(1)
        if inputs.availability is not None:
            bad &= inputs.availability[m]
        rows = bad.nonzero()[:, 0].tolist()
        if rows:
            pairs = ", ".join(f"({inputs.names[i]}, {inputs.names[j]})" for i, j in inputs.pairs if m in (i, j))
            raise SettingsError(
                f"embeddings of {name} hold NaN or infinity in {len(rows)} of {len(h)} rows "
                f"({few(rows, _SHOWN_ROWS)}); they affect the pairs {pairs}"
            )
    for index, weight in enumerate(inputs.projections):
        if not weight.isfinite().all():
            i, j = inputs.pairs[index // 2][:: -1 if index % 2 else 1]
            raise SettingsError(
                f"the projection W of ({inputs.names[i]}, {inputs.names[j]}) holds NaN or infinity: "
                f"training has diverged"
            )


def warn_no_valid_pair(any_positive: bool) -> None:
    """Log a warning, once per process, if a batch has no positive at all: the model learns nothing from it."""
    if not any_positive:
        warn_once(
            logger,
            "a batch has no valid positive in any pair of modalities: its loss is 0 and its gradients are zero; "
            "check availability and patient ids (logged once)",
        )
