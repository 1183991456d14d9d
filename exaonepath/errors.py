"""Every error this package raises on purpose, under one base class.

A message says what was wrong, where (file, key, row), and what to do about it. Errors caused by an argument are also
`ValueError`, so that code written against plain Python conventions catches them.
"""


class ExaonePathError(Exception):
    """Base of all errors raised by exaonepath."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The message by the lines it is to be shown in: a line break inside one belongs to a name, and is escaped."""
        return (str(self),)


class SettingsError(ExaonePathError, ValueError):
    """An argument or option has a value that cannot be used (patch size <= 0, unknown backend, ...)."""


class ConfigError(SettingsError):
    """A model configuration holds an unknown key or an impossible value."""


class DeviceError(SettingsError):
    """The requested device or dtype is not available on this machine."""


class BackendError(ExaonePathError, RuntimeError):
    """A computation cannot run here or not on this input, ran out of memory, or gave NaN."""


class MemoryLimitError(BackendError):
    """A computation would need more memory than the limit or the device has; refused before anything is allocated."""


class MissingDependencyError(BackendError):
    """An optional package is needed for this and not installed; the message names the extra that brings it."""


class SlideError(ExaonePathError):
    """Something is wrong with a slide file."""


class SlideOpenError(SlideError):
    """The slide is missing, unreadable, truncated, has no level, or is not a slide at all."""


class SlideChangedError(SlideError):
    """The slide file was replaced or written to while it was being read; nothing read since can be used."""


class ScaleError(SlideError):
    """The slide's pixel size is doubtful and strictness was asked for, or no patch can be computed with it."""


class SlideReadError(SlideError):
    """Pixels of an opened slide could not be read, also not through a fresh handle."""


class SlideSkippedError(SlideError):
    """The slide was refused by a limit the caller set (`max_seg_pixels`); the reason is also on disk."""


class OutputError(ExaonePathError, OSError):
    """An output folder or file cannot be written (permissions, disk full, not a folder)."""


class OutputCollisionError(OutputError):
    """The output would overwrite the result of a different slide, or two inputs would write the same file."""


class DataFileError(ExaonePathError):
    """An input HDF5 file is corrupt, incomplete, lacks a dataset, or its datasets do not fit together."""


class DamagedFileError(DataFileError):
    """An HDF5 file was whole once and is not any more: truncated, or its content and its checksums disagree."""


class UnfinishedFileError(DataFileError):
    """An HDF5 file lacks the mark that its writer puts there last."""


class ForeignFileError(DataFileError):
    """A file that no stage of this package writes: another format, another layout, or data that lie elsewhere."""


class FileBusyError(ExaonePathError, OSError):
    """An HDF5 file is there but cannot be opened now: locked by another process, or not readable by this user."""


class WeightsError(ExaonePathError):
    """A model's files cannot be found or read, are damaged, or do not fit the model (missing, unexpected or misshapen
    tensors, others than floating point, NaN)."""
