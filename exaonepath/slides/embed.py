"""The last stage: computes the embeddings from the features of one slide, and writes them to an HDF5 file."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exaonepath.device import inference
from exaonepath.encoders.loading import LoadedEncoder
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import BackendError, DataFileError, FileBusyError
from exaonepath.files.artifact import MadeFrom, refuse_input_as_output, reuse, settings_hash
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.embeddings import ATTRIBUTES, KIND, PATCHES, SlideEmbedding, read_embedding, write_embedding
from exaonepath.files.features import FeatureSet, read_features
from exaonepath.files.hdf5 import StoredFile, open_h5
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

_SLIDE = ("slide_fingerprint", "slide_path", "slide_mtime_ns")
# Attributes of the features file, and their names in the embeddings file: they still show what the embedding was made
# from when the features file is gone.
_OF_FEATURES = {
    "settings_hash": "features_settings_hash",
    "weights_fingerprint": "patch_weights_fingerprint",
    "preprocessing": "preprocessing",
    "dtype": "features_computed_in",
    "feature_dtype": "feature_dtype",
    "patches_settings_hash": "patches_settings_hash",
    "patch_size": "patch_size",
}


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
    patch_embeddings: bool | None = None,
    patient: str | None = None,
    request: str | None = None,
    overwrite: bool = False,
) -> tuple[Path, bool]:
    """Embed a features file into an embedding file; a finished file of the same features and weights is left unchanged.

    Args:
        features_path: HDF5 with `features`, `coords` and `contour_index` (zeros if missing), ours or the original's.
        out_path: the HDF5 file to write: `slide_embedding`, `coords`, `contour_index`, and `patch_embedding`.
        encoder, dtype, max_memory: as for `embed_slide`.
        patch_embeddings: whether the file has the embedding of each patch, 6 kB each. If False, they are removed from a
            finished file; if True, a file without them is made again; None: a new file has them.
        patient: the patient whom the slide is of; stored.
        request: hash of what was asked for, of all stages; stored. Only a hint: it does not decide about reuse.
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
    attrs = _settings(digest.hexdigest(), encoder, dtype)
    key = settings_hash(attrs)
    fingerprint, path, mtime = (features.attrs.get(name) for name in _SLIDE)
    made_from = MadeFrom(key, fingerprint, path, mtime, features_sha256=attrs["features_sha256"])
    inputs = {to: features.attrs[name] for name, to in _OF_FEATURES.items() if name in features.attrs}
    stored = reuse(out, KIND, made_from, lambda file: _may_be_used(file, patch_embeddings), overwrite=overwrite)
    if stored is not None:
        if patch_embeddings is False:
            remove_patch_embeddings(out, inputs)
        logger.info("%s is up to date", out)
        return out, True
    ensure_folder(out.parent)
    made_by = features.attrs.get("weights")
    if "imported_from" in features.attrs and made_by != encoder.weights:
        logger.warning(
            "the features in %s were made by %s and imported from %s; the embedding means something only if the slide "
            "encoder (%s) was trained on features of that encoder",
            source,
            made_by,
            features.attrs["imported_from"],
            encoder.weights,
        )
    if len(features.features) == 0:
        logger.warning("%s holds no patch: the slide embedding is all zeros", source)
    embedding = embed_slide(features, encoder, dtype, max_memory=max_memory)
    if patch_embeddings is False:
        embedding = replace(embedding, patch_embedding=None)
    attrs |= {
        "settings_hash": key,
        "weights": encoder.weights,
        "random_weights": encoder.is_random or str(features.attrs.get("weights", "")).startswith("random:"),
        "n_patches": len(features.features),
        # What viewers and exports have to know, without the files of earlier stages. Not a part of the settings: files
        # of earlier versions, which lack it, are used again.
        "feature_width": features.features.shape[1],
        "n_failed": len(features.failures),
        "exaonepath_version": __version__,
        **inputs,
        **({} if patient is None else {"patient": patient}),
        **({} if request is None else {"request": request}),
    }
    attrs |= {name: features.attrs[name] for name in (*_SLIDE, "reader") if name in features.attrs}
    write_embedding(out, embedding, attrs)
    return out, False


def finished_embedding(
    out_path: str | os.PathLike[str],
    features_made_from: MadeFrom,
    encoder: LoadedEncoder[ExaonePathSlideEncoderModel],
    *,
    dtype: torch.dtype = torch.float32,
    patch_embeddings: bool | None = None,
) -> dict[str, Any] | None:
    """Attributes of a finished embedding that the stages before it would give again, found without the features file.

    The embeddings file states which features it was computed from: by the hash of their content, and by the hash of
    everything that decided them (slide, coordinates, preprocessing, weights, dtypes). If the latter is equal, computing
    the features and the embedding again would give this result.

    Args:
        out_path: the embeddings file.
        features_made_from: the inputs of the features (see `feature_identity`).
        encoder, dtype: of the slide encoder.
        patch_embeddings: True: a file without them is not used.

    Returns:
        The attributes; None if the embedding must be made, or if patches were unreadable (they are tried again).

    Raises:
        OutputCollisionError, OutputError: see `exaonepath.files.artifact.reuse`.
    """
    out = Path(out_path)
    try:
        with open_h5(out) as file:
            stored = file.attributes(ATTRIBUTES)
    except (DataFileError, FileBusyError):
        return None  # the stage that makes it again says why
    key = settings_hash(_settings(str(stored.get("features_sha256")), encoder, dtype))
    current = (stored.get("features_settings_hash"), stored.get("settings_hash"))
    if current != (features_made_from.settings_hash, key) or stored.get("n_failed"):
        return None
    made_from = replace(features_made_from, settings_hash=key)
    used = reuse(out, KIND, made_from, lambda file: _may_be_used(file, patch_embeddings))
    return stored if used else None


def remove_patch_embeddings(path: Path, inputs: Mapping[str, Any] | None = None) -> None:
    """Write a finished embeddings file again without patch embeddings, unless it has none.

    Args:
        path: the file.
        inputs: attributes to add, if the file was made by a version that did not store them.

    Raises:
        DataFileError, OutputError: the file cannot be read, or written.
    """
    embedding = read_embedding(path, require_patches=False)
    if embedding.patch_embedding is not None:
        write_embedding(path, replace(embedding, patch_embedding=None), {**(inputs or {}), **embedding.attrs})


def _may_be_used(file: StoredFile, patch_embeddings: bool | None) -> bool | None:
    """True if the file holds what is wanted, otherwise None."""
    if patch_embeddings and PATCHES not in file:
        logger.info("%s was kept without patch embeddings, which are wanted: making it again", file.path)
        return None
    return True


def _settings(features_sha256: str, encoder: LoadedEncoder[Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "features_sha256": features_sha256,
        "weights_fingerprint": encoder.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
    }
