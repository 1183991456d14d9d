"""The state of torch's random generators, kept to draw the same numbers again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """The current state of the generators of the CPU and of the GPUs in use.

    Args:
        tensors: if given, only the GPUs of these tensors are used; otherwise every GPU, once CUDA is initialised.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._cpu = torch.get_rng_state()
        if tensors:
            self._devices, self._states = get_device_states(*tensors)
        else:
            self._devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
            self._states = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Use this state inside a `with` block; afterwards the generators continue as if the block had not run."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states)
            yield
