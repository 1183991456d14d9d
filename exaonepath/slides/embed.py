"""The last stage: computes the embeddings from the features of one slide, and writes them to an HDF5 file."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exaonepath.device import inference
from exaonepath.encoders.loading import LoadedEncoder
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import BackendError, DataFileError
from exaonepath.files.artifact import MadeFrom, refuse_input_as_output, reuse, settings_hash
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.embeddings import KIND, SlideEmbedding, write_embedding
from exaonepath.files.features import FeatureSet, read_features
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

_SLIDE = ("slide_fingerprint", "slide_path", "slide_mtime_ns")


def embed_slide(
    features: FeatureSet,
    encoder: LoadedEncoder[ExaonePathSlideEncoderModel],
    dtype: torch.dtype = torch.float32,
    *,
    max_memory: int | str | None = None,
) -> SlideEmbedding:
    """Run the slide encoder over the features of one slide, which stay in the host's memory.

    Args:
        features: as returned by `read_features`, with coordinates.
        encoder: from `load_slide_encoder`.
        dtype: bfloat16 and float16 run under autocast; the result is always float32.
        max_memory: memory that the slide encoder may use on its device, weights included, in bytes or as "12GB"; None:
            the free memory on a GPU, no limit on a CPU.

    Raises:
        DataFileError: the features have no coordinates, or the wrong width.
        MemoryLimitError: the slide does not fit; raised before the computation, with the amount of memory it needs.
        DeviceError: the dtype is not float32, bfloat16 or float16.
        BackendError: the encoder returned NaN or infinity, or ran out of memory.
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
    # If the value of one patch is not finite, neither is the mean over all patches: checking the mean checks them all.
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
    """Embed a features file into an embedding file; a finished file of the same features and weights is left unchanged.

    Args:
        features_path: HDF5 with `features`, `coords` and `contour_index` (zeros if missing), ours or the original's.
        out_path: the HDF5 file to write: `slide_embedding`, `patch_embedding`, `coords`, `contour_index`.
        encoder, dtype, max_memory: as for `embed_slide`.
        overwrite: compute again, even if a finished file exists.

    Returns:
        The output path, and whether a finished file existed already.

    Raises:
        DataFileError: the features file is damaged.
        OutputCollisionError: the output belongs to another slide, or is an input.
        OutputError: the output cannot be written.
        MemoryLimitError: see `embed_slide`.
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
    fingerprint, path, mtime = (features.attrs.get(name) for name in _SLIDE)
    made_from = MadeFrom(key, fingerprint, path, mtime, features_sha256=attrs["features_sha256"])
    if reuse(out, KIND, made_from, lambda file: True, overwrite=overwrite):
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
    attrs |= {name: features.attrs[name] for name in (*_SLIDE, "reader") if name in features.attrs}
    write_embedding(out, embedding, attrs)
    return out, False
