"""What remains of a slide when it is finished: everything, the features, or the slide embedding alone.

The patches file, the picture of the tissue and the contours are small and always remain.
"""

from __future__ import annotations

import logging
from typing import Literal, get_args

from exaonepath.errors import DataFileError, FileBusyError, SettingsError
from exaonepath.files.hdf5 import open_h5
from exaonepath.slides.outputs import OutputPaths

logger = logging.getLogger(__name__)

Keep = Literal["slide", "features", "all"]


def check_keep(keep: str | None) -> Keep | None:
    """The value itself; `SettingsError` is raised unless it is "slide", "features", "all" or None."""
    for known in get_args(Keep):
        if keep == known:
            return known
    if keep is not None:
        raise SettingsError(f"what is kept is slide, features or all, not {keep!r}")
    return None


def wants_patch_embeddings(keep: Keep | None) -> bool | None:
    """Whether an embeddings file holds patch embeddings; None: a new file does, and a finished one stays as it is."""
    return None if keep is None else keep == "all"


def remove_features(paths: OutputPaths, settings_hash: str) -> None:
    """Remove the features of a slide whose embedding is finished.

    A features file that was made with other settings is not removed: it is not what this embedding was computed from.
    """
    if not paths.features.exists():
        return
    try:
        with open_h5(paths.features) as file:
            ours = file.attribute("settings_hash") == settings_hash
    except (DataFileError, FileBusyError) as exc:
        logger.warning("%s is not removed (%s)", paths.features, exc)
        return
    if not ours:
        logger.warning("%s is not removed: it was made with other settings", paths.features)
        return
    try:
        paths.features.unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("%s cannot be removed (%s)", paths.features, exc.strerror)
