"""Two threads, one device: patches of one slide are encoded while the slide encoder works on another.

Both fit into the memory of the device as a rule. If the slide encoder runs out of it, it gets the device for itself.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from exaonepath.slides.features.encoding import HalvingEncoder
from exaonepath.slides.features.pipeline import Started


class DeviceGate:
    """Keeps the patch encoder from beginning a batch while the slide encoder needs the whole device."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._wanted = threading.Event()
        self._free = threading.Event()
        self._free.set()

    def guard(self, encoder: HalvingEncoder) -> GuardedEncoder:
        """The encoder, whose batches wait at the gate."""
        return GuardedEncoder(encoder, self)

    @contextmanager
    def alone(self, device: torch.device) -> Iterator[None]:
        """Let no batch begin during the block, and give unused memory back to the device."""
        self._free.clear()
        try:
            with self._busy:
                gc.collect()
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
                yield
        finally:
            self._free.set()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Begin a batch, as soon as nobody needs the device for itself."""
        self._free.wait()
        with self._busy:
            yield


class GuardedEncoder:
    """An encoder whose batches wait at a gate."""

    def __init__(self, encoder: HalvingEncoder, gate: DeviceGate) -> None:
        self._encoder, self._gate = encoder, gate
        self.batch_size, self.page_locked = encoder.batch_size, encoder.page_locked

    def start(self, images: np.ndarray) -> Started:
        """See `BatchEncoder.start`."""
        with self._gate.batch():
            return self._encoder.start(images)

    def width(self) -> int:
        """See `BatchEncoder.width`."""
        with self._gate.batch():
            return self._encoder.width()
