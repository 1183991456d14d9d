"""Device functions that the attention kernels share: tiles of tokens, rows of a head, rotation.

A launch is a flat list of tiles, longest first. A tile consists of up to BLOCK consecutive tokens (`first`, `last`) and
the interval of tokens that they attend to (`begin`, `end`). A tile of one long segment needs no mask in its interior
blocks. A tile of several short segments uses the bounds of each row as its mask. Segments are contiguous, so two bounds
per row describe the mask completely.

An address is a 64-bit base per block of tokens plus 32-bit offsets inside the block, because T * 3 * H * D exceeds
2^31.
"""

import triton
import triton.language as tl

# Number of tokens in a CAREFUL step. It is small, so that this rarely used loop needs no more registers than the
# others.
CAREFUL_BLOCK = tl.constexpr(16)


@triton.jit
def wide(token):
    """A token's number in 64 bits. A sum replaces `.to`, because `token` can be a plain int under the interpreter."""
    return token + tl.full([], 0, tl.int64)


@triton.jit
def load_tile(p_tiles, BLOCK: tl.constexpr):
    """first, last, begin, end of this program's tile, and which of its BLOCK tokens exist.

    The last tile of a segment has fewer than BLOCK tokens; `exists` [BLOCK] is False for the others.
    """
    w = tl.program_id(0).to(tl.int64) * 4
    first, last = tl.load(p_tiles + w), tl.load(p_tiles + w + 1)
    begin, end = tl.load(p_tiles + w + 2), tl.load(p_tiles + w + 3)
    return first, last, begin, end, tl.arange(0, BLOCK) < last - first


@triton.jit
def load_bounds(p_bounds, first, exists, BLOCK: tl.constexpr):
    """Interval of tokens that each token of a tile attends to; empty for tokens that do not exist."""
    p = p_bounds + wide(first) * 2 + tl.arange(0, BLOCK) * 2
    return tl.load(p, mask=exists, other=0), tl.load(p + 1, mask=exists, other=0)


@triton.jit
def unmasked_end(p_bounds, first, last, begin, end, BLOCK: tl.constexpr):
    """The end of the blocks of BLOCK tokens that need no mask; `begin` (no block) for a tile of several segments.

    Segments are sorted. So if the segment of the first token ends at `end`, and that of the last token starts at
    `begin`, all tokens of the tile belong to one segment.
    """
    one_segment = (tl.load(p_bounds + wide(first) * 2 + 1) == end) & (tl.load(p_bounds + wide(last - 1) * 2) == begin)
    return tl.where(one_segment, begin + (end - begin) // BLOCK * BLOCK, begin)


@triton.jit
def row_pointers(p_x, first, s_token, BLOCK: tl.constexpr, D: tl.constexpr):
    """Pointers [BLOCK, D] to a head at tokens first .. first + BLOCK."""
    return p_x + wide(first) * s_token + (tl.arange(0, BLOCK) * s_token)[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(p_x, first, exists, s_token, BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """A head at BLOCK tokens, starting at `first`, [BLOCK, D]; if MASKED, 0 for tokens that do not exist."""
    p = row_pointers(p_x, first, s_token, BLOCK, D)
    if MASKED:
        return tl.load(p, mask=exists[:, None], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def load_block(
    p_x, d_x, head, first, exists, s_token, BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """`load_rows`, but if DESCRIPTOR and not MASKED, through `d_x`, a tensor descriptor of [T, H, D].

    On sm_90 and later, one thread then asks the copy engine (TMA) for the whole block, and the others compute no
    addresses. A descriptor has no mask: behind the end of a segment it loads the tokens of the next segment. So masked
    blocks are always loaded through pointers.
    """
    if DESCRIPTOR and not MASKED:
        return d_x.load([first, head, 0]).reshape([BLOCK, D])
    else:
        return load_rows(p_x, first, exists, s_token, BLOCK, D, MASKED)


@triton.jit
def load_values(p_x, first, exists, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """One value for each of BLOCK tokens, starting at `first`; if MASKED, 0 for tokens that do not exist."""
    p = p_x + wide(first) + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(p, mask=exists, other=0.0)
    else:
        return tl.load(p)


@triton.jit
def only_finite(x):
    """x [ROWS, D] with 0 in place of infinite values and NaN; and for each row NaN if it had such a value, else 0.

    A masked probability is 0, but 0 * NaN is NaN: in a product, a bad row of one segment would affect all segments of
    its tile. So if the result of a tile is not finite, the tile is computed again with CAREFUL steps. The products then
    use the cleaned rows, and the NaN is added to the probabilities of those rows that attend to the bad row.
    """
    finite = tl.abs(x) < float("inf")  # false for NaN
    return tl.where(finite, x, 0.0).to(x.dtype), tl.sum(tl.where(finite, 0.0, float("nan")), 1)


@triton.jit
def not_finite(x):
    """Whether any value in x [ROWS, D] is infinite or NaN."""
    return tl.sum(tl.sum(x * 0.0, 1), 0) != 0.0  # inf * 0 is NaN, and NaN != 0 is true


@triton.jit
def load_angles(p_cos, p_sin, first, exists, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """cos and sin of BLOCK tokens, starting at `first`: two float32 [BLOCK, D/2]."""
    o = wide(first) * HALF + (tl.arange(0, BLOCK) * HALF)[:, None] + tl.arange(0, HALF)[None, :]
    return tl.load(p_cos + o, mask=exists[:, None], other=1.0), tl.load(p_sin + o, mask=exists[:, None], other=0.0)


@triton.jit
def rotate(a, b, cos, sin):
    """Rotate in float32. Dimensions (d, d + D/2) form a pair, so a and b are the two halves of a head."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.fma(-b, sin, a * cos), tl.fma(a, sin, b * cos)


@triton.jit
def store_rows(p_x, first, exists, s_token, x, BLOCK: tl.constexpr, D: tl.constexpr):
    """Store float32 [BLOCK, D] rows in the dtype of p_x."""
    tl.store(row_pointers(p_x, first, s_token, BLOCK, D), x.to(p_x.dtype.element_ty), mask=exists[:, None])


@triton.jit
def within(tokens, lo, hi):
    """[ROWS, COLUMNS]: whether each row attends to each column token, lo <= token < hi.

    One unsigned comparison replaces two: if token < lo, the difference is negative, and a huge number as unsigned.
    """
    return (tokens[None, :] - lo[:, None]).to(tl.uint32) < (hi - lo).to(tl.uint32)[:, None]
