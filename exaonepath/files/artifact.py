"""When a stored result is used again: the hashes that tell what made it, and whose it is."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py

from exaonepath.errors import DataFileError, OutputCollisionError, OutputError
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.hdf5_output import encodable

logger = logging.getLogger(__name__)


def check_owner(
    path: Path, attrs: Mapping[str, Any], fingerprint: str | None, slide_path: str | None, *, overwrite: bool
) -> bool:
    """Whether a stored result is of the slide at hand, by what its attributes say.

    Args:
        path: the stored file.
        attrs: its attributes `slide_fingerprint` and `slide_path`; a file without them counts as ours.
        fingerprint, slide_path: the slide at hand, None where unknown.
        overwrite: the user asked to start over.

    Returns:
        False where the result is stale: the slide was replaced under the same path, or overwriting was asked for.

    Raises:
        OutputCollisionError: the result belongs to a different slide, which would lose it.
    """
    stored = attrs.get("slide_fingerprint")
    if stored is None or fingerprint is None or stored == fingerprint:
        return True
    origin = attrs.get("slide_path")
    if overwrite or (origin is not None and slide_path is not None and origin == encodable(slide_path)):
        logger.warning("%s was made from other content than %s holds now: doing it again", path, slide_path)
        return False
    raise OutputCollisionError(
        f"{path} holds the result of a different slide{f', {origin}' if origin else ''}; two slides of one name need "
        "output folders of their own (or ask to overwrite)"
    )


def refuse_foreign(path: Path, marker: str, foreign: Iterable[str] = ()) -> None:
    """Refuse to replace what is no result of the same stage: a slide, a text, the file of another stage.

    Our files appear whole, so what is there and is not HDF5, or lacks `marker`, or holds a dataset of `foreign`, was
    never an earlier result. A damaged HDF5 file may be.

    Raises:
        OutputCollisionError: something else is there. OutputError: a folder is.
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
    if names and (marker not in names or names & set(foreign)):
        raise other


def refuse_input_as_output(out: Path, inputs: Iterable[Path]) -> None:
    """Raise `OutputCollisionError` where the output file is one of the inputs."""
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise OutputCollisionError(f"{out} is an input of this command; choose another output file")


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hex digest of a settings mapping, independent of key order; values must be plain JSON types."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()


def canonical_json(settings: Mapping[str, Any]) -> str:
    """JSON text with sorted keys and no white space: equal settings give equal text."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
