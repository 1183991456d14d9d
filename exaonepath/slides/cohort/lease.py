"""Which process works on which slide: a lease is a small file that its owner keeps renewing.

`claims/<id>.json` is created exclusively and names its owner. While the owner works, it writes a higher counter into
the file every few seconds. A lease is stale, and may be taken over, in two cases: the owner ran on this machine and
does not run any more; or an observer has seen the same content for so long, by its own monotonic clock. Clocks of two
machines are never compared, so a clock that is wrong or jumps changes nothing.

A lease only saves work: results are right also if two processes believe to own a slide. Each writes into files of its
own, named by its token, and results appear by a rename. So these races are allowed: an owner that was stopped for
longer than the limit goes on until it looks at its lease again.

The owner renews through the descriptor that it keeps open. If the file was taken over meanwhile (by a rename), it
writes into a deleted file, and cannot overwrite the lease of the new owner.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from exaonepath.errors import LeaseLostError
from exaonepath.files.atomic import ensure_folder, output_error, remove_abandoned
from exaonepath.files.processes import is_running, process_space, start_time
from exaonepath.slides.cohort.batch_system import job_id
from exaonepath.slides.cohort.claim_file import (
    Claim,
    Holder,
    create_claim,
    packed,
    read_claim,
    remove_claim,
    write_all,
)

logger = logging.getLogger(__name__)

STALE_AFTER = 120.0  # seconds without renewal after which a lease may be taken over
_RENEW_EVERY = 30.0
_RENEWALS = 3  # an observer waits for at least as many missed renewals, whatever its own settings are


class Leases:
    """The leases of one process on the slides of one output folder.

    Args:
        folder: the folder `claims`; created if needed.
        run: id of the run, stored in the leases.
        stale_after: seconds without renewal, as seen by this process, after which a lease may be taken over.
        renew_every: seconds between renewals; default: 30, or a quarter of `stale_after` if that is less.
        clock: monotonic seconds (for tests).

    Raises:
        OutputError: the folder cannot be created or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        run: str = "",
        stale_after: float = STALE_AFTER,
        renew_every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = ensure_folder(folder)
        self.stale_after = stale_after
        self._renew_every = min(_RENEW_EVERY, stale_after / 4) if renew_every is None else renew_every
        self._clock, self._run = clock, run
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._held: dict[str, Lease] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        remove_abandoned(self.folder)

    def claim(self, slide: str, stale: bytes | None = None) -> Lease | None:
        """Claim the slide with this id; None if another process holds it.

        Args:
            slide: the id.
            stale: content of a lease that another observer of this run has found to be stale.

        Raises:
            OutputError: the lease cannot be written, or something else stands in its place.
        """
        path = self.path(slide)
        for _ in range(2):
            lease = self._create(slide, path)
            if lease is not None:
                self._seen.pop(slide, None)
                self._hold(lease)
                return lease
            claim = read_claim(path)
            if claim is None:
                continue  # released since
            if claim.content != stale and not self._is_stale(slide, claim):
                return None
            if not remove_claim(path, claim.content):
                return None
            _log_takeover(slide, claim.holder)
        return None

    def look(self, slide: str) -> tuple[Literal["free", "held", "stale"], Claim | None]:
        """State of the slide with this id. Whether a lease of another machine is stale shows only after several looks.

        Raises:
            OutputError: as for `read_claim`.
        """
        claim = read_claim(self.path(slide))
        if claim is None:
            self._seen.pop(slide, None)
            return "free", None
        return ("stale" if self._is_stale(slide, claim) else "held"), claim

    def path(self, slide: str) -> Path:
        """The lease of the slide with this id."""
        return self.folder / f"{slide}.json"

    def close(self) -> None:
        """Release every lease that is still held, and end the thread that renews them."""
        self._stop.set()
        if self._thread is not None:
            if self._thread.is_alive():  # an interrupt may have come before its start, and join would be an error
                self._thread.join()
            self._thread = None
        for lease in list(self._held.values()):
            lease.release()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def renew(self) -> None:
        """Renew all leases now; the thread does so by itself."""
        with self._lock:
            held = list(self._held.values())
        for lease in held:
            lease.renew()

    def _is_stale(self, slide: str, claim: Claim) -> bool:
        holder = claim.holder
        if holder is not None and holder.space == process_space() and not is_running(holder.pid, holder.started):
            return True
        now = self._clock()
        content, since = self._seen.get(slide, (b"", now))
        if content != claim.content:
            content, since = claim.content, now
        self._seen[slide] = content, since
        return now - since >= max(self.stale_after, _RENEWALS * (holder.renew_every if holder else 0.0))

    def _create(self, slide: str, path: Path) -> Lease | None:
        holder = Holder(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            job=job_id(),
            space=process_space(),
            started=start_time(os.getpid()),
            run=self._run,
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            renew_every=self._renew_every,
            counter=0,
        )
        try:
            descriptor = create_claim(path, packed(holder))
        except OSError as exc:
            raise output_error(path, exc) from exc
        return None if descriptor is None else Lease(self, slide, path, descriptor, holder)

    def _hold(self, lease: Lease) -> None:
        with self._lock:
            self._held[lease.slide] = lease
            if self._thread is None:
                self._stop.clear()
                self._thread = threading.Thread(target=self._keep, name="exaonepath-leases", daemon=True)
                self._thread.start()

    def _keep(self) -> None:
        while not self._stop.wait(self._renew_every):
            self.renew()

    def _forget(self, lease: Lease) -> None:
        with self._lock:
            if self._held.get(lease.slide) is lease:
                del self._held[lease.slide]


class Lease:
    """A slide that this process has claimed; made by `Leases.claim`.

    Attributes:
        slide: the id of the slide.
        token: random; names the partial files of this owner.
    """

    def __init__(self, leases: Leases, slide: str, path: Path, descriptor: int, holder: Holder) -> None:
        self.slide, self.token = slide, holder.token
        self._leases, self._path, self._descriptor, self._holder = leases, path, descriptor, holder
        self._size = len(packed(holder))
        self._lost = self._released = False
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Write a higher counter into the lease, and look whether it is still this process's."""
        with self._lock:
            if self._released or self._lost:
                return
            self._holder = replace(self._holder, counter=self._holder.counter + 1)
            try:
                self._reopen_if_replaced()
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                write_all(self._descriptor, packed(self._holder, self._size))
                os.fsync(self._descriptor)
            except OSError as exc:
                # If this goes on, others take the slide over, which the check below finds.
                logger.warning("%s cannot be renewed (%s)", self._path, exc)
            self._look()

    def check(self, *, thorough: bool = True) -> None:
        """Raise an error if the lease was lost.

        Args:
            thorough: look at the file, as before anything is published; otherwise at the result of the last look.

        Raises:
            LeaseLostError: another process has taken the slide over, or the lease was removed.
        """
        with self._lock:
            if thorough and not self._lost:
                self._look()
            if self._lost:
                raise LeaseLostError(
                    f"{self._path}: another process has taken over slide {self.slide}, since this one did not renew "
                    "its claim in time; its work is left to the other"
                )

    def release(self) -> None:
        """Remove the lease, unless another process has taken it over."""
        with self._lock:
            if self._released:
                return
            self._released = True
            try:
                claim = None if self._lost else read_claim(self._path)
                if claim is not None and claim.holder is not None and claim.holder.token == self.token:
                    remove_claim(self._path, claim.content)
            except OSError as exc:  # the process ends soon, and so the lease becomes stale
                logger.warning("%s cannot be removed (%s)", self._path, exc)
            finally:
                os.close(self._descriptor)
                self._leases._forget(self)

    def _reopen_if_replaced(self) -> None:
        """Open the lease again if `remove_claim` put it back by a copy: the open file has no name any more."""
        if os.fstat(self._descriptor).st_nlink:
            return
        claim = read_claim(self._path)
        if claim is not None and claim.holder is not None and claim.holder.token == self.token:
            descriptor = os.open(self._path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            os.close(self._descriptor)
            self._descriptor = descriptor

    def _look(self) -> None:
        try:
            claim = read_claim(self._path)
        except OSError as exc:
            logger.warning("%s cannot be looked at (%s)", self._path, exc)
            return
        if claim is None or (claim.holder is not None and claim.holder.token != self.token):
            self._lost = True


def _log_takeover(slide: str, holder: Holder | None) -> None:
    who = f"process {holder.pid} on {holder.host}" if holder else "a process that cannot be identified"
    logger.warning("%s was claimed by %s, which does not work on it any more; taking it over", slide, who)
