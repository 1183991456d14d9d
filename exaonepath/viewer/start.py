"""Starts the viewer of an output folder, if the packages that it needs are installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from exaonepath.errors import MissingDependencyError
from exaonepath.slides.cohort.cohort_slide import CohortSlide


def start(
    out: str | os.PathLike[str],
    slides: Sequence[CohortSlide] = (),
    *,
    port: int = 0,
    announce: Callable[[str], None] = lambda url: None,
    browser: bool = False,
    table: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    device: str = "auto",
) -> None:
    """Serve the page of an output folder until the process is interrupted (Ctrl-C, SIGTERM), which ends it regularly.

    Args:
        out: the output folder.
        slides: where slides are now, or slides without results.
        port: 0: a free one.
        announce: called with the address of the page as soon as it can be opened.
        browser: open it in the browser.
        table: a CSV or Parquet file with values of patches (see `PatchTable`).
        weights, device: of the slide encoder, for attention.

    Raises:
        MissingDependencyError: starlette or uvicorn is not installed.
        SettingsError: the folder holds no results, the table cannot be used, or the port cannot.
    """
    try:
        from exaonepath.viewer.serve import serve
    except ImportError as exc:
        raise MissingDependencyError(
            f'the viewer needs starlette and uvicorn ({exc}): pip install "exaonepath[viewer]"'
        ) from exc
    from exaonepath.viewer.service import Service
    from exaonepath.viz.values.library import Library
    from exaonepath.viz.values.table import PatchTable

    values = None if table is None else PatchTable(table)
    service = Service(Library(out, slides), values, weights=weights, device=device)
    try:
        serve(service, port, announce, browser=browser)
    except KeyboardInterrupt:
        pass  # the regular end: there is no other
    finally:
        service.close()
