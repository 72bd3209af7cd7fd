"""One process that serves: uvicorn with a graceful shutdown."""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import sys
import time
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from batchnorm_service.http.app import Application, create_app
from batchnorm_service.lifecycle import Lifecycle
from batchnorm_service.models.shared_state import SharedState
from batchnorm_service.process.connection import Connection
from batchnorm_service.settings import Settings

logger = logging.getLogger(__name__)

# Longer than load balancers keep an idle connection (60 s is common), so that the server does not close one
# on which a request is already under way.
KEEP_ALIVE_SECONDS: Final = 65
# A client that does not read its answer must not keep a stopping server alive.
SHUTDOWN_SECONDS: Final = 20


class Server(uvicorn.Server):
    """uvicorn's server, which after SIGTERM is not ready, answers for a while, and ends with status 0."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, drain_seconds: float) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain on SIGTERM, shut down on SIGINT or a second signal, and end at once on a third."""
        if sig == signal.SIGTERM and self._stop_at is None and not self.should_exit:
            self._lifecycle.stopping = True
            self._stop_at = time.monotonic() + self._drain_seconds
            # Tells clients to connect again, elsewhere.
            self.config.encoded_headers.append((b"connection", b"close"))
        elif self.should_exit:
            self.force_exit = True
        else:
            self._lifecycle.stopping = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Check, ten times a second, whether the drain is over and which clients have stalled."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.check(now)
        return await super().on_tick(counter)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context of the settings; None without TLS.

    Raises:
        OSError: A file is not a certificate or key, or the two do not match; ssl.SSLError is an OSError.
    """
    if settings.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=settings.tls_client_ca)
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _configuration(settings: Settings, app: Application) -> uvicorn.Config:
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


def serve(settings: Settings, state: SharedState, listener: socket.socket) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT."""
    try:
        app = create_app(settings, state)
    except Exception:
        logger.exception("the process could not start")
        sys.exit(STARTUP_FAILURE)
    lifecycle: Lifecycle = app.state.context.lifecycle
    Server(_configuration(settings, app), lifecycle, settings.drain_seconds).run(sockets=[listener])
