"""The fused Triton kernels as torch operations: allocation, launches, autograd, and fakes for torch.compile."""

from __future__ import annotations

import importlib.util
import math
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exaonepath.errors import BackendError
from exaonepath.kernels.launch_config import AttentionConfig, attention_config
from exaonepath.ops.fragment_layout import Segments
from exaonepath.ops.rotary import Rotation
from exaonepath.ops.tiles import tile_schedule, token_bounds

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_TOKENS = 2**31 - 256  # token numbers are 32-bit inside the kernels
_ROW_BLOCK = 64


def why_not(qkv: Tensor) -> str | None:
    """Why the kernels cannot serve this input, or None where they can."""
    if qkv.dtype not in DTYPES:
        return f"the triton kernels take float32, float16 and bfloat16, not {qkv.dtype}"
    if qkv.shape[3] not in HEAD_DIMS:
        return f"the triton kernels take head dimensions {', '.join(map(str, HEAD_DIMS))}, not {qkv.shape[3]}"
    if qkv.shape[0] > _MAX_TOKENS:
        return f"{qkv.shape[0]} tokens are more than the triton kernels can number"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install the triton that belongs to your torch"
    if qkv.device.type == "cpu":
        return None if _interpreted() else "the triton kernels need a CUDA device"
    if qkv.device.type != "cuda":
        return f"the triton kernels need a CUDA device, not {qkv.device}"
    major, minor = torch.cuda.get_device_capability(qkv.device)
    return None if major >= 8 else f"the triton kernels need compute capability 8.0, this GPU has {major}.{minor}"


def triton_available() -> bool:
    """Whether the kernels could serve half precision on this machine's GPU."""
    return torch.cuda.is_available() and why_not(torch.empty((1, 3, 1, 64), dtype=torch.float16, device="cuda")) is None


def triton_attention(qkv: Tensor, segments: Segments, rotation: Rotation | None, scale: float) -> Tensor:
    """`fragment_attention` through the kernels; arguments as there, checked by the caller.

    Raises:
        BackendError: the kernels cannot run here, or not on this input.
    """
    reason = why_not(qkv)
    if reason is not None:
        raise BackendError(f'{reason}; use the "sdpa" backend')
    if qkv.shape[0] == 0:
        return qkv[:, 0] * 1
    if qkv.stride(3) != 1 or qkv.stride(0) != qkv.shape[1] * qkv.shape[2] * qkv.shape[3]:
        qkv = qkv.contiguous()  # gradients share the strides of qkv, and are dense
    config = _config(qkv)
    if rotation is None:
        cos = sin = qkv.new_empty(0, dtype=torch.float32)
    else:
        cos, sin = rotation.cos_sin(torch.float32)
    tables = [
        segments.cached("bounds", token_bounds),
        *(
            segments.cached(f"tiles{block}", partial(tile_schedule, block=block))
            for block in (config.forward.block_m, config.query_gradient.block_m, config.key_gradient.block_n)
        ),
    ]
    training = torch.is_grad_enabled() and qkv.requires_grad
    out: Tensor = _forward(qkv, cos, sin, *tables, scale, training)[0]
    return out


@torch.library.custom_op("exaonepath::fragment_attention", mutates_args=())
def _forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor, tiles_m: Tensor, tiles_q: Tensor, tiles_k: Tensor,
    scale: float, training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [T, H, D], lse [H, T], and for training the rotated qkv (empty where nothing was rotated)."""
    from exaonepath.kernels.fragment_attention import forward_kernel, rotate_kernel

    tokens, _, heads, dim = qkv.shape
    config = _config(qkv)
    rope = cos.numel() > 0
    turned = torch.empty_like(qkv) if training and rope else qkv.new_empty(0)
    out = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=qkv.device)
    launch = config.forward
    with _on(qkv):
        if turned.numel():
            rotate_kernel[(-(-tokens // _ROW_BLOCK), heads)](
                qkv, turned, cos, sin, *qkv.stride()[:3], tokens, D=dim, BLOCK=_ROW_BLOCK
            )
            qkv, rope = turned, False
        forward_kernel[(tiles_m.shape[0], heads)](
            qkv, out, lse, cos, sin, bounds, tiles_m, *qkv.stride()[:3], out.stride(0), tokens, scale / math.log(2),
            D=dim, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, ROPE=rope, PRECISION=config.precision,
            STAGES=launch.num_stages, num_warps=launch.num_warps,
        )  # fmt: skip
    return out, lse, turned


@_forward.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor, tiles_m: Tensor, tiles_q: Tensor, tiles_k: Tensor,
    scale: float, training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, _, heads, dim = qkv.shape
    turned = torch.empty_like(qkv) if training and cos.numel() else qkv.new_empty(0)
    return qkv.new_empty((tokens, heads, dim)), qkv.new_empty((heads, tokens), dtype=torch.float32), turned


@torch.library.custom_op("exaonepath::fragment_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor, tiles_q: Tensor,
    tiles_k: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    from exaonepath.kernels.fragment_attention import delta_kernel, key_gradient_kernel, query_gradient_kernel

    tokens, _, heads, dim = qkv.shape
    config = _config(qkv)
    dout = dout.contiguous()
    dqkv = torch.empty_strided(qkv.shape, qkv.stride(), dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse)
    with _on(qkv):
        delta_kernel[(-(-tokens // _ROW_BLOCK), heads)](
            out, dout, delta, tokens, out.stride(0), D=dim, BLOCK=_ROW_BLOCK
        )
        for kernel, tiles, launch in (
            (query_gradient_kernel, tiles_q, config.query_gradient),
            (key_gradient_kernel, tiles_k, config.key_gradient),
        ):
            kernel[(tiles.shape[0], heads)](
                qkv, dqkv, dout, lse, delta, cos, sin, bounds, tiles, *qkv.stride()[:3], dout.stride(0), tokens,
                scale, scale / math.log(2),
                D=dim, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, TURN_BACK=cos.numel() > 0,
                PRECISION=config.precision, STAGES=launch.num_stages, num_warps=launch.num_warps,
            )  # fmt: skip
    return dqkv


@_backward.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor, tiles_q: Tensor,
    tiles_k: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    return torch.empty_strided(qkv.shape, qkv.stride(), dtype=qkv.dtype, device=qkv.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, cos, sin, bounds, _, tiles_q, tiles_k, scale, _ = inputs
    out, lse, turned = output
    # The rotated copy takes qkv's place: whoever made qkv is then free to let go of it.
    ctx.save_for_backward(turned if turned.numel() else qkv, out, lse, cos, sin, bounds, tiles_q, tiles_k)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dqkv = None if dout is None else _backward(dout, *ctx.saved_tensors, ctx.scale)
    return (dqkv, *(None,) * 8)


_forward.register_autograd(_gradient, setup_context=_save)


def _config(qkv: Tensor) -> AttentionConfig:
    capability = torch.cuda.get_device_capability(qkv.device) if qkv.device.type == "cuda" else None
    return attention_config(capability, qkv.element_size(), qkv.shape[3])


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
