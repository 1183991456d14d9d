"""The sweep on CUDA: one call into the extension queues all tiles of a pair, products included.

A loop over tiles in Python takes about 90 us a tile of the host's time, and a tile takes the device less than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exaonepath.ops.extension import require_extension
from exaonepath.ops.sigmoid_loss.sweep import N_SUMS, PairTask, Tile

# 48 MB of float32 and 24 MB of half precision. On an H200, larger tiles were faster, although they do not fit its
# cache: at B = 32,768 and d = 512, a pair took 9.2 ms with (4096, 2048) and 8.4 ms with (4096, 4096). With the 32 MB of
# cuBLAS, the latter would take more than 128 MB.
CUDA_TILE = Tile(4096, 3072)
# The pass of a tile on a second stream, during the products of its neighbours; the workspace then holds two tiles. On
# an H200 this was 3 to 5 % slower.
OVERLAPPED = False


@dataclass(frozen=True)
class CudaSweep:
    """The sweep on the current stream of the task's device.

    Products are cuBLAS's through torch's own handle: its workspace, and its setting of TF32.
    """

    tile: Tile
    overlapped: bool

    def __call__(self, task: PairTask) -> None:
        if task.u.shape[0] == 0 or task.v.shape[0] == 0:
            return
        dtype, device = task.engine.gradient_operand, task.u.device
        # The same tensors, if the dtypes are the same. Copies live until this function returns, and their memory is
        # then given only to later work on this stream.
        gradient_u, gradient_v = (task.u, task.v) if task.gradients is None else (task.u.to(dtype), task.v.to(dtype))
        du, dv = (None, None) if task.gradients is None else task.gradients
        _require(task, gradient_u, gradient_v)
        rows, columns, dim = task.u.shape[0], task.v.shape[0], task.u.shape[1]
        extension = require_extension()
        size = extension.sigmoid_sweep_workspace_cuda(
            rows, columns, self.tile.rows, self.tile.columns, _name(dtype), self.overlapped
        )
        workspace = task.workspace.bytes(size, device)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            side_stream = torch.cuda.Stream().cuda_stream if self.overlapped else 0
            extension.sigmoid_sweep_cuda(
                u=task.u.data_ptr(),
                v=task.v.data_ptr(),
                gradient_u=gradient_u.data_ptr(),
                gradient_v=gradient_v.data_ptr(),
                du=_address(du),
                dv=_address(dv),
                dtype=_name(task.u.dtype),
                gradient_dtype=_name(dtype),
                row_ids=task.row_ids.data_ptr(),
                col_ids=task.column_ids.data_ptr(),
                params=task.constants.on_device.data_ptr(),
                sums=task.sums.data_ptr(),
                rows=rows,
                cols=columns,
                dim=dim,
                tile_rows=self.tile.rows,
                tile_cols=self.tile.columns,
                workspace=workspace.data_ptr(),
                device=device.index,
                stream=stream,
                side_stream=side_stream,
                blas_handle=torch.cuda.current_blas_handle(),
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _require(task: PairTask, gradient_u: Tensor, gradient_v: Tensor) -> None:
    """Check tensors before their raw pointers go to the extension. A failure is a bug of this package."""
    u, v, engine = task.u, task.v, task.engine
    gradient_operand = u.dtype if task.gradients is None else engine.gradient_operand
    rows, columns = (u.shape[0],), (v.shape[0],)
    wanted = [
        (u, u.shape, engine.operand),
        (v, (*columns, u.shape[1]), engine.operand),
        (task.row_ids, rows, torch.int64),
        (task.column_ids, columns, torch.int64),
        (task.constants.on_device, (3,), torch.float64),
        (task.sums, (N_SUMS,), torch.float64),
    ]
    if gradient_u is not u or gradient_v is not v:
        wanted += [(gradient_u, u.shape, gradient_operand), (gradient_v, v.shape, gradient_operand)]
    if task.gradients is not None:
        wanted += [(task.gradients[0], u.shape, torch.float32), (task.gradients[1], v.shape, torch.float32)]
    device = u.device
    for tensor, shape, dtype in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != device:
            raise TypeError("a tensor of the sweep does not match the interface in csrc/sigmoid_loss.h")
