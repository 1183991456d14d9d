"""The last stage: features of one slide to its embeddings, and the HDF5 file they are kept in."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exaonepath.device import inference
from exaonepath.encoders.loading import LoadedEncoder
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import BackendError, DataFileError, OutputCollisionError, UnfinishedFileError
from exaonepath.files.artifact import check_owner, refuse_foreign, refuse_input_as_output, settings_hash
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.features import FeatureSet, read_features
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.hdf5_output import atomic_h5
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

_DATASETS = ("slide_embedding", "patch_embedding", "coords", "contour_index")
_ATTRIBUTES = (
    "features_sha256",
    "weights_fingerprint",
    "dtype",
    "settings_hash",
    "weights",
    "random_weights",
    "n_patches",
    "n_failed",
    "exaonepath_version",
    "slide_fingerprint",
    "slide_path",
    "complete",
)


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
    features: FeatureSet,
    encoder: LoadedEncoder[ExaonePathSlideEncoderModel],
    dtype: torch.dtype = torch.float32,
    *,
    max_memory: int | str | None = None,
) -> SlideEmbedding:
    """Run the slide encoder over the features of one slide, which stay in the host's memory.

    Args:
        features: as `read_features` returns them, with coordinates.
        encoder: from `load_slide_encoder`.
        dtype: bfloat16 and float16 run under autocast; the result is float32 always.
        max_memory: what the slide encoder may use on its device, weights included, in bytes or as "12GB"; None: what is
            free on a GPU, no limit on a CPU.

    Raises:
        DataFileError: the features have no coordinates, or the wrong width.
        MemoryLimitError: the slide cannot fit; said beforehand, with the figure it needs.
        DeviceError: a dtype other than float32, bfloat16 and float16.
        BackendError: the encoder gave NaN or infinity, or ran out of memory.
    """
    width = encoder.model.config.wsi["input_dim"]
    if features.coords is None:
        raise DataFileError("the features have no coordinates; the slide encoder needs them")
    if features.features.shape[1] != width:
        raise DataFileError(f"features are {features.features.shape[1]} wide, the slide encoder takes {width}")
    device = encoder.device
    with inference(device, dtype, f"a slide of {len(features.features)} patches"):
        output = encoder.model.encode_streamed(
            features.features[None],
            None,
            features.coords[None],
            features.contour_index[None],
            max_memory=max_memory,
        )
    slide, patches = (output[key][0].float().numpy() for key in ("slide_embedding", "patch_embedding"))
    # The mean of all patches is not finite where a single one is not.
    if not np.isfinite(slide).all():
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
    max_memory: int | str | None = None,
    overwrite: bool = False,
) -> tuple[Path, bool]:
    """Embed a features file into an embedding file; a finished file of the same features and weights is left alone.

    Args:
        features_path: HDF5 with `features`, `coords` and (else zeros) `contour_index`, ours or the original's.
        out_path: the HDF5 file to write: `slide_embedding`, `patch_embedding`, `coords`, `contour_index`.
        encoder, dtype, max_memory: as for `embed_slide`.
        overwrite: compute again, whatever is stored.

    Returns:
        The output path, and whether it was there already.

    Raises:
        DataFileError: the features file is broken. OutputCollisionError: the output is of another slide, or an input.
        OutputError: the output cannot be written. MemoryLimitError: see `embed_slide`.
    """
    out, source = Path(out_path), Path(features_path)
    refuse_input_as_output(out, [source])
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
    if _is_finished(out, key, attrs["features_sha256"], features.attrs, overwrite):
        logger.info("%s is up to date", out)
        return out, True
    ensure_folder(out.parent)
    if len(features.features) == 0:
        logger.warning("%s holds no patch: the slide embedding is all zeros", source)
    embedding = embed_slide(features, encoder, dtype, max_memory=max_memory)
    attrs |= {
        "settings_hash": key,
        "weights": encoder.weights,
        "random_weights": encoder.is_random or str(features.attrs.get("weights", "")).startswith("random:"),
        "n_patches": len(features.features),
        "n_failed": len(features.failures),
        "exaonepath_version": __version__,
    }
    attrs |= {name: features.attrs[name] for name in ("slide_fingerprint", "slide_path") if name in features.attrs}
    with atomic_h5(out) as file:
        for name in _DATASETS:
            file.array(name, getattr(embedding, name))
        file.attributes({**attrs, "complete": True})
    return out, False


def read_embedding(path: str | os.PathLike[str]) -> SlideEmbedding:
    """Read an embedding file.

    Raises:
        DataFileError: missing, corrupt or half written, or datasets that do not fit together.
    """
    with open_h5(path, _DATASETS) as file:
        if not file.attribute("complete", False):
            raise UnfinishedFileError(
                f'{path} is half written: it has no "complete" mark, which comes last; make it again'
            )
        attrs = file.attributes(_ATTRIBUTES)
        width = len(slide := file.dataset("slide_embedding", "f", (None,)))
        n = len(patches := file.dataset("patch_embedding", "f", (None, width)))
        coords, contours = file.dataset("coords", "iu", (n, 2)), file.dataset("contour_index", "iu", (n,))
        return SlideEmbedding(slide.read(), patches.read(), coords.read(), contours.read(), attrs)


def _is_finished(out: Path, key: str, digest: str, slide: Mapping[str, Any], overwrite: bool) -> bool:
    refuse_foreign(out, "slide_embedding")
    if not out.exists():
        return False
    try:
        with open_h5(out, _DATASETS) as file:
            origin = (slide.get("slide_fingerprint"), slide.get("slide_path"))
            attrs = file.attributes(_ATTRIBUTES)
            known = [each.get("slide_fingerprint") is not None for each in (attrs, slide)]
            if known[0] != known[1] and attrs.get("features_sha256") != digest and not overwrite:
                # Features of the original do not say of which slide they are: nothing tells that this is the same one.
                raise OutputCollisionError(
                    f"{out} was made from other features, perhaps of another slide; name another output, or ask to "
                    "overwrite it"
                )
            if not check_owner(out, attrs, *origin, overwrite=overwrite):
                return False
            finished = bool(attrs.get("complete", False)) and attrs.get("settings_hash") == key and not overwrite
            if finished:
                file.verify()
            return finished
    except DataFileError as exc:
        logger.warning("%s; computing it again", exc)
        return False
