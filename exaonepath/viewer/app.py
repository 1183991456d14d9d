"""The application behind the page: its addresses, and what each of them returns.

Everything under `/api/slides/KEY/` that is computed from results carries their version in the query (`v`): an array of
one version is never combined with that of another, and may be cached for ever. Pixels carry the fingerprint of the
slide file in their path for the same reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from exaonepath.errors import ExaonePathError, FileBusyError, MaskError, OutputCollisionError, OutputError, SlideError
from exaonepath.text import printable
from exaonepath.viewer.access import Access
from exaonepath.viewer.memo import NotFound, Outdated
from exaonepath.viewer.service import Service
from exaonepath.viz.values.attention import AttentionUnavailable

logger = logging.getLogger(__name__)

_FOREVER = {"cache-control": "private, max-age=31536000, immutable"}
_NEVER = {"cache-control": "no-store"}
_PAGE_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".woff2": "font/woff2",
}
_MAX_BODY = 16 << 20  # of a request that saves regions
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFound, 404),
    (Outdated, 409),
    (AttentionUnavailable, 409),
    (OutputCollisionError, 409),
    (FileBusyError, 503),
    (MaskError, 422),
    (OutputError, 507),
    (SlideError, 410),  # the slide is gone, was replaced, or cannot be read
)


def make_app(service: Service, token: str) -> ASGIApp:
    """The ASGI application of the viewer.

    Args:
        service: answers the questions.
        token: the first path segment of every address.
    """
    routes = _Routes(service)
    app = Starlette(routes=routes.all(), exception_handlers={HTTPException: _http_error, ExaonePathError: _our_error})
    return Access(app, token)


class _Routes:
    """One method an address. Work runs in threads, so that slow work for one client does not delay the others."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = _page_files()

    def all(self) -> list[Route]:
        slide, pixels = "/api/slides/{key}", "/pixels/{key}/{fingerprint}"
        return [
            Route("/", self.page),
            Route("/page/{name:path}", self.page),
            Route("/api/slides", self.slides),
            Route(slide, self.slide),
            Route(f"{slide}/state", self.state),
            Route(f"{slide}/failed", self.failed),
            Route(f"{slide}/similar", self.similar),
            Route(f"{slide}/regions", self.regions, methods=["GET", "PUT"]),
            *(Route(f"{slide}/{name}", _array(work)) for name, work in self._service.arrays.items()),
            Route(f"{pixels}/tiles/{{level}}/{{column}}_{{row}}.jpg", self.tile),
            Route(f"{pixels}/thumbnail.jpg", self.thumbnail),
            Route(f"{pixels}/patches/{{x}}_{{y}}_{{size}}_{{side}}.jpg", self.patch),
            Route("/thumbnails/{key}.jpg", self.any_thumbnail),
        ]

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        content = self._page.get(name)
        if content is None:
            raise HTTPException(404)
        kind = _PAGE_TYPES[f".{name.rpartition('.')[2]}"]
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    async def slides(self, request: Request) -> Response:
        return await self._json(self._service.slides)

    async def slide(self, request: Request) -> Response:
        return await self._json(self._service.detail, request.path_params["key"])

    async def state(self, request: Request) -> Response:
        return await self._json(self._service.state, request.path_params["key"])

    async def failed(self, request: Request) -> Response:
        return await self._json(self._service.failed, request.path_params["key"], _query(request))

    async def similar(self, request: Request) -> Response:
        return await self._json(self._service.similar, request.path_params["key"], _query(request))

    async def regions(self, request: Request) -> Response:
        key = request.path_params["key"]
        if request.method == "GET":
            return await self._json(self._service.regions, key)
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "regions are sent as application/json")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY:
                raise HTTPException(413, f"more than {_MAX_BODY >> 20} MB of regions")
        return await self._json(self._service.save_regions, key, bytes(body))

    async def tile(self, request: Request) -> Response:
        return await self._picture(request, self._service.pixels.tile, "level", "column", "row")

    async def patch(self, request: Request) -> Response:
        return await self._picture(request, self._service.pixels.patch, "x", "y", "size", "side")

    async def thumbnail(self, request: Request) -> Response:
        return await self._picture(request, lambda *of: (self._service.pixels.thumbnail(*of), True))

    async def any_thumbnail(self, request: Request) -> Response:
        """The thumbnail of a slide that the page has not opened yet, so that it does not know its fingerprint."""
        response = await self.thumbnail(request)
        response.headers["cache-control"] = "private, max-age=60"
        return response

    async def _picture(self, request: Request, work: Callable[..., tuple[bytes, bool]], *names: str) -> Response:
        path = request.path_params
        numbers = [_whole(path[name]) for name in names]

        def read() -> tuple[bytes, bool]:
            return work(self._service.entry(path["key"]), path.get("fingerprint"), *numbers)

        data, good = await run_in_threadpool(read)
        return Response(data, media_type="image/jpeg", headers=_FOREVER if good else _NEVER)

    async def _json(self, work: Callable[..., Any], *arguments: Any) -> Response:
        return JSONResponse(await run_in_threadpool(work, *arguments), headers=_NEVER)


def _array(work: Callable[[str, Mapping[str, str]], tuple[np.ndarray, dict[str, str]]]) -> Callable[..., Any]:
    """The route of an array, sent as its bytes in little-endian order."""

    async def answer(request: Request) -> Response:
        values, headers = await run_in_threadpool(work, request.path_params["key"], _query(request))
        data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
        return Response(data, media_type="application/octet-stream", headers={**_FOREVER, **headers})

    return answer


def _query(request: Request) -> Mapping[str, str]:
    return request.query_params


def _whole(text: str) -> int:
    """A number from an address; anything but a few ASCII digits names no tile."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise HTTPException(404)
    return int(text)


def _page_files() -> dict[str, bytes]:
    """The files of the page by name. They are read at the start, so that no address ever becomes a path."""
    found: dict[str, bytes] = {}
    root = resources.files("exaonepath.viewer") / "page"
    for folder, prefix in ((root, ""), (root / "vendor", "vendor/")):
        for file in folder.iterdir():
            if file.is_file() and f".{file.name.rpartition('.')[2]}" in _PAGE_TYPES:
                found[prefix + file.name] = file.read_bytes()
    return found


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    detail = exc.detail or HTTPStatus(exc.status_code).phrase
    return JSONResponse({"error": detail}, exc.status_code, headers=_NEVER)


async def _our_error(request: Request, exc: Exception) -> Response:
    status = next((status for kind, status in _STATUS if isinstance(exc, kind)), 500)
    logger.debug("%s: %s", request.url.path, exc)
    return JSONResponse({"error": printable(exc)}, status, headers=_NEVER)
