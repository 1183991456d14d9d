"""The files of a model, in a local folder or in a repository of the Hub.

Symbolic links are followed: the Hub's cache consists of them, and what a user links from a folder of their own is
theirs to decide. What is opened at the end of a link has to be a regular file.
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

# Arguments of `from_pretrained` that say where files are fetched from. `proxies` and `resume_download` have no effect
# in newer versions of the Hub's client, which read the environment.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_IGNORED_ARGUMENTS = ("proxies", "resume_download", "mirror", "user_agent", "_commit_hash")
# The base class of what the Hub's HTTP library raises: httpx or requests, whichever the client is built on.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


class HubError(WeightsError):
    """The Hub refused a request, or what was asked for is no id of a repository."""


@dataclass
class Repository:
    """Where the files of one model lie.

    Attributes:
        where: local folder, the path of a config.json, or a Hub id.
        subfolder: folder inside it, "" for the root.
        hub: arguments of the Hub's client.
        unreachable: the Hub was asked for a file that the cache lacks, and could not be reached.
    """

    where: str
    subfolder: str = ""
    hub: dict[str, Any] = field(default_factory=dict)
    unreachable: bool = field(default=False, init=False)
    _opened: dict[Path, tuple[int, ...]] = field(default_factory=dict, init=False)

    @classmethod
    def from_arguments(cls, where: str | os.PathLike[str] | None, arguments: dict[str, Any]) -> Repository:
        """Take the arguments that say where files are out of those of a `from_pretrained`.

        Raises:
            SettingsError: `where` is not a path or id, or the subfolder leads out of it.
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
        """The files lie in a local folder (or `where` is a file, of whatever kind), and the Hub is not asked."""
        return os.path.lexists(self.where)

    @property
    def _format(self) -> int | None:
        """What lies at a local path, as in `stat.S_IFMT`; None: a broken link, or nothing."""
        try:
            return stat.S_IFMT(Path(self.where).stat().st_mode)
        except OSError:
            return None

    def location(self, name: str) -> str:
        """The file of that name, for messages."""
        return "/".join(part for part in (self.where, self.subfolder, name) if part)

    def open(self, name: str, stack: ExitStack) -> BinaryIO | None:
        """Open a file for reading until `stack` closes; None where there is no such file.

        Raises:
            WeightsError: it cannot be opened or fetched, or is not a regular file.
        """
        path = self._path(name)
        if path is None:
            return None
        try:
            # Without O_NONBLOCK the open of a FIFO waits for a writer, for ever.
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
        """The content of a file; None where there is no such file.

        Raises:
            WeightsError: as for `open`, or it is larger than `limit` bytes.
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
        """Raise `WeightsError` where a file that was read is no longer the one that lies there."""
        for path, identity in self._opened.items():
            try:
                now = _identity(path.stat())
            except OSError:
                now = ()
            if now != identity:
                raise WeightsError(f"{path} was replaced while the model was read; nothing was loaded, try again")

    def missing(self, what: str) -> WeightsError:
        """The error for a file that is not there."""
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
            # transformers lets a configuration be named by its file.
            return Path(self.where) if name == "config.json" and self._format == stat.S_IFREG else None
        try:
            path = hf_hub_download(self.where, name, subfolder=self.subfolder or None, **self.hub)
        except LocalEntryNotFoundError:
            self.unreachable = True
            self.hub["local_files_only"] = True  # asking again would only wait again
            return None
        except EntryNotFoundError:
            return None
        except (OSError, HFValidationError, _HTTP_ERROR) as exc:
            raise HubError(self._not_found(str(exc))) from exc
        if commit := _COMMIT.search(path):
            self.hub["revision"] = commit[1]  # all further files of the same commit
        return Path(path)

    def _not_found(self, reason: str) -> str:
        return (
            f"no weights at {self.where!r}: neither a directory nor a Hub repository that can be reached. Check the "
            f"name and the connection, log in with `hf auth login` if the repository is gated, or use random:0 to try "
            f"the pipeline out ({reason})"
        )


def check_subfolder(subfolder: object, name: str) -> None:
    """Raise `SettingsError` where `subfolder` is not a relative path that stays inside its folder."""
    path = PurePosixPath(subfolder.replace("\\", "/")) if isinstance(subfolder, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or ":" in path.parts[:1] or "\0" in str(path):
        raise SettingsError(f"{name} must be a relative path inside the model's folder, got {subfolder!r}")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
