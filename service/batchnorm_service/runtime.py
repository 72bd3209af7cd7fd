"""What a process has besides its endpoints of inference: made once, at its start."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from batchnorm_service.control import Control, metrics_endpoint
from batchnorm_service.counters import SharedRows
from batchnorm_service.gate import Gate
from batchnorm_service.keys import Keyring
from batchnorm_service.lifecycle import Lifecycle, watch
from batchnorm_service.metrics import Metrics
from batchnorm_service.repository import Repository
from batchnorm_service.settings import Settings
from batchnorm_service.state import State


class Runtime:
    """Models, keys, counters and what is shared with other processes.

    Args:
        settings: Those of the process.
        state: What is shared, its list of models made; None for a process on its own, which makes it.
        lifecycle: Through which the process says that it ends.

    Attributes:
        repository: The models that are served.
        rows: The counters.
        lifecycle: As given.
    """

    def __init__(
        self, settings: Settings, state: State | None = None, lifecycle: Lifecycle | None = None
    ) -> None:
        self.lifecycle = lifecycle or Lifecycle()
        self._settings = settings
        self._state = state or self._alone()
        self._state.register()
        self.repository = Repository(settings.directory(), self._state)
        if state is None:
            self.repository.load_all()
        self.repository.refresh()
        self.rows = SharedRows(self._state)
        self._keyring = Keyring(settings.keys) if settings.keys else None

    def install(self, app: FastAPI) -> None:
        """Add the routes of control and metrics, and the gate before all routes."""
        control = Control(self.repository, self._state, allowed=self._settings.control)
        index, models = "/v2/repository/index", "/v2/repository/models/{name}"
        app.add_api_route(index, control.index, methods=["POST"])
        app.add_api_route(f"{models}/load", control.load, methods=["POST"])
        app.add_api_route(f"{models}/unload", control.unload, methods=["POST"])
        named = "/v2/repository/{repository}"
        for path in (f"{named}/index", f"{named}/models/{{name}}/load", f"{named}/models/{{name}}/unload"):
            app.add_api_route(path, control.named_repository, methods=["POST"], include_in_schema=False)
        metrics = Metrics(self.rows, self.repository, self._state)
        app.add_api_route("/metrics", metrics_endpoint(metrics), methods=["GET"])
        app.add_middleware(Gate, settings=self._settings, keyring=self._keyring, rows=self.rows)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Follow the shared state while the application serves."""
        task = asyncio.create_task(watch(self.repository, self._keyring))
        try:
            yield
        finally:
            task.cancel()

    def _alone(self) -> State:
        path = tempfile.mkdtemp(prefix="batchnorm-service-", dir=self._settings.run_dir)
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        return State(Path(path))
