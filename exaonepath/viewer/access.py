"""Who may talk to the viewer: requests from this machine that know the token, and nobody else.

The server listens on the loopback address only. That alone is not enough: any user of the machine can connect to it,
and any page in the user's browser can send requests to it. So the address of the page contains a random token (its
first path segment), which every request has to state; and a request must name this machine as its host, so that a
foreign name that an attacker resolves to 127.0.0.1 (DNS rebinding) is refused.
"""

from __future__ import annotations

import hmac
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HOSTS = {"127.0.0.1", "localhost", "[::1]"}
_MAX_TOKEN = 256
_HEADERS = {
    # Nothing is loaded from elsewhere, nothing is sent elsewhere, no inline script runs, no other page frames this one.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; "
        # The one rule that OpenSeadragon adds to the document (it hides an outline on phones), by its hash.
        "style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # the address contains the token
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def new_token() -> str:
    """A token that cannot be guessed: 192 random bits."""
    return secrets.token_urlsafe(24)


class Access:
    """ASGI middleware: checks host, origin and token, removes the token from the path, and adds security headers.

    Args:
        app: the application behind it.
        token: the first segment of every path.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets; the server has no lifespan events
            return
        reason = self._refused(scope)
        response = self._app if reason is None else PlainTextResponse(f"{reason}\n", 403)
        if reason is None:
            _, _, rest = scope["path"].lstrip("/").partition("/")
            scope = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode("utf-8", "surrogateescape")}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        await response(scope, receive, send_with_headers)

    def _refused(self, scope: Scope) -> str | None:
        """The reason why a request is refused; None if it is not."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        name = name or host if port.isdecimal() else host
        if name.lower() not in _HOSTS:
            return "this server answers to 127.0.0.1 and localhost only"
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return "requests of other pages are not answered"
        given = scope["path"].lstrip("/").partition("/")[0].encode("utf-8", "surrogateescape")[:_MAX_TOKEN]
        if not hmac.compare_digest(given, self._token):
            return "the address lacks the token; use the whole address that the command printed"
        return None
