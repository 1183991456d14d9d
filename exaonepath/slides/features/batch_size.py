"""How many patches the patch encoder gets at a time, if the user leaves it to the program.

On a CUDA device the batch size is the largest power of two, from 8 to 256, with which the encoder needs at most four
fifths of the free memory. On other devices, and for modules whose memory use is unknown, it is 32.

The memory of a patch follows from the layers of the ViT: when the MLP of a block applies its activation, the tokens
before and after attention are held, those after the norm (except by `encoders.prepared`), and the hidden values before
and after the activation. The bound 256 is where a
product has enough rows to occupy a large GPU; more would only take memory.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn

from exaonepath.encoders.patch_encoder import DIM, ExaonePathPatchEncoderModel
from exaonepath.errors import SettingsError

logger = logging.getLogger(__name__)

DEFAULT = 32
_SMALLEST, _LARGEST = 8, 256
_SHARE = 0.8  # of the free memory; the rest is for workspaces and the rounding of the allocator
_HIDDEN = 4  # width of the MLP, in widths of a token


def check_batch_size(batch_size: int | Literal["auto"]) -> None:
    """Raise `SettingsError` if it is neither "auto" nor a positive whole number."""
    if batch_size != "auto" and (isinstance(batch_size, bool | str) or batch_size <= 0):
        raise SettingsError(f'batch size must be positive, or "auto", got {batch_size!r}')


def bytes_per_patch(crop: int, patch_size: int, dtype: torch.dtype, prepared: bool) -> int:
    """Memory on the device that the patch encoder needs for each patch of a batch.

    Args:
        crop: side of the image in pixels.
        patch_size: side of the area of one token in pixels.
        dtype: of the matrix products.
        prepared: whether it runs with converted weights (`encoders.prepared`), or as it is, under autocast.
    """
    itemsize = dtype.itemsize if prepared else 4  # under autocast, norms are in float32
    held = 2 if prepared else 3
    tokens = 1 + (crop // patch_size) ** 2
    # Images: two batches in uint8 (one is being copied), one in float32, and one in the dtype of the products.
    images = 3 * crop**2 * (2 + 4 + itemsize)
    return images + tokens * (held + 2 * _HIDDEN) * DIM * itemsize


def choose_batch_size(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    prepared: bool,
    crop: int,
    earlier: int | None = None,
) -> int:
    """The batch size for "auto". The weights must be on the device already.

    Args:
        module: the encoder.
        device: where it runs.
        dtype, prepared: see `bytes_per_patch`.
        crop: side of the images in pixels.
        earlier: batch size of the interrupted run that is continued: it is used again, so that all rows are those of
            an uninterrupted run, unless it does not fit.
    """
    if device.type != "cuda" or not isinstance(module, ExaonePathPatchEncoderModel):
        return earlier or DEFAULT
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for itself can be used too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return fitting_batch_size(free, bytes_per_patch(crop, module.config.patch_size, dtype, prepared), earlier)


def fitting_batch_size(free: int, per_patch: int, earlier: int | None = None) -> int:
    """The largest batch size that fits into `free` bytes, or `earlier`, if that fits."""
    most = int(_SHARE * free) // per_patch
    if earlier is not None:
        if earlier <= most:
            return earlier
        logger.warning(
            "the interrupted run used batches of %d patches, which do not fit into the free memory now; with smaller "
            "ones, features may differ from those of an uninterrupted run by rounding",
            earlier,
        )
    size = _LARGEST
    while size > max(most, _SMALLEST):
        size //= 2
    logger.info("batch size %d: %d MB of %d MB that are free", size, size * per_patch >> 20, free >> 20)
    return size
