"""The rule that decides if a stored result is used again, made again, or left unchanged because it is not ours."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import h5py

from exaonepath.errors import DataFileError, OutputCollisionError, OutputError
from exaonepath.files.hdf5 import StoredFile, open_h5
from exaonepath.files.hdf5_output import encodable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MARKS = ("slide_fingerprint", "slide_path", "slide_mtime_ns", "settings_hash", "features_sha256", "complete")


@dataclass(frozen=True)
class Kind:
    """A kind of file that a stage writes.

    Attributes:
        datasets: datasets that every such file has; the first one distinguishes it from other files.
        others: datasets that only files of other stages have.
        writer: returns the program that wrote a file without this package's attributes, if the layout shows it.
        made_again: writers whose files can be made again without loss.
    """

    datasets: tuple[str, ...]
    others: tuple[str, ...] = ()
    writer: Callable[[StoredFile], str | None] = lambda file: None
    made_again: tuple[str, ...] = ()


@dataclass(frozen=True)
class MadeFrom:
    """The inputs of a result. A stored result is used again only if all of them are the same.

    Attributes:
        settings_hash: hash of everything that decides the content: settings, inputs, weights.
        slide_fingerprint, slide_path: the slide; None if it is not known (features of EXAONE Path).
        slide_mtime_ns: modification time of the slide.
        settings: if the file stores them, the warning names those that differ.
        features_sha256: hash of the features that an embedding is computed from; the fingerprint of the input if the
            slide is not known.
    """

    settings_hash: str
    slide_fingerprint: str | None
    slide_path: str | None
    slide_mtime_ns: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    features_sha256: str | None = None


def reuse(
    path: Path, kind: Kind, made_from: MadeFrom, read: Callable[[StoredFile], T], *, overwrite: bool = False
) -> T | None:
    """The value that `read` returns for a finished result, if the result can be used again; None if it must be made.

    Every stage applies this rule, in this order. A file that is not a result of this stage is never replaced. A file
    that this project did not make, or the result of another slide, is replaced only on request. A result that is
    damaged, unfinished or made from other inputs is made again, and a warning is logged. Otherwise every checksum is
    compared, and the result is used.

    Raises:
        OutputCollisionError: another file, a file of another program, or the result of another slide would be lost.
        OutputError: `path` is a folder, or permission to read it is denied.
    """
    try:
        _refuse_other_files(path, kind)
    except PermissionError as exc:
        raise OutputError(f"{path} may not be read (permission denied), so it is not replaced") from exc
    if not path.exists():
        return None
    try:
        with open_h5(path) as file:
            reason = _why_not(path, file, kind, made_from, overwrite)
            if reason is None:
                file.require(kind.datasets)
                file.verify()
                return read(file)
            if reason:
                logger.warning("%s %s: making it again", path, reason)
    except DataFileError as exc:
        logger.warning("%s; making it again", exc)
    return None


def _why_not(path: Path, file: StoredFile, kind: Kind, made_from: MadeFrom, overwrite: bool) -> str | None:
    """The reason why a readable result is not used: None if it is used, "" if the user asked to make it again."""
    attrs = file.attributes(_MARKS)
    if attrs.get("settings_hash") is None:
        writer = kind.writer(file)
        if writer not in kind.made_again and (writer or not overwrite):
            raise OutputCollisionError(
                f"{path} was made by {writer or 'another program'}, whose files are not replaced; name another output, "
                f"or move the file away{'' if writer else ', or ask to overwrite it'}"
            )
        return "" if overwrite else "does not state which slide and settings it was made from"
    if not is_of_this_slide(path, attrs, made_from, overwrite=overwrite):
        return "was made from other content of the slide"
    if overwrite:
        return ""
    if not attrs.get("complete", False):
        return "is unfinished"
    if attrs["settings_hash"] != made_from.settings_hash:
        names = _changed(file, made_from.settings)
        return f"was made with other settings{f' ({names})' if names else ''}"
    now, then = made_from.slide_mtime_ns, attrs.get("slide_mtime_ns")
    same_place = made_from.slide_path is not None and attrs.get("slide_path") == encodable(made_from.slide_path)
    if same_place and now is not None and then is not None and now != then:
        logger.warning(
            "%s is used again, but %s was written to since it was made; its sampled content is the same. If more of it "
            "has changed (for example, a copy that was not finished), ask to overwrite",
            path,
            made_from.slide_path,
        )
    return None


def _changed(file: StoredFile, settings: Mapping[str, Any]) -> str:
    text = file.attribute("settings")
    if not settings or not isinstance(text, str):
        return ""
    try:
        old = json.loads(text)
    except ValueError:
        return ""
    return ", ".join(sorted(name for name in settings.keys() | old.keys() if settings.get(name) != old.get(name)))


def is_of_this_slide(path: Path, attrs: Mapping[str, Any], made_from: MadeFrom, *, overwrite: bool) -> bool:
    """Whether the attributes of a stored result show that it belongs to the current slide.

    Args:
        path: the stored file.
        attrs: those of its attributes `slide_fingerprint`, `slide_path` and `features_sha256` that exist.
        made_from: the inputs of the current run.
        overwrite: the user asked to start again.

    Returns:
        False if the result is outdated: the slide was replaced under the same path, or overwriting was requested.

    Raises:
        OutputCollisionError: the result belongs to a different slide, whose result would be lost.
    """
    stored, fingerprint = attrs.get("slide_fingerprint"), made_from.slide_fingerprint
    if stored is None or fingerprint is None:
        features = made_from.features_sha256
        if features and (stored is None) != (fingerprint is None) and attrs.get("features_sha256") != features:
            # Features of EXAONE Path do not state their slide: nothing shows that it is the same one.
            if not overwrite:
                raise OutputCollisionError(
                    f"{path} was made from other features, perhaps of another slide; name another output, or ask to "
                    "overwrite it"
                )
            return False
        return True
    if stored == fingerprint:
        return True
    origin = attrs.get("slide_path")
    if overwrite or (
        origin is not None and made_from.slide_path is not None and origin == encodable(made_from.slide_path)
    ):
        return False
    raise OutputCollisionError(
        f"{path} holds the result of a different slide{f', {origin}' if origin else ''}; two slides of one name need "
        "output folders of their own (or ask to overwrite)"
    )


def _refuse_other_files(path: Path, kind: Kind) -> None:
    """Refuse to replace a file that is not a result of this stage: a slide, a text, the file of another stage.

    This package writes files whole, so a file that is not HDF5, lacks the first dataset of `kind`, or has a dataset of
    another kind was never an earlier result. A damaged HDF5 file may be one.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file to write")
    if not path.exists() or path.stat().st_size == 0:
        return
    other = OutputCollisionError(
        f"{path} is there already and is no earlier result of this stage; name another output, or move it away"
    )
    if not h5py.is_hdf5(path):
        raise other
    try:
        with open_h5(path) as file:
            names = set(file.names)
    except DataFileError:
        return
    if names and (kind.datasets[0] not in names or names & set(kind.others)):
        raise other


def refuse_input_as_output(out: Path, inputs: Iterable[Path]) -> None:
    """Raise `OutputCollisionError` if the output file is one of the inputs."""
    for path in inputs:
        same = False
        with suppress(PermissionError):  # if permission is denied, opening the files raises the error
            same = out.exists() and path.exists() and out.samefile(path)
        if same:
            raise OutputCollisionError(f"{out} is an input of this command; choose another output file")


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hex digest of a settings mapping, independent of the key order; values must be plain JSON types."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()


def canonical_json(settings: Mapping[str, Any]) -> str:
    """JSON text with sorted keys and no white space: equal settings give equal text."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
