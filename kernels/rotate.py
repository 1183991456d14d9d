"""Rotation of queries and keys by the position of their token, in place or into a copy."""

import triton
import triton.language as tl
from exaonepath.kernels.blocks import load_angles, load_rows, rotate, store_rows


@triton.jit(do_not_specialize=["first_row", "n_rows", "n_heads", "n_rotated"])
def rotate_kernel(
    p_x, p_out, p_cos, p_sin, s_token, s_head, s_out_token, s_out_head, first_row, n_rows, n_heads, n_rotated,
    D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """out = x with heads below n_rotated rotated and the rest copied; out may be x.

    Grid (cdiv(n_rows, BLOCK), cdiv(n_heads, HEADS)): each program reads the angles once, for HEADS heads.
    x and out [n_rows, n_heads, D]; row 0 is token first_row; cos and sin float32 [T, D/2].
    """
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0) * BLOCK
    exists = tl.arange(0, BLOCK) < n_rows - row
    cos, sin = load_angles(p_cos, p_sin, first_row + row, exists, BLOCK, HALF)
    for h in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + h
        if head < n_heads:
            p = p_x + head.to(tl.int64) * s_head
            a = load_rows(p, row, exists, s_token, BLOCK, HALF, True)
            b = load_rows(p + HALF, row, exists, s_token, BLOCK, HALF, True)
            if head < n_rotated:
                x, y = rotate(a, b, cos, sin)
                a, b = x.to(a.dtype), y.to(b.dtype)
            p = p_out + head.to(tl.int64) * s_out_head
            store_rows(p, row, exists, s_out_token, a, BLOCK, HALF)
            store_rows(p + HALF, row, exists, s_out_token, b, BLOCK, HALF)
