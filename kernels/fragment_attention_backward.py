"""Backward pass of the fragment attention: dQ by tiles of queries, dK and dV by tiles of keys.

Each program owns the rows that it writes, so no atomic additions are needed, and the result is deterministic. Queries
and keys are already rotated: training rotates them once, into the buffer that the backward pass needs anyway. The
gradients are rotated back at the end (ROTATE_BACK). The mask is symmetric, so both kernels use the same kind of tile
list. The second kernel computes the scores transposed, S' = K Q', so that no result of a product has to be transposed.

Shapes of the tensors: qkv and dqkv [T, 3, H, D] with equal strides; out and dout [T, H, D] contiguous; cos and sin
float32 [T, D/2]; lse and delta float32 [H, T]; bounds int32 [T, 2]; tiles int32 [W, 4].
"""

import triton
import triton.language as tl
from exaonepath.kernels.blocks import (
    CAREFUL_BLOCK,
    load_angles,
    load_block,
    load_bounds,
    load_rows,
    load_tile,
    load_values,
    not_finite,
    only_finite,
    rotate,
    store_rows,
    unmasked_end,
    wide,
    within,
)


@triton.jit
def _store_gradient(
    p_x, p_cos, p_sin, first, exists, s_token, g, BLOCK: tl.constexpr, D: tl.constexpr, ROTATE_BACK: tl.constexpr
):
    """Store the float32 gradient of a rotated query or key, rotated back.

    The gradient is multiplied by the transpose of the rotation, which is the inverse rotation, with -sin.
    """
    if ROTATE_BACK:
        HALF: tl.constexpr = D // 2
        a, b = tl.split(tl.permute(tl.reshape(g, [BLOCK, 2, HALF]), [0, 2, 1]))
        cos, sin = load_angles(p_cos, p_sin, first, exists, BLOCK, HALF)
        a, b = rotate(a, b, cos, -sin)
        store_rows(p_x, first, exists, s_token, a, BLOCK, HALF)
        store_rows(p_x + HALF, first, exists, s_token, b, BLOCK, HALF)
    else:
        store_rows(p_x, first, exists, s_token, g, BLOCK, D)


@triton.jit
def _query_gradient_step(
    p_k, p_v, d_k, d_v, head, start, end, lo, hi, q, dout, lse, delta, dq, s_token, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one block of keys to the gradient of a tile of rotated queries.

    The probabilities are computed again from the scores and lse. The gradient of a score is p * (dp - delta), because
    delta = rowsum(out * dout) equals the mean of dp with weights p, which the normalisation of softmax subtracts.
    """
    keys = start + tl.arange(0, BLOCK_N)
    present = keys < end
    k = load_block(p_k, d_k, head, start, present, s_token, BLOCK_N, D, MASKED, DESCRIPTORS)
    v = load_block(p_v, d_v, head, start, present, s_token, BLOCK_N, D, MASKED, DESCRIPTORS)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(tl.fma(s, scale_log2, -lse[:, None]))  # [BM, BN]
    if MASKED:
        p = tl.where(within(keys, lo, hi), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    if CAREFUL:
        k, poison = only_finite(k)
        ds = tl.where(within(keys, lo, hi), ds + poison[None, :], 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n_tokens"])
def query_gradient_kernel(
    p_qkv, p_dqkv, d_k, d_v, p_out, p_dout, p_lse, p_delta, p_cos, p_sin, p_bounds, p_tiles, s_token, s_slot,
    s_head, s_out_token, s_out_head, n_tokens, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROTATE_BACK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries and one head, and delta = rowsum(out * dout) for the other kernel; grid (W, H)."""
    head_32 = tl.program_id(1)
    head = head_32.to(tl.int64)
    first, last, begin, end, exists = load_tile(p_tiles, BLOCK_M)
    p_q = p_qkv + head * s_head
    p_k, p_v = p_q + s_slot, p_q + 2 * s_slot
    dout = load_rows(p_dout + head * s_out_head, first, exists, s_out_token, BLOCK_M, D, True)
    out = load_rows(p_out + head * s_out_head, first, exists, s_out_token, BLOCK_M, D, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    o_row = head * n_tokens + wide(first) + tl.arange(0, BLOCK_M)
    tl.store(p_delta + o_row, delta, mask=exists)
    lse = tl.load(p_lse + o_row, mask=exists, other=0.0)
    q = load_rows(p_q, first, exists, s_token, BLOCK_M, D, True)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    plain = unmasked_end(p_bounds, first, last, begin, end, BLOCK_N)
    for start in tl.range(begin, plain, BLOCK_N, num_stages=STAGES):
        dq = _query_gradient_step(
            p_k, p_v, d_k, d_v, head_32, start, end, begin, end, q, dout, lse, delta, dq, s_token, scale_log2,
            D, BLOCK_N, False, False, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    lo, hi = load_bounds(p_bounds, first, exists, BLOCK_M)  # after the loop above, which then has more free registers
    for start in tl.range(plain, end, BLOCK_N, num_stages=STAGES):
        dq = _query_gradient_step(
            p_k, p_v, d_k, d_v, head_32, start, end, lo, hi, q, dout, lse, delta, dq, s_token, scale_log2,
            D, BLOCK_N, True, False, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    if plain == begin and not_finite(dq):
        dq = tl.zeros([BLOCK_M, D], tl.float32)
        first, _, begin, end, exists = load_tile(p_tiles, BLOCK_M)  # again: they occupy no registers during the loops
        lo, hi = load_bounds(p_bounds, first, exists, BLOCK_M)
        for start in tl.range(begin, end, CAREFUL_BLOCK, num_stages=1):
            dq = _query_gradient_step(
                p_k, p_v, d_k, d_v, head_32, start, end, lo, hi, q, dout, lse, delta, dq, s_token, scale_log2,
                D, CAREFUL_BLOCK, True, True, PRECISION, DESCRIPTORS,
            )  # fmt: skip
    first, _, _, _, exists = load_tile(p_tiles, BLOCK_M)
    p_dq = p_dqkv + head * s_head
    _store_gradient(p_dq, p_cos, p_sin, first, exists, s_token, dq * scale, BLOCK_M, D, ROTATE_BACK)


@triton.jit
def _key_gradient_step(
    p_q, p_dout, p_lse, p_delta, d_q, d_dout, head, start, end, lo, hi, k, v, dk, dv, s_token, s_out_token, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one block of queries to the gradients of a tile of rotated keys and of values.

    lse and delta are loaded where they are used, since each thread needs them for many columns: loaded earlier, they
    would occupy registers during the products.
    """
    rows = start + tl.arange(0, BLOCK_M)
    present = rows < end
    q = load_block(p_q, d_q, head, start, present, s_token, BLOCK_M, D, MASKED, DESCRIPTORS)
    dout = load_block(p_dout, d_dout, head, start, present, s_out_token, BLOCK_M, D, MASKED, DESCRIPTORS)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    lse = load_values(p_lse, start, present, BLOCK_M, MASKED)
    p = tl.exp2(tl.fma(s, scale_log2, -lse[None, :]))  # [BN, BM]
    if CAREFUL:
        q, poison = only_finite(q)
        dout, more = only_finite(dout)
        p += (poison + more)[None, :]
    if MASKED:
        p = tl.where(within(rows, lo, hi), p, 0.0)  # a key gets gradients only from queries of its own interval
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    delta = load_values(p_delta, start, present, BLOCK_M, MASKED)
    ds = p * (dp - delta[None, :])
    if CAREFUL:
        ds = tl.where(within(rows, lo, hi), ds, 0.0)  # delta of a query of another segment may be NaN
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=["n_tokens"])
def key_gradient_kernel(
    p_qkv, p_dqkv, d_q, d_dout, p_dout, p_lse, p_delta, p_cos, p_sin, p_bounds, p_tiles, s_token,
    s_slot, s_head, s_out_token, s_out_head, n_tokens, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROTATE_BACK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of BLOCK_N keys and one head; grid (W, H), with tiles of up to BLOCK_N tokens."""
    head_32 = tl.program_id(1)
    head = head_32.to(tl.int64)
    first, last, begin, end, exists = load_tile(p_tiles, BLOCK_N)
    p_q = p_qkv + head * s_head
    k = load_rows(p_q + s_slot, first, exists, s_token, BLOCK_N, D, True)
    v = load_rows(p_q + 2 * s_slot, first, exists, s_token, BLOCK_N, D, True)
    p_do, p_l, p_d = p_dout + head * s_out_head, p_lse + head * n_tokens, p_delta + head * n_tokens
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    plain = unmasked_end(p_bounds, first, last, begin, end, BLOCK_M)
    for start in tl.range(begin, plain, BLOCK_M, num_stages=STAGES):
        dk, dv = _key_gradient_step(
            p_q, p_do, p_l, p_d, d_q, d_dout, head_32, start, end, begin, end, k, v, dk, dv, s_token, s_out_token,
            scale_log2, D, BLOCK_M, False, False, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    lo, hi = load_bounds(p_bounds, first, exists, BLOCK_N)
    # Smaller blocks for the rest: bounds and masks need registers, and less is computed beyond the end of a segment.
    MASKED_M: tl.constexpr = min(BLOCK_M, 64)
    for start in tl.range(plain, end, MASKED_M, num_stages=STAGES):
        dk, dv = _key_gradient_step(
            p_q, p_do, p_l, p_d, d_q, d_dout, head_32, start, end, lo, hi, k, v, dk, dv, s_token, s_out_token,
            scale_log2, D, MASKED_M, True, False, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    if plain == begin and (not_finite(dk) or not_finite(dv)):
        dk = tl.zeros([BLOCK_N, D], tl.float32)
        dv = tl.zeros([BLOCK_N, D], tl.float32)
        first, _, begin, end, exists = load_tile(p_tiles, BLOCK_N)  # again: they occupy no registers during the loops
        lo, hi = load_bounds(p_bounds, first, exists, BLOCK_N)
        for start in tl.range(begin, end, CAREFUL_BLOCK, num_stages=1):
            dk, dv = _key_gradient_step(
                p_q, p_do, p_l, p_d, d_q, d_dout, head_32, start, end, lo, hi, k, v, dk, dv, s_token, s_out_token,
                scale_log2, D, CAREFUL_BLOCK, True, True, PRECISION, DESCRIPTORS,
            )  # fmt: skip
    first, _, _, _, exists = load_tile(p_tiles, BLOCK_N)
    p_dk = p_dqkv + head * s_head + s_slot
    _store_gradient(p_dk, p_cos, p_sin, first, exists, s_token, dk * scale, BLOCK_N, D, ROTATE_BACK)
    store_rows(p_dk + s_slot, first, exists, s_token, dv, BLOCK_N, D)
