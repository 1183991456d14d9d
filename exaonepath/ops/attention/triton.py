"""The fused Triton kernels as torch operations: checks, allocation, launches, autograd, and fakes for torch.compile.

The operators take only tensors and numbers. Everything else that the kernels need (tile lists, launch settings, whether
the machine supports them) is looked up inside the operators, at run time. So a compiled graph neither breaks nor
specialises on one slide. A CUDA graph would replay the launches of the slide that it was captured with. Therefore the
operators have a tag, so that torch.compile excludes them from its CUDA graphs, and a capture by hand logs a warning.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from typing import Any

import torch
from torch import Tensor

from exaonepath.errors import BackendError, SettingsError
from exaonepath.kernels.launch_config import ROTATE, AttentionConfig, attention_config
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation
from exaonepath.ops.attention.tiles import TileSchedules, schedules

logger = logging.getLogger(__name__)

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOOKS_UP_TILES = (torch.Tag.cudagraph_unsafe,)
_MAX_TOKENS = 2**31 - 256  # token numbers are 32-bit inside the kernels


def unsupported_input(dtype: torch.dtype, head_dim: int, tokens: int) -> str | None:
    """The reason why the kernels do not support such input on any machine, or None if they do."""
    if dtype not in DTYPES:
        return f"the triton kernels take float32, float16 and bfloat16, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the triton kernels take head dimensions {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if tokens > _MAX_TOKENS:
        return f"{tokens} tokens are more than the triton kernels can number"
    return None


def unsupported_device(device: torch.device) -> str | None:
    """The reason why the kernels cannot run on this device of this machine, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install the triton that belongs to your torch"
    if device.type == "cpu":
        return None if _interpreted() else "the triton kernels need a CUDA device"
    if device.type != "cuda":
        return f"the triton kernels need a CUDA device, not {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the triton kernels need compute capability 8.0, this GPU has {major}.{minor}"


def triton_attention(
    qkv: Tensor, segments: Segments, rotation: Rotation | None, scale: float, overwrite_qkv: bool = False
) -> Tensor:
    """`fragment_attention` through the kernels; the same arguments, checked by the caller.

    Raises:
        BackendError: the kernels do not support this device or this input.
    """
    _refuse(unsupported_input(qkv.dtype, qkv.shape[3], qkv.shape[0]))
    if qkv.shape[0] == 0:
        return qkv[:, 0] * 1  # a new tensor, connected to the graph
    offsets = _known_offsets(segments)
    cos, sin = _tables(qkv, rotation)
    training = torch.is_grad_enabled() and qkv.requires_grad
    if qkv.stride(3) != 1 or (training and not qkv.is_contiguous()):
        qkv = qkv.contiguous()
    if overwrite_qkv and not training:
        q, k, v = qkv.unbind(1)
        if rotation is not None:
            _rotate_rows(k, cos, sin, 0)
        _attend_rows(q, k, v, cos, sin, offsets, 0, scale)
        return q
    out: Tensor = _forward(qkv, cos, sin, offsets, scale, training)[0]
    return out


def triton_attend_rows(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, first_row: int, rotation: Rotation | None, scale: float
) -> None:
    """Attention of some query rows over all keys of their segments; the result overwrites the queries. No autograd.

    Args:
        q: [R, H, D] queries of packed tokens first_row .. first_row + R, last dimension contiguous. They are rotated if
            `rotation` is given, and overwritten with the result.
        k, v: [T, H, D], last dimension contiguous, not shared with q; keys already rotated (`triton_rotate_rows`).
        segments: segments that cover all T tokens.
        rotation: rotation of all T tokens, or None.
        scale: positive factor on the scores.

    Raises:
        SettingsError: shapes, dtypes, devices or strides do not match.
        BackendError: the kernels do not support this device or this input.
    """
    _check_rows(q, k.shape[0], first_row, rotation)
    if k.shape != v.shape or k.shape[1:] != q.shape[1:] or not q.dtype == k.dtype == v.dtype:
        raise SettingsError(
            f"queries, keys and values do not match: {list(q.shape)} {q.dtype}, {list(k.shape)} {k.dtype}, "
            f"{list(v.shape)} {v.dtype}"
        )
    if segments.n_tokens != k.shape[0]:
        raise SettingsError(f"segments cover {segments.n_tokens} tokens, but there are {k.shape[0]} keys")
    if not q.device == k.device == v.device == segments.offsets.device:
        raise SettingsError("queries, keys, values and segments must be on one device")
    if k.stride(2) != 1 or v.stride(2) != 1:
        raise SettingsError("the last dimension of keys and values must be contiguous")
    if q.shape[0]:
        _attend_rows(q, k, v, *_tables(q, rotation), _known_offsets(segments), first_row, scale)


def triton_rotate_rows(k: Tensor, rotation: Rotation, first_row: int) -> None:
    """Rotate heads [R, H, D] of packed tokens first_row .. first_row + R in place, by one kernel. No autograd.

    Raises:
        SettingsError: shapes, devices or strides do not match.
        BackendError: the kernels do not support this device or this input.
    """
    _check_rows(k, rotation.positions.shape[0], first_row, rotation)
    if k.shape[0]:
        _rotate_rows(k, *_tables(k, rotation), first_row)


def _check_rows(x: Tensor, tokens: int, first_row: int, rotation: Rotation | None) -> None:
    if x.ndim != 3 or x.stride(2) != 1:
        raise SettingsError(f"rows must be [R, H, D] with a contiguous last dimension, got {list(x.shape)}")
    _refuse(unsupported_input(x.dtype, x.shape[2], tokens))
    if first_row < 0 or first_row + x.shape[0] > tokens:
        raise SettingsError(f"rows {first_row} to {first_row + x.shape[0]} are not all among {tokens} tokens")
    if rotation is not None:
        rotation.require(tokens, x.shape[2], x.device)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise BackendError(f'{reason}; use the "sdpa" backend')


def _known_offsets(segments: Segments) -> Tensor:
    if not torch.compiler.is_compiling():
        # Computed from the lengths on the host and stored, so that no operator has to read the offsets from the device.
        schedules(segments.offsets, segments)
    return segments.offsets


def _tables(x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    if rotation is None:
        empty = x.new_empty(0, dtype=torch.float32)  # operators take no None in place of these tensors
        return empty, empty
    return rotation.cos_sin(torch.float32)


def _config(x: Tensor) -> AttentionConfig:
    """Launch settings for [..., D] on its device; raises `BackendError` if the device does not support the kernels."""
    _refuse(unsupported_device(x.device))
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
    return attention_config(capability, x.element_size(), x.shape[-1])


def _descriptors(wanted: bool, block: int, *tensors: Tensor) -> tuple[Any, ...]:
    """A tensor descriptor for blocks of a head [T, 1, D] of each tensor [T, H, D], or None for all of them.

    None if the launch does not want them, or if the copy engine cannot address one of the tensors. A descriptor is an
    argument of the launch, so it needs no memory on the device.
    """
    if not (wanted and all(map(_describable, tensors))):
        return (None,) * len(tensors)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return tuple(TensorDescriptor(t, list(t.shape), list(t.stride()), [block, 1, t.shape[2]]) for t in tensors)


def _describable(x: Tensor) -> bool:
    """Whether the copy engine can address [T, H, D]: base and strides are multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2])


def _launch_forward(
    config: AttentionConfig, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, cos: Tensor, sin: Tensor,
    known: TileSchedules, first_row: int, rotate_queries: bool, scale: float,
) -> None:  # fmt: skip
    from exaonepath.kernels.fragment_attention import forward_kernel

    launch = config.forward
    tiles = known.tiles(launch.block_m, first_row, q.shape[0])
    d_k, d_v = _descriptors(launch.descriptors, launch.block_n, k, v)
    with _on(q):
        forward_kernel[(tiles.shape[0], q.shape[1])](
            q, k, v, d_k, d_v, out, lse, *((cos, sin) if rotate_queries else (None, None)), known.bounds, tiles,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], first_row, known.n_tokens,
            scale / math.log(2),
            D=q.shape[2], BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, ROTATE_Q=rotate_queries,
            STORE_LSE=lse is not None, PRECISION=config.precision, STAGES=launch.num_stages,
            DESCRIPTORS=d_k is not None, SUMS=launch.sums, num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def _launch_query_gradient(
    config: AttentionConfig, qkv: Tensor, dqkv: Tensor, out: Tensor, dout: Tensor, lse: Tensor, delta: Tensor,
    cos: Tensor, sin: Tensor, known: TileSchedules, scale: float,
) -> None:  # fmt: skip
    """dqkv[:, 0], and delta, which the other gradients need."""
    from exaonepath.kernels.fragment_attention_backward import query_gradient_kernel

    launch, rotate_back = config.query_gradient, cos.numel() > 0
    tiles = known.tiles(launch.block_m)
    d_k, d_v = _descriptors(launch.descriptors, launch.block_n, qkv[:, 1], qkv[:, 2])
    with _on(qkv):
        query_gradient_kernel[(tiles.shape[0], qkv.shape[2])](
            qkv, dqkv, d_k, d_v, out, dout, lse, delta, *((cos, sin) if rotate_back else (None, None)), known.bounds,
            tiles, *qkv.stride()[:3], *dout.stride()[:2], known.n_tokens, scale, scale / math.log(2),
            D=qkv.shape[3], BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, ROTATE_BACK=rotate_back,
            PRECISION=config.precision, STAGES=launch.num_stages, DESCRIPTORS=d_k is not None,
            num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def _launch_key_gradient(
    config: AttentionConfig, qkv: Tensor, dqkv: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, cos: Tensor,
    sin: Tensor, known: TileSchedules, scale: float,
) -> None:  # fmt: skip
    """dqkv[:, 1] and dqkv[:, 2]."""
    from exaonepath.kernels.fragment_attention_backward import key_gradient_kernel

    launch, rotate_back = config.key_gradient, cos.numel() > 0
    tiles = known.tiles(launch.block_n)
    d_q, d_dout = _descriptors(launch.descriptors, launch.block_m, qkv[:, 0], dout)
    with _on(qkv):
        key_gradient_kernel[(tiles.shape[0], qkv.shape[2])](
            qkv, dqkv, d_q, d_dout, dout, lse, delta, *((cos, sin) if rotate_back else (None, None)), known.bounds,
            tiles, *qkv.stride()[:3], *dout.stride()[:2], known.n_tokens, scale, scale / math.log(2),
            D=qkv.shape[3], BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, ROTATE_BACK=rotate_back,
            PRECISION=config.precision, STAGES=launch.num_stages, DESCRIPTORS=d_q is not None,
            num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def _launch_rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, first_row: int, n_rotated: int) -> None:
    """out [R, H, D] = x with its first `n_rotated` heads rotated."""
    from exaonepath.kernels.rotate import rotate_kernel

    rows, heads, dim = x.shape
    block = ROTATE.tokens(dim)
    with _on(x):
        rotate_kernel[(-(-rows // block), -(-heads // ROTATE.heads))](
            x, out, cos, sin, *x.stride()[:2], *out.stride()[:2], first_row, rows, heads, n_rotated,
            D=dim, BLOCK=block, HEADS=ROTATE.heads, num_warps=ROTATE.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip


@torch.library.custom_op("exaonepath::attend_rows", mutates_args=("q",), tags=_LOOKS_UP_TILES)
def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, first_row: int, scale: float
) -> None:
    known = _schedules(offsets)
    _launch_forward(_config(q), q, k, v, q, None, cos, sin, known, first_row, cos.numel() > 0, scale)


@_attend_rows.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, first_row: int, scale: float) -> None:
    return None


@torch.library.custom_op("exaonepath::rotate_rows", mutates_args=("x",))
def _rotate_rows(x: Tensor, cos: Tensor, sin: Tensor, first_row: int) -> None:
    _refuse(unsupported_device(x.device))
    _launch_rotate(x, x, cos, sin, first_row, x.shape[1])


@_rotate_rows.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, first_row: int) -> None:
    return None


@torch.library.custom_op("exaonepath::fragment_attention", mutates_args=(), tags=_LOOKS_UP_TILES)
def _forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, scale: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, H, D], lse [H, T] and the rotated qkv. The last two are empty without training; qkv also without
    rotation.

    lse is the logarithm of the sum of exponentials of each row's scores: with it, the backward pass computes each
    probability again from its score, without another pass over the row.
    """
    tokens, _, heads, dim = qkv.shape
    _refuse(unsupported_device(qkv.device))
    known = _schedules(offsets)
    rope = cos.numel() > 0
    if training:
        qkv = qkv.contiguous()  # a compiled graph may pass other strides than those that were traced
    out = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((heads, tokens) if training else 0, dtype=torch.float32, device=qkv.device)
    rotated = torch.empty_like(qkv) if training and rope else qkv.new_empty(0)
    q, k, v = qkv.unbind(1)
    rotate_queries = rope and not training
    if training and rope:
        # Queries and keys are the first 2 * heads of 3 * heads; the values are copied.
        _launch_rotate(qkv.flatten(1, 2), rotated.flatten(1, 2), cos, sin, 0, 2 * heads)
        q, k, v = rotated.unbind(1)
    elif rope:
        k = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
        _launch_rotate(qkv[:, 1], k, cos, sin, 0, heads)
    _launch_forward(_config(q), q, k, v, out, lse if training else None, cos, sin, known, 0, rotate_queries, scale)
    return out, lse, rotated


@_forward.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, scale: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, heads, dim = qkv.shape
    lse = qkv.new_empty((heads, tokens) if training else 0, dtype=torch.float32)
    rotated = qkv.new_empty(qkv.shape if training and cos.numel() else 0)
    return qkv.new_empty((tokens, heads, dim)), lse, rotated


@torch.library.custom_op("exaonepath::fragment_attention_backward", mutates_args=(), tags=_LOOKS_UP_TILES)
def _backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """Gradient of qkv [T, 3, H, D]; `qkv` is the rotated one if there is a rotation."""
    known, config = _schedules(offsets), _config(qkv)
    qkv, dout = qkv.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    _launch_query_gradient(config, qkv, dqkv, out, dout, lse, delta, cos, sin, known, scale)
    _launch_key_gradient(config, qkv, dqkv, dout, lse, delta, cos, sin, known, scale)
    return dqkv


@_backward.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, cos, sin, offsets, scale, _ = inputs
    out, lse, rotated = output
    # The rotated copy is saved instead of qkv, so the memory of qkv can be freed after the forward pass.
    ctx.save_for_backward(rotated if rotated.numel() else qkv, out, lse, cos, sin, offsets)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dqkv = None if dout is None else _backward(dout, *ctx.saved_tensors, ctx.scale)
    return (dqkv, *(None,) * 5)


_forward.register_autograd(_gradient, setup_context=_save)


def _schedules(offsets: Tensor) -> TileSchedules:
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        logger.warning(
            "fragment attention is captured in a CUDA graph: every replay uses the segments of this call, even if the "
            "offsets change; capture one graph for each set of segments"
        )
    return schedules(offsets)


def _on(tensor: Tensor) -> Any:
    """Make the tensor's device current: Triton launches on the current device. -1 changes nothing."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
