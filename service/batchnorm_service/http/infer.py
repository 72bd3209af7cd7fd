"""The endpoint that answers inference requests, as plain ASGI: bytes in, bytes out."""

from __future__ import annotations

import logging
from time import perf_counter_ns
from typing import Any, Final, TypeAlias

from anyio import to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from batchnorm_service.context import Context
from batchnorm_service.errors import ServiceError, UnsupportedEncodingError
from batchnorm_service.http import error_answers
from batchnorm_service.http.body import CODINGS, DisconnectedError, compress, decompress, keep_memory, read
from batchnorm_service.models.model import Model
from batchnorm_service.protocol import exchange

# Messages up to this size are answered in the event loop, larger ones in a thread, so that no other waits.
# Measured on two cores: a thread adds 0.1 ms; bytes of this size take 0.04 ms, JSON of it 1.2 ms.
INLINE_BYTES: Final = 256 * 1024
# Up to this size the parts of an answer are joined: a copy takes less time than a second call of `send`.
JOINED_BYTES: Final = 64 * 1024

_JSON_LENGTH: Final = b"inference-header-content-length"
_Headers: TypeAlias = list[tuple[bytes, bytes]]

logger = logging.getLogger(__name__)


class Infer:
    """ASGI endpoint of inference; the scope's `path_params` name the model and, if given, the version."""

    def __init__(self, context: Context) -> None:
        self._context = context
        keep_memory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, and record its status in the scope, where admission counts it."""
        try:
            model = self._context.repository.get(**scope["path_params"])
            headers, parts = await self._answer(model, dict(scope["headers"]), receive)
        except DisconnectedError:
            return
        except ServiceError as error:
            await _send_error(error_answers.answer_to(error), scope, receive, send)
            return
        except Exception:
            # Here and not in a middleware, because FastAPI's middleware does not run for this endpoint.
            logger.exception("a defect: inference failed")
            await _send_error(error_answers.answer(500, error_answers.DEFECT), scope, receive, send)
            return
        scope["status"] = 200
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        *first, last = parts
        for part in first:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": last})

    async def _answer(
        self, model: Model, headers: dict[bytes, bytes], receive: Receive
    ) -> tuple[_Headers, list[Any]]:
        """Return the headers of the answer and the parts of its body."""
        context = self._context
        limit = context.settings.max_body
        given = headers.get(b"content-encoding", b"").lower() or b"identity"
        if given != b"identity" and given not in CODINGS:
            raise UnsupportedEncodingError(
                f"Content-Encoding {given.decode('latin-1')!r} is not gzip or deflate"
            )
        # Only if a single coding is named: clients that name several cannot always read all of them.
        wanted = headers.get(b"accept-encoding", b"").lower()
        length = headers.get(b"content-length")
        body = await read(None if length is None else int(length), receive, limit)
        arrived = perf_counter_ns()

        def work() -> tuple[exchange.Reply, tuple[_Headers, list[Any]], int]:
            began = perf_counter_ns()
            plain = body if given == b"identity" else decompress(given, body, limit)
            reply = exchange.infer(model, plain, headers.get(_JSON_LENGTH), context.rules)
            return reply, _message(model, reply, wanted), began - arrived

        small = len(body) <= INLINE_BYTES and given == b"identity" and wanted not in CODINGS
        try:
            reply, message, queue = work() if small else await to_thread.run_sync(work)
        except ServiceError:
            context.statistics.failed(model, perf_counter_ns() - arrived)
            raise
        # Here and not in the thread: incrementing a number is not atomic.
        context.statistics.succeeded(model, reply.rows, queue, reply.read, reply.compute, reply.write)
        return message


async def _send_error(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    scope["status"] = answer.status_code
    await answer(scope, receive, send)


def _message(model: Model, reply: exchange.Reply, coding: bytes) -> tuple[_Headers, list[Any]]:
    """Return the headers and the parts of the body of an answer."""
    parts: list[Any] = reply.parts
    headers = [(b"batchnorm-fingerprint", model.layer.fingerprint.encode())]
    if reply.json_length is None:
        headers.append((b"content-type", b"application/json"))
    else:
        headers.append((b"content-type", b"application/octet-stream"))
        headers.append((_JSON_LENGTH, b"%d" % reply.json_length))
    if coding in CODINGS:
        parts = [compress(coding, parts)]
        headers.append((b"content-encoding", coding.removeprefix(b"x-")))
    size = sum(map(len, parts))
    headers.append((b"content-length", b"%d" % size))
    return headers, [b"".join(parts)] if len(parts) > 1 and size <= JOINED_BYTES else parts
