"""The size of a pixel: where it comes from, and whether it can be believed.

The original takes whatever positive number it finds first. So do we, bit for bit; but a slide that says 85 micrometres
(the resolution of a print) gives patches of one pixel, and nobody sees that from a vector. What is doubtful is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from xml.etree import ElementTree

DEFAULT_MPP = 0.5
ASSUMED = "assumed"
SMALLEST, LARGEST = 0.05, 10.0  # micrometres; oil immersion at 100x is 0.1, a macro camera 10
_TOLERANCE = 0.01  # by which the two axes may differ

_OME_LIMIT = 1 << 24
_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4, "pm": 1e-6}


def pixel_size(properties: Mapping[str, str]) -> tuple[float, str]:
    """(micrometres per pixel at level 0, where that comes from).

    The first of: OME-XML, in a TIFF without a vendor's own properties, whose resolution tags say nothing reliable;
    `openslide.mpp-x`; `aperio.MPP`; 10 / objective power; 0.5, assumed.
    """
    ome = ome_pixel_size(properties)
    if ome is not None:
        return ome[0], "OME PhysicalSizeX"
    for key in ("openslide.mpp-x", "aperio.MPP"):
        value = _positive_number(properties.get(key))
        if value is not None:
            return value, key
    power = _positive_number(properties.get("openslide.objective-power"))
    if power is not None:
        return 10.0 / power, "openslide.objective-power"
    return DEFAULT_MPP, ASSUMED


def doubts(properties: Mapping[str, str], mpp: float, source: str) -> list[str]:
    """What speaks against this pixel size, a phrase each; nothing for a plausible one."""
    found = []
    if source == ASSUMED:
        found.append(f"states neither MPP nor objective power; assuming {mpp:.2f} um per pixel")
    elif not SMALLEST <= mpp <= LARGEST:
        found.append(
            f"has an implausible pixel size, {mpp:g} um ({source}): outside {SMALLEST:g} to {LARGEST:g} um, patches "
            "will be of a wrong size; correct the file's metadata"
        )
    y = _other_axis(properties, source)
    if y is not None and abs(y - mpp) > _TOLERANCE * max(y, mpp):
        found.append(f"has pixels of {mpp:g} x {y:g} um; {mpp:g} ({source}) is used for both axes")
    return found


def ome_pixel_size(properties: Mapping[str, str]) -> tuple[float, float | None] | None:
    """(x, y) in micrometres from OME-XML in a generic TIFF's description; None where there is none."""
    text = properties.get("tiff.ImageDescription", "")
    if properties.get("openslide.vendor") != "generic-tiff" or "<OME" not in text[:4096] or len(text) > _OME_LIMIT:
        return None
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # OME-XML has none; entities can expand without bound
        return None
    try:
        root = ElementTree.fromstring(text.encode())
    except (ElementTree.ParseError, UnicodeError):
        return None
    pixels = next((e for e in root.iter() if re.sub(r"^{.*}", "", e.tag) == "Pixels"), None)
    if pixels is None:
        return None
    sizes = []
    for axis in "XY":
        value = _positive_number(pixels.get(f"PhysicalSize{axis}"))
        unit = _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        sizes.append(None if value is None or unit is None else value * unit)
    return None if sizes[0] is None else (sizes[0], sizes[1])


def _other_axis(properties: Mapping[str, str], source: str) -> float | None:
    if source.startswith("OME"):
        ome = ome_pixel_size(properties)
        return None if ome is None else ome[1]
    return _positive_number(properties.get("openslide.mpp-y")) if source == "openslide.mpp-x" else None


def _positive_number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
