"""Runs the viewer: listens on the loopback address, and shows the page in the browser."""

from __future__ import annotations

import socket
import threading
import webbrowser
from collections.abc import Callable

import uvicorn

from exaonepath.errors import SettingsError
from exaonepath.viewer.access import new_token
from exaonepath.viewer.app import make_app
from exaonepath.viewer.service import Service

_HOST = "127.0.0.1"
_BACKLOG = 512
_SHUTDOWN_SECONDS = 2


def listen(port: int) -> socket.socket:
    """A socket that listens on the loopback address; port 0 takes a free one. Connections wait until they are served.

    Raises:
        SettingsError: the port is in use, or may not be used.
    """
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((_HOST, port))
        server.listen(_BACKLOG)
    except (OSError, OverflowError) as exc:
        server.close()
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise SettingsError(f"port {port} cannot be used ({reason}); without --port, a free one is taken") from exc
    return server


def make_server(service: Service, token: str) -> uvicorn.Server:
    """The server of a service, which is run by `run(sockets=[...])`."""
    config = uvicorn.Config(
        make_app(service, token),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def serve(service: Service, port: int, announce: Callable[[str], None], *, browser: bool) -> None:
    """Serve until the process is interrupted.

    Args:
        service: what is shown.
        port: the port; 0: a free one.
        announce: called with the address of the page as soon as it can be opened.
        browser: open it in the browser.

    Raises:
        SettingsError: the port cannot be used.
        KeyboardInterrupt: after the server was stopped by a signal.
    """
    token = new_token()
    with listen(port) as server:
        url = f"http://{_HOST}:{server.getsockname()[1]}/{token}/"
        announce(url)
        if browser:
            # In a thread: a browser in the terminal would not return before it has shown the page.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        make_server(service, token).run(sockets=[server])
