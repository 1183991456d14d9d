"""The results of a slide as exports need them: its vectors, and what its files state about the patches."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, SettingsError, SlideError
from exaonepath.exchange.slide_patches import CheckedMatrix, Matrix, Picture, SlidePatches, Vectors
from exaonepath.files import embeddings, features
from exaonepath.files.geojson import geojson_made_from, stated_origin
from exaonepath.files.hdf5 import StoredFile, open_h5, passing_errors
from exaonepath.files.patches import parse_patches
from exaonepath.slides.image import SlideImage
from exaonepath.slides.outputs import Kind, output_paths, read_layout, stored_ids
from exaonepath.slides.patches.pipeline import REFERENCE_MPP
from exaonepath.text import close_to

logger = logging.getLogger(__name__)

_STAGES: tuple[Kind, ...] = ("patches", "features", "embedding", "contours")
_FEATURES, _EMBEDDINGS = "_features.h5", "embeddings"
_PICTURE_SIDE = 1024


@dataclass(frozen=True)
class SlideFiles:
    """The files of one slide, by kind; those that exist."""

    id: str
    files: Mapping[Kind, Path]


@dataclass(frozen=True)
class Reading:
    """What of a slide is wanted, and what the user states about it.

    Attributes:
        vectors: "features" or "embeddings" of the patches; None: whichever exist, or none.
        dtype: "float32" or "float16"; None: as stored.
        encoder: name of the encoder; None: as the files state it.
        patch_size: side of a patch in level-0 pixels, for files that do not state it.
        target_size: the same in pixels at 0.5 um, as it was asked for.
        slides: slide files by id, for those that have moved.
        picture: whether a small picture of the slide is wanted.
    """

    vectors: Vectors | None = "features"
    dtype: str | None = None
    encoder: str | None = None
    patch_size: int | None = None
    target_size: int | None = None
    slides: Mapping[str, Path] = field(default_factory=dict)
    picture: bool = False


def find_results(source: Path, ids: tuple[str, ...] = ()) -> list[SlideFiles]:
    """The slides of an output folder, by id, or the one slide of a features, embeddings or patches file.

    Args:
        source: the folder, or the file.
        ids: slides that are wanted; none: all.

    Raises:
        SettingsError: there are no results, or none of a wanted slide.
        DataFileError, OutputError: the folder or the file cannot be read.
    """
    if source.is_file():
        found = [_of_file(source)]
    elif source.is_dir():
        layout = read_layout(source)
        by_id: dict[str, dict[Kind, Path]] = {}
        for kind in _STAGES:
            for name, path in stored_ids(source, kind, layout):
                by_id.setdefault(name, {})[kind] = path
        found = [SlideFiles(name, files) for name, files in sorted(by_id.items()) if set(files) - {"contours"}]
    else:
        raise SettingsError(f"{source} does not exist; name an output folder of exaonepath encode, or one file of it")
    if not found:
        raise SettingsError(f"{source} holds no results of exaonepath (patches, features or embeddings)")
    known = {slide.id: slide for slide in found}
    for name in ids:
        if name not in known:
            raise SettingsError(f"{source} has no results of a slide {name!r}{close_to(name, known)}")
    return [known[name] for name in dict.fromkeys(ids)] if ids else found


def _of_file(path: Path) -> SlideFiles:
    with open_h5(path) as file:
        names = set(file.names)
    stem = path.name.removesuffix(".h5")
    if "slide_embedding" in names:
        if path.parent.name == _EMBEDDINGS:
            paths = vars(output_paths(path.parent.parent, stem))
            others = {kind: paths[kind] for kind in _STAGES if paths[kind].is_file()}
            return SlideFiles(stem, {**others, "embedding": path})
        return SlideFiles(stem, {"embedding": path})
    if "features" in names:
        stem = path.name.removesuffix(_FEATURES).removesuffix(".h5")
        patches = path.with_name(f"{stem}.h5")
        files: dict[Kind, Path] = {"features": path}
        if patches != path and patches.is_file():
            files["patches"] = patches
        return SlideFiles(stem, files)
    if "coords" in names:
        return SlideFiles(stem, {"patches": path})
    raise SettingsError(f"{path} holds neither features nor embeddings nor patches; it holds {sorted(names)}")


def open_results(found: SlideFiles, wanted: Reading) -> AbstractContextManager[SlidePatches]:
    """The patches of a slide; its vectors can be read while the block runs, whose errors pass through unchanged.

    Raises:
        DataFileError: a file is damaged or incomplete, or the vectors were not kept.
        SettingsError: the size of the patches is not stated.
    """
    return passing_errors(_opened(found, wanted))


@contextmanager
def _opened(found: SlideFiles, wanted: Reading) -> Iterator[SlidePatches]:
    with ExitStack() as stack:
        rows = _rows(stack, found, wanted)
        about = _about_patches(found, rows.attrs)
        size = rows.attrs.get("patch_size") or about.get("patch_size") or wanted.patch_size
        if not size:
            raise SettingsError(
                f"no file states the size of the patches of {found.id}; state it in level-0 pixels (--patch-size)"
            )
        vectors = None
        if rows.vectors is not None:
            vectors = CheckedMatrix(rows.vectors, f"{rows.path} ({rows.kind})", rows.columns, wanted.dtype)
        path = about.get("slide_path", rows.attrs.get("slide_path"))
        yield SlidePatches(
            id=found.id,
            coords=rows.coords,
            patch_size=int(size),
            vectors=vectors,
            kind=rows.kind,
            encoder=wanted.encoder or str(rows.attrs.get("weights", "")),
            fragments=rows.fragments,
            slide_vector=_slide_vector(found, rows.coords),
            patient=_patient(found),
            mpp=about.get("mpp", rows.attrs.get("mpp")),
            target_size=wanted.target_size or about.get("target_size"),
            target_step=None if wanted.target_size else about.get("target_step"),
            target_mpp=REFERENCE_MPP if wanted.target_size or "target_size" in about else None,
            level0_size=about.get("level0_size"),
            origin=_origin(found),
            attrs={name: value for name, value in rows.attrs.items() if name != "complete"},
            picture=_picture(found.id, wanted, path, rows.attrs.get("slide_fingerprint")) if wanted.picture else None,
        )


@dataclass(frozen=True)
class _Rows:
    """The patches in one file, and their vectors in it: `columns` of a dataset; None if there are none."""

    path: Path
    coords: np.ndarray
    fragments: np.ndarray
    attrs: dict[str, Any]
    vectors: Matrix | None = None
    columns: tuple[int, int] | None = None
    kind: Vectors = "features"


def _rows(stack: ExitStack, found: SlideFiles, wanted: Reading) -> _Rows:
    kinds: tuple[Vectors, ...] = ("features", "embeddings") if wanted.vectors is None else (wanted.vectors,)
    problems = []
    for kind in kinds:
        if kind == "features" and "features" in found.files:
            path = found.files["features"]
            file = stack.enter_context(open_h5(path, ["features", "coords"]))
            vectors = file.dataset("features", "f", (None, None))
            return _Rows(path, *_positions(file, len(vectors)), _finished(file, features.ATTRIBUTES), vectors)
        if "embedding" in found.files:
            path = found.files["embedding"]
            file = stack.enter_context(open_h5(path, embeddings.DATASETS))
            if embeddings.PATCHES in file:
                vectors = file.dataset(embeddings.PATCHES, "f", (None, None))
                attrs = _finished(file, embeddings.ATTRIBUTES)
                columns = None
                if kind == "features":
                    width = attrs.get("feature_width")
                    if not isinstance(width, int) or not 0 < width <= vectors.shape[1]:
                        problems.append(
                            f"{path} was written by an earlier version, which does not state how wide the features in "
                            "its patch embeddings are"
                        )
                        continue
                    columns = (0, width)
                return _Rows(path, *_positions(file, len(vectors)), attrs, vectors, columns, kind)
        problems.append(f"the {kind} of the patches of {found.id} were not kept")
    if wanted.vectors is not None:
        raise DataFileError(
            f"{problems[-1]}; encode the slide again with --keep all, or export other vectors (--vectors)"
        )
    for stage in ("embedding", "patches"):
        if stage in found.files:
            path = found.files[stage]
            with open_h5(path, ["coords"]) as file:
                attrs = _finished(file, embeddings.ATTRIBUTES) if stage == "embedding" else {}
                return _Rows(path, *_positions(file, None), attrs)
    raise DataFileError(f"{found.id} has no results")


def _finished(file: StoredFile, names: tuple[str, ...]) -> dict[str, Any]:
    attrs = file.attributes(names)
    if not attrs.get("complete", True):
        raise DataFileError(f"{file.path} is marked as not complete; run its stage again")
    return attrs


def _positions(file: StoredFile, n: int | None) -> tuple[np.ndarray, np.ndarray]:
    coords = file.dataset("coords", "iu", (n, 2)).read()
    fragments = np.zeros(len(coords), np.int32)
    if "contour_index" in file:
        fragments = file.dataset("contour_index", "iu", (len(coords),)).read()
    for values in (coords, fragments):
        if values.size and max(abs(int(values.min())), abs(int(values.max()))) > np.iinfo(np.int32).max:
            raise DataFileError(f"{file.path}: coordinates are beyond 32 bits")
    return coords.astype(np.int32), fragments.astype(np.int32)


def _about_patches(found: SlideFiles, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """What the patches file states; nothing if the vectors were made from other patches."""
    path = found.files.get("patches")
    if path is None:
        return {}
    with open_h5(path, ["coords"]) as file:
        patches = parse_patches(path, file)
        settings, mpp, slide = (file.attribute(name) for name in ("settings", "mpp", "slide_path"))
        size = file.attribute("level_dim", of="coords")
    stated = attrs.get("patches_settings_hash")
    if stated is not None and patches.settings_hash is not None and stated != patches.settings_hash:
        logger.warning("%s was made again with other settings since; what it states is not used", path)
        return {}
    about: dict[str, Any] = {"patch_size": patches.patch_size}
    if isinstance(mpp, float):
        about["mpp"] = mpp
    if isinstance(slide, str):
        about["slide_path"] = slide
    if patches.patch_level == 0 and isinstance(size, np.ndarray) and size.shape == (2,):
        about["level0_size"] = (int(size[0]), int(size[1]))
    try:
        asked = json.loads(settings) if isinstance(settings, str) else {}
    except ValueError:
        asked = {}
    for name, key in (("target_size", "patch_size"), ("target_step", "step_size")):
        if isinstance(asked, dict) and isinstance(asked.get(key), int):
            about[name] = asked[key]
    return about


def _slide_vector(found: SlideFiles, coords: np.ndarray) -> np.ndarray | None:
    path = found.files.get("embedding")
    if path is None:
        return None
    with open_h5(path, embeddings.DATASETS) as file:
        _finished(file, ("complete",))
        if not np.array_equal(_positions(file, None)[0], coords):
            logger.warning("%s is of other patches than the features of %s, and is left out", path, found.id)
            return None
        return file.dataset("slide_embedding", "f", (None,)).read()


def _patient(found: SlideFiles) -> str | None:
    path = found.files.get("embedding")
    if path is None:
        return None
    with open_h5(path) as file:
        patient = file.attribute("patient")
    return patient if isinstance(patient, str) else None


def _origin(found: SlideFiles) -> tuple[int, int]:
    path = found.files.get("contours")
    return (0, 0) if path is None else stated_origin(geojson_made_from(path) or {})


def _picture(name: str, wanted: Reading, stated: object, fingerprint: object) -> Picture | None:
    """A small picture of the slide, if its file is at hand and is the one that the results were made from."""
    path = wanted.slides.get(name) or (Path(stated) if isinstance(stated, str) and stated else None)
    if path is None or not path.exists():
        return None
    try:
        with SlideImage(path) as slide:
            if isinstance(fingerprint, str) and slide.fingerprint() != fingerprint:
                logger.warning("%s is another slide than the one %s was made from; it is not shown", path, name)
                return None
            pixels = slide.thumbnail(_PICTURE_SIDE)
            width, height = slide.dimensions
    except SlideError as exc:
        logger.warning("no picture of %s: %s", name, exc)
        return None
    return Picture(pixels, (pixels.shape[1] / width, pixels.shape[0] / height))
