"""What identifies the features of a slide: the inputs and settings that decide them, known before any patch is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from exaonepath.errors import SettingsError
from exaonepath.files.artifact import MadeFrom, canonical_json, settings_hash
from exaonepath.files.patches import PatchSet
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.image import SlideImage

FeatureDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class FeatureIdentity:
    """The inputs of a features file.

    Attributes:
        made_from: decides whether a stored result is used again.
        attrs: attributes of the features file that state the inputs.
    """

    made_from: MadeFrom
    attrs: dict[str, Any]


def feature_identity(
    slide: SlideImage,
    patches: PatchSet,
    *,
    preprocessing: PreprocessingConfig,
    weights_fingerprint: str,
    dtype: torch.dtype,
    feature_dtype: FeatureDtype = "float32",
) -> FeatureIdentity:
    """What the features of these patches are made from.

    Args:
        slide: an open slide.
        patches: its patches.
        preprocessing: resize, crop, mean and std.
        weights_fingerprint: hash of the patch encoder's weights.
        dtype: of the matrix products.
        feature_dtype: of the stored features.

    Raises:
        SettingsError: `feature_dtype` is neither "float32" nor "float16".
    """
    check_feature_dtype(feature_dtype)
    attrs: dict[str, Any] = {
        "slide_fingerprint": slide.fingerprint(),
        "patch_size": int(patches.patch_size),
        "preprocessing": canonical_json(preprocessing.to_dict()),
        "weights_fingerprint": weights_fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        # Only what differs from earlier versions is added, so that results of theirs are used again.
        **({} if feature_dtype == "float32" else {"feature_dtype": feature_dtype}),
    }
    inputs = {"coords": digest(patches.coords), "contours": digest(patches.contour_index)}
    key = settings_hash({**attrs, **inputs, **slide.reader_settings()})
    place, mtime = slide.stored_path, slide.mtime_ns
    attrs |= {"settings_hash": key, "slide_path": place, "feature_dtype": feature_dtype}
    attrs |= {} if mtime is None else {"slide_mtime_ns": mtime}
    attrs |= {} if patches.settings_hash is None else {"patches_settings_hash": patches.settings_hash}
    return FeatureIdentity(MadeFrom(key, slide.fingerprint(), place, mtime), attrs)


def check_feature_dtype(feature_dtype: str) -> FeatureDtype:
    """The value itself; `SettingsError` is raised unless it is "float32" or "float16"."""
    for known in get_args(FeatureDtype):
        if feature_dtype == known:
            return known
    raise SettingsError(f"features are stored as float32 or float16, not as {feature_dtype!r}")


def digest(values: np.ndarray) -> str:
    """SHA-256 of the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
