"""From a patch's pixels to what the patch encoder takes: resize, centre crop, normalise.

Two halves. The image half (`resize_and_crop`, `read_window`) works on uint8 and runs in the reader's threads; the
arithmetic half (`normalise`) runs on whole batches on the model's device. Only the part of a patch that survives the
crop is read and resized, wherever that gives the very same bytes as resizing everything and cropping afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from exaonepath.errors import SettingsError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PreprocessingConfig:
    """What is done to a patch before the encoder sees it.

    Attributes:
        resize: length in pixels the shorter side is resized to (PIL bilinear, antialiased). The published model was
            made with 256; a newer revision of the original uses 224.
        crop: side in pixels of the centre crop, at most `resize`: a smaller image would get a black frame, which the
            encoder has never seen.
        mean: subtracted per RGB channel, after division by 255.
        std: divided by, per RGB channel.

    Raises:
        SettingsError: a value that cannot be used.
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
        """Plain JSON types, the inverse of `from_dict`."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessingConfig:
        """Build from `to_dict`'s form; absent keys take their default, unknown ones raise `SettingsError`."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise SettingsError(f"preprocessing: unknown setting {', '.join(unknown)}")
        return cls(**values)


class _Span(NamedTuple):
    """One axis of a resize-then-crop: what to take from the source, and what to do with it.

    Source pixels [start, stop) are needed. PIL is to resize [box_start, box_stop) of these (relative to `start`) to
    `size` pixels, of which [crop_start, crop_start + crop) are the result.
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
    return round((resized - crop) / 2)  # torchvision's CenterCrop: Python's round, half to even


def _span(length: int, resized: int, crop: int) -> _Span:
    first = _crop_start(resized, crop)
    if length == resized:
        return _Span(first, first + crop, 0.0, float(crop), crop, 0)
    # PIL keeps the box in float32 and computes sample positions from it in float64. Both are exact, and the result is
    # that of the full resize, where the scale is a fraction over a power of two (always so for resize 256).
    reduced = resized // math.gcd(length, resized)
    if reduced & (reduced - 1) or length * reduced >= 1 << 24:
        return _whole(length, resized, crop)
    scale = length / resized
    begin, end = first * scale, (first + crop) * scale
    reach = max(scale, 1.0) + 1  # the triangle filter reaches one (source or target, the larger) pixel; 1 for rounding
    start, stop = max(0, math.floor(begin - reach)), min(length, math.ceil(end + reach))
    return _Span(start, stop, begin - start, end - start, crop, 0)


class ReadWindow(NamedTuple):
    """The part of a square patch that has to be read, and how to finish it.

    Attributes:
        offset: where the part starts, in pixels right of and below the patch's corner.
        size: side of the part in pixels.
    """

    offset: int
    size: int
    span: _Span
    crop: int

    def finish(self, part: Image.Image) -> np.ndarray:
        """Turn the part, an RGB or RGBA image of `size` x `size`, into uint8 [crop, crop, 3]; alpha is dropped."""
        return _resize(part, self.span, self.span, self.crop)


def read_window(patch_size: int, config: PreprocessingConfig) -> ReadWindow:
    """What to read of a square patch of `patch_size` pixels, so that `finish` gives the whole patch's result."""
    span = _span(patch_size, config.resize, config.crop)
    return ReadWindow(span.start, span.stop - span.start, span, config.crop)


def resize_and_crop(image: np.ndarray, config: PreprocessingConfig) -> np.ndarray:
    """Resize the shorter side to `config.resize`, keep the central `config.crop` square.

    Args:
        image: uint8 [h, w, 3], or [h, w, 4] of which the alpha is dropped.
        config: the sizes.

    Returns:
        uint8 [crop, crop, 3]: byte for byte what torchvision's Resize and CenterCrop give for a PIL image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or not image.size:
        raise SettingsError(f"an image must be uint8 [h, w, 3 or 4], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    if height == width:
        window = read_window(height, config)
        end = window.offset + window.size
        return window.finish(Image.fromarray(np.ascontiguousarray(image[window.offset : end, window.offset : end])))
    # Newer Pillow runs its two passes in the order that is cheaper for the given shape, and they round in between: a
    # shape that is not square keeps its result only when it is resized whole.
    shorter = min(height, width)
    rows = _whole(height, config.resize * height // shorter, config.crop)
    columns = _whole(width, config.resize * width // shorter, config.crop)
    return _resize(Image.fromarray(np.ascontiguousarray(image)), rows, columns, config.crop)


def _resize(image: Image.Image, rows: _Span, columns: _Span, crop: int) -> np.ndarray:
    # Without alpha before anything else: Pillow would multiply the colours by it while resizing.
    image = image.convert("RGB")
    size, box = (columns.size, rows.size), (columns.box_start, rows.box_start, columns.box_stop, rows.box_stop)
    if size != image.size or box != (0, 0, *image.size):
        image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    top, left = rows.crop_start, columns.crop_start
    return np.asarray(image)[top : top + crop, left : left + crop]


def normalise(images: torch.Tensor, config: PreprocessingConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scale to [0, 1], subtract the mean, divide by the standard deviation.

    Args:
        images: uint8 [B, h, w, 3] on any device.
        config: mean and std.
        dtype: of the result; the arithmetic is float32.

    Returns:
        [B, 3, h, w] on the same device, contiguous.
    """
    mean = torch.tensor(config.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(3, 1, 1)
    # One pass changes type and layout together; the rest is in place, so the batch exists once in float32.
    b, height, width, _ = images.shape
    values = torch.empty((b, 3, height, width), device=images.device).copy_(images.permute(0, 3, 1, 2))
    return values.div_(255).sub_(mean).div_(std).to(dtype)
