"""One process that serves: uvicorn, with an orderly end and without patience for clients that stall."""

from __future__ import annotations

import json
import logging
import signal
import socket
import ssl
import sys
import time
from http import HTTPStatus
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from batchnorm_service.http.app import create_app
from batchnorm_service.lifecycle import Lifecycle
from batchnorm_service.models.shared_state import State
from batchnorm_service.settings import Settings

logger = logging.getLogger(__name__)

# Longer than a load balancer keeps an idle connection (60 s is common), so that the server does not close one
# which a request is already on.
KEEP_ALIVE_SECONDS: Final = 65
# A client that does not read its answer must not keep a stopping server alive.
SHUTDOWN_SECONDS: Final = 20
# As much as most servers allow; the parser itself knows no bound.
MAX_HEAD: Final = 64 * 1024


class Connection(HttpToolsProtocol):
    """uvicorn's connection, which counts among others and knows since when a request is incomplete."""

    limits: Settings  # of the class that `_configuration` makes

    def connection_made(self, transport: Any) -> None:
        """Refuse a connection beyond the limit."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._since: float | None = time.monotonic()  # of the first byte of a request that is incomplete
        if len(self.connections) > self.limits.max_connections:
            self.refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections: try again")

    def data_received(self, data: bytes) -> None:
        """Refuse headers without end."""
        super().data_received(data)
        if self._since is not None and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self.refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"headers exceed {MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        """Note when a request began."""
        super().on_message_begin()
        self._head_bytes = 0
        self._since = time.monotonic()

    def on_message_complete(self) -> None:
        """Note that it is whole."""
        self._since = None
        super().on_message_complete()

    @property
    def _in_head(self) -> bool:
        return self.cycle is None or self.cycle.scope is not self.scope

    def check_time(self, now: float) -> None:
        """Refuse a request that has taken too long to arrive."""
        if self._since is not None:
            in_head = self._in_head
            limit = self.limits.header_seconds if in_head else self.limits.body_seconds
            if now - self._since > limit:
                what = "headers" if in_head else "body"
                self.refuse(HTTPStatus.REQUEST_TIMEOUT, f"the {what} took longer than {limit:g} s")

    def refuse(self, status: HTTPStatus, reason: str) -> None:
        """Answer and close the connection; an answer that is under way is left to end first."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing() or (answering and self._in_head):
            return
        if not answering or not self.cycle.response_started:
            body = json.dumps({"error": reason})
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n"
            head += "Retry-After: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
            self.transport.write(f"{head}\r\n{body}".encode())
        self._since = None
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server: SIGTERM ends it after a while in which it says so, and with status 0."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, drain_seconds: float) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at once, or at a second signal, begin to end; at a third, end."""
        if sig == signal.SIGTERM and self._stop_at is None and not self.should_exit:
            self._lifecycle.stopping = True
            self._stop_at = time.monotonic() + self._drain_seconds
            # Clients are to come back elsewhere.
            self.config.encoded_headers.append((b"connection", b"close"))
        elif self.should_exit:
            self.force_exit = True
        else:
            self._lifecycle.stopping = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second, see whether it is time to end and who has stalled."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.check_time(now)
        return await super().on_tick(counter)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return how connections are encrypted, and which certificates clients must have; None where not at all.

    Raises:
        OSError: a file is no certificate or no key, or they do not fit; ssl.SSLError is one.
    """
    if settings.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=settings.tls_client_ca)
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _configuration(settings: Settings, app: FastAPI) -> uvicorn.Config:
    context = tls_context(settings)
    return uvicorn.Config(
        app,
        http=type("LimitedConnection", (Connection,), {"limits": settings}),
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        ssl_context_factory=None if context is None else lambda *_: context,
    )


def serve(settings: Settings, state: State, listener: socket.socket) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT."""
    try:
        app = create_app(settings, state)
    except Exception:
        logger.exception("the process could not start")
        sys.exit(STARTUP_FAILURE)
    lifecycle: Lifecycle = app.state.service.lifecycle
    Server(_configuration(settings, app), lifecycle, settings.drain_seconds).run(sockets=[listener])
