"""Batches of a slide that are read before they are asked for, within a fixed amount of memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from exaonepath.slides.cohort.reading import BatchReader
from exaonepath.slides.features.reader import PatchBatch


class ReadAhead(Iterator[PatchBatch]):
    """Reads the batches of a slide on a thread, from now on.

    Args:
        reader: the batches.
        max_bytes: of the images that wait; one batch may always wait.
    """

    def __init__(self, reader: BatchReader, max_bytes: int) -> None:
        self._reader, self._max_bytes = reader, max_bytes
        self._batches: deque[PatchBatch] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="exaonepath-ahead", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self.close()  # nobody else can: the caller has no object yet
            raise

    def __next__(self) -> PatchBatch:
        """The next batch; an error of the reader is raised after the batches before it."""
        with self._changed:
            self._changed.wait_for(lambda: self._batches or self._ended)
            if not self._batches:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopIteration
            batch = self._batches.popleft()
            self._bytes -= batch.images.nbytes
            self._changed.notify_all()
            return batch

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the images that wait now."""
        return self._bytes

    def close(self) -> None:
        """Stop reading, and wait for the threads: the time of one patch. What waits is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reader.cancel()
        if self._thread.is_alive():
            self._thread.join()
        self._batches.clear()

    def _put(self, batch: PatchBatch) -> bool:
        """Let a batch wait, as soon as there is room; False if the rest is not wanted."""
        size = batch.images.nbytes
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._batches or self._bytes + size <= self._max_bytes)
            if self._closed:
                return False
            self._batches.append(batch)
            self._bytes += size
            self._changed.notify_all()
        return True

    def _read(self) -> None:
        batches = iter(self._reader)
        try:
            for batch in batches:
                if not self._put(batch):
                    return
        except BaseException as exc:  # noqa: BLE001  it is raised where the batch is asked for
            self._error = exc
        finally:
            try:
                batches.close()
            finally:
                with self._changed:
                    self._ended = True
                    self._changed.notify_all()
