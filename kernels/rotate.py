"""Rotation of queries and keys by their token's position, before or after attention, in place or into a copy."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_row", "n_rows", "n_heads", "n_turned"])
def rotate_kernel(
    p_x, p_out, p_cos, p_sin, s_token, s_head, s_out_token, s_out_head, first_row, n_rows, n_heads, n_turned,
    D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """out = x with heads below n_turned rotated (turned back where BACK), the rest copied; out may be x.

    Grid (cdiv(n_rows, BLOCK), cdiv(n_heads, HEADS)): one reading of the angles serves HEADS heads.
    x and out [n_rows, n_heads, D]; row 0 is token first_row; cos and sin float32 [T, D/2].
    """
    HALF: tl.constexpr = D // 2
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rows, o_d = tl.arange(0, BLOCK), tl.arange(0, HALF)
    exists = (start + rows < n_rows)[:, None]
    o_angle = (first_row + start) * HALF + (rows * HALF)[:, None] + o_d[None, :]
    cos, sin = tl.load(p_cos + o_angle, mask=exists, other=1.0), tl.load(p_sin + o_angle, mask=exists, other=0.0)
    if BACK:
        sin = -sin  # the inverse of a rotation is the rotation by the opposite angle
    p_x += start * s_token
    p_out += start * s_out_token
    for h in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + h
        if head < n_heads:
            p = p_x + head.to(tl.int64) * s_head + (rows * s_token)[:, None] + o_d[None, :]
            a, b = tl.load(p, mask=exists, other=0.0), tl.load(p + HALF, mask=exists, other=0.0)
            if head < n_turned:
                x, y = a.to(tl.float32), b.to(tl.float32)
                a = tl.fma(-y, sin, x * cos).to(a.dtype)
                b = tl.fma(x, sin, y * cos).to(b.dtype)
            p = p_out + head.to(tl.int64) * s_out_head + (rows * s_out_token)[:, None] + o_d[None, :]
            tl.store(p, a, mask=exists)
            tl.store(p + HALF, b, mask=exists)
