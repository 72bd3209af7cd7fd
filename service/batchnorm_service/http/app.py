"""The web application: the table of routes, and the dispatch of a request to its endpoint.

Every answer with another status than 200 is `{"error": text}`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from batchnorm_service import __version__
from batchnorm_service.context import Context, start
from batchnorm_service.errors import NotReadyError, ServiceError
from batchnorm_service.http import answers, error_answers, openapi
from batchnorm_service.http.admission import Admission
from batchnorm_service.http.infer import Infer
from batchnorm_service.http.paths import MODEL_PATHS, Kind, classify
from batchnorm_service.http.repository_endpoints import RepositoryEndpoints
from batchnorm_service.lifecycle import watch
from batchnorm_service.models.model import Model
from batchnorm_service.models.shared_state import SharedState
from batchnorm_service.protocol import metadata
from batchnorm_service.settings import Settings

# Middleware around every request, those to infer included, the outermost first: each makes an ASGI
# application from the context and the application inside.
LAYERS: Final[tuple[Callable[[Context, ASGIApp], ASGIApp], ...]] = (Admission,)


def create_app(settings: Settings | None = None, state: SharedState | None = None) -> Application:
    """Load the models and return the ASGI application that serves them; its `state.context` is the `Context`.

    Args:
        settings: Settings; None reads the environment, as `uvicorn --factory` needs it.
        state: State shared with other processes; None for a single process.

    Raises:
        pydantic.ValidationError: The environment lacks a setting or has a wrong one.
    """
    return Application(start(settings or Settings(), state))


class Application(FastAPI):
    """The web application, with a shortcut to the endpoint of infer.

    A request to infer goes from `LAYERS` directly to its endpoint, because FastAPI's middleware and routing
    take longer than the inference of a small tensor.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(
            title="batchnorm-service",
            version=__version__,
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
            redirect_slashes=False,
            lifespan=lambda _: watch(context.repository, context.keyring),
            exception_handlers={
                ServiceError: _on_service_error,
                HTTPException: _on_http_exception,
                RequestValidationError: _on_invalid_parameter,
                ClientDisconnect: _on_disconnect,
                Exception: _on_defect,
            },
        )
        self.state.context = context
        self._infer = Infer(context)
        self._add_routes(_Endpoints(context))
        RepositoryEndpoints(context).add_routes(self)
        self._way: ASGIApp = self._dispatch
        for layer in reversed(LAYERS):
            self._way = layer(context, self._way)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; `paths.classify` is called once, and its result put into the scope."""
        if scope["type"] == "http":
            scope["asked"] = classify(scope["method"], scope["path"])
        await self._way(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        return openapi.document(super().openapi())

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["asked"].kind is Kind.INFER:
                scope["path_params"] = scope["asked"].model
                await self._infer(scope, receive, send)
                return
            if scope["method"] == "HEAD":  # the server leaves the body out, as it knows the method too
                scope = {**scope, "method": "GET"}
        await super().__call__(scope, receive, send)

    def _add_routes(self, endpoints: _Endpoints) -> None:
        self._get("/v2/health/live", endpoints.live, answers.Live, "Whether the process runs")
        self._get("/v2/health/ready", endpoints.ready, answers.Ready, "Whether a model is served")
        text = "Name, version and extensions of the service"
        self._get("/v2", endpoints.server_metadata, answers.Server, text)
        self._get("/v2/", endpoints.server_metadata, answers.Server, text, include_in_schema=False)
        self._get("/v2/models", endpoints.model_names, answers.Models, "Names of the loaded models")
        text = "Statistics of all models"
        self._get("/v2/models/stats", endpoints.all_statistics, answers.Statistics, text)
        for path in MODEL_PATHS:
            text = "What the model takes and gives, and its fingerprint"
            self._get(path, endpoints.model_metadata, answers.Model, text)
            text = "Whether the model is loaded"
            self._get(path + "/ready", endpoints.model_ready, answers.ModelReady, text)
            text = "The model in Triton's form"
            self._get(path + "/config", endpoints.model_configuration, answers.Configuration, text)
            text = "What was answered for the model, and how fast"
            self._get(path + "/stats", endpoints.model_statistics, answers.Statistics, text)
            # Not FastAPI's: the endpoint reads the body, whatever its Content-Type (tritonclient sends none).
            self.router.routes.append(Route(path + "/infer", self._infer, methods=["POST"]))

    def _get(
        self,
        path: str,
        endpoint: Callable[..., Awaitable[dict[str, Any]]],
        form: type[BaseModel],
        summary: str,
        include_in_schema: bool = True,
    ) -> None:
        self.add_api_route(
            path, endpoint, response_model=form, summary=summary, include_in_schema=include_in_schema
        )


class _Endpoints:
    """Endpoints that only read."""

    def __init__(self, context: Context) -> None:
        self._repository = context.repository
        self._statistics = context.statistics
        self._lifecycle = context.lifecycle

    async def live(self) -> dict[str, Any]:
        return {"live": True}

    async def ready(self) -> dict[str, Any]:
        if self._lifecycle.stopping:
            raise NotReadyError("the service is shutting down")
        if not self._repository.ready:
            raise NotReadyError("no model is loaded")
        # The text of the specification says "live" here, its servers and clients say "ready".
        return {"ready": True, "live": True}

    async def server_metadata(self) -> dict[str, Any]:
        return metadata.server()

    async def model_names(self) -> dict[str, Any]:
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
        """Return the model of that version, or all loaded versions if none is named."""
        if version is not None:
            return [self._repository.get(name, version)]
        self._repository.get(name)  # raises if there is none
        return [self._repository.get(name, one) for one in self._repository.versions(name)]


async def _on_service_error(request: Request, error: ServiceError) -> Response:
    return error_answers.answer_to(error)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if "GET" in headers.get("Allow", ""):
        headers["Allow"] += ", HEAD"
    return error_answers.answer(error.status_code, error.detail, headers)


async def _on_invalid_parameter(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    return error_answers.answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return error_answers.answer(
        400, "the request is incomplete"
    )  # nobody reads it; it keeps a traceback out of the log


async def _on_defect(request: Request, defect: Exception) -> Response:
    return error_answers.answer(500, error_answers.DEFECT)  # uvicorn writes the traceback
