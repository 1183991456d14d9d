"""What runs on the nodes of a Ray cluster that read: tasks that open a slide, and find its patches or read them."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import ClusterError, SlideChangedError
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.features.reader import PatchBatch, PatchReader
from exaonepath.slides.image import SlideImage
from exaonepath.slides.stages import find_patches
from exaonepath.version import __version__


@dataclass(frozen=True)
class Place:
    """Where a process runs: sent by each task before its first batch."""

    node: str
    host: str
    pid: int

    @classmethod
    def here(cls) -> Place:
        """The place of this process."""
        import ray

        return cls(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid())


@dataclass(frozen=True)
class SlideRequest:
    """The slide that a task opens, and how the encoder sees it: the task must see the same.

    Attributes:
        path, name, mpp, reader: see `SlideImage`.
        fingerprint, reader_settings: as the encoder sees the slide.
        version: of exaonepath.
    """

    path: Path
    name: str
    mpp: float | None
    reader: str
    fingerprint: str
    reader_settings: dict[str, str]
    version: str = __version__

    @contextmanager
    def opened(self) -> Iterator[SlideImage]:
        """Open the slide.

        Raises:
            ClusterError: another version of exaonepath is installed here, or a reader with other results is used.
            SlideChangedError: the path names another file here.
        """
        check_version(self.version)
        with SlideImage(self.path, self.reader, self.mpp, self.name) as image:
            if image.fingerprint() != self.fingerprint:
                raise SlideChangedError(f"{self.path} on {socket.gethostname()} is another file than on the encoder")
            if image.reader_settings() != self.reader_settings:
                raise ClusterError(
                    f"{self.path} is read by {image.reader!r} on {socket.gethostname()}, whose pixels differ from "
                    "those on the encoder; install the same packages on all nodes, or choose a reader (--reader)"
                )
            yield image


def check_version(version: str) -> None:
    """Raise `ClusterError` if this process has another version of exaonepath than the one that asks it to work."""
    if version != __version__:
        raise ClusterError(
            f"node {socket.gethostname()} has exaonepath {__version__}, and the run was started by {version}; install "
            "the same version on all nodes"
        )


def find_patches_there(request: SlideRequest, out: Path, patching: dict[str, Any], overwrite: bool) -> Place:
    """A Ray task: compute the patches of a slide and write them."""
    with request.opened() as image:
        find_patches(image, out, patching, overwrite)
    return Place.here()


def read_batches_there(
    request: SlideRequest,
    coords: np.ndarray,
    patch_size: int,
    preprocessing: PreprocessingConfig,
    batch_size: int,
    rows: np.ndarray,
    threads: int,
) -> Generator[Place | PatchBatch, None, None]:
    """A Ray task: yields where it runs, then the batches (see `PatchReader`)."""
    with request.opened() as image:
        yield Place.here()
        reader = PatchReader(
            image, coords, patch_size, preprocessing, batch_size=batch_size, num_workers=threads, indices=rows
        )
        batches = iter(reader)
        try:
            for batch in batches:
                image.check_unchanged()  # the encoder's file system may notice a change later than this one
                yield batch
        finally:
            batches.close()
