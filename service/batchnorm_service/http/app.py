"""The HTTP edge: the table of routes, and the way of a request to its endpoint.

Every answer but 200 is `{"error": text}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from batchnorm_service import __version__
from batchnorm_service.context import Service, start
from batchnorm_service.errors import NotReadyError, ServiceError
from batchnorm_service.http import error_answers, openapi
from batchnorm_service.http.admission import Gate
from batchnorm_service.http.infer import Infer
from batchnorm_service.http.repository_endpoints import Control
from batchnorm_service.lifecycle import watch
from batchnorm_service.models.model import Model
from batchnorm_service.models.shared_state import State
from batchnorm_service.protocol import metadata
from batchnorm_service.settings import Settings

_OF_MODEL: Final = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
_INFER: Final = re.compile("/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")

# What wraps every request, infer's included, the first outermost: makers of an ASGI application from the
# service and the application inside.
LAYERS: Final[tuple[Callable[[Service, ASGIApp], ASGIApp], ...]] = (Gate,)


def create_app(settings: Settings | None = None, state: State | None = None) -> FastAPI:
    """Load the models and return the ASGI application that serves them; its `state.service` is the `Service`.

    Args:
        settings: What to serve; None reads the environment, as `uvicorn --factory` needs it.
        state: What is shared with other processes; None for a process on its own.

    Raises:
        pydantic.ValidationError: the environment lacks a setting or has a wrong one.
    """
    return Application(start(settings or Settings(), state))


class Application(FastAPI):
    """The routes of a service, and a short cut to one of them.

    A request to infer goes from `LAYERS` straight to its endpoint, which is a route like the others: the
    middleware of FastAPI and the search for the route take longer than small tensors do.
    """

    def __init__(self, service: Service) -> None:
        super().__init__(
            title="batchnorm-service",
            version=__version__,
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
            redirect_slashes=False,
            lifespan=lambda _: watch(service.repository, service.keyring),
            exception_handlers={
                ServiceError: _on_refusal,
                HTTPException: _on_http_exception,
                RequestValidationError: _on_invalid_parameter,
                ClientDisconnect: _on_disconnect,
                Exception: _on_defect,
            },
        )
        self.state.service = service
        self._infer = Infer(service)
        self._add_routes(_Endpoints(service))
        Control(service).add_routes(self)
        self._way: ASGIApp = self._dispatch
        for layer in reversed(LAYERS):
            self._way = layer(service, self._way)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._way(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        return openapi.document(super().openapi())

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and (path := _INFER.fullmatch(scope["path"]))
        ):
            scope["path_params"] = path.groupdict()
            await self._infer(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def _add_routes(self, endpoints: _Endpoints) -> None:
        self.add_api_route("/v2/health/live", endpoints.live)
        self.add_api_route("/v2/health/ready", endpoints.ready)
        self.add_api_route("/v2", endpoints.server_metadata)
        self.add_api_route("/v2/", endpoints.server_metadata, include_in_schema=False)
        self.add_api_route("/v2/models", endpoints.model_names)
        self.add_api_route("/v2/models/stats", endpoints.all_statistics)
        for path in _OF_MODEL:
            self.add_api_route(path, endpoints.model_metadata)
            self.add_api_route(path + "/ready", endpoints.model_ready)
            self.add_api_route(path + "/config", endpoints.model_configuration)
            self.add_api_route(path + "/stats", endpoints.model_statistics)
            # Not FastAPI's: the body is read there, whatever its Content-Type (tritonclient has none).
            self.router.routes.append(Route(path + "/infer", self._infer, methods=["POST"]))


class _Endpoints:
    """What answers the routes, over one service."""

    def __init__(self, service: Service) -> None:
        self._repository = service.repository
        self._statistics = service.statistics
        self._lifecycle = service.lifecycle

    async def live(self) -> dict[str, bool]:
        return {"live": True}

    async def ready(self) -> dict[str, bool]:
        if self._lifecycle.stopping:
            raise NotReadyError("the service is about to end")
        if not self._repository.ready:
            raise NotReadyError("no model is loaded")
        # The text of the specification says "live" here, its servers and clients say "ready".
        return {"ready": True, "live": True}

    async def server_metadata(self) -> dict[str, Any]:
        return metadata.server()

    async def model_names(self) -> dict[str, list[str]]:
        return {"models": self._repository.names()}

    async def model_ready(self, request: Request) -> dict[str, Any]:
        return {"name": self._model(request).name, "ready": True}

    async def model_metadata(self, request: Request) -> dict[str, Any]:
        model = self._model(request)
        return metadata.of_model(model, self._repository.versions(model.name))

    async def model_configuration(self, request: Request) -> dict[str, Any]:
        return metadata.configuration(self._model(request))

    async def model_statistics(self, request: Request) -> dict[str, Any]:
        return self._statistics.of(self._versions(**request.path_params))

    async def all_statistics(self) -> dict[str, Any]:
        return self._statistics.of(
            model for name in self._repository.names() for model in self._versions(name)
        )

    def _model(self, request: Request) -> Model:
        return self._repository.get(**request.path_params)

    def _versions(self, name: str, version: str | None = None) -> list[Model]:
        """The model of that version; all loaded ones where none is named."""
        if version is not None:
            return [self._repository.get(name, version)]
        self._repository.get(name)  # refuses what there is not
        return [self._repository.get(name, one) for one in self._repository.versions(name)]


async def _on_refusal(request: Request, refusal: ServiceError) -> Response:
    return error_answers.answer_to(refusal)


async def _on_http_exception(request: Request, refusal: HTTPException) -> Response:
    request.scope["status"] = refusal.status_code
    return error_answers.answer(refusal.status_code, refusal.detail, refusal.headers)


async def _on_invalid_parameter(request: Request, refusal: RequestValidationError) -> Response:
    first = refusal.errors()[0]
    return error_answers.answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _on_disconnect(request: Request, refusal: ClientDisconnect) -> Response:
    return error_answers.answer(
        400, "the request is incomplete"
    )  # nobody reads it; it keeps a traceback out of the log


async def _on_defect(request: Request, defect: Exception) -> Response:
    return error_answers.answer(500, error_answers.DEFECT)  # uvicorn writes the traceback
