"""The pixel size of a slide: its source, and checks of its plausibility.

The original uses the first positive number that it finds. This package does the same, bit for bit, unless the user
states the pixel size. But a slide that states 85 micrometres (the resolution of a print) gives patches of one pixel,
and the vectors do not show that. Doubts about the pixel size are therefore reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from xml.etree import ElementTree

from exaonepath.errors import SettingsError

DEFAULT_MPP = 0.5
ASSUMED = "assumed"
GIVEN = "given"  # by the user, with --mpp or mpp=
_OME = "OME PhysicalSizeX"
_STATED = ("openslide.mpp-x", "aperio.MPP")
SMALLEST, LARGEST = 0.05, 10.0  # micrometres; oil immersion at 100x has 0.1, a macro camera 10
_TOLERANCE = 0.01  # relative difference that is allowed between the two axes

_CONTRADICTION = 0.05  # relative difference that is allowed between OME-XML and the resolution tags

_OME_LIMIT = 1 << 24
_INCH = 25_400.0
_MICROMETRES = {
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "nm": 1e-3,
    "pm": 1e-6,
    "Å": 1e-4,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "in": _INCH,
    "ft": 12 * _INCH,
    "thou": _INCH / 1000,
    "mil": _INCH / 1000,
    "li": _INCH / 12,
    "pt": _INCH / 72,
}
# Unicode has two characters for the micro sign, and files may hold it in another encoding than the stated one: Latin-1
# read as UTF-8, and UTF-8 read as Latin-1.
_MICRO_SIGNS = ("\u03bc", "\ufffd", "\u00c2\u00b5", "\u00ce\u00bc")


@dataclass(frozen=True)
class OmeScale:
    """The pixel size of level 0 according to OME-XML.

    Attributes:
        x, y: micrometres per pixel; None if not stated, or not usable.
        doubts: the reasons to doubt it, a phrase each.
    """

    x: float | None
    y: float | None
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PixelSize:
    """The pixel size of a slide at level 0.

    Attributes:
        x, y: micrometres per pixel; y equals x if the source states one number for both axes. Only x is used.
        source: the property that x was read from, "given" or "assumed".
        doubts: the reasons to doubt it, a phrase each.
        overridden: what the file states, if the user stated another value; otherwise empty.
    """

    x: float
    y: float
    source: str
    doubts: tuple[str, ...]
    overridden: str = ""


def slide_pixel_size(properties: Mapping[str, str], given: float | None = None) -> PixelSize:
    """The pixel size of a slide with these properties, or the one that the user gives.

    Raises:
        SettingsError: `given` is not a positive number.
    """
    check_given(given)
    stated, source = pixel_size(properties)
    if given is None:
        y = _other_axis(properties, source)
        return PixelSize(stated, stated if y is None else y, source, tuple(doubts(properties, stated, source)))
    value = float(given)
    found = () if SMALLEST <= value <= LARGEST else (_implausible(value, GIVEN, "correct it"),)
    differs = source != ASSUMED and abs(stated - value) > _TOLERANCE * max(stated, value)
    return PixelSize(value, value, GIVEN, found, f"{stated:g} um ({source})" if differs else "")


def check_given(mpp: float | None) -> None:
    """Raise `SettingsError` unless a pixel size that the user gives is a positive number, or None."""
    if mpp is not None and (isinstance(mpp, bool) or not isinstance(mpp, Real) or not 0 < mpp < math.inf):
        raise SettingsError(f"mpp is the pixel size in micrometres and must be a positive number, not {mpp!r}")


def pixel_size(properties: Mapping[str, str]) -> tuple[float, str]:
    """(micrometres per pixel at level 0, the source of that value).

    The first of these is used: OME-XML, in a TIFF without a vendor's own properties (the resolution tags of such a
    file are not reliable); `openslide.mpp-x`; `aperio.MPP`; 10 / objective power; 0.5, assumed.
    """
    ome = ome_scale(properties)
    if ome is not None and ome.x is not None:
        return ome.x, _OME
    for key in _STATED:
        value = _positive_number(properties.get(key))
        if value is not None:
            return value, key
    power = _positive_number(properties.get("openslide.objective-power"))
    if power is not None:
        return 10.0 / power, "openslide.objective-power"
    return DEFAULT_MPP, ASSUMED


def doubts(properties: Mapping[str, str], mpp: float, source: str) -> list[str]:
    """The reasons to doubt this pixel size, a phrase each; empty for a plausible one."""
    found = []
    if source == ASSUMED:
        found.append(
            f"states neither MPP nor objective power; assuming {mpp:.2f} um per pixel (mpp =, or --mpp states it)"
        )
    elif not SMALLEST <= mpp <= LARGEST:
        found.append(_implausible(mpp, source, "correct the file's metadata, or state it (mpp =, or --mpp)"))
    ome = ome_scale(properties)
    if ome is not None:
        found += ome.doubts
    if source != _OME:
        for key in _STATED[: _STATED.index(source)] if source in _STATED else _STATED:
            if key in properties:
                found.append(
                    f"states a pixel size of {properties[key][:40]!r} ({key}), which cannot be used; {mpp:g} um "
                    f"({source}) is used in its place"
                )
                break
    y = _other_axis(properties, source)
    if y is not None and abs(y - mpp) > _TOLERANCE * max(y, mpp):
        found.append(f"has pixels of {mpp:g} x {y:g} um; {mpp:g} ({source}) is used for both axes")
    tags = _positive_number(properties.get("openslide.mpp-x")) if source == _OME else None
    # Resolution tags often hold the resolution of a print, which is not a scale of the slide; such values are ignored.
    if tags is not None and SMALLEST <= tags <= LARGEST and abs(tags - mpp) > _CONTRADICTION * max(tags, mpp):
        found.append(
            f"has pixels of {mpp:g} um by its OME-XML, which is used, and of {tags:g} um by its resolution tags"
        )
    return found


def _implausible(mpp: float, source: str, advice: str) -> str:
    return (
        f"has an implausible pixel size, {mpp:g} um ({source}): outside {SMALLEST:g} to {LARGEST:g} um, patches will "
        f"be of a wrong size; {advice}"
    )


def ome_scale(properties: Mapping[str, str]) -> OmeScale | None:
    """The pixel size in OME-XML in a generic TIFF's description; None if the description is not OME-XML."""
    images = _ome_images(properties)
    if not images:
        return None
    pixels, sure = _of_level_0(images, properties)
    sizes, found = [], []
    for axis in "XY":
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        value, factor = _positive_number(size), _MICROMETRES.get(_with_micro_sign(unit.strip()))
        sizes.append(None if value is None or factor is None else value * factor)
        if axis == "X" and size is not None and sizes[0] is None:
            found.append(f"states a pixel size of {size[:40]!r} {unit[:20]!r} in its OME-XML, which cannot be used")
    if sizes[0] is None and sizes[1] is not None and not found:
        found.append(
            f"states a pixel size of {sizes[1]:g} um for the vertical axis only, in its OME-XML; it is not used"
        )
    if not sure and len({(image.get("PhysicalSizeX"), image.get("PhysicalSizeXUnit")) for image in images}) > 1:
        found.append(
            f"has OME-XML with {len(images)} images of different pixel sizes, and does not state which one is level 0; "
            "the first is used"
        )
    return OmeScale(sizes[0], sizes[1], tuple(found))


def ome_attribute(properties: Mapping[str, str], name: str) -> str | None:
    """What OME-XML states about the pixels of level 0 in an attribute; None if nothing, or if the image is unclear."""
    images = _ome_images(properties)
    if not images:
        return None
    pixels, sure = _of_level_0(images, properties)
    return pixels.get(name) if sure or len({image.get(name) for image in images}) == 1 else None


def _ome_images(properties: Mapping[str, str]) -> list[ElementTree.Element]:
    """The `Pixels` elements of the OME-XML in a generic TIFF's description; empty if it is not OME-XML."""
    text = properties.get("tiff.ImageDescription", "")
    if properties.get("openslide.vendor") != "generic-tiff" or "<OME" not in text[:4096] or len(text) > _OME_LIMIT:
        return []
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # OME-XML has neither; entities can expand without bound
        return []
    try:
        # Parsed as text, not bytes: the encoding that the XML states no longer applies.
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, UnicodeError, ValueError):
        return []
    return [element for element in root.iter() if _name(element) == "Pixels"]


def _of_level_0(images: list[ElementTree.Element], properties: Mapping[str, str]) -> tuple[ElementTree.Element, bool]:
    """The `Pixels` element of level 0 in a file with more than one image, and whether the choice is certain.

    Labels and overviews are images too. The image of level 0 has the size of level 0. If several or none have it, the
    image in directory 0 is used: the text is stored in that directory, which is also the directory of level 0.
    """
    if len(images) == 1:
        return images[0], True
    size = tuple(properties.get(f"openslide.level[0].{side}") for side in ("width", "height"))
    candidates = [image for image in images if (image.get("SizeX"), image.get("SizeY")) == size] or images
    if len(candidates) > 1:
        candidates = [image for image in candidates if _is_in_directory_0(image)] or candidates
    return candidates[0], len(candidates) == 1


def _is_in_directory_0(pixels: ElementTree.Element) -> bool:
    # A TiffData element without an IFD refers to the whole file, from its first directory.
    return any(_name(element) == "TiffData" and element.get("IFD", "0").strip() == "0" for element in pixels)


def _name(element: ElementTree.Element) -> str:
    return re.sub(r"^{.*}", "", element.tag)


def _with_micro_sign(unit: str) -> str:
    for sign in _MICRO_SIGNS:
        if unit == f"{sign}m":
            return "µm"
    return unit


def _other_axis(properties: Mapping[str, str], source: str) -> float | None:
    if source == _OME:
        ome = ome_scale(properties)
        return None if ome is None else ome.y
    return _positive_number(properties.get("openslide.mpp-y")) if source == "openslide.mpp-x" else None


def _positive_number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
