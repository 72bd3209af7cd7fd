"""The HTTP edge: routes, the body limit, and the table from refusal to status.

Every answer but 200 is `{"error": text}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Final

from anyio import to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from batchnorm_service import __version__, protocol
from batchnorm_service.errors import (
    BodyTooLargeError,
    InvalidInputError,
    ModelNotFoundError,
    NotReadyError,
    ServiceError,
    UnsupportedError,
)
from batchnorm_service.models import Model, Repository
from batchnorm_service.settings import Settings

STATUS: Final[dict[type[ServiceError], int]] = {
    InvalidInputError: 400,
    ModelNotFoundError: 404,
    BodyTooLargeError: 413,
    UnsupportedError: 501,
    NotReadyError: 503,
}

JSON_LENGTH_HEADER: Final = "Inference-Header-Content-Length"
FINGERPRINT_HEADER: Final = "Batchnorm-Fingerprint"

# Up to this size a message is answered in the event loop, beyond it in a thread, so that others do not wait.
# Measured: the way to a thread and back costs 0.15 ms, and binary data of this size is answered in about that
# time; JSON of this size takes 4 ms, which is the longest that the loop stands still.
INLINE_BYTES: Final = 256 * 1024


def create_app(settings: Settings | None = None) -> FastAPI:
    """Load the models and return the ASGI application that serves them.

    Args:
        settings: What to serve; None reads the environment, as workers and `uvicorn --factory` need it.

    Raises:
        pydantic.ValidationError: the environment lacks a setting or has a wrong one.
    """
    settings = settings or Settings()
    service = _Service(Repository(settings.models), settings.max_body)
    app = FastAPI(
        title="batchnorm-service",
        version=__version__,
        # `infer` takes bytes that no schema of FastAPI describes, so no half description is published.
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            ServiceError: _on_refusal,
            HTTPException: _on_http_exception,
            RequestValidationError: _on_invalid_parameter,
            ClientDisconnect: _on_disconnect,
            Exception: _on_defect,
        },
    )
    app.add_api_route("/v2/health/live", service.live)
    app.add_api_route("/v2/health/ready", service.ready)
    app.add_api_route("/v2", service.server_metadata)
    app.add_api_route("/v2/", service.server_metadata)
    app.add_api_route("/v2/models", service.model_names)
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        app.add_api_route(path, service.model_metadata)
        app.add_api_route(path + "/ready", service.model_ready)
        # A plain Starlette route: the body is read here, whatever its Content-Type (tritonclient has none).
        app.add_route(path + "/infer", service.infer, methods=["POST"])
    return app


class _Service:
    """The endpoints over one repository."""

    def __init__(self, repository: Repository, max_body: int) -> None:
        self._repository = repository
        self._max_body = max_body

    async def live(self) -> dict[str, bool]:
        return {"live": True}

    async def ready(self) -> dict[str, bool]:
        if not self._repository.ready:
            raise NotReadyError("no model is loaded")
        # The text of the specification says "live" here, its servers and clients say "ready".
        return {"ready": True, "live": True}

    async def server_metadata(self) -> dict[str, Any]:
        return {"name": "batchnorm-service", "version": __version__, "extensions": protocol.EXTENSIONS}

    async def model_names(self) -> dict[str, list[str]]:
        return {"models": self._repository.names()}

    async def model_ready(self, request: Request) -> dict[str, Any]:
        return {"name": self._model(request).name, "ready": True}

    async def model_metadata(self, request: Request) -> dict[str, Any]:
        model = self._model(request)
        return protocol.metadata(model, self._repository.versions(model.name))

    async def infer(self, request: Request) -> Response:
        model = self._model(request)
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise UnsupportedError(f"Content-Encoding {encoding!r} is not supported, send the body as it is")
        body = await self._body(request)
        arguments = model, body, request.headers.get(JSON_LENGTH_HEADER)
        if len(body) <= INLINE_BYTES:
            reply = protocol.infer(*arguments)
        else:
            reply = await to_thread.run_sync(protocol.infer, *arguments)

        headers = {FINGERPRINT_HEADER: model.layer.fingerprint}
        if reply.json_length is None:
            return Response(reply.body, headers=headers, media_type="application/json")
        headers[JSON_LENGTH_HEADER] = str(reply.json_length)
        return Response(reply.body, headers=headers, media_type="application/octet-stream")

    def _model(self, request: Request) -> Model:
        return self._repository.get(**request.path_params)

    async def _body(self, request: Request) -> bytearray:
        """Read the body, refusing it unread if its announced length exceeds the limit."""
        if int(request.headers.get("content-length", 0)) > self._max_body:
            raise BodyTooLargeError(f"the body exceeds the limit of {self._max_body} bytes")
        body = bytearray()
        async with aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                if len(body) + len(chunk) > self._max_body:  # a chunked body announces nothing
                    raise BodyTooLargeError(f"the body exceeds the limit of {self._max_body} bytes")
                body += chunk
        return body


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    # The standard library escapes what is not ASCII, so that no text from outside can fail to be encoded.
    return Response(json.dumps({"error": text}), status, headers, media_type="application/json")


async def _on_refusal(request: Request, refusal: ServiceError) -> Response:
    return _error(STATUS[type(refusal)], str(refusal))


async def _on_http_exception(request: Request, refusal: HTTPException) -> Response:
    return _error(refusal.status_code, refusal.detail, refusal.headers)


async def _on_invalid_parameter(request: Request, refusal: RequestValidationError) -> Response:
    first = refusal.errors()[0]
    return _error(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _on_disconnect(request: Request, refusal: ClientDisconnect) -> Response:
    return _error(400, "the request is incomplete")  # nobody reads it; it keeps a traceback out of the log


async def _on_defect(request: Request, defect: Exception) -> Response:
    return _error(500, "internal error; the log of the service has the traceback")  # uvicorn writes it
