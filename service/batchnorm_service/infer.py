"""The endpoint that answers inference requests, as plain ASGI: bytes in, bytes out."""

from __future__ import annotations

import logging
from time import perf_counter_ns
from typing import Any, Final

from anyio import to_thread
from starlette.types import Message, Receive, Scope, Send

from batchnorm_service import protocol, refusals
from batchnorm_service.errors import BodyTooLargeError, ServiceError, UnsupportedEncodingError
from batchnorm_service.models import Model
from batchnorm_service.service import Service

JSON_LENGTH_HEADER: Final = "Inference-Header-Content-Length"
FINGERPRINT_HEADER: Final = "Batchnorm-Fingerprint"

# Up to this size a message is answered in the event loop, beyond it in a thread, so that others do not wait.
# Measured: the way to a thread and back costs 0.15 ms, and binary data of this size is answered in about that
# time; JSON of this size takes 4 ms, which is the longest that the loop stands still.
INLINE_BYTES: Final = 256 * 1024

logger = logging.getLogger(__name__)


class _DisconnectedError(Exception):
    """The client left before its message was whole; nobody waits for an answer."""


class Infer:
    """Answers a request for the model that the path names (`name`, and `version` where given)."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; `path_params` of the scope names the model."""
        try:
            model = self._service.repository.get(**scope["path_params"])
            start, body = await self._answer(model, scope, receive)
        except _DisconnectedError:
            return
        except ServiceError as refusal:
            await refusals.answer_to(refusal)(scope, receive, send)
            return
        except Exception:
            # Here and not in a middleware, because the way to this endpoint has none.
            logger.exception("a defect: inference failed")
            await refusals.answer(500, refusals.DEFECT)(scope, receive, send)
            return
        await send(start)
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, model: Model, scope: Scope, receive: Receive) -> tuple[Message, Any]:
        headers = dict(scope["headers"])
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if encoding.lower() != "identity":
            raise UnsupportedEncodingError(
                f"Content-Encoding {encoding!r} is not supported: send gzip or deflate"
            )
        body = await _body(headers, receive, self._service.settings.max_body)
        began = perf_counter_ns()
        length = headers.get(b"inference-header-content-length")
        arguments = model, body, None if length is None else length.decode("latin-1")
        try:
            if len(body) <= INLINE_BYTES:
                reply = protocol.infer(*arguments)
            else:
                reply = await to_thread.run_sync(protocol.infer, *arguments)
        except ServiceError:
            self._service.statistics.failed(model, perf_counter_ns() - began)
            raise
        self._service.statistics.succeeded(model, 1, 0, 0, perf_counter_ns() - began, 0)
        pairs = [
            (b"content-length", b"%d" % len(reply.body)),
            (
                b"content-type",
                b"application/json" if reply.json_length is None else b"application/octet-stream",
            ),
            (b"batchnorm-fingerprint", model.layer.fingerprint.encode()),
        ]
        if reply.json_length is not None:
            pairs.append((b"inference-header-content-length", b"%d" % reply.json_length))
        return {"type": "http.response.start", "status": 200, "headers": pairs}, reply.body


async def _body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytearray:
    """Read the body, refusing it unread if its announced length exceeds the limit."""
    if int(headers.get(b"content-length", 0)) > limit:
        raise BodyTooLargeError(f"the body exceeds the limit of {limit} bytes")
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _DisconnectedError
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) + len(chunk) > limit:  # a chunked body announces nothing
            raise BodyTooLargeError(f"the body exceeds the limit of {limit} bytes")
        body += chunk
    return body
