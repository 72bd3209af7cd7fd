"""Endpoints of the repository of models (the protocol's extension `model_repository`) and of metrics.

POST /v2/repository/index                     list all models, and why some are not served
POST /v2/repository/models/{name}/load        load the versions that the directory has now
POST /v2/repository/models/{name}/unload      stop serving the model
GET  /metrics
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, suppress
from typing import Any, Final

from anyio import to_thread
from fastapi import FastAPI, Request
from starlette.responses import Response

from batchnorm_service.context import Context
from batchnorm_service.errors import (
    BodyTooLargeError,
    ForbiddenError,
    InvalidInputError,
    LaggingError,
    UnsupportedError,
)
from batchnorm_service.http.answers import IndexEntry
from batchnorm_service.http.metrics import Metrics
from batchnorm_service.models.shared_state import PATIENCE_SECONDS
from batchnorm_service.protocol.exchange import Rules
from batchnorm_service.protocol.tensors import parse_json

# Bodies of these requests are a few words.
MAX_BODY: Final = 64 * 1024


class RepositoryEndpoints:
    """Endpoints of the repository and of metrics."""

    def __init__(self, context: Context) -> None:
        self._repository = context.repository
        self._state = context.state
        self._allowed = context.settings.control
        self._metrics = Metrics(context)

    def add_routes(self, app: FastAPI) -> None:
        """Add the endpoints to an application."""
        app.add_api_route("/metrics", self.metrics, summary="Metrics of all processes, for Prometheus")
        for path, endpoint, form, summary in (
            ("/index", self.index, list[IndexEntry], "Every model, whether it is served, and why not"),
            ("/models/{name}/load", self.load, None, "Serve what the directory holds of a model now"),
            ("/models/{name}/unload", self.unload, None, "Serve a model no longer"),
        ):
            root, post = "/v2/repository", ["POST"]
            app.add_api_route(root + path, endpoint, methods=post, response_model=form, summary=summary)
            named = root + "/{repository}" + path
            app.add_api_route(named, self.named_repository, methods=post, include_in_schema=False)

    async def index(self, request: Request) -> Response:
        """List every model, whether it is served, and if not, why."""
        ready = (await _object(request)).get("ready", False)
        if type(ready) is not bool:
            raise InvalidInputError("ready must be true or false")
        found = []
        for entry in await to_thread.run_sync(self._repository.index):
            if entry.fingerprint or not ready:
                version = {"version": entry.version} if entry.version else {}
                state = {"state": "READY" if entry.fingerprint else "UNAVAILABLE", "reason": entry.reason}
                found.append({"name": entry.name} | version | state)
        return Response(json.dumps(found), media_type="application/json")

    async def load(self, request: Request) -> Response:
        """Load all versions of a model that the directory holds now, or none if one cannot be loaded."""
        self._check_allowed()
        for parameter in await _parameters(request):
            if parameter == "config" or parameter.startswith("file:"):
                raise UnsupportedError(f"{parameter} is not supported: models come from the directory alone")
        await self._all_take(await to_thread.run_sync(self._repository.load, request.path_params["name"]))
        return Response()

    async def unload(self, request: Request) -> Response:
        """Stop serving a model until it is loaded again."""
        self._check_allowed()
        await _parameters(request)
        await self._all_take(await to_thread.run_sync(self._repository.unload, request.path_params["name"]))
        return Response()

    async def named_repository(self) -> Response:
        """Answer 501: there is only one repository, and it has no name."""
        raise UnsupportedError("named repositories are not supported: there is one, without a name")

    def metrics(self, request: Request) -> Response:
        """Print the metrics of all processes for Prometheus."""
        text, kind = self._metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

    def _check_allowed(self) -> None:
        if not self._allowed:
            raise ForbiddenError("loading and unloading is off: the service must be started with --control")

    async def _all_take(self, generation: int) -> None:
        """Wait until every live process serves this generation of the list or a newer one."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        with suppress(OSError, ValueError):  # `Lifecycle.watch` tries again, and logs the reason
            await to_thread.run_sync(self._repository.refresh)
        while True:
            live = self._state.live().values()
            lagging = sum(had < generation for had in live)
            if not lagging:
                return
            if asyncio.get_running_loop().time() > deadline:
                raise LaggingError(
                    f"{lagging} of {len(live)} workers have not applied the change after "
                    f"{PATIENCE_SECONDS:g} s; the change is made, and they will apply it later"
                )
            await asyncio.sleep(0.02)


async def _parameters(request: Request) -> dict[str, Any]:
    parameters = (await _object(request)).get("parameters", {})
    if type(parameters) is not dict:
        raise InvalidInputError("parameters must be an object")
    return parameters


async def _object(request: Request) -> dict[str, Any]:
    """Return the JSON object of a body, whatever its Content-Type; an empty body is an empty object."""
    body = bytearray()
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_BODY:
                raise BodyTooLargeError(f"the body exceeds the limit of {MAX_BODY} bytes for this path")
    found = parse_json(bytes(body), Rules.max_depth) if body.strip() else {}
    if type(found) is not dict:
        raise InvalidInputError("the body must be an object, or empty")
    return found
