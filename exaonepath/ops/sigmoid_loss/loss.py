"""The all-pairwise sigmoid loss of any number of modalities, with its gradients, in O(B * d) memory.

    u = l2norm(h_i W_ij)    v = l2norm(h_j W_ji)    s_kl = exp(t_ij) <u_k, v_l> + b_ij    y_kl = [p(k) = p(l)]
    L_ij = sum over valid kl of BCEWithLogits(s_kl, y_kl; pos_weight) / n_ij       n_ij = number of valid positives
    L    = weighted mean of L_ij over the pairs with n_ij > 0; 0 if there is none

(EXAONE Path 2.5, arXiv 2512.14019; the sigmoid loss is SigLIP's, arXiv 2303.15343.) The forward pass already computes
the gradients; the backward pass only multiplies them by the gradient of the loss. So the loss is differentiable once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exaonepath.errors import BackendError
from exaonepath.ops.sigmoid_loss.checks import check_finite_values, check_inputs, warn_no_valid_pair
from exaonepath.ops.sigmoid_loss.engine import choose_engine
from exaonepath.ops.sigmoid_loss.pairs import (
    STATISTICS,
    LocalBatch,
    PairwiseInputs,
    pairwise_sigmoid,
)


class SigmoidLossResult(NamedTuple):
    """Only `loss` is differentiable. [P] is over the pairs in the order of `combinations(range(M), 2)`."""

    loss: Tensor  # []
    pair_losses: Tensor  # [P] L_ij, 0 if n_ij = 0; NaN for a pair of weight 0, which is not computed
    n_positive: Tensor  # [P] int64, n_ij
    n_valid: Tensor  # [P] int64, rows with modality i times rows with modality j
    missing: Tensor  # [P] share of the B x B cells that are not valid
    positive_logit: Tensor  # [P] mean of s over the valid positives; NaN if not computed
    negative_logit: Tensor  # [P] mean of s over the valid negatives; NaN if not computed, or if there is none


def sigmoid_loss(
    embeddings: Sequence[Tensor],
    projections: Mapping[tuple[int, int], Tensor],
    log_t: Tensor,
    bias: Tensor,
    patient: Tensor,
    availability: Tensor | None = None,
    *,
    pair_weights: Sequence[float] | None = None,
    pos_weight: float | str | None = None,
    backend: str = "auto",
    check_finite: bool = False,
    names: Sequence[str] | None = None,
) -> SigmoidLossResult:
    """All pairs of M modalities in one call; no tensor of size B x B is ever stored.

    Args:
        embeddings: M >= 2 tensors [B, E_m] of one device and dtype: float32, bfloat16, float16 (for all three, logits
            are float32 and sums float64) or float64 (backend "torch"). Under autocast, dtypes may differ. A row that is
            not available may have any values. A row whose projection has length 0 counts as u = 0.
        projections: W_ij [E_i, d_ij] for every ordered pair (i, j) of modality numbers; W_ij and W_ji have the same d.
        log_t, bias: [P = M (M - 1) / 2], t_ij and b_ij in the order of `itertools.combinations(range(M), 2)`.
        patient: [B] integer ids; rows of one patient are positives of each other.
        availability: [M, B] bool; None: every modality is available in every row.
        pair_weights: P numbers >= 0 for the weighted mean; None: equal.
        pos_weight: None (1), a number > 0, or "balanced": valid negatives / valid positives of the pair.
        backend: "cuda", "cpu" (both compiled), "torch" (any device), or "auto": the compiled one if it can be used.
        check_finite: raise an error if an available row has NaN or infinity (needs one pass over the inputs).
        names: names of the modalities, for messages.

    Returns:
        SigmoidLossResult; its loss is float32 (float64 for float64). If there is no valid positive in any pair, the
        loss and its gradients are 0, and a warning is logged once.

    Raises:
        SettingsError: shapes, devices, dtypes or options are wrong; exp(t) overflows; check_finite found NaN or
            infinity.
        BackendError: the requested backend cannot be used here; or the loss is differentiated a second time.
    """
    inputs = check_inputs(embeddings, projections, log_t, bias, patient, availability, pair_weights, pos_weight, names)
    training = torch.is_grad_enabled() and any(
        x.requires_grad for x in (*inputs.embeddings, *inputs.projections, inputs.log_t, inputs.bias)
    )
    loss, statistics, _ = _sigmoid_loss(
        list(inputs.embeddings),
        list(inputs.projections),
        inputs.log_t,
        inputs.bias,
        inputs.patient,
        inputs.availability,
        list(inputs.pair_weights),
        inputs.pos_weight,
        inputs.balanced,
        "\n".join(inputs.names),  # operators do not support lists of strings
        backend,
        computing_dtype(inputs),
        [h.requires_grad for h in inputs.embeddings] if training else [],
        check_finite,
    )
    return as_result(loss, statistics)


def as_result(loss: Tensor, statistics: Tensor) -> SigmoidLossResult:
    """The columns of STATISTICS as named tensors."""
    columns = dict(zip(STATISTICS, statistics.detach().unbind(1), strict=True))
    return SigmoidLossResult(
        loss,
        columns["loss"].to(loss.dtype),
        columns["n_positive"].long(),
        columns["n_valid"].long(),
        (1 - columns["n_valid"] / columns["n_cells"].clamp(min=1)).to(loss.dtype),
        columns["positive_logit"].to(loss.dtype),
        columns["negative_logit"].to(loss.dtype),
    )


def computing_dtype(inputs: PairwiseInputs) -> torch.dtype:
    """Dtype of the products: that of the embeddings, or that of autocast if it is on (float64 stays)."""
    kind, dtype = inputs.embeddings[0].device.type, inputs.embeddings[0].dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """A context without autograd and without autocast: all dtypes are already chosen."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class _Arguments(NamedTuple):
    """The arguments of the operator below, by name: torch passes them as a tuple. The first four have gradients."""

    embeddings: Sequence[Tensor]
    projections: Sequence[Tensor]
    log_t: Tensor
    bias: Tensor
    patient: Tensor
    availability: Tensor | None
    pair_weights: Sequence[float]
    pos_weight: float | None
    balanced: bool
    names: str
    backend: str
    dtype: torch.dtype
    wants: Sequence[bool]
    check_finite: bool


@torch.library.custom_op("exaonepath::sigmoid_loss", mutates_args=())
def _sigmoid_loss(
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    log_t: Tensor,
    bias: Tensor,
    patient: Tensor,
    availability: Tensor | None,
    pair_weights: Sequence[float],
    pos_weight: float | None,
    balanced: bool,
    names: str,
    backend: str,
    dtype: torch.dtype,
    wants: Sequence[bool],
    check_finite: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    inputs = PairwiseInputs(
        embeddings,
        projections,
        log_t,
        bias,
        patient,
        availability,
        pair_weights,
        pos_weight,
        balanced,
        names.split("\n"),
    )
    with plain_arithmetic(patient.device):
        engine = choose_engine(backend, patient.device, dtype)
        if check_finite:
            check_finite_values(inputs)
        result = pairwise_sigmoid(inputs, engine, LocalBatch(), wants or None)
        warn_no_valid_pair(result.any_positive)
    return result.loss, result.statistics, result.gradients


@_sigmoid_loss.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    arguments = _Arguments(*inputs)
    embeddings, patient, dtype, wants = arguments.embeddings, arguments.patient, arguments.dtype, arguments.wants
    accumulator = torch.promote_types(dtype, torch.float32)
    n_pairs = math.comb(len(embeddings), 2)
    loss = patient.new_empty((), dtype=accumulator)
    statistics = patient.new_empty((n_pairs, len(STATISTICS)), dtype=torch.float64)
    if not wants:
        return loss, statistics, []
    like = [h for h, wanted in zip(embeddings, wants, strict=True) if wanted]
    like += [*arguments.projections, arguments.log_t, arguments.bias]
    return loss, statistics, [patient.new_empty(x.shape, dtype=accumulator) for x in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    arguments = _Arguments(*inputs)
    _, statistics, gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics, *gradients)
    ctx.wants = arguments.wants
    ctx.n_gradients = len(gradients)
    # The inputs are saved only to raise an error for a second derivative.
    ctx.save_for_backward(*gradients, *arguments.embeddings, *arguments.projections, arguments.log_t, arguments.bias)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    gradients, inputs = saved[: ctx.n_gradients], saved[ctx.n_gradients :]
    n_modalities = len(ctx.wants)
    n_projections = len(inputs) - n_modalities - 2
    scaled = scale_gradients(grad_loss, gradients, inputs, ctx.wants)
    return (
        scaled[:n_modalities],
        scaled[n_modalities : n_modalities + n_projections],
        *scaled[-2:],
        *[None] * (len(_Arguments._fields) - 4),
    )


_sigmoid_loss.register_autograd(_backward, setup_context=_setup_context)


def scale_gradients(
    grad_loss: Tensor | None, gradients: Sequence[Tensor], inputs: Sequence[Tensor], wants: Sequence[bool]
) -> list[Tensor | None]:
    """grad_loss times each stored gradient, in its input's dtype; None for embeddings that require no gradient.

    `gradients` omits those embeddings, `inputs` contains them: embeddings, projections, log_t, bias.
    """
    if grad_loss is None:
        return [None] * len(inputs)
    wanted = [*wants, *[True] * (len(inputs) - len(wants))]
    targets = [x for x, w in zip(inputs, wanted, strict=True) if w]
    if torch.is_grad_enabled():  # only under create_graph=True
        found = _RefuseSecondDerivative.apply(grad_loss, len(targets), *gradients, *targets)
    else:
        found = [(grad_loss * g).to(x.dtype) for g, x in zip(gradients, targets, strict=True)]
    remaining = iter(found)
    return [next(remaining) if w else None for w in wanted]


class _RefuseSecondDerivative(torch.autograd.Function):
    """Scales the gradients, and connects them to the inputs, so that a second derivative calls `backward`.

    Without this connection, autograd would treat the stored gradients as constants, and a second derivative would be
    silently wrong.
    """

    @staticmethod
    def forward(ctx: Any, grad_loss: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple((grad_loss * g).to(x.dtype) for g, x in zip(tensors[:count], tensors[count:], strict=True))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise BackendError(
            "the sigmoid loss is differentiable once: its gradients are computed in the forward pass and have no "
            "derivative; for second derivatives use exaonepath.reference.sigmoid_loss.dense_sigmoid_loss"
        )
