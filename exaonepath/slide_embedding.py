"""The last stage: features of one slide to its embeddings, and the HDF5 file they are kept in."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exaonepath.errors import BackendError, DataFileError, OutputCollisionError, OutputError
from exaonepath.feature_extraction.store import FeatureSet, read_features
from exaonepath.models.loading import LoadedEncoder
from exaonepath.models.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.storage import atomic_h5, ensure_folder, open_h5, settings_hash
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

_DATASETS = ("slide_embedding", "patch_embedding", "coords", "contour_index")


@dataclass(frozen=True)
class SlideEmbedding:
    """Embeddings of one slide.

    Attributes:
        slide_embedding: float32 [C + E]; zeros for a slide without tissue.
        patch_embedding: float32 [N, C + E], patch features beside the slide encoder's output.
        coords: int32 [N, 2], (x, y) at level 0 in pixels.
        contour_index: int32 [N], tissue fragment of each patch.
        attrs: what made them (weights, dtype, hashes).
    """

    slide_embedding: np.ndarray
    patch_embedding: np.ndarray
    coords: np.ndarray
    contour_index: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)


def embed_slide(
    features: FeatureSet, encoder: LoadedEncoder[ExaonePathSlideEncoderModel], dtype: torch.dtype = torch.float32
) -> SlideEmbedding:
    """Run the slide encoder over the features of one slide.

    Args:
        features: as `read_features` returns them, with coordinates.
        encoder: from `load_slide_encoder`.
        dtype: bfloat16 and float16 run under autocast; the result is float32 always.

    Raises:
        DataFileError: the features have no coordinates, or the wrong width.
        BackendError: the encoder gave NaN or infinity.
    """
    width = encoder.model.config.wsi["input_dim"]
    if features.coords is None:
        raise DataFileError("the features have no coordinates; the slide encoder needs them")
    if features.features.shape[1] != width:
        raise DataFileError(f"features are {features.features.shape[1]} wide, the slide encoder takes {width}")
    device = encoder.device
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = encoder.model(
            torch.from_numpy(features.features)[None].to(device),
            None,
            torch.from_numpy(features.coords)[None].to(device),
            torch.from_numpy(features.contour_index)[None].to(device),
        )
    slide, patches = (output[key][0].float().cpu().numpy() for key in ("slide_embedding", "patch_embedding"))
    if not (np.isfinite(slide).all() and np.isfinite(patches).all()):
        raise BackendError(
            "the slide encoder gave NaN or infinity; the weights are broken, or the dtype is too narrow for them: "
            "try float32 or bfloat16"
        )
    return SlideEmbedding(slide, patches, features.coords, features.contour_index)


def embed_features_file(
    features_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    encoder: LoadedEncoder[ExaonePathSlideEncoderModel],
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> tuple[Path, bool]:
    """Embed a features file into an embedding file; a finished file of the same features and weights is left alone.

    Args:
        features_path: HDF5 with `features`, `coords` and (else zeros) `contour_index`, ours or the original's.
        out_path: the HDF5 file to write: `slide_embedding`, `patch_embedding`, `coords`, `contour_index`.
        encoder, dtype: as for `embed_slide`.
        overwrite: compute again, whatever is stored.

    Returns:
        The output path, and whether it was there already.

    Raises:
        DataFileError: the features file is broken. OutputCollisionError: the output is of another slide, or an input.
        OutputError: the output cannot be written.
    """
    out, source = Path(out_path), Path(features_path)
    if out.exists() and source.exists() and out.samefile(source):
        raise OutputCollisionError(f"{out} is the features file itself; choose another output")
    features = read_features(source, expected_dim=encoder.model.config.wsi["input_dim"])
    digest = hashlib.sha256(features.features.tobytes())
    for array in (features.coords, features.contour_index):
        digest.update(b"" if array is None else array.tobytes())
    attrs: dict[str, Any] = {
        "features_sha256": digest.hexdigest(),
        "weights_fingerprint": encoder.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
    }
    key = settings_hash(attrs)
    fingerprint = features.attrs.get("slide_fingerprint")
    if not overwrite and _is_finished(out, key, fingerprint):
        logger.info("%s is up to date", out)
        return out, True
    ensure_folder(out.parent)
    if len(features.features) == 0:
        logger.warning("%s holds no patch: the slide embedding is all zeros", source)
    embedding = embed_slide(features, encoder, dtype)
    attrs |= {
        "settings_hash": key,
        "weights": encoder.weights,
        "random_weights": encoder.is_random,
        "n_patches": len(features.features),
        "n_failed": len(features.failures),
        "exaonepath_version": __version__,
    }
    if fingerprint is not None:
        attrs["slide_fingerprint"] = fingerprint
    try:
        with atomic_h5(out) as file:
            for name in _DATASETS:
                file[name] = getattr(embedding, name)
            file.attrs.update({**attrs, "complete": True})
    except RuntimeError as exc:  # HDF5 reports a full disk met while closing like this
        raise OutputError(f"cannot write {out}: {exc}; check that the disk is not full and run again") from exc
    return out, False


def read_embedding(path: str | os.PathLike[str]) -> SlideEmbedding:
    """Read an embedding file.

    Raises:
        DataFileError: missing, corrupt or half written, or datasets that do not fit together.
    """
    with open_h5(path, _DATASETS) as file:
        if not file.attrs.get("complete", False):
            raise DataFileError(f"{path} is half written: delete it and run the slide stage again")
        try:
            arrays = {name: file[name][()] for name in _DATASETS}
        except OSError as exc:
            raise DataFileError(f"{path}: data cannot be read ({exc}); delete it and run the stage again") from exc
        attrs = dict(file.attrs)
    n = len(arrays["patch_embedding"])
    if not n == len(arrays["coords"]) == len(arrays["contour_index"]):
        raise DataFileError(f"{path}: patch_embedding, coords and contour_index have different lengths")
    return SlideEmbedding(**arrays, attrs=attrs)


def _is_finished(out: Path, key: str, fingerprint: str | None) -> bool:
    if not out.exists():
        return False
    try:
        with open_h5(out, _DATASETS) as file:
            other = file.attrs.get("slide_fingerprint")
            if other is not None and fingerprint is not None and other != fingerprint:
                raise OutputCollisionError(f"{out} holds the embedding of another slide; choose another output")
            return bool(file.attrs.get("complete", False)) and file.attrs.get("settings_hash") == key
    except DataFileError as exc:
        logger.warning("%s; computing it again", exc)
        return False
