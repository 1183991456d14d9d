"""Settings of the tissue segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from exaonepath.errors import SettingsError

MAX_SEG_PIXELS = 40_000_000_000
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class SegmentationSettings:
    """How tissue is distinguished from background. Defaults are EXAONE Path's.

    Attributes:
        sthresh: saturation (0-255) above which a pixel is tissue; ignored with `use_otsu`.
        mthresh: side of the median filter, in pixels of the segmentation level; made odd.
        use_otsu: choose the saturation threshold by Otsu's method.
        close: side of the morphological closing, in pixels; 0: none.
        a_t: smallest tissue area, in units of 512 x 512 level-0 pixels.
        a_h: smallest hole area (exclusive), in the same units.
        max_n_holes: holes kept per contour, largest first.
        seg_downsample: reduce the segmentation level further by this factor, >= 1; "auto": to about 64x, if the slide
            has no level near it.
        max_seg_pixels: largest number of pixels of the segmentation level; None or <= 0: no limit.
    """

    sthresh: int = 8
    mthresh: int = 7
    use_otsu: bool = False
    close: int = 4
    a_t: float = 1
    a_h: float = 1
    max_n_holes: int = 100
    seg_downsample: float | Literal["auto"] = 1.0
    max_seg_pixels: int | None = MAX_SEG_PIXELS

    def __post_init__(self) -> None:
        for name in ("sthresh", "mthresh", "close", "a_t", "a_h", "max_n_holes", "seg_downsample", "max_seg_pixels"):
            value = getattr(self, name)
            if (name == "max_seg_pixels" and value is None) or (name == "seg_downsample" and value == AUTO):
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise SettingsError(f"{name} must be a finite number, not {value!r}")
        for name in ("mthresh", "close", "max_n_holes"):
            value = getattr(self, name)
            if value != int(value):
                raise SettingsError(f"{name} must be a whole number, not {value!r}")
            object.__setattr__(self, name, int(value))
        if not 0 <= self.sthresh <= 255:
            raise SettingsError(f"sthresh is a saturation and must be 0 to 255, not {self.sthresh}")
        if not 0 <= self.mthresh <= 254:
            raise SettingsError(f"mthresh is the side of the median filter and must be 0 to 254, not {self.mthresh}")
        if not 0 <= self.close <= 4096:
            raise SettingsError(f"close is the side of the closing in pixels and must be 0 to 4096, not {self.close}")
        for name in ("a_t", "a_h"):
            value = getattr(self, name)
            if value < 0:
                raise SettingsError(f"{name} is an area and must be a number >= 0, not {value}")
        if self.max_n_holes < 0:
            raise SettingsError(f"max_n_holes must be >= 0, not {self.max_n_holes}")
        if self.seg_downsample != AUTO and self.shrink < 1:
            raise SettingsError(f'seg_downsample must be a number >= 1 or "{AUTO}", not {self.seg_downsample}')

    @property
    def shrink(self) -> float:
        """`seg_downsample` as a number; the automatic one is not known without the slide."""
        if isinstance(self.seg_downsample, str):
            raise SettingsError(f'seg_downsample = "{AUTO}" is a number only for a given slide')
        return float(self.seg_downsample)
