"""State that the processes of a service share: a directory with the list of models, layers and workers.

    models.json            the list, replaced as a whole; its generation is a number that only grows
    layers/FINGERPRINT     the layers in the list, one file for each, named by its fingerprint
    workers/ID             a file for each worker, locked while it lives, with the generation that it serves
    lock                   held by the process that changes the list

The list is made from the directory of models, on start and by each load. Workers read layers from the shared
state and not from that directory, so that all of them, and those started later, serve the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from batchnorm._kinds import AnyFrozen, load
from batchnorm_service.errors import LaggingError

# How long one change waits for another, and a load for the workers.
PATIENCE_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Entry:
    """One version of one model in the list.

    Attributes:
        name: Name of the model.
        version: Version of the model; empty if a whole folder has a problem.
        fingerprint: Fingerprint of the layer that is served; None if none is.
        reason: Why no layer is served, or why the last load changed nothing; else empty.
    """

    name: str
    version: str
    fingerprint: str | None
    reason: str = ""


@dataclass(frozen=True)
class Listing:
    """The list of models: all versions of all models in one generation."""

    generation: int
    entries: tuple[Entry, ...] = ()


class SharedState:
    """The state in a shared directory, as one process sees it.

    Args:
        path: The directory; it exists, and belongs to this service alone.

    Attributes:
        identity: Name of this process in the shared state, once it is registered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._list = path / "models.json"
        self._workers = path / "workers"
        self._layers = path / "layers"
        for folder in (self._workers, self._layers):
            folder.mkdir(exist_ok=True)
        self.identity = ""
        self._own: int | None = None

    @property
    def path(self) -> Path:
        """The directory."""
        return self._path

    # The list

    def mark(self) -> tuple[int, int] | None:
        """Return a value that changes whenever the list is replaced; None before there is a list."""
        try:
            status = self._list.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def listing(self) -> Listing:
        """Return the list of models, or an empty list of generation 0 before there is one."""
        try:
            found = json.loads(self._list.read_bytes())
        except FileNotFoundError:
            return Listing(0)
        return Listing(found["generation"], tuple(Entry(**entry) for entry in found["entries"]))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock under which `publish` may be called.

        Raises:
            LaggingError: Another process held the lock for too long.
        """
        with (self._path / "lock").open("w") as file:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not _locked(file.fileno(), fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise LaggingError("another change of the models is under way; nothing was changed")
                time.sleep(0.02)
            yield

    def publish(self, entries: tuple[Entry, ...]) -> int:
        """Replace the list, drop the layers that are no longer in it, and return its generation."""
        new = Listing(self.listing().generation + 1, entries)
        _replace(self._list, json.dumps(asdict(new)).encode())
        kept = {entry.fingerprint for entry in entries}
        for path in self._layers.iterdir():
            # A worker that is just reading an older list misses the file, and then reads this one.
            if path.name not in kept:
                path.unlink()
        return new.generation

    # The layers

    def scratch(self) -> Path:
        """Return a path for a temporary file, which the caller deletes."""
        return self._path / f"copy-{secrets.token_hex(8)}"

    def put(self, layer: AnyFrozen) -> None:
        """Save a layer under its fingerprint; it is kept until a list without it is published.

        Raises:
            OSError: The file cannot be written.
        """
        path = self._layers / layer.fingerprint
        if not path.exists():
            layer.save(path)

    def get(self, fingerprint: str) -> AnyFrozen:
        """Return a saved layer.

        Raises:
            OSError: The file is not there any more.
            ValueError: The file has changed since it was written.
        """
        layer = load(self._layers / fingerprint)
        if layer.fingerprint != fingerprint:
            raise ValueError(f"the file of layer {fingerprint} has another one")
        return layer

    # The workers

    def register(self) -> None:
        """Register this process as a worker; call it before the list is first read."""
        self.identity = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._own = os.open(self._workers / self.identity, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._own, fcntl.LOCK_EX)

    def leave(self) -> None:
        """Unregister this process, which also happens when it ends."""
        if self._own is not None:
            os.close(self._own)
            self._own = None

    def acknowledge(self, generation: int) -> None:
        """Record that this worker serves this generation of the list."""
        if self._own is not None:
            os.pwrite(self._own, b"%20d" % generation, 0)

    def live(self) -> dict[str, int]:
        """Return the generation of the list that each live worker serves."""
        found = {}
        for path in self._workers.iterdir():
            with path.open("rb") as file:
                if not _locked(file.fileno(), fcntl.LOCK_SH):  # the worker holds it: it lives
                    found[path.name] = int(file.read() or b"0")
        return found


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
