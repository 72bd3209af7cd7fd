"""What the endpoints share: one object that a process makes at its start."""

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
from batchnorm_service.models.shared_state import State
from batchnorm_service.protocol.exchange import Rules
from batchnorm_service.settings import Settings


@dataclass(frozen=True)
class Service:
    """A process's settings, its models, and what it counts.

    Attributes:
        settings: What the process was started with.
        state: What it shares with the other processes of the service.
        repository: The models that it answers by.
        rows: What it counts, and the sums over all processes.
        statistics: What it counts for each model.
        keyring: The keys of clients; None lets everybody in.
        lifecycle: Whether it is about to end.
    """

    settings: Settings
    state: State
    repository: Repository
    rows: SharedRows
    statistics: Statistics
    keyring: Keyring | None
    lifecycle: Lifecycle = field(default_factory=Lifecycle)

    @cached_property
    def rules(self) -> Rules:
        """What the settings say of messages."""
        return Rules(self.settings.max_elements, null=self.settings.nan == "null")


def start(settings: Settings, state: State | None = None) -> Service:
    """Join the processes that share this state, and load the models that are listed in it.

    Args:
        settings: What the process was started with.
        state: What is shared, with its list of models; None for a process on its own, which makes both.

    Raises:
        OSError, ValueError: a shared file or the file of keys cannot be read.
    """
    alone = state is None
    if state is None:
        path = tempfile.mkdtemp(prefix="batchnorm-service-", dir=settings.run_dir)
        state = State(Path(path))
        weakref.finalize(state, shutil.rmtree, path, ignore_errors=True)
    state.register()
    repository = Repository(settings.directory(), state)
    if alone:
        repository.load_all()
    repository.refresh()
    rows = SharedRows(state)
    keyring = Keyring(settings.keys) if settings.keys else None
    return Service(settings, state, repository, rows, Statistics(rows), keyring)
