"""Whether a process that left a file behind still runs; process ids are compared only where they mean the same."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ENDED = frozenset({"Z", "X"})  # states of a process that has ended and was not waited for


@cache
def process_space() -> str:
    """Sixteen hex digits for the set of processes whose ids can be compared: a machine since its start, or a container.

    Host names repeat (containers, images of one virtual machine), so the identity of the machine's start is included.
    """
    parts = [socket.gethostname()]
    try:
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
        parts.append(_BOOT_ID.read_text(encoding="ascii").strip())
    except OSError:  # not Linux: the host name has to do
        parts.append("")
    return hashlib.sha256(":".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def start_time(pid: int) -> str:
    """When a process began, in a unit of the system's own: it tells a process from a later one of the same id.

    Empty if the system does not say, or if there is no such process.
    """
    found = _stat(pid)
    return found[1] if found else ""


def is_running(pid: int, started: str = "") -> bool:
    """Whether the process with this id, and with this start time unless it is empty, still runs.

    Only for ids of this process space. A process of another user counts as running.
    """
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    found = _stat(pid)
    if found is None:
        return True
    return found[0] not in _ENDED and started in ("", found[1])


def _stat(pid: int) -> tuple[str, str] | None:
    """State and start time of a process; None if they cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name of the program, in parentheses, may contain spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else None
