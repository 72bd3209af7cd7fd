"""Admission of requests before the routes: keys, limits of what is in flight, and counters.

It is plain ASGI, because its time is added to every request.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping
from time import perf_counter_ns
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchnorm_service.context import Context
from batchnorm_service.counts.counters import (
    BOUNDS,
    BYTES_IN_FLIGHT,
    DURATIONS,
    IN_FLIGHT,
    SECONDS_NS,
    STATUSES,
)
from batchnorm_service.errors import OverloadedError, ServiceError
from batchnorm_service.http.error_answers import answer_to
from batchnorm_service.http.paths import Kind
from batchnorm_service.logs import request_id, safe_id

logger = logging.getLogger(__name__)

_BOUNDS_NS: Final = [round(bound * 1e9) for bound in BOUNDS]


class Admission:
    """ASGI middleware that checks keys and limits, and counts; the scope has `asked`, from `paths.classify`.

    Args:
        context: Limits, keys and counters.
        app: The application that answers admitted requests.
    """

    def __init__(self, context: Context, app: ASGIApp) -> None:
        settings = context.settings
        self._app = app
        self._keyring = context.keyring
        self._max_requests = settings.max_requests
        self._max_queued = settings.max_queued
        self._max_body = settings.max_body
        self._access_log = settings.access_log
        self._row = context.rows.process

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = perf_counter_ns()
        asked = scope["asked"]
        headers = dict(scope["headers"])
        infer = asked.kind is Kind.INFER
        if not infer or self._access_log or b"x-request-id" in headers:
            send = _watched(scope, headers.get(b"x-request-id"), send)
        row = self._row
        size = 0
        try:
            if self._keyring is not None and asked.scope is not None:
                self._keyring.check(_key(headers), asked.scope)
            if infer:
                size = self._admitted(headers)
        except ServiceError as error:
            answer = answer_to(error)
            await answer(scope, receive, send)
            row[STATUSES + answer.status_code] += 1
            if self._access_log:
                self._log(scope, answer.status_code, began)
            return
        if infer:
            row[IN_FLIGHT] += 1
            row[BYTES_IN_FLIGHT] += size
        try:
            await self._app(scope, receive, send)
        finally:
            if infer:
                row[IN_FLIGHT] -= 1
                row[BYTES_IN_FLIGHT] -= size
                took = perf_counter_ns() - began
                row[SECONDS_NS] += took
                row[DURATIONS + bisect_left(_BOUNDS_NS, took)] += 1
            status = scope.get("status", 0)  # 0: the client left before there was an answer
            row[STATUSES + status] += 1
            if self._access_log:
                self._log(scope, status, began)

    def _admitted(self, headers: Mapping[bytes, bytes]) -> int:
        """Return the number of bytes that a request counts as: its length, or the limit if that is unknown.

        Raises:
            OverloadedError: As many requests or bytes are in flight as the limits allow.
        """
        size = min(int(headers.get(b"content-length", self._max_body)), self._max_body)
        row = self._row
        if row[IN_FLIGHT] >= self._max_requests or row[BYTES_IN_FLIGHT] + size > self._max_queued:
            raise OverloadedError("as many requests are in flight as the limits allow: try again")
        return size

    def _log(self, scope: Scope, status: int, began: int) -> None:
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": (perf_counter_ns() - began) / 1e6,
            "client": scope["client"] and scope["client"][0],
        }
        logger.info("request", extra={"fields": fields})


def _watched(scope: Scope, given: bytes | None, send: Send) -> Send:
    """Return a `send` that records the status, and adds the id of the request to the answer if there is one.

    The endpoint of infer records the status itself, so most of its requests do not need this.
    """
    identity = None
    if given is not None:
        identity = safe_id(given.decode("latin-1"))
        request_id.set(identity)

    async def watched(message: Message) -> None:
        if message["type"] == "http.response.start":
            scope["status"] = message["status"]
            if identity is not None:
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
        await send(message)

    return watched


def _key(headers: Mapping[bytes, bytes]) -> bytes | None:
    given = headers.get(b"authorization")
    if given is not None and given[:7].lower() == b"bearer ":
        return given[7:].strip()
    return headers.get(b"x-api-key")
