"""The objects that the endpoints share, made once when a process starts."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from batchnorm_service.counts.counters import SharedRows
from batchnorm_service.counts.statistics import Statistics
from batchnorm_service.keys import Keyring
from batchnorm_service.lifecycle import Lifecycle
from batchnorm_service.models.repository import Repository
from batchnorm_service.models.shared_state import SharedState
from batchnorm_service.protocol.exchange import Rules
from batchnorm_service.settings import Settings


@dataclass(frozen=True)
class Context:
    """Settings, models and counters of one process.

    Attributes:
        settings: Settings of the process.
        state: State shared with the other processes of the service.
        repository: Models that the process serves.
        rows: Counters of this process, and their sums over all processes.
        statistics: Counters of each model.
        keyring: Keys of clients; None if no key is needed.
        lifecycle: Whether the process is shutting down.
    """

    settings: Settings
    state: SharedState
    repository: Repository
    rows: SharedRows
    statistics: Statistics
    keyring: Keyring | None
    lifecycle: Lifecycle = field(default_factory=Lifecycle)

    @cached_property
    def rules(self) -> Rules:
        """Limits of messages and form of answers, from the settings."""
        return Rules(self.settings.max_elements, null=self.settings.nan == "null")


def start(settings: Settings, state: SharedState | None = None) -> Context:
    """Join the processes that share this state, and load the models that are listed in it.

    Args:
        settings: Settings of the process.
        state: Shared state with its list of models; None for a single process, which makes both.

    Raises:
        OSError, ValueError: A shared file or the file of keys cannot be read.
    """
    alone = state is None
    if state is None:
        path = tempfile.mkdtemp(prefix="batchnorm-service-", dir=settings.run_dir)
        state = SharedState(Path(path))
        weakref.finalize(state, shutil.rmtree, path, ignore_errors=True)
    state.register()
    repository = Repository(settings.directory(), state)
    if alone:
        repository.load_all()
    repository.refresh()
    rows = SharedRows(state)
    keyring = Keyring(settings.keys) if settings.keys else None
    return Context(settings, state, repository, rows, Statistics(rows), keyring)
