"""The other files of a slide, next to the one that is opened: DICOM instances, a MIRAX folder, VMS images.

OpenSlide reads them implicitly, so they are part of the slide's content: if one is replaced, the slide has changed.
"""

from __future__ import annotations

from pathlib import Path

from exaonepath.slides.dicom import is_dicom, series_identity

_MAX_INDEX_BYTES = 1 << 20


def companion_files(path: Path) -> tuple[Path, ...]:
    """The other files of a slide, by name; empty for a slide of one file.

    DICOM: the instances of the same series in the same folder. MIRAX (.mrxs): the files in the folder of the same stem.
    Hamamatsu (.vms, .vmu): the files that it names.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".mrxs":
            found = {file for file in path.with_suffix("").iterdir() if file.is_file()}
        elif suffix in (".vms", ".vmu"):
            found = _named_in(path)
        elif is_dicom(path):
            found = _of_the_same_series(path)
        else:
            return ()
    except OSError:  # opening the slide raises the error that explains it
        return ()
    return tuple(sorted(found - {path}))


def _named_in(path: Path) -> set[Path]:
    with path.open("rb") as file:
        text = file.read(_MAX_INDEX_BYTES).decode("utf-8", "replace")
    names = {line.partition("=")[2].strip() for line in text.splitlines() if "=" in line}
    # Only plain file names are accepted: the format defines no others, and an untrusted text must not select other
    # paths.
    plain = {name for name in names if 0 < len(name.encode()) < 256 and not set(name) & set("/\\\0")}
    return {path.parent / name for name in plain if (path.parent / name).is_file()}


def _of_the_same_series(path: Path) -> set[Path]:
    series = series_identity(path)
    if series is None:
        return set()
    return {file for file in path.parent.iterdir() if file.is_file() and series_identity(file) == series}
