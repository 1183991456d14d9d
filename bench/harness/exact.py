"""Exact values of sampled rows, in float64, at any size: what every candidate is checked against before it is timed.

A slide of a million patches has no dense reference. Rows of attention are independent, so one head and some rows of
some fragments (the longest, the shortest, a few more; always their first and last row) are computed exactly instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exaonepath.ops.attention.rotary import apply_rotation

from .problems import Problem

_ROWS = 64
_FRAGMENTS = 6
_SCORES = 1 << 25  # float64 scores held at once

# A result is at most this far from float64, by norm. In half precision probabilities, output, ds and (where rotated)
# queries and keys are each rounded once, by half a unit in the last place (2^-9 bf16, 2^-12 fp16), independently of one
# another: eight such errors stay under 4 units. float32: errors of 2^-24 grow as the root of up to a million terms.
TOLERANCE = {torch.float32: 6e-5, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}


@dataclass(frozen=True)
class Sample:
    """Exact numbers of one head: per chosen fragment its length, rows [R], and "out" (with gradients also "dq", "dk",
    "dv"), each [R, D] in float64."""

    head: int
    fragments: list[tuple[int, Tensor, dict[str, Tensor]]]

    def errors(self, tensors: dict[str, Tensor]) -> tuple[float, float]:
        """Worst over tensors [T, H, D] and fragments: norm of the error over norm, largest error over largest value.

        Fragment by fragment, since outputs shrink with its length: a long one would be negligible compared with a short
        one. A fragment of one token has gradients of exactly 0: those are measured by what normal inputs give, L^-1/2.
        """
        worst_norm = worst_max = 0.0
        for length, rows, values in self.fragments:
            for name, exact in values.items():
                typical = 0.0 if name in ("out", "dv") else length**-0.5
                error = tensors[name][rows, self.head].double() - exact
                norm = max(float(exact.norm()), typical * exact.numel() ** 0.5)
                worst_norm = max(worst_norm, _number(error.norm() / norm))
                worst_max = max(worst_max, _number(error.abs().max() / max(float(exact.abs().max()), typical)))
        return worst_norm, worst_max


def exact_sample(problem: Problem, qkv: Tensor, dout: Tensor | None, *, rotated: bool) -> Sample:
    """Exact rows for these inputs; `dout` None leaves gradients out."""
    rng = np.random.default_rng(problem.seed + 2)
    head = int(rng.integers(problem.heads))
    q, k, v = qkv[:, :, head].double().unbind(1)
    cos = sin = None
    if rotated:
        cos, sin = problem.rotation.cos_sin(torch.float64)
        q, k = (apply_rotation(x[:, None], cos, sin)[:, 0] for x in (q, k))
    scale = problem.head_dim**-0.5
    starts = np.concatenate([[0], np.cumsum(problem.lengths)])
    fragments = []
    for segment in _choose(problem.lengths, rng):
        begin, end = int(starts[segment]), int(starts[segment + 1])
        local = _rows(end - begin, rng).to(qkv.device)
        part = slice(begin, end)
        gradient = None if dout is None else dout[part, head].double()
        values = _segment(q[part], k[part], v[part], gradient, local, scale)
        rows = local + begin
        if cos is not None and sin is not None:
            # The gradient with respect to the input of the rotation: rotated back.
            for name in {"dq", "dk"} & values.keys():
                values[name] = apply_rotation(values[name][:, None], cos[rows], -sin[rows])[:, 0]
        fragments.append((end - begin, rows, values))
    return Sample(head, fragments)


def _segment(q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, rows: Tensor, scale: float) -> dict[str, Tensor]:
    p = (q[rows] @ k.T * scale).softmax(-1)
    out = p @ v
    if dout is None:
        return {"out": out}
    delta = (dout[rows] * out).sum(-1, keepdim=True)
    ds = p * (dout[rows] @ v.T - delta)
    dk, dv = torch.zeros_like(k[rows]), torch.zeros_like(v[rows])
    step = max(1, _SCORES // len(k))
    for first in range(0, len(q), step):
        some = slice(first, first + step)
        p = (q[some] @ k.T * scale).softmax(-1)
        delta = (dout[some] * (p @ v)).sum(-1, keepdim=True)
        p = p[:, rows]
        dv += p.T @ dout[some]
        dk += (p * (dout[some] @ v[rows].T - delta)).T @ q[some] * scale
    return {"out": out, "dq": ds @ k * scale, "dk": dk, "dv": dv}


def _choose(lengths: list[int], rng: np.random.Generator) -> list[int]:
    order = np.argsort(lengths, kind="stable")
    more = rng.choice(len(lengths), min(_FRAGMENTS, len(lengths)), replace=False)
    return sorted({int(order[0]), int(order[-1]), *(int(i) for i in more)})


def _rows(length: int, rng: np.random.Generator) -> Tensor:
    rows = rng.choice(length, min(_ROWS, length), replace=False)
    return torch.from_numpy(np.unique(np.concatenate([rows, [0, length - 1]])))


def _number(value: Tensor) -> float:
    number = float(value)
    return number if number == number else float("inf")
