"""The repository of models over HTTP (the protocol's extension `model_repository`), and the metrics.

POST /v2/repository/index                     what there is, and what is wrong with it
POST /v2/repository/models/{name}/load        take what the directory holds of a model now
POST /v2/repository/models/{name}/unload      serve it no longer
GET  /metrics
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, suppress
from typing import Any, Final

from anyio import to_thread
from fastapi import Request
from starlette.responses import Response

from batchnorm_service.errors import (
    BodyTooLargeError,
    ForbiddenError,
    InvalidInputError,
    LaggingError,
    UnsupportedError,
)
from batchnorm_service.metrics import Metrics
from batchnorm_service.repository import Repository
from batchnorm_service.state import PATIENCE_SECONDS, State
from batchnorm_service.tensors import parse_json

# Bodies of these requests are a few words.
MAX_BODY: Final = 64 * 1024


class Control:
    """The endpoints over one repository.

    Args:
        repository: The models of this process.
        state: What is shared with the other processes.
        allowed: Whether clients may load and unload.
    """

    def __init__(self, repository: Repository, state: State, *, allowed: bool) -> None:
        self._repository = repository
        self._state = state
        self._allowed = allowed

    async def index(self, request: Request) -> Response:
        """Name every model, whether it is served, and if not, why."""
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

    async def load(self, name: str, request: Request) -> Response:
        """Load all versions of a model that the directory holds now, or change nothing."""
        self._check_allowed()
        for parameter in await _parameters(request):
            if parameter == "config" or parameter.startswith("file:"):
                raise UnsupportedError(f"{parameter} is not supported: models come from the directory alone")
        await self._all_take(await to_thread.run_sync(self._repository.load, name))
        return Response()

    async def unload(self, name: str, request: Request) -> Response:
        """Serve a model no longer, until it is loaded again."""
        self._check_allowed()
        await _parameters(request)
        await self._all_take(await to_thread.run_sync(self._repository.unload, name))
        return Response()

    async def named_repository(self) -> Response:
        """Refuse: there is one repository, without a name."""
        raise UnsupportedError("named repositories are not supported: there is one, without a name")

    def _check_allowed(self) -> None:
        if not self._allowed:
            raise ForbiddenError("loading and unloading is off: the service must be started with --control")

    async def _all_take(self, generation: int) -> None:
        """Wait until every live process answers by this generation of the list or a newer one."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        with suppress(OSError, ValueError):  # the watch tries again, and says why it cannot be
            await to_thread.run_sync(self._repository.refresh)
        while True:
            live = self._state.live().values()
            lagging = sum(had < generation for had in live)
            if not lagging:
                return
            if asyncio.get_running_loop().time() > deadline:
                raise LaggingError(
                    f"{lagging} of {len(live)} workers have not taken the change after "
                    f"{PATIENCE_SECONDS:g} s; it stands, and they take it when they can"
                )
            await asyncio.sleep(0.02)


def metrics_endpoint(metrics: Metrics) -> Any:
    """Return the endpoint that prints metrics, in the form that the client accepts."""

    def print_metrics(request: Request) -> Response:
        """Print the metrics of all processes for Prometheus."""
        text, kind = metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

    return print_metrics


async def _parameters(request: Request) -> dict[str, Any]:
    parameters = (await _object(request)).get("parameters", {})
    if type(parameters) is not dict:
        raise InvalidInputError("parameters must be an object")
    return parameters


async def _object(request: Request) -> dict[str, Any]:
    """Return the JSON object of a body; an empty body is an empty object, and its Content-Type is nobody's."""
    body = bytearray()
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_BODY:
                raise BodyTooLargeError(f"the body exceeds the limit of {MAX_BODY} bytes for this path")
    found = parse_json(bytes(body)) if body.strip() else {}
    if type(found) is not dict:
        raise InvalidInputError("the body must be an object, or empty")
    return found
