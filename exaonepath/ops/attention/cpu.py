"""Attention of one long segment on the CPU, for inference: complete rows of scores for a few queries at a time.

For what `cpu_kernel` does not compute: very long segments, half precision, and everything without the extension.

torch's own CPU flash kernel reaches 170 GFLOP/s on two Zen 5 cores, in float32 and in bfloat16. Two oneDNN products
around torch's softmax reach 240, because a block of rows stays in the cache. Scores and softmax are float32 for every
input dtype. The flash kernel is used below `MIN_LENGTH`, where it is as fast; if oneDNN is not available; and for half
precision on processors with AMX matrix units, which it uses.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from exaonepath.ops.linear import linear, onednn_available

# Size of a block of scores. Measured on 2 cores with 1 MB of L2 cache: at L = 20,000, 128 rows are faster than 64, 256
# and 512. Shorter segments allow more rows in the same size.
_SCORE_BYTES = 10 << 20
_MIN_ROWS, _MAX_ROWS = 64, 512
MIN_LENGTH = 512


def can_attend(q: Tensor, length: int) -> bool:
    """Whether `attend_segment` should compute a segment of `length` keys; q: the packed queries [T, H, D]."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and length >= MIN_LENGTH
        and (q.dtype == torch.float32 or not _has_amx())
        and not (torch.is_grad_enabled() and q.requires_grad)
        and not torch.compiler.is_compiling()
        and onednn_available()
    )


@cache
def _has_amx() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe is not None and probe())


def attend_segment(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """softmax(q kᵀ scale) v for queries of one segment.

    Args:
        q, out: [R, H, D] views of some or all tokens of the segment; `out` may be q itself.
        k, v: [L, H, D] views, the whole segment.
        scale: factor on the scores.
    """
    length, heads, _ = k.shape
    rows = max(_MIN_ROWS, min(_MAX_ROWS, _SCORE_BYTES // (4 * length)))
    with torch.autocast("cpu", enabled=False):
        for h in range(heads):
            # `linear(x, w)` is x @ w.T: with keys as weights it gives the scores, with transposed values the result.
            queries = q[:, h].float().mul(scale)
            keys = k[:, h].float().contiguous()
            values = v[:, h].float().T.contiguous()
            for start in range(0, q.shape[0], rows):
                scores = linear(queries[start : start + rows], keys)
                out[start : start + rows, h] = linear(scores.softmax(-1), values)
