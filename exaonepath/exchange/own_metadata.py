"""What this package states about the vectors in files of a general format (AnnData, Parquet, Zarr), as JSON.

A file that states it is imported without further options; a file of another program is read all the same, and then the
user states what it does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, SettingsError
from exaonepath.exchange.slide_patches import SlidePatches
from exaonepath.files.hdf5_output import encodable
from exaonepath.files.strict_json import parse_json
from exaonepath.version import __version__

KEY = "exaonepath"
_FORMAT = 1
_MAX_TEXT = 1 << 26


def describe(slides: Sequence[SlidePatches]) -> str:
    """The metadata of a file of several slides, without their vectors, as JSON text.

    Raises:
        SettingsError: the slides have vectors of different kinds, widths or encoders, or one id twice.
    """
    kinds = {(slide.kind, None if slide.vectors is None else slide.vectors.shape[1], maker(slide)) for slide in slides}
    if len(kinds) > 1:
        listed = "; ".join(
            sorted(f"{kind} of {encoder or 'an unknown encoder'}, {width}" for kind, width, encoder in kinds)
        )
        raise SettingsError(
            f"slides with different vectors do not fit into one file ({listed}); write a file per slide"
        )
    if len({slide.id for slide in slides}) < len(slides):
        raise SettingsError("two slides have one id, and would be one slide in the file")
    value = {
        "format": _FORMAT,
        "exaonepath_version": __version__,
        "vectors": slides[0].kind if slides else "features",
        "slides": {encodable(slide.id): _about(slide) for slide in slides},
    }
    return json.dumps(value, sort_keys=True)


def maker(slide: SlidePatches) -> str:
    """What made the vectors, so that those of two slides can be compared if it is equal."""
    stated = (slide.attrs.get(name) for name in ("patch_weights_fingerprint", "weights_fingerprint", "preprocessing"))
    return "/".join([slide.encoder, *(str(value) for value in stated if value)])


def _about(slide: SlidePatches) -> dict[str, Any]:
    values = {
        "encoder": encodable(slide.encoder),
        "patch_size": slide.patch_size,
        "n_patches": len(slide),
        "patient": slide.patient,
        "mpp": slide.mpp,
        "target_size": slide.target_size,
        "target_step": slide.target_step,
        "target_mpp": slide.target_mpp,
        "level0_size": slide.level0_size,
        "made_from": {name: plain(value) for name, value in slide.attrs.items()},
    }
    return {name: value for name, value in values.items() if value is not None}


def plain(value: Any) -> Any:
    """A value of numpy as Python's; anything else than text, a number or a truth value as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | bool) else encodable(str(value))


def parse(text: str | bytes | None, where: str) -> dict[str, Any]:
    """The metadata of a file; empty if it has none.

    Raises:
        DataFileError: it is damaged, or was written by a later version.
    """
    if text is None:
        return {}
    data = text.encode() if isinstance(text, str) else text
    if len(data) > _MAX_TEXT:
        raise DataFileError(f"{where} states {len(data)} bytes about its slides, more than is ever read")
    value = parse_json(data, where, DataFileError)
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        raise DataFileError(f"{where}: what it states about its slides is damaged")
    if value["format"] > _FORMAT:
        raise DataFileError(f"{where} was written by a later version of exaonepath; update this one")
    if not isinstance(value.get("slides"), dict) or not all(isinstance(v, dict) for v in value["slides"].values()):
        raise DataFileError(f"{where}: what it states about its slides is damaged")
    return value


def without_patches(metadata: Mapping[str, Any]) -> list[str]:
    """The slides that had no patch when the file was written: they have no row, so only the metadata list them. Slides
    that had patches and have no row now were taken out of the file."""
    return [name for name, about in metadata.get("slides", {}).items() if about.get("n_patches") == 0]


def stated(metadata: Mapping[str, Any], slide: str, where: str) -> dict[str, Any]:
    """What the metadata state about one slide, as arguments of `SlidePatches`; empty if nothing.

    Raises:
        DataFileError: a value has the wrong type.
    """
    about = metadata.get("slides", {}).get(slide, {})
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("encoder", "patient"), str),
        **dict.fromkeys(("patch_size", "target_size", "target_step"), int),
        **dict.fromkeys(("mpp", "target_mpp"), (int, float)),
    }
    found = {}
    for name, kind in kinds.items():
        value = about.get(name)
        if value is None:
            continue
        positive = isinstance(value, str) or (
            not isinstance(value, bool) and isinstance(value, int | float) and value > 0
        )
        if not isinstance(value, kind) or not positive:
            raise DataFileError(f"{where}: {name} of {slide} is {value!r:.40}")
        found[name] = value
    return found
