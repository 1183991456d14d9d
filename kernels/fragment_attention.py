"""The forward kernel of attention inside segments of packed tokens; it also rotates the queries.

Queries are rotated at the start of their tile, each once. Keys are already rotated (`rotate_kernel`): every tile of a
segment reads all its keys, so a rotation in this kernel would repeat it for each tile, and would need registers.

Shapes of the tensors: q and out [R, H, D], whose row 0 is packed token `first_row`; k and v [T, H, D]; cos and sin
float32 [T, D/2]; lse float32 [H, T]; bounds int32 [T, 2]; tiles int32 [W, 4] as (first, last, begin, end). The last
dimension is contiguous, the other strides are arbitrary. d_k and d_v are tensor descriptors of k and v for blocks of
[BLOCK_N, 1, D], or None. out may be q: no other program reads or writes these rows of q and out.
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
    not_finite,
    only_finite,
    rotate,
    store_rows,
    unmasked_end,
    wide,
    within,
)


@triton.jit
def _forward_step(
    p_k, p_v, d_k, d_v, head, start, end, lo, hi, q, acc, l, m, s_k_token, s_v_token, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Online softmax over one block of keys. m is the largest score before scaling; scale_log2 > 0.

    Online softmax needs each key only once: if a block has a new largest score, the previous sums `acc` and `l` are
    multiplied by a correction. exp2 is the fast instruction of a GPU, so scale_log2 contains the factor 1 / ln 2.
    """
    keys = start + tl.arange(0, BLOCK_N)
    present = keys < end
    k = load_block(p_k, d_k, head, start, present, s_k_token, BLOCK_N, D, MASKED, DESCRIPTORS)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
    if MASKED:
        s = tl.where(within(keys, lo, hi), s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row without any key so far has m = -inf, and -inf - (-inf) would be NaN.
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(tl.fma(s, scale_log2, (-m_safe * scale_log2)[:, None]))
    # Exactly 1 if the largest score stays the same. fma(m, scale_log2, -m * scale_log2) is not 0 but the rounding error
    # of the product, and so the sums of a row would grow or shrink a little with each block of keys.
    rescale = tl.exp2((m - m_safe) * scale_log2)
    v = load_block(p_v, d_v, head, start, present, s_v_token, BLOCK_N, D, MASKED, DESCRIPTORS)
    if CAREFUL:
        v, poison = only_finite(v)
        p += tl.where(within(keys, lo, hi), poison[None, :], 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    if SUMS > 1:
        p = tl.reshape(p, [BLOCK_M, BLOCK_N // SUMS, SUMS])
        l = l * rescale[:, None]
    else:
        l = l * rescale
    return acc, l + tl.sum(p, 1), m_new


@triton.jit
def _no_keys(BLOCK_M: tl.constexpr, D: tl.constexpr, SUMS: tl.constexpr):
    """acc, l and m before the first block of keys.

    With SUMS > 1, l [BLOCK_M, SUMS] are sums over every SUMS-th key, added up after the loops. Four threads of a warp
    share a row of scores, and 8 neighbouring columns are two of each. So with 8 sums, each thread adds its own columns,
    and no block of keys needs an exchange between threads for the sum.
    """
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if SUMS > 1:
        return acc, tl.zeros([BLOCK_M, SUMS], tl.float32), m
    else:
        return acc, tl.zeros([BLOCK_M], tl.float32), m


@triton.jit(do_not_specialize=["first_row", "n_tokens"])
def forward_kernel(
    p_q, p_k, p_v, d_k, d_v, p_out, p_lse, p_cos, p_sin, p_bounds, p_tiles, s_q_token, s_q_head, s_k_token, s_k_head,
    s_v_token, s_v_head, s_out_token, s_out_head, first_row, n_tokens, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROTATE_Q: tl.constexpr,
    STORE_LSE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_MASKED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """out of one tile of queries and one head, and if STORE_LSE its log2 sum of exponentials; grid (W, H)."""
    head_32 = tl.program_id(1)
    head = head_32.to(tl.int64)
    first, last, begin, end, exists = load_tile(p_tiles, BLOCK_M)
    p_q += head * s_q_head
    p_k += head * s_k_head
    p_v += head * s_v_head
    row = first - first_row
    if ROTATE_Q:
        # The rotated queries are written to the memory of the result, and loaded again. On sm_90, a query tile that was
        # computed in registers would occupy them for the whole loop; a loaded one is in shared memory, from where the
        # matrix units read it. The barrier makes the stores of all threads visible before the load.
        HALF: tl.constexpr = D // 2
        cos, sin = load_angles(p_cos, p_sin, first, exists, BLOCK_M, HALF)
        a = load_rows(p_q, row, exists, s_q_token, BLOCK_M, HALF, True)
        b = load_rows(p_q + HALF, row, exists, s_q_token, BLOCK_M, HALF, True)
        a, b = rotate(a, b, cos, sin)
        p_rotated = p_out + head * s_out_head
        store_rows(p_rotated, row, exists, s_out_token, a, BLOCK_M, HALF)
        store_rows(p_rotated + HALF, row, exists, s_out_token, b, BLOCK_M, HALF)
        tl.debug_barrier()
        q = load_rows(p_rotated, row, exists, s_out_token, BLOCK_M, D, True)
    else:
        q = load_rows(p_q, row, exists, s_q_token, BLOCK_M, D, True)
    acc, l, m = _no_keys(BLOCK_M, D, SUMS)
    plain = unmasked_end(p_bounds, first, last, begin, end, BLOCK_N)
    for start in tl.range(begin, plain, BLOCK_N, num_stages=STAGES):
        acc, l, m = _forward_step(
            p_k, p_v, d_k, d_v, head_32, start, end, begin, end, q, acc, l, m, s_k_token, s_v_token, scale_log2,
            D, BLOCK_M, BLOCK_N, False, False, PRECISION, DESCRIPTORS, SUMS,
        )  # fmt: skip
    lo, hi = load_bounds(p_bounds, first, exists, BLOCK_M)  # after the loop above, which then has more free registers
    for start in tl.range(plain, end, BLOCK_MASKED, num_stages=STAGES):
        acc, l, m = _forward_step(
            p_k, p_v, d_k, d_v, head_32, start, end, lo, hi, q, acc, l, m, s_k_token, s_v_token, scale_log2,
            D, BLOCK_M, BLOCK_MASKED, True, False, PRECISION, DESCRIPTORS, SUMS,
        )  # fmt: skip
    if plain == begin and not_finite(acc):
        acc, l, m = _no_keys(BLOCK_M, D, SUMS)
        # Everything is loaded again after a barrier: otherwise the compiler would keep it in registers during the loops
        # above, although this branch rarely runs.
        tl.debug_barrier()
        first, _, begin, end, exists = load_tile(p_tiles, BLOCK_M)
        if ROTATE_Q:
            q = load_rows(p_out + head * s_out_head, first - first_row, exists, s_out_token, BLOCK_M, D, True)
        else:
            q = load_rows(p_q, first - first_row, exists, s_q_token, BLOCK_M, D, True)
        lo, hi = load_bounds(p_bounds, first, exists, BLOCK_M)
        for start in tl.range(begin, end, CAREFUL_BLOCK, num_stages=1):
            acc, l, m = _forward_step(
                p_k, p_v, d_k, d_v, head_32, start, end, lo, hi, q, acc, l, m, s_k_token, s_v_token, scale_log2,
                D, BLOCK_M, CAREFUL_BLOCK, True, True, PRECISION, DESCRIPTORS, SUMS,
            )  # fmt: skip
    # Loaded again, so that the addresses of the rows occupy no registers during the loops.
    first, _, _, _, exists = load_tile(p_tiles, BLOCK_M)
    if SUMS > 1:
        l = tl.sum(l, 1)
    # If l of a row that exists is 0, every score was -inf. Then the result is NaN, as in softmax.
    l = tl.where(exists, l, 1.0)
    if STORE_LSE:
        p = p_lse + head * n_tokens + wide(first) + tl.arange(0, BLOCK_M)
        tl.store(p, tl.fma(m, scale_log2, tl.log2(l)), mask=exists)
    store_rows(p_out + head * s_out_head, first - first_row, exists, s_out_token, acc * (1.0 / l)[:, None], BLOCK_M, D)
