"""Device functions the attention kernels share: tiles of tokens, rows of a head, rotation.

A launch is a flat list of tiles, longest first. A tile is up to BLOCK consecutive tokens (`first`, `last`) and the
interval of tokens they may meet (`begin`, `end`). A tile of one long segment runs its interior blocks without any
masking; a tile of several short segments masks by each row's own bounds. Segments are contiguous, so bounds are all a
mask ever needs.

Addresses are one 64-bit base per block of tokens and 32-bit offsets inside it: T * 3 * H * D passes 2^31.
"""

import triton
import triton.language as tl

# Tokens a CAREFUL step works on: few, so that the loop that hardly ever runs asks for no register beyond the others'.
CAREFUL_BLOCK = tl.constexpr(16)


@triton.jit
def wide(token):
    """A token's number in 64 bits (an int under the interpreter, which has no method to ask)."""
    return token + tl.full([], 0, tl.int64)


@triton.jit
def load_tile(p_tiles, BLOCK: tl.constexpr):
    """first, last, begin, end of this program's tile, and which of its BLOCK tokens exist."""
    w = tl.program_id(0).to(tl.int64) * 4
    first, last = tl.load(p_tiles + w), tl.load(p_tiles + w + 1)
    begin, end = tl.load(p_tiles + w + 2), tl.load(p_tiles + w + 3)
    return first, last, begin, end, tl.arange(0, BLOCK) < last - first


@triton.jit
def load_bounds(p_bounds, first, exists, BLOCK: tl.constexpr):
    """Interval each token of a tile may meet; empty for tokens that do not exist."""
    p = p_bounds + wide(first) * 2 + tl.arange(0, BLOCK) * 2
    return tl.load(p, mask=exists, other=0), tl.load(p + 1, mask=exists, other=0)


@triton.jit
def unmasked_end(p_bounds, first, last, begin, end, BLOCK: tl.constexpr):
    """Up to where blocks of BLOCK tokens need no mask: nowhere in a tile of several segments."""
    one_segment = (tl.load(p_bounds + wide(first) * 2 + 1) == end) & (tl.load(p_bounds + wide(last - 1) * 2) == begin)
    return tl.where(one_segment, begin + (end - begin) // BLOCK * BLOCK, begin)


@triton.jit
def row_pointers(p_x, first, s_token, BLOCK: tl.constexpr, D: tl.constexpr):
    """Pointers [BLOCK, D] to a head at tokens first .. first + BLOCK."""
    return p_x + wide(first) * s_token + (tl.arange(0, BLOCK) * s_token)[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(p_x, first, exists, s_token, BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """A head at BLOCK tokens from `first` on, [BLOCK, D]; where MASKED, 0 for tokens that do not exist."""
    p = row_pointers(p_x, first, s_token, BLOCK, D)
    if MASKED:
        return tl.load(p, mask=exists[:, None], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def only_finite(x):
    """x [ROWS, D] with 0 for what is infinite or NaN, and per row 0, or NaN if something was.

    A masked probability is 0, but 0 * NaN is NaN: in a product, a bad row of one segment reaches every segment of its
    tile. So where a tile has met one it is worked on again, with CAREFUL steps: products get the cleaned rows, and
    whoever may meet a bad row gets the NaN through its probabilities.
    """
    finite = tl.abs(x) < float("inf")  # false for NaN
    return tl.where(finite, x, 0.0).to(x.dtype), tl.sum(tl.where(finite, 0.0, float("nan")), 1)


@triton.jit
def not_finite(x):
    """Whether anything in x [ROWS, D] is infinite or NaN."""
    return tl.sum(tl.sum(x * 0.0, 1), 0) != 0.0  # inf * 0 is NaN, and NaN differs from everything


@triton.jit
def load_angles(p_cos, p_sin, first, exists, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """cos and sin of BLOCK tokens from `first` on: two float32 [BLOCK, D/2]."""
    o = wide(first) * HALF + (tl.arange(0, BLOCK) * HALF)[:, None] + tl.arange(0, HALF)[None, :]
    return tl.load(p_cos + o, mask=exists[:, None], other=1.0), tl.load(p_sin + o, mask=exists[:, None], other=0.0)


@triton.jit
def turn(a, b, cos, sin):
    """Rotate in float32. The pair turned together is (d, d + D/2), so a and b are the halves of a head."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.fma(-b, sin, a * cos), tl.fma(a, sin, b * cos)


@triton.jit
def store_rows(p_x, first, exists, s_token, x, BLOCK: tl.constexpr, D: tl.constexpr):
    """Store float32 [BLOCK, D] rows in the dtype of p_x."""
    tl.store(row_pointers(p_x, first, s_token, BLOCK, D), x.to(p_x.dtype.element_ty), mask=exists[:, None])


@triton.jit
def within(tokens, lo, hi):
    """[ROWS, COLUMNS]: which of the column tokens each row may meet; one unsigned comparison instead of two."""
    return (tokens[None, :] - lo[:, None]).to(tl.uint32) < (hi - lo).to(tl.uint32)[:, None]
