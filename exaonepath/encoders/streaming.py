"""Copies of rows between the host's memory and a GPU, while the GPU computes.

A GPU can copy from and to page-locked memory by itself, in the background. Two page-locked buffers are used
alternately: while a copy from or to one buffer runs, the CPU fills or empties the other. If no copy between host and
GPU is needed, the same calls copy directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFERS = 2


class _Buffers:
    """Page-locked [rows, width] buffers, used alternately. Each has an event that marks the end of its last copy."""

    def __init__(self, device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
        self._device = device
        self._all = [_page_locked(rows, width, dtype) for _ in range(_BUFFERS)]
        self._copied: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._current = 0

    def advance(self) -> int:
        """Switch to the next buffer, and return its number."""
        self._current = (self._current + 1) % _BUFFERS
        return self._current

    def settled(self, number: int) -> Tensor:
        """The buffer, after its last copy has ended."""
        event = self._copied[number]
        if event is not None:
            event.synchronize()
        return self._all[number]

    def mark(self, number: int) -> None:
        """Record that a copy from or to the buffer was started."""
        self._copied[number] = _event(self._device)


def _page_locked(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, width), dtype=dtype, pin_memory=True)


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _need_buffers(host: torch.device, device: torch.device) -> bool:
    return host.type == "cpu" and device.type == "cuda"


class RowReader:
    """Reads rows of a [M, C] tensor, on any device, to `device`.

    Args:
        source: [M, C]. device: device of the result. rows: largest number of rows in one call.
    """

    def __init__(self, source: Tensor, device: torch.device, rows: int) -> None:
        self._source, self._device = source, device
        need = _need_buffers(source.device, device)
        self._buffers = _Buffers(device, rows, source.shape[1], source.dtype) if need else None

    def take(self, index: Tensor) -> Tensor:
        """Rows [R, C] at int64 [R] positions (on the source's device), on the reader's device."""
        if self._buffers is None:
            return self._source.index_select(0, index).to(self._device)
        number = self._buffers.advance()
        part = self._buffers.settled(number)[: index.numel()]
        torch.index_select(self._source, 0, index, out=part)
        # Returns before the copy ends. Later GPU work waits for it, because it is in the same stream.
        moved = part.to(self._device, non_blocking=True)
        self._buffers.mark(number)
        return moved


class RowWriter:
    """Writes [R, W] tensors of `device` to tensors that may be on the host. Call `finish` before reading those.

    Args:
        device: device of the values. host: device of the targets. rows: largest number of rows in one call. width: W.
        dtype: dtype of the values.
    """

    def __init__(self, device: torch.device, host: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
        self._buffers = _Buffers(device, rows, width, dtype) if _need_buffers(host, device) else None
        self._pending: dict[int, Tensor] = {}

    def put(self, values: Tensor, target: Tensor) -> None:
        """Copy values [R, W] to `target` of the same shape."""
        if self._buffers is None:
            target.copy_(values)
            return
        number = self._buffers.advance()
        self._empty(number)  # the values of an earlier call go to their target before the buffer is used again
        self._buffers.settled(number)[: values.shape[0]].copy_(values, non_blocking=True)
        self._buffers.mark(number)
        self._pending[number] = target

    def finish(self) -> None:
        """Wait for every copy."""
        for number in list(self._pending):
            self._empty(number)

    def _empty(self, number: int) -> None:
        if self._buffers is not None and number in self._pending:
            target = self._pending.pop(number)
            target.copy_(self._buffers.settled(number)[: target.shape[0]])
