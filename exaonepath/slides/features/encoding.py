"""The patch encoder on its device: images in, features out, so that a GPU computes one batch while others move.

On a CUDA device `start` returns before the work is done. Images are copied to the device on one stream and features
back on another, from and to page-locked memory, which the GPU can access by itself; the encoder runs on the current
stream in between. On other devices `start` computes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exaonepath.device import inference
from exaonepath.errors import DeviceError, SettingsError
from exaonepath.slides.features.preprocessing import PreprocessingConfig, normalise


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
        dtype: bfloat16 and float16 run under autocast.

    Raises:
        DeviceError: the encoder cannot be moved to the device.
    """

    def __init__(
        self, module: torch.nn.Module, preprocessing: PreprocessingConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._preprocessing, self._device, self._dtype = preprocessing, device, dtype
        try:
            module.to(device)
        except (RuntimeError, AssertionError) as exc:  # torch built without CUDA raises AssertionError
            raise DeviceError(f"the patch encoder cannot be moved to {device}: {exc}") from exc
        self._call: Callable[[Tensor], Any] = module
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None

    @property
    def page_locked(self) -> bool:
        """Whether images in page-locked memory are copied to the device in the background."""
        return self._streams is not None

    def start(self, images: np.ndarray) -> Features:
        """Encode images uint8 [b, crop, crop, 3].

        The images must not be changed before `Features.result` has returned.

        Raises:
            SettingsError: the encoder does not return [b, D].
            BackendError: the batch does not fit into the device's memory.
        """
        advice = "; use a smaller batch size (what was done is kept)"
        with inference(self._device, self._dtype, f"a batch of {len(images)} patches", advice):
            batch = self._uploaded(torch.from_numpy(images))
            features = self._call(normalise(batch, self._preprocessing))
            if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
                got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise SettingsError(
                    f"the patch encoder must return a tensor [{len(images)}, D] for this batch, got {got}"
                )
            return self._read_back(features.float())

    def width(self) -> int:
        """D, for a slide without patches, where no output of the encoder shows it."""
        crop = self._preprocessing.crop
        return self.start(np.zeros((1, crop, crop, 3), np.uint8)).result().shape[1]

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
