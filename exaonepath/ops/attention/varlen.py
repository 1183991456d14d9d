"""Fragment attention in the form in which other libraries call attention over packed sequences: queries, keys and
values in three tensors, and cumulative lengths. See docs/attention.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from exaonepath.errors import SettingsError
from exaonepath.ops.attention.fragment_attention import attend_by_segment, resolve_backend, score_scale
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, rotary_periods
from exaonepath.ops.attention.triton_varlen import require_tokens, triton_varlen_attention


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Segments,
    coords: Tensor | Rotation | None = None,
    *,
    patch_size: int | None = None,
    periods: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Self-attention of packed tokens, each to the tokens of its own segment, with an optional 2D rotation.

    Results and backends are those of `fragment_attention`. There is no mask, no dropout and no causal order.

    Args:
        q, k, v: [T, H, D] of one floating dtype, on one device; any strides. A tensor whose last dimension is not
            contiguous is copied by the "triton" backend.
        cu_seqlens: int32 or int64 [S + 1] on the tokens' device, ascending from 0 to T; segment s is tokens
            cu_seqlens[s] to cu_seqlens[s + 1], and may be empty. On a GPU its values are read once, which waits for the
            GPU, and again after each write to it. `Segments.from_cu_seqlens` reads them beforehand.
        coords: [T, 2], the (x, y) of each token's patch, top left corner, in pixels of level 0, for the rotation of
            queries and keys (RoPE, `Rotation.from_coords`), integer, float32 (exact below 2^24) or float64; or a
            `Rotation`, which computes its angles once for all layers. None: no rotation. Coordinates have no gradient.
        patch_size: side of a patch in pixels of level 0; needed if `coords` is a tensor.
        periods: [D/4] patches per revolution, for `coords` in a tensor; default `rotary_periods(D)`.
        scale: positive factor on the scores; default D ** -0.5.
        backend: one of ATTENTION_BACKENDS, see `resolve_backend`; "auto" is deterministic.

    Returns:
        [T, H, D] in q's dtype, contiguous. Differentiable in q, k and v.

    Raises:
        SettingsError: shapes, dtypes, devices, cumulative lengths, coordinates or scale do not match, or the backend is
            unknown.
        BackendError: the backend cannot run on this device.
    """
    _check_tokens(q, k, v)
    tokens, _, dim = q.shape
    scale = score_scale(scale, dim)
    segments = None
    if isinstance(cu_seqlens, Segments):
        segments = cu_seqlens
        _check_device("segments are", segments.offsets, q)
    else:
        _check_device("cu_seqlens is", cu_seqlens, q)
        if not torch.compiler.is_compiling():
            segments = _read_segments(cu_seqlens)
    rotation = _rotation(coords, q, patch_size, periods)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    backend = resolve_backend(
        backend, q.device, q.dtype, dim, segments, rotated=rotation is not None, training=training
    )
    if segments is None:
        assert isinstance(cu_seqlens, Tensor)
        if backend == "triton":
            return triton_varlen_attention(q, k, v, cu_seqlens, rotation, scale)
        segments = _break_to_read_segments(cu_seqlens)
    require_tokens(segments, tokens)
    if backend == "triton":
        return triton_varlen_attention(q, k, v, segments, rotation, scale)
    # Under autocast torch's operations return its dtype.
    return attend_by_segment(q, k, v, segments, rotation, backend, scale).to(q.dtype)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 3 or not q.is_floating_point() or 0 in q.shape[1:]:
        raise SettingsError(
            f"q must be floating point [T, H, D], packed tokens without padding, got {q.dtype} {list(q.shape)}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.ndim == 3 and x.shape[::2] == q.shape[::2] and x.shape[1] != q.shape[1]:
            raise SettingsError(
                f"{name} has {x.shape[1]} heads, but q has {q.shape[1]}; grouped heads are not supported: repeat those "
                "of k and v with repeat_interleave(q.shape[1] // k.shape[1], 1)"
            )
        if x.shape != q.shape:
            raise SettingsError(
                f"{name} is {list(x.shape)}, but q is {list(q.shape)}; this is self-attention: "
                "q, k and v hold the same tokens, heads and dimensions"
            )
        if x.dtype != q.dtype:
            raise SettingsError(f"{name} is {x.dtype}, but q is {q.dtype}; convert them to one dtype")
        _check_device(f"{name} is", x, q)


def _check_device(what: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise SettingsError(f"{what} on {x.device}, but q is on {q.device}; move both to one device")


def _rotation(
    coords: Tensor | Rotation | None, q: Tensor, patch_size: int | None, periods: Tensor | None
) -> Rotation | None:
    if not isinstance(coords, Tensor):
        if patch_size is not None or periods is not None:
            raise SettingsError("patch_size and periods belong to coords [T, 2]; a Rotation has its own")
        if coords is not None:
            coords.require(q.shape[0], q.shape[2], q.device)
        return coords
    inexact = coords.is_floating_point() and coords.dtype.itemsize < 4  # half precision rounds from 2,048 or 256 on
    if coords.shape != (q.shape[0], 2) or coords.dtype == torch.bool or coords.is_complex() or inexact:
        raise SettingsError(
            f"coords must be integer, float32 or float64 [T, 2] with T = {q.shape[0]}, "
            f"got {coords.dtype} {list(coords.shape)}"
        )
    _check_device("coords is", coords, q)
    if patch_size is None or patch_size <= 0:
        raise SettingsError(f"coords needs patch_size, a positive number of pixels of level 0, got {patch_size}")
    rotation = Rotation.from_coords(coords, rotary_periods(q.shape[2]) if periods is None else periods, patch_size)
    rotation.require(q.shape[0], q.shape[2], q.device)
    return rotation


# For each tensor of cumulative lengths: its version when it was read, and its segments.
_READ: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _read_segments(cu_seqlens: Tensor) -> Segments:
    """`Segments.from_cu_seqlens`, but the same object as before while the tensor holds the same values.

    So all layers of a batch share what is computed from the segments. On a GPU, the version that torch increases at
    every write to a tensor says whether it has to be read again; inference tensors have none, and are always read. On
    the CPU a read waits for nothing, so the values are always read: other libraries may write to that memory.
    """
    seen: tuple[int | None, Segments] | None = _READ.get(cu_seqlens)
    on_cpu_or_unversioned = cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference()
    version = None if on_cpu_or_unversioned else cu_seqlens._version
    if seen is not None and version is not None and seen[0] == version:
        return seen[1]
    segments = Segments.from_cu_seqlens(cu_seqlens)
    if seen is not None and seen[1].lengths == segments.lengths:
        segments = seen[1]
    _READ[cu_seqlens] = version, segments
    return segments


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="this backend needs the lengths of the segments on the host: give Segments.from_cu_seqlens(cu_seqlens), "
    "made outside the compiled function, in place of cu_seqlens"
)
def _break_to_read_segments(cu_seqlens: Tensor) -> Segments:
    return _read_segments(cu_seqlens)
