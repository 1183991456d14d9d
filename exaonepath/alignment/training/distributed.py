"""The processes that train together: one, or those that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from exaonepath.device import resolve_device

# Gradients are summed in buckets of this size: with one message for each parameter, latency would dominate.
_BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank, count: index of this process, and number of processes.
        device: device of this process.
    """

    rank: int
    count: int
    device: torch.device

    @staticmethod
    def start(device: str) -> Processes:
        """Join the group that the environment of a launcher describes, with one device per process; without a launcher,
        use one process on `device`.

        Raises:
            DeviceError: the device does not exist.
        """
        chosen = resolve_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes(0, 1, chosen)
        # accelerate supports the launchers, selects a communication backend, and assigns one device to each process.
        from accelerate import PartialState

        state = PartialState(cpu=chosen.type == "cpu")
        return Processes(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def any_true(self, value: bool) -> bool:
        """Whether `value` is true on any process; all processes must call it."""
        if self.count == 1:
            return value
        flag = torch.tensor([int(value)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Wait until all processes have called it."""
        if self.count > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum `.grad` over the processes; it stays None for a parameter without a gradient on any process."""
        if self.count == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.device)
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        with_gradient = [p for p, flag in zip(parameters, has.tolist(), strict=True) if flag]
        for bucket in _buckets(with_gradient):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            flat = torch.cat([p.grad.reshape(-1) for p in bucket])  # type: ignore[union-attr]
            dist.all_reduce(flat)
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]


def _buckets(parameters: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        n_bytes = parameter.numel() * parameter.element_size()
        if bucket and (size + n_bytes > _BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += n_bytes
    if bucket:
        yield bucket
