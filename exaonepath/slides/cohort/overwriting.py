"""Which results a run that computes everything again has still to replace: those that are older than the run.

Several processes that overwrite one folder must not replace each other's results, and a slide whose worker was killed
must be continued, not begun again. So a run notes at its start which files exist; what has changed since counts as new.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from exaonepath.files.file_identity import FileIdentity, file_identity
from exaonepath.slides.outputs import output_paths


@dataclass(frozen=True)
class Overwriting:
    """The files at the start of a run.

    Attributes:
        enabled: whether the run computes everything again.
        files: identities of the results that existed.
        partial: names of the partial files that existed.
    """

    enabled: bool = False
    files: dict[Path, FileIdentity] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()

    def applies_to(self, path: Path) -> bool:
        """Whether the file is to be computed again."""
        return self.enabled and file_identity(path) == self.files.get(path)


def note_existing(out: str | os.PathLike[str], ids: Iterable[str], enabled: bool) -> Overwriting:
    """Note what exists of these slides at the start of a run; nothing is looked at unless `enabled`."""
    if not enabled:
        return Overwriting()
    files: dict[Path, FileIdentity] = {}
    folders: set[Path] = set()
    for name in ids:
        paths = output_paths(out, name)
        folders.add(paths.features.parent)
        for path in (paths.patches, paths.features, paths.embedding):
            identity = file_identity(path)
            if identity is not None:
                files[path] = identity
    partial: set[str] = set()
    for folder in folders:
        if folder.is_dir():
            partial.update(path.name for path in folder.iterdir() if path.suffix == ".part")
    return Overwriting(True, files, frozenset(partial))
