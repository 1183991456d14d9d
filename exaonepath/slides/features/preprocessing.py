"""Preprocessing of patches for the patch encoder: resize, centre crop, normalise.

The module has two parts. The image part (`resize_and_crop`, `read_window`) works on uint8 and runs in the reader's
threads; the arithmetic part (`normalise`) runs on whole batches on the model's device. Only the region of a patch that
remains after the crop is read and resized, if that gives the same bytes as resizing everything and cropping afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from exaonepath.errors import SettingsError
from exaonepath.ops.resize import Axis, resize_bilinear, resize_by_pillow

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PreprocessingConfig:
    """The steps between a patch's pixels and the encoder's input.

    Attributes:
        resize: length in pixels that the shorter side is resized to (PIL bilinear, antialiased). The published model
            was made with 256; a newer revision of the original uses 224.
        crop: side in pixels of the centre crop, at most `resize`: a smaller image would be padded with black, which the
            encoder was not trained on.
        mean: subtracted per RGB channel, after division by 255.
        std: divisor per RGB channel.

    Raises:
        SettingsError: a value is invalid.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise SettingsError(f"preprocessing: {name} must be a positive whole number of pixels, got {value!r}")
        if self.resize < self.crop:
            raise SettingsError(
                f"preprocessing: resize {self.resize} is smaller than crop {self.crop}; every patch would get a black "
                f"frame: use a resize of at least {self.crop}"
            )
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise SettingsError(f"preprocessing: {name} must be three finite numbers, got {getattr(self, name)!r}")
            object.__setattr__(self, name, values)  # lists (from JSON) become tuples: equal settings compare equal
        if min(self.std) <= 0:
            raise SettingsError(f"preprocessing: std must be positive, got {self.std!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types; the inverse of `from_dict`."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessingConfig:
        """Build from `to_dict`'s result; absent keys take their default, unknown keys raise `SettingsError`."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise SettingsError(f"preprocessing: unknown setting {', '.join(unknown)}")
        return cls(**values)


class _Span(NamedTuple):
    """One axis of a resize followed by a crop: the source pixels to read, and how to resize and crop them.

    Source pixels [start, stop) are needed. PIL resizes [box_start, box_stop) of these (relative to `start`) to `size`
    pixels, of which [crop_start, crop_start + crop) are the result.
    """

    start: int
    stop: int
    box_start: float
    box_stop: float
    size: int
    crop_start: int


def _whole(length: int, resized: int, crop: int) -> _Span:
    return _Span(0, length, 0.0, float(length), resized, _crop_start(resized, crop))


def _crop_start(resized: int, crop: int) -> int:
    return round((resized - crop) / 2)  # as in torchvision's CenterCrop: Python's round, half to even


def _span(length: int, resized: int, crop: int) -> _Span:
    first = _crop_start(resized, crop)
    if length == resized:
        return _Span(first, first + crop, 0.0, float(crop), crop, 0)
    # PIL keeps the box in float32 and computes sample positions from it in float64. Both are exact, and the result
    # equals that of the full resize, if the scale is a fraction over a power of two (always the case for resize 256).
    reduced = resized // math.gcd(length, resized)
    if reduced & (reduced - 1) or length * reduced >= 1 << 24:
        return _whole(length, resized, crop)
    scale = length / resized
    begin, end = first * scale, (first + crop) * scale
    reach = max(scale, 1.0) + 1  # the triangle filter reaches one pixel (source or target, the larger); 1 for rounding
    start, stop = max(0, math.floor(begin - reach)), min(length, math.ceil(end + reach))
    return _Span(start, stop, begin - start, end - start, crop, 0)


class ReadWindow(NamedTuple):
    """The region of a square patch that must be read, and how it is processed.

    Attributes:
        offset: start of the region, in pixels to the right of and below the patch's corner.
        size: side of the region in pixels.
    """

    offset: int
    size: int
    span: _Span
    crop: int

    def finish(self, part: np.ndarray) -> np.ndarray:
        """Resize and crop the region, uint8 [size, size, 3], to uint8 [crop, crop, 3]."""
        return _resize(part, self.span, self.span, self.crop)


def read_window(patch_size: int, config: PreprocessingConfig) -> ReadWindow:
    """The region to read of a square patch of `patch_size` pixels, so that `finish` gives the whole patch's result."""
    span = _span(patch_size, config.resize, config.crop)
    return ReadWindow(span.start, span.stop - span.start, span, config.crop)


def resize_and_crop(image: np.ndarray, config: PreprocessingConfig) -> np.ndarray:
    """Resize the shorter side to `config.resize` and keep the central square of side `config.crop`.

    Args:
        image: uint8 [h, w, 3], or [h, w, 4], of which alpha is dropped.
        config: the sizes.

    Returns:
        uint8 [crop, crop, 3]: byte for byte the result of torchvision's Resize and CenterCrop for a PIL image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or not image.size:
        raise SettingsError(f"an image must be uint8 [h, w, 3 or 4], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    if height == width:
        window = read_window(height, config)
        end = window.offset + window.size
        return window.finish(image[window.offset : end, window.offset : end, :3])
    # Newer Pillow versions run their two passes in the order that is cheaper for the given shape, and round in between.
    # An image that is not square therefore has to be resized whole, otherwise its result would change.
    shorter = min(height, width)
    rows = _whole(height, config.resize * height // shorter, config.crop)
    columns = _whole(width, config.resize * width // shorter, config.crop)
    return _resize(image[..., :3], rows, columns, config.crop)


def _resize(image: np.ndarray, rows: _Span, columns: _Span, crop: int) -> np.ndarray:
    height, width = image.shape[:2]
    size, box = (columns.size, rows.size), (columns.box_start, rows.box_start, columns.box_stop, rows.box_stop)
    top, left = rows.crop_start, columns.crop_start
    if size == (width, height) and box == (0, 0, width, height):
        return image[top : top + crop, left : left + crop]
    axes = (Axis(s.box_start, s.box_stop, s.size, s.crop_start, s.crop_start + crop) for s in (rows, columns))
    # Patches are square and have few sizes; other images may each have another size, which would be checked each time.
    return (resize_bilinear if height == width else resize_by_pillow)(image, *axes)


def normalise(images: torch.Tensor, config: PreprocessingConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scale to [0, 1], subtract the mean, divide by the standard deviation.

    Args:
        images: uint8 [B, h, w, 3] on any device.
        config: mean and std.
        dtype: of the result; the arithmetic is in float32.

    Returns:
        [B, 3, h, w] on the same device, contiguous.
    """
    mean, std = _constants(config.mean, images.device), _constants(config.std, images.device)
    # One pass changes type and layout together; the other steps are in place, so only one float32 copy is in memory.
    b, height, width, _ = images.shape
    values = torch.empty((b, 3, height, width), device=images.device).copy_(images.permute(0, 3, 1, 2))
    return values.div_(255).sub_(mean).div_(std).to(dtype)


@cache
@torch.inference_mode(False)
def _constants(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Made once: such a copy to a GPU waits for everything that the GPU was given before.
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
