"""The patch encoder on its device: images in, features out, so that a GPU computes one batch while others move.

On a CUDA device `start` returns before the work is done. Images are copied to the device on one stream and features
back on another, from and to page-locked memory, which the GPU can access by itself; the encoder runs on the current
stream in between. On other devices `start` computes at once.

In half precision an unmodified patch encoder is called through a copy with converted weights (`encoders.prepared`); any
other module runs under autocast.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from exaonepath.device import inference
from exaonepath.encoders.prepared import PreparedPatchEncoder, can_prepare
from exaonepath.errors import BackendError, DeviceError, DeviceMemoryError, SettingsError
from exaonepath.slides.features.batch_size import check_batch_size, choose_batch_size
from exaonepath.slides.features.preprocessing import PreprocessingConfig, normalise

logger = logging.getLogger(__name__)


class Features:
    """The features of a batch that was given to the device, perhaps not finished."""

    def __init__(self, values: Tensor, copied: torch.cuda.Event | None) -> None:
        self._values, self._copied = values, copied

    def result(self) -> np.ndarray:
        """Wait for the device; float32 [b, D]. Any thread may call this."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.numpy()


class BatchEncoder:
    """An encoder, moved to its device, that is called with batches of preprocessed images.

    Args:
        module: maps normalised float [B, 3, crop, crop] to [B, D]; in evaluation mode.
        preprocessing: mean and standard deviation.
        device: where to run.
        dtype: of the matrix products: float32, bfloat16 or float16.
        batch_size: most images in a batch; "auto": see `choose_batch_size`.
        earlier_batch_size: of the interrupted run that is continued; "auto" takes it again.
        compile: run the encoder through `torch.compile`, for batches of one size: smaller ones are padded.

    Attributes:
        batch_size: most images in a batch.

    Raises:
        SettingsError: the batch size is invalid.
        DeviceError: the encoder cannot be moved to the device.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocessing: PreprocessingConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch_size: int | Literal["auto"] = 32,
        earlier_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        check_batch_size(batch_size)
        self._preprocessing, self._device, self._compile = preprocessing, device, compile
        try:
            module.to(device)
        except (RuntimeError, AssertionError) as exc:  # torch built without CUDA raises AssertionError
            raise DeviceError(f"the patch encoder cannot be moved to {device}: {exc}") from exc
        try:
            self._call, self._autocast = _callable(module, dtype, compile)
        except torch.OutOfMemoryError as exc:
            raise BackendError(f"the patch encoder in {dtype} does not fit into the memory of {device}: {exc}") from exc
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        self.batch_size = (
            choose_batch_size(module, device, dtype, self._autocast != dtype, preprocessing.crop, earlier_batch_size)
            if batch_size == "auto"
            else batch_size
        )

    @property
    def page_locked(self) -> bool:
        """Whether images in page-locked memory are copied to the device in the background."""
        return self._streams is not None

    def start(self, images: np.ndarray) -> Features:
        """Encode images uint8 [b, crop, crop, 3].

        The images must not be changed before `Features.result` has returned.

        Raises:
            SettingsError: the encoder does not return [b, D].
            DeviceMemoryError: the batch does not fit into the device's memory.
            BackendError: the encoder cannot be compiled.
        """
        n = len(images)
        advice = "; use a smaller batch size (what was done is kept)"
        with inference(self._device, self._autocast, f"a batch of {n} patches", advice):
            batch = normalise(self._uploaded(torch.from_numpy(images)), self._preprocessing)
            if self._compile and n < self.batch_size:
                # Another size would be compiled again. Zeros, so that the rows that are dropped are finite.
                batch = torch.cat([batch, batch.new_zeros((self.batch_size - n, *batch.shape[1:]))])
            features = self._call(batch) if not self._compile else self._call_compiled(batch)
            if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(batch):
                got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise SettingsError(
                    f"the patch encoder must return a tensor [{len(batch)}, D] for this batch, got {got}"
                )
            return self._read_back(features[:n].float())

    def width(self) -> int:
        """D, for a slide without patches, where no output of the encoder shows it."""
        crop = self._preprocessing.crop
        return self.start(np.zeros((1, crop, crop, 3), np.uint8)).result().shape[1]

    def with_batch_size(self, batch_size: int) -> BatchEncoder:
        """The same encoder for batches of another size."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def _call_compiled(self, batch: Tensor) -> Any:
        from torch._dynamo.exc import TorchDynamoException  # takes long to import

        try:
            return self._call(batch)
        except TorchDynamoException as exc:
            raise BackendError(f"the patch encoder cannot be compiled; run it without compilation: {exc}") from exc

    def _uploaded(self, images: Tensor) -> Tensor:
        if self._streams is None:
            return images.to(self._device)
        compute, upload = torch.cuda.current_stream(self._device), self._streams[0]
        with torch.cuda.stream(upload):
            batch = images.to(self._device, non_blocking=True)
        compute.wait_stream(upload)
        # The memory belongs to the copying stream: it must not be used again before the encoder has read it.
        batch.record_stream(compute)
        return batch

    def _read_back(self, features: Tensor) -> Features:
        if self._streams is None:
            return Features(features.cpu(), None)
        compute, back = torch.cuda.current_stream(self._device), self._streams[1]
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        back.wait_stream(compute)
        with torch.cuda.stream(back):
            host.copy_(features, non_blocking=True)
            features.record_stream(back)
            copied = torch.cuda.Event(blocking=True)  # waiting must not keep a core busy that could read patches
            copied.record(back)
        return Features(host, copied)


class HalvingEncoder:
    """An encoder of one slide that goes on with half the batch size, once, if the device's memory is exhausted.

    Args:
        encoder: the encoder; batches of its size still come in.
    """

    def __init__(self, encoder: BatchEncoder) -> None:
        self._encoder = encoder
        self._half: BatchEncoder | None = None
        self.batch_size, self.page_locked = encoder.batch_size, encoder.page_locked

    def start(self, images: np.ndarray) -> Features | JoinedFeatures:
        """Encode images uint8 [b, crop, crop, 3] (see `BatchEncoder.start`), perhaps in two parts.

        Raises:
            DeviceMemoryError: half a batch does not fit either, or there is nothing to divide.
        """
        if self._half is None:
            try:
                return self._encoder.start(images)
            except DeviceMemoryError as exc:
                if self.batch_size < 2:
                    raise
                logger.warning("%s; going on with batches of %d", exc, self.batch_size // 2)
                self._half = self._encoder.with_batch_size(self.batch_size // 2)
            # Outside of the handler: the exception refers to frames that hold tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        size = self._half.batch_size
        return JoinedFeatures([self._half.start(images[at : at + size]) for at in range(0, len(images), size)])

    def width(self) -> int:
        """See `BatchEncoder.width`."""
        return self._encoder.width()


class JoinedFeatures:
    """The features of a batch that was encoded in parts."""

    def __init__(self, parts: Sequence[Features]) -> None:
        self._parts = parts

    def result(self) -> np.ndarray:
        """Wait for the device; float32 [b, D]. Any thread may call this."""
        return np.concatenate([part.result() for part in self._parts])


# Compilation takes a minute, so an encoder of many slides is compiled once.
_compiled: WeakKeyDictionary[nn.Module, tuple[object, Callable[[Tensor], Any]]] = WeakKeyDictionary()


def _callable(module: nn.Module, dtype: torch.dtype, compile: bool) -> tuple[Callable[[Tensor], Any], torch.dtype]:
    """What is called for a batch, and the dtype of autocast around it (float32: none)."""
    if not can_prepare(module):
        return (torch.compile(module, dynamic=False) if compile else module), dtype
    if not compile:
        return (module if dtype == torch.float32 else PreparedPatchEncoder(module, dtype)), torch.float32
    # Weights that were changed since are seen by their address, or by the number of their changes in place.
    state = dtype, *((p.data_ptr(), None if p.is_inference() else p._version) for p in module.parameters())
    found = _compiled.get(module)
    if found is None or found[0] != state:
        found = _compiled[module] = state, torch.compile(PreparedPatchEncoder(module, dtype), dynamic=False)
    return found[1], torch.float32
