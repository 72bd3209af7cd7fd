"""One connection: uvicorn's, with limits, and with a framing of requests that no header can change.

An error on a connection is answered after the answers to earlier requests, and then closes the connection.
"""

from __future__ import annotations

import json
import time
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from batchnorm_service.settings import Settings

# As much as most servers allow; the parser itself has no limit.
MAX_HEAD: Final = 64 * 1024
# How long a connection that ends with an error still reads and discards what the client sends.
LINGER_SECONDS: Final = 1.0
_TOO_LONG: Final = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"headers exceed {MAX_HEAD} bytes"
_CONNECT: Final = HTTPStatus.NOT_IMPLEMENTED, "CONNECT is not supported: the service is not a proxy"


class Connection(HttpToolsProtocol):
    """A connection with limits: of the number of connections, and of time and size for each request.

    Methods that are called for each request call the base class by name, which is faster than super().
    """

    limits: Settings  # of the class that `server` makes

    def connection_made(self, transport: Any) -> None:
        """Close a connection beyond the limit."""
        super().connection_made(transport)
        self._since: float | None = time.monotonic()  # when the request that is not yet complete began
        self._error: tuple[HTTPStatus, str] | None = None
        self._close_at: float | None = None  # set once nothing more is answered
        self._piece = 0  # size of the piece of data that is being parsed
        self._fresh = True  # whether that piece begins with a new request
        self._head_bytes = 0  # size of all earlier pieces since the head began
        self._before = 0  # how much of them may belong to earlier requests
        self._no_body = 0  # size of what came after the head since the last bytes of the body: trailers
        if len(self.connections) > self.limits.max_connections:
            self._fail(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections: try again")

    def data_received(self, data: bytes) -> None:
        """Parse a piece of data.

        If a request asks for an upgrade, the parser ends it after its head, and would read the body as the
        next request. Upgrades are not supported, so such a head is parsed again without the upgrade.
        """
        self._unset_keepalive_if_required()
        if self._error is not None:
            return
        self._piece = len(data)
        self._fresh = self._since is None or self.scope is None
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._go_on(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError as reason:
            self._fail(*(self._error or (HTTPStatus.BAD_REQUEST, f"the request is not valid HTTP: {reason}")))
            return
        if self._since is not None:
            self._head_bytes += self._piece
            self._no_body += self._piece
            if (self._head_bytes - self._before if self._in_head else self._no_body) > MAX_HEAD:
                self._fail(*_TOO_LONG)

    def _go_on(self, data: memoryview) -> None:
        """Parse a head that asks for an upgrade again without the upgrade, and then what follows it."""
        while True:
            head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.scope["http_version"].encode()]
            for name, value in self.headers:
                if name != b"upgrade":
                    head += [b"\r\n", name, b": ", value]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(b"".join([*head, b"\r\n\r\n"]))
            try:
                if data:
                    self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]

    def on_message_begin(self) -> None:
        """Record the time at which a request began."""
        HttpToolsProtocol.on_message_begin(self)
        self._head_bytes = 0
        self._before = 0 if self._fresh else self._piece
        self._fresh = False
        self._since = time.monotonic()

    def on_headers_complete(self) -> None:
        """Begin to answer, unless the head is too long or must be parsed again without its upgrade."""
        if self._head_bytes + self._piece > MAX_HEAD:  # may include earlier requests, so measure exactly
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > MAX_HEAD:
                self._error = _TOO_LONG
                raise ValueError  # raised through the parser, which then parses no more
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._error = _CONNECT
                raise ValueError
            self.scope["http_version"] = self.parser.get_http_version()
        else:
            HttpToolsProtocol.on_headers_complete(self)
            # Trailers are dropped here: a proxy that sets or removes headers does not check them.
            self.headers = []
            self._no_body = -self._piece

    def on_body(self, body: bytes) -> None:
        """Receive a part of the body."""
        self._no_body = -self._piece
        HttpToolsProtocol.on_body(self, body)

    def on_message_complete(self) -> None:
        """Record that a request is complete."""
        if not self.parser.should_upgrade():
            self._since = None
            HttpToolsProtocol.on_message_complete(self)

    @property
    def _in_head(self) -> bool:
        return self.cycle is None or self.cycle.scope is not self.scope

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _behind(self) -> bool:
        """Whether earlier requests must be answered first."""
        return bool(self.pipeline) or (self._answering and (self._in_head or self._since is None))

    def check(self, now: float) -> None:
        """Answer a request that has taken too long to arrive, or an error that had to wait."""
        if self._close_at is not None:
            if now > self._close_at:
                self.transport.close()
        elif self._behind:
            return
        elif self._error is not None:
            self._fail(*self._error)
        elif self._since is not None:
            in_head = self._in_head
            limit = self.limits.header_seconds if in_head else self.limits.body_seconds
            if now - self._since > limit:
                what = "headers" if in_head else "body"
                self._fail(HTTPStatus.REQUEST_TIMEOUT, f"the {what} took longer than {limit:g} s")

    def _fail(self, status: HTTPStatus, reason: str) -> None:
        """Answer with an error and close the connection, now or at a later `check`."""
        self._error = status, reason
        if self._behind or self.transport.is_closing():
            return
        self._since = None
        if self._answering and self.cycle.response_started:
            self.transport.close()
            return
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps({"error": reason})
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n"
        head += "Retry-After: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
        self.transport.write(f"{head}\r\n{body}".encode())
        if status == HTTPStatus.SERVICE_UNAVAILABLE or not self.transport.can_write_eof():
            self.transport.close()
        else:
            # Closing while data are unread sends a reset, which can overtake the answer.
            self.transport.write_eof()
            self.flow.resume_reading()
            self._close_at = time.monotonic() + LINGER_SECONDS
