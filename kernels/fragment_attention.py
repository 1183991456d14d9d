"""Attention inside segments of packed tokens, with the 2D rotation of queries and keys fused in: forward and backward.

A launch is a flat list of tiles, longest first. A tile is up to BLOCK consecutive tokens (`first`, `last`) and the
interval of tokens they may meet (`begin`, `end`). A tile of one long segment runs its interior blocks without any
masking; a tile of several short segments masks by each row's own bounds. Segments are contiguous, so bounds are all a
mask ever needs.

Where the rotation happens: inference turns the query tile once and each key block as it is read (ROPE). Training turns
queries and keys once into the buffer that backward needs anyway (`rotate_kernel`), since turning inside the backward's
loops does not fit the registers of sm_8x, and turns the gradients back in the epilogue (TURN_BACK).

Heads are worked on in halves: the pair turned together is (d, d + D/2), so with x = [a, b] the score is a.a' + b.b',
two products of half the depth, and no register ever has to be shuffled from one half to the other.

Shapes behind the pointers: qkv and dqkv [T, 3, H, D]; out and dout [T, H, D]; cos and sin float32 [T, D/2]; lse and
delta float32 [H, T]; bounds int32 [T, 2]; tiles int32 [W, 4] as (first, last, begin, end).
"""

import triton
import triton.language as tl


@triton.jit
def _halves(p_x, tokens, mask, s_token, HALF: tl.constexpr):
    """Both halves of a head at `tokens`: two [B, D/2], 0 where masked. 64-bit offsets: T * 3 * H * D passes 2^31."""
    o_d = tl.arange(0, HALF)
    p = p_x + tokens.to(tl.int64)[:, None] * s_token + o_d[None, :]
    a = tl.load(p, mask=mask[:, None], other=0.0)
    b = tl.load(p + HALF, mask=mask[:, None], other=0.0)
    return a, b


@triton.jit
def _angles(p_cos, p_sin, tokens, mask, HALF: tl.constexpr):
    """cos and sin at `tokens`: two float32 [B, D/2]."""
    o = tokens.to(tl.int64)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    return tl.load(p_cos + o, mask=mask[:, None], other=1.0), tl.load(p_sin + o, mask=mask[:, None], other=0.0)


@triton.jit
def _turn(a, b, cos, sin):
    """Rotate halves in float32 and round once, back to their dtype."""
    x, y = a.to(tl.float32), b.to(tl.float32)
    return (x * cos - y * sin).to(a.dtype), (y * cos + x * sin).to(b.dtype)


@triton.jit
def _head(p_x, p_cos, p_sin, tokens, mask, s_token, HALF: tl.constexpr, ROPE: tl.constexpr):
    """Halves of a query or key, rotated where ROPE."""
    a, b = _halves(p_x, tokens, mask, s_token, HALF)
    if ROPE:
        cos, sin = _angles(p_cos, p_sin, tokens, mask, HALF)
        a, b = _turn(a, b, cos, sin)
    return a, b


@triton.jit
def _store_turned_back(p_x, p_cos, p_sin, tokens, mask, s_token, a, b, HALF: tl.constexpr, TURN_BACK: tl.constexpr):
    """Store float32 halves of a gradient, turned back where asked (the transpose of a rotation is its inverse)."""
    if TURN_BACK:
        cos, sin = _angles(p_cos, p_sin, tokens, mask, HALF)
        a, b = a * cos + b * sin, b * cos - a * sin
    p = p_x + tokens.to(tl.int64)[:, None] * s_token + tl.arange(0, HALF)[None, :]
    tl.store(p, a.to(p_x.dtype.element_ty), mask=mask[:, None])
    tl.store(p + HALF, b.to(p_x.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _tile(p_tiles, BLOCK: tl.constexpr):
    """first, last, begin, end of this program's tile, its tokens [BLOCK], and which of them exist."""
    w = tl.program_id(0).to(tl.int64) * 4
    first, last = tl.load(p_tiles + w), tl.load(p_tiles + w + 1)
    begin, end = tl.load(p_tiles + w + 2), tl.load(p_tiles + w + 3)
    tokens = first + tl.arange(0, BLOCK)
    return first, last, begin, end, tokens, tokens < last


@triton.jit
def _bounds(p_bounds, tokens, mask):
    """Interval each token may meet; empty for tokens that do not exist."""
    o = tokens.to(tl.int64) * 2
    return tl.load(p_bounds + o, mask=mask, other=0), tl.load(p_bounds + o + 1, mask=mask, other=0)


@triton.jit
def _unmasked_end(p_bounds, first, last, begin, end, BLOCK: tl.constexpr):
    """Up to where blocks of BLOCK tokens need no mask: nowhere in a tile of several segments."""
    one_segment = (tl.load(p_bounds + first.to(tl.int64) * 2 + 1) == end) & (
        tl.load(p_bounds + (last - 1).to(tl.int64) * 2) == begin
    )
    return tl.where(one_segment, begin + (end - begin) // BLOCK * BLOCK, begin)


@triton.jit
def _forward_step(
    p_k, p_v, p_cos, p_sin, start, end, lo, hi, q_a, q_b, acc, l, m, s_token, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over one block of keys."""
    HALF: tl.constexpr = D // 2
    keys = start + tl.arange(0, BLOCK_N)
    there = keys < end
    k_a, k_b = _head(p_k, p_cos, p_sin, keys, there, s_token, HALF, ROPE)
    s = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
    s = tl.dot(q_b, tl.trans(k_b), s, input_precision=PRECISION) * scale_log2  # [BM, BN]
    if MASKED:
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has met no key yet keeps m = -inf, and -inf - -inf is not a number.
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s - m_safe[:, None])
    rescale = tl.exp2(m - m_safe)
    v = tl.load(
        p_v + keys.to(tl.int64)[:, None] * s_token + tl.arange(0, D)[None, :], mask=there[:, None], other=0.0
    )  # [BN, D]
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, l * rescale + tl.sum(p, 1), m_new


@triton.jit
def forward_kernel(
    p_qkv, p_out, p_lse, p_cos, p_sin, p_bounds, p_tiles, s_token, s_slot, s_head, s_out_token, n_tokens, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse (base 2) of one tile of queries and one head; grid (W, H)."""
    HALF: tl.constexpr = D // 2
    head = tl.program_id(1).to(tl.int64)
    first, last, begin, end, rows, exists = _tile(p_tiles, BLOCK_M)
    lo, hi = _bounds(p_bounds, rows, exists)
    p_q = p_qkv + head * s_head
    q_a, q_b = _head(p_q, p_cos, p_sin, rows, exists, s_token, HALF, ROPE)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    plain = _unmasked_end(p_bounds, first, last, begin, end, BLOCK_N)
    for start in tl.range(begin, plain, BLOCK_N, num_stages=STAGES):
        acc, l, m = _forward_step(
            p_q + s_slot, p_q + 2 * s_slot, p_cos, p_sin, start, end, lo, hi, q_a, q_b, acc, l, m, s_token, scale_log2,
            D, BLOCK_N, ROPE, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(plain, end, BLOCK_N, num_stages=STAGES):
        acc, l, m = _forward_step(
            p_q + s_slot, p_q + 2 * s_slot, p_cos, p_sin, start, end, lo, hi, q_a, q_b, acc, l, m, s_token, scale_log2,
            D, BLOCK_N, ROPE, True, PRECISION,
        )  # fmt: skip
    l = tl.where(l == 0.0, 1.0, l)  # rows beyond the tile
    out = acc / l[:, None]
    p = p_out + head * D + rows.to(tl.int64)[:, None] * s_out_token + tl.arange(0, D)[None, :]
    tl.store(p, out.to(p_out.dtype.element_ty), mask=exists[:, None])
    tl.store(p_lse + head * n_tokens + rows, m + tl.log2(l), mask=exists)


@triton.jit
def rotate_kernel(
    p_qkv, p_turned, p_cos, p_sin, s_token, s_slot, s_head, n_tokens, D: tl.constexpr, BLOCK: tl.constexpr
):
    """A copy of qkv with queries and keys rotated; grid (cdiv(T, BLOCK), H). Both share their strides."""
    HALF: tl.constexpr = D // 2
    head = tl.program_id(1).to(tl.int64) * s_head
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = tokens < n_tokens
    cos, sin = _angles(p_cos, p_sin, tokens, exists, HALF)
    p = tokens.to(tl.int64)[:, None] * s_token + tl.arange(0, HALF)[None, :] + head
    for slot in tl.static_range(3):
        a, b = _halves(p_qkv + head + slot * s_slot, tokens, exists, s_token, HALF)
        if slot < 2:
            a, b = _turn(a, b, cos, sin)
        tl.store(p_turned + p + slot * s_slot, a, mask=exists[:, None])
        tl.store(p_turned + p + slot * s_slot + HALF, b, mask=exists[:, None])


@triton.jit
def delta_kernel(p_out, p_dout, p_delta, n_tokens, s_token, D: tl.constexpr, BLOCK: tl.constexpr):
    """delta = rowsum(out * dout), what the softmax's gradient subtracts; grid (cdiv(T, BLOCK), H)."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = rows < n_tokens
    o = head * D + rows.to(tl.int64)[:, None] * s_token + tl.arange(0, D)[None, :]
    out = tl.load(p_out + o, mask=exists[:, None], other=0.0).to(tl.float32)
    dout = tl.load(p_dout + o, mask=exists[:, None], other=0.0).to(tl.float32)
    tl.store(p_delta + head * n_tokens + rows, tl.sum(out * dout, 1), mask=exists)


@triton.jit
def _query_gradient_step(
    p_k, p_v, start, end, lo, hi, q_a, q_b, dout, lse, delta, dq_a, dq_b, s_token, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a tile of rotated queries."""
    HALF: tl.constexpr = D // 2
    keys = start + tl.arange(0, BLOCK_N)
    there = keys < end
    k_a, k_b = _halves(p_k, keys, there, s_token, HALF)
    v = tl.load(
        p_v + keys.to(tl.int64)[:, None] * s_token + tl.arange(0, D)[None, :], mask=there[:, None], other=0.0
    )  # [BN, D]
    s = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
    s = tl.dot(q_b, tl.trans(k_b), s, input_precision=PRECISION) * scale_log2
    p = tl.exp2(s - lse[:, None])  # [BM, BN]
    if MASKED:
        p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(k_a.dtype)
    dq_a = tl.dot(ds, k_a, dq_a, input_precision=PRECISION)
    dq_b = tl.dot(ds, k_b, dq_b, input_precision=PRECISION)
    return dq_a, dq_b


@triton.jit
def query_gradient_kernel(
    p_qkv, p_dqkv, p_dout, p_lse, p_delta, p_cos, p_sin, p_bounds, p_tiles, s_token, s_slot, s_head, s_out_token,
    n_tokens, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TURN_BACK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries and one head; grid (W, H). qkv and dqkv share their strides."""
    HALF: tl.constexpr = D // 2
    head = tl.program_id(1).to(tl.int64)
    first, last, begin, end, rows, exists = _tile(p_tiles, BLOCK_M)
    lo, hi = _bounds(p_bounds, rows, exists)
    p_q = p_qkv + head * s_head
    q_a, q_b = _halves(p_q, rows, exists, s_token, HALF)
    o_out = head * D + rows.to(tl.int64)[:, None] * s_out_token + tl.arange(0, D)[None, :]
    dout = tl.load(p_dout + o_out, mask=exists[:, None], other=0.0)
    lse = tl.load(p_lse + head * n_tokens + rows, mask=exists, other=0.0)
    delta = tl.load(p_delta + head * n_tokens + rows, mask=exists, other=0.0)
    dq_a = tl.zeros([BLOCK_M, HALF], tl.float32)
    dq_b = tl.zeros([BLOCK_M, HALF], tl.float32)
    plain = _unmasked_end(p_bounds, first, last, begin, end, BLOCK_N)
    for start in tl.range(begin, plain, BLOCK_N, num_stages=STAGES):
        dq_a, dq_b = _query_gradient_step(
            p_q + s_slot, p_q + 2 * s_slot, start, end, lo, hi, q_a, q_b, dout, lse, delta, dq_a, dq_b,
            s_token, scale_log2, D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(plain, end, BLOCK_N, num_stages=STAGES):
        dq_a, dq_b = _query_gradient_step(
            p_q + s_slot, p_q + 2 * s_slot, start, end, lo, hi, q_a, q_b, dout, lse, delta, dq_a, dq_b,
            s_token, scale_log2, D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    _store_turned_back(
        p_dqkv + head * s_head, p_cos, p_sin, rows, exists, s_token, dq_a * scale, dq_b * scale, HALF, TURN_BACK
    )


@triton.jit
def _key_gradient_step(
    p_q, p_dout, p_lse, p_delta, start, end, lo, hi, k_a, k_b, v, dk_a, dk_b, dv, s_token, s_out_token,
    scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a tile of rotated keys and of values.

    Scores are formed transposed, S' = K Q', so that no product has to be transposed after it was made.
    """
    HALF: tl.constexpr = D // 2
    rows = start + tl.arange(0, BLOCK_M)
    there = rows < end
    q_a, q_b = _halves(p_q, rows, there, s_token, HALF)
    dout = tl.load(
        p_dout + rows.to(tl.int64)[:, None] * s_out_token + tl.arange(0, D)[None, :], mask=there[:, None], other=0.0
    )  # [BM, D]
    lse = tl.load(p_lse + rows, mask=there, other=float("inf"))  # a row that does not exist: p = 0
    delta = tl.load(p_delta + rows, mask=there, other=0.0)
    s = tl.dot(k_a, tl.trans(q_a), input_precision=PRECISION)
    s = tl.dot(k_b, tl.trans(q_b), s, input_precision=PRECISION) * scale_log2
    p = tl.exp2(s - lse[None, :])  # [BN, BM]
    if MASKED:
        # The mask is symmetric: a key meets the queries of its own interval.
        p = tl.where((rows[None, :] >= lo[:, None]) & (rows[None, :] < hi[:, None]), p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q_a.dtype)
    dk_a = tl.dot(ds, q_a, dk_a, input_precision=PRECISION)
    dk_b = tl.dot(ds, q_b, dk_b, input_precision=PRECISION)
    return dk_a, dk_b, dv


@triton.jit
def key_gradient_kernel(
    p_qkv, p_dqkv, p_dout, p_lse, p_delta, p_cos, p_sin, p_bounds, p_tiles, s_token, s_slot, s_head, s_out_token,
    n_tokens, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TURN_BACK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of BLOCK_N keys and one head; grid (W, H), tiles made for BLOCK_N."""
    HALF: tl.constexpr = D // 2
    head = tl.program_id(1).to(tl.int64)
    first, last, begin, end, keys, exists = _tile(p_tiles, BLOCK_N)
    lo, hi = _bounds(p_bounds, keys, exists)
    p_q = p_qkv + head * s_head
    k_a, k_b = _halves(p_q + s_slot, keys, exists, s_token, HALF)
    o_v = keys.to(tl.int64)[:, None] * s_token + tl.arange(0, D)[None, :]
    v = tl.load(p_q + 2 * s_slot + o_v, mask=exists[:, None], other=0.0)
    p_do, p_l, p_d = p_dout + head * D, p_lse + head * n_tokens, p_delta + head * n_tokens
    dk_a = tl.zeros([BLOCK_N, HALF], tl.float32)
    dk_b = tl.zeros([BLOCK_N, HALF], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    plain = _unmasked_end(p_bounds, first, last, begin, end, BLOCK_M)
    for start in tl.range(begin, plain, BLOCK_M, num_stages=STAGES):
        dk_a, dk_b, dv = _key_gradient_step(
            p_q, p_do, p_l, p_d, start, end, lo, hi, k_a, k_b, v, dk_a, dk_b, dv, s_token, s_out_token,
            scale_log2, D, BLOCK_M, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(plain, end, BLOCK_M, num_stages=STAGES):
        dk_a, dk_b, dv = _key_gradient_step(
            p_q, p_do, p_l, p_d, start, end, lo, hi, k_a, k_b, v, dk_a, dk_b, dv, s_token, s_out_token,
            scale_log2, D, BLOCK_M, True, PRECISION,
        )  # fmt: skip
    p_dk = p_dqkv + head * s_head + s_slot
    _store_turned_back(p_dk, p_cos, p_sin, keys, exists, s_token, dk_a * scale, dk_b * scale, HALF, TURN_BACK)
    tl.store(p_dk + s_slot + o_v, dv.to(p_dqkv.dtype.element_ty), mask=exists[:, None])
