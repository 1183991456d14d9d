"""All errors that this package raises on purpose, with one base class.

A message states the problem, its place (file, key, row), and what to do. Errors caused by an argument are also
`ValueError`, so that code with the usual Python conventions catches them.
"""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 50  # problems that a message lists


class ExaonePathError(Exception):
    """Base of all errors raised by exaonepath."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines of the message. A line break inside one of them is part of a name, and must be escaped."""
        return (str(self),)


class _ListedError(ExaonePathError):
    """An error with several reasons.

    Args:
        head: the first line of the message.
        problems: the reasons, if there are several.
    """

    def __init__(self, head: str, problems: Iterable[str] = ()) -> None:
        self.head, self.problems = head, tuple(problems)
        super().__init__("\n".join(self.lines))

    @property
    def lines(self) -> tuple[str, ...]:
        """The first line, and a line for each reason; of very many reasons, the first ones."""
        shown = [f"  - {problem}" for problem in self.problems[:_LISTED]]
        more = len(self.problems) - _LISTED
        return (self.head, *shown, *([f"  ... and {more} more"] if more > 0 else []))

    def __reduce__(self) -> tuple[type[_ListedError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.head, self.problems)


class SettingsError(ExaonePathError, ValueError):
    """An argument or option has a value that cannot be used (patch size <= 0, unknown backend, ...)."""


class ConfigError(SettingsError):
    """A model configuration has an unknown key or an impossible value."""


class DeviceError(SettingsError):
    """The requested device or dtype is not available on this machine."""


class BackendError(ExaonePathError, RuntimeError):
    """A computation is not supported on this device or for this input, ran out of memory, or returned NaN."""


class MemoryLimitError(BackendError):
    """A computation needs more memory than the limit, or than the device has; raised before anything is allocated."""


class DeviceMemoryError(BackendError):
    """A computation ran out of the device's memory."""


class MissingDependencyError(BackendError):
    """A required optional package is not installed; the message names the extra that contains it."""


class ClusterError(_ListedError, RuntimeError):
    """A Ray cluster cannot be reached, differs from this installation, or lacks what is asked for."""


class SlideError(ExaonePathError):
    """Something is wrong with a slide file."""


class SlideOpenError(SlideError):
    """The slide is missing, unreadable, truncated, has no level, or is not a slide at all."""


class SlideChangedError(SlideError):
    """The slide file was replaced or written to while it was read; data read since then must not be used."""


class ScaleError(SlideError):
    """The slide's pixel size is doubtful and strict mode is on, or no patches can be computed with it."""


class SlideReadError(SlideError):
    """Pixels of an opened slide could not be read, also not after it was opened again."""


class SlideSkippedError(SlideError):
    """The slide exceeds a limit that the caller set (`max_seg_pixels`); the reason is also stored on disk."""


class MaskError(ExaonePathError, ValueError):
    """A file of tissue regions or excluded regions cannot be read, selects nothing, or does not fit the slide."""


class OutputError(ExaonePathError, OSError):
    """An output folder or file cannot be written (permissions, disk full, not a folder)."""


class OutputCollisionError(OutputError):
    """The output would overwrite the result of a different slide, or two inputs would write the same file."""


class SlideListError(_ListedError, SettingsError):
    """The slides of a cohort cannot be used as they are listed; `problems` has every reason."""


class IdCollisionError(_ListedError, OutputCollisionError):
    """Several slides would write the same files, because their ids are equal; `problems` names all of them."""


class DataFileError(ExaonePathError):
    """An input HDF5 file is corrupt, incomplete, lacks a dataset, or its datasets do not match."""


class DamagedFileError(DataFileError):
    """A file was complete and was damaged later: it is truncated, or its content does not match its checksums."""


class UnfinishedFileError(DataFileError):
    """An HDF5 file lacks the mark that its writer writes last."""


class ForeignFileError(DataFileError):
    """A file that was not written by this package: another format or layout, or data in other files."""


class FileBusyError(ExaonePathError, OSError):
    """An HDF5 file exists but cannot be opened now: locked by another process, or not readable by this user."""


class WeightsError(ExaonePathError):
    """A model's files cannot be found or read, are damaged, or do not fit the model (missing, unexpected or misshapen
    tensors, others than floating point, NaN)."""


class StoredConfigError(WeightsError, ConfigError):
    """The config.json of a model's files holds an unknown key or an impossible value."""


class LeaseLostError(ExaonePathError):
    """Another process has taken over this slide, because this one did not renew its claim in time; it stops."""


class SlideBusyError(ExaonePathError):
    """Another process works on this slide now."""


class WorkerError(ExaonePathError):
    """A worker process ended before its work was done: it was killed, or ran out of memory."""
