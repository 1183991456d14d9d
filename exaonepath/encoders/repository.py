"""The files of a model, in a local folder or in a repository of the Hub.

Symbolic links are followed, because the Hub's cache consists of them, and because users may link files into their own
folders. The target of a link must be a regular file.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from exaonepath.errors import SettingsError, WeightsError

# Arguments of `from_pretrained` that control the download of files. `proxies` and `resume_download` have no effect in
# newer versions of the Hub's client, which read the environment.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_IGNORED_ARGUMENTS = ("proxies", "resume_download", "mirror", "user_agent", "_commit_hash")
# The base class of the errors of the HTTP library that the Hub's client uses (httpx or requests, by version).
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


class HubError(WeightsError):
    """The Hub refused a request, or the name is not a valid id of a repository."""


@dataclass
class Repository:
    """Location of the files of one model.

    Attributes:
        where: local folder, the path of a config.json, or a Hub id.
        subfolder: folder inside it, "" for the root.
        hub: arguments of the Hub's client.
        unreachable: a file is not in the cache, and the Hub could not be reached.
    """

    where: str
    subfolder: str = ""
    hub: dict[str, Any] = field(default_factory=dict)
    unreachable: bool = field(default=False, init=False)
    _opened: dict[Path, tuple[int, ...]] = field(default_factory=dict, init=False)

    @classmethod
    def from_arguments(cls, where: str | os.PathLike[str] | None, arguments: dict[str, Any]) -> Repository:
        """Remove the arguments that locate files from `arguments` of a `from_pretrained`, and use them.

        Raises:
            SettingsError: `where` is not a path or an id, or the subfolder is outside it.
        """
        if not isinstance(where, str | os.PathLike) or not isinstance(os.fspath(where), str) or not os.fspath(where):
            raise SettingsError(f"weights are named by a directory or a Hub id, got {where!r}")
        subfolder = arguments.pop("subfolder", None) or ""
        check_subfolder(subfolder, "subfolder")
        hub = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
        for name in _IGNORED_ARGUMENTS:
            arguments.pop(name, None)
        return cls(os.fspath(where), subfolder, {k: v for k, v in hub.items() if v is not None})

    def __str__(self) -> str:
        return f"{self.where} (subfolder {self.subfolder})" if self.subfolder else self.where

    @property
    def is_local(self) -> bool:
        """Whether `where` exists locally (as a folder or any kind of file); then the Hub is not used."""
        return os.path.lexists(self.where)

    @property
    def _format(self) -> int | None:
        """File type of a local path, as in `stat.S_IFMT`; None: a broken link, or nothing exists."""
        try:
            return stat.S_IFMT(Path(self.where).stat().st_mode)
        except OSError:
            return None

    def location(self, name: str) -> str:
        """The full name of a file, for messages."""
        return "/".join(part for part in (self.where, self.subfolder, name) if part)

    def open(self, name: str, stack: ExitStack) -> BinaryIO | None:
        """Open a file for reading until `stack` closes; None if the file does not exist.

        Raises:
            WeightsError: the file cannot be opened or downloaded, or is not a regular file.
        """
        path = self._path(name)
        if path is None:
            return None
        try:
            # Without O_NONBLOCK, opening a FIFO waits for a writer, possibly forever.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = stack.enter_context(os.fdopen(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb"))
        except (FileNotFoundError, NotADirectoryError) as exc:
            if path.is_symlink():
                raise WeightsError(f"{path} is a broken link: what it points to is gone") from exc
            return None
        except IsADirectoryError as exc:
            raise WeightsError(f"{path} is not a regular file, but a directory") from exc
        except PermissionError as exc:
            raise WeightsError(f"{path} may not be read by this user: check its permissions and its folder's") from exc
        except (OSError, ValueError) as exc:
            raise WeightsError(f"{path} cannot be opened: {exc}") from exc
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError(f"{path} is not a regular file, but a device, a pipe or the like")
        self._opened[path] = _identity(status)
        return file

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a file; None if the file does not exist.

        Raises:
            WeightsError: as for `open`, or the file is larger than `limit` bytes.
        """
        with ExitStack() as stack:
            file = self.open(name, stack)
            if file is None:
                return None
            try:
                data = file.read(limit + 1)
            except OSError as exc:
                raise WeightsError(f"{self.location(name)} cannot be read: {exc}") from exc
        if len(data) > limit:
            raise WeightsError(f"{self.location(name)} has more than {limit:,} bytes: it is no file of such a model")
        return data

    def check_unchanged(self) -> None:
        """Raise `WeightsError` if a file that was read has been replaced since then."""
        for path, identity in self._opened.items():
            try:
                now = _identity(path.stat())
            except OSError:
                now = ()
            if now != identity:
                raise WeightsError(f"{path} was replaced while the model was read; nothing was loaded, try again")

    def missing(self, what: str) -> WeightsError:
        """The error for a missing file."""
        if self.unreachable:
            reason = "no connection, or HF_HUB_OFFLINE or local_files_only is set, and the local cache has no copy"
            return WeightsError(self._not_found(f"no {what} in {self}: {reason}"))
        if not self.is_local:
            return WeightsError(f"no {what} in {self}: the repository on the Hub has none")
        if self._format is None:
            return WeightsError(f"{self.where} is a broken link, or its folder may not be entered by this user")
        if self._format != stat.S_IFDIR:
            return WeightsError(f"{self.where} is not a directory; give the directory that holds the model's files")
        return WeightsError(f"no {what} in {self}; a model's directory holds config.json and model.safetensors")

    def _path(self, name: str) -> Path | None:
        if self.is_local:
            if self._format == stat.S_IFDIR:
                return Path(self.where, self.subfolder, name)
            # transformers also accepts the path of the configuration file itself.
            return Path(self.where) if name == "config.json" and self._format == stat.S_IFREG else None
        try:
            path = hf_hub_download(self.where, name, subfolder=self.subfolder or None, **self.hub)
        except LocalEntryNotFoundError:
            self.unreachable = True
            self.hub["local_files_only"] = True  # a second request would only wait for the same timeout
            return None
        except EntryNotFoundError:
            return None
        except (OSError, HFValidationError, _HTTP_ERROR) as exc:
            raise HubError(self._not_found(str(exc))) from exc
        if commit := _COMMIT.search(path):
            self.hub["revision"] = commit[1]  # read all further files from the same commit
        return Path(path)

    def _not_found(self, reason: str) -> str:
        return (
            f"no weights at {self.where!r}: neither a directory nor a Hub repository that can be reached. Check the "
            f"name and the connection, log in with `hf auth login` if the repository is gated, or use random:0 to try "
            f"the pipeline out ({reason})"
        )


def check_subfolder(subfolder: object, name: str) -> None:
    """Raise `SettingsError` if `subfolder` is not a relative path that stays inside its folder."""
    path = PurePosixPath(subfolder.replace("\\", "/")) if isinstance(subfolder, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or ":" in path.parts[:1] or "\0" in str(path):
        raise SettingsError(f"{name} must be a relative path inside the model's folder, got {subfolder!r}")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
