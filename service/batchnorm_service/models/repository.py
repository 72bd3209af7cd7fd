"""The models that this process serves, and how they are changed for all processes of the service."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from batchnorm_service.errors import LoadError, ModelNotFoundError, NotReadyError
from batchnorm_service.models.directory import Directory, Source
from batchnorm_service.models.model import Model
from batchnorm_service.models.shared_state import Entry, Listing, SharedState

logger = logging.getLogger(__name__)

UNLOADED: Final = "unloaded"


@dataclass(frozen=True)
class _Served:
    """The models that are served, replaced as a whole; a request keeps the model that it began with."""

    listing: Listing = field(default_factory=lambda: Listing(0))
    mark: tuple[int, int] | None = None
    models: Mapping[str, Mapping[str, Model]] = field(default_factory=dict)
    # The highest version of each model.
    defaults: Mapping[str, Model] = field(default_factory=dict)


class Repository:
    """The models of a directory, as this process serves them.

    Lookups read memory only. `load`, `unload` and `refresh` read files and may be called from any thread.

    Args:
        directory: The directory that models come from.
        state: State shared with the other processes of the service.
    """

    def __init__(self, directory: Directory, state: SharedState) -> None:
        self._directory = directory
        self._state = state
        self._served = _Served()
        self._refreshing = threading.Lock()

    # What is served

    @property
    def ready(self) -> bool:
        """Whether there is a model to serve."""
        return bool(self._served.models)

    @property
    def generation(self) -> int:
        """The generation of the list of models that is served."""
        return self._served.listing.generation

    @property
    def stale(self) -> bool:
        """Whether there is a newer list than the one that is served."""
        return self._state.mark() != self._served.mark

    def names(self) -> list[str]:
        """Return the names of the loaded models, sorted."""
        return sorted(self._served.models)

    def versions(self, name: str) -> list[str]:
        """Return the loaded versions of a model, lowest first; an empty list if it is not loaded."""
        return list(self._served.models.get(name, {}))

    def get(self, name: str, version: str | None = None) -> Model:
        """Return a loaded model; if no version is named, the highest loaded one.

        The lookup is in memory: a name from outside never becomes a path.

        Raises:
            NotReadyError: The model is known but not loaded.
            ModelNotFoundError: There is no such model or version.
        """
        served = self._served
        try:
            return served.defaults[name] if version is None else served.models[name][version]
        except KeyError:
            pass
        for entry in served.listing.entries:
            if entry.name == name and version in (None, entry.version) and not entry.fingerprint:
                why = "is unloaded" if entry.reason == UNLOADED else "could not be loaded, the index says why"
                raise NotReadyError(f"model {_label(name, version)} {why}")
        raise ModelNotFoundError(f"there is no model {_label(name, version)}")

    def index(self) -> list[Entry]:
        """Return all versions of all models: loaded, not loaded and why, and not loaded yet.

        Raises:
            NotReadyError: The directory cannot be listed.
        """
        try:
            sources = self._directory.sources()
        except OSError as reason:
            raise NotReadyError(f"the directory of models cannot be listed: {reason.strerror}") from reason
        listed = self._state.listing().entries
        known = {(entry.name, entry.version) for entry in listed}
        new = [
            Entry(source.name, source.version, None, source.problem or "not loaded yet")
            for source in sources
            if (source.name, source.version) not in known
        ]
        return sorted([*listed, *new], key=lambda entry: (entry.name, len(entry.version), entry.version))

    def refresh(self) -> None:
        """Serve the newest list from now on, and acknowledge it to the other processes.

        Raises:
            OSError, ValueError: A layer of the list cannot be read; the models served before are still
                served.
        """
        with self._refreshing:
            mark = self._state.mark()
            if mark != self._served.mark:
                self._served = self._taken(self._state.listing(), mark)
            self._state.acknowledge(self.generation)

    def _taken(self, listing: Listing, mark: tuple[int, int] | None) -> _Served:
        models: dict[str, dict[str, Model]] = {}
        for entry in sorted(
            listing.entries, key=lambda entry: (entry.name, len(entry.version), entry.version)
        ):
            if entry.fingerprint:
                had = self._served.models.get(entry.name, {}).get(entry.version)
                if had is None or had.layer.fingerprint != entry.fingerprint:
                    had = Model(entry.name, entry.version, self._state.get(entry.fingerprint))
                models.setdefault(entry.name, {})[entry.version] = had
        defaults = {name: list(versions.values())[-1] for name, versions in models.items()}
        return _Served(listing, mark, models, defaults)

    # Changes

    def load_all(self) -> list[Entry]:
        """List all models of the directory; return those that cannot be loaded, listed with the reason.

        Raises:
            LoadError: The directory cannot be listed, or the list cannot be written.
        """
        with self._changing():
            entries = self._read(self._directory.sources())
            self._state.publish(tuple(entries))
        if not any(entry.fingerprint for entry in entries):
            logger.warning("no model is loaded: the service will not be ready")
        return [entry for entry in entries if not entry.fingerprint]

    def load(self, name: str) -> int:
        """List all versions of one model in the directory, or change nothing if one cannot be loaded.

        Returns:
            The generation of the new list, which each process applies by `refresh`.

        Raises:
            ModelNotFoundError: The directory has nothing of that name.
            LoadError: A version cannot be loaded (the list has the reason), or the list cannot be written.
            LaggingError: Another change took too long.
        """
        with self._changing():
            read = self._read(self._directory.sources(name))
            if not read:
                raise ModelNotFoundError(f"the directory of models holds no model {name!r}")
            listed = self._state.listing().entries
            others = [entry for entry in listed if entry.name != name]
            failed = {entry.version: entry for entry in read if not entry.fingerprint}
            if not failed:
                return self._state.publish((*others, *read))
            kept = [
                replace(entry, reason=failed.pop(entry.version).reason) if entry.version in failed else entry
                for entry in listed
                if entry.name == name
            ]
            reasons = "; ".join(_reason(entry) for entry in read if not entry.fingerprint)
            self._state.publish((*others, *kept, *failed.values()))
        raise LoadError(f"model {name!r} cannot be loaded; the versions loaded before are kept: {reasons}")

    def unload(self, name: str) -> int:
        """List a model as unloaded until it is loaded again or the service restarts.

        Returns:
            The generation of the new list, which each process applies by `refresh`.

        Raises:
            ModelNotFoundError: There is no such model.
            LoadError: The list cannot be written.
            LaggingError: Another change took too long.
        """
        with self._changing():
            entries = self._state.listing().entries
            if all(entry.name != name for entry in entries):
                raise ModelNotFoundError(f"there is no model {name!r}")
            logger.info("model %r is unloaded", name)
            return self._state.publish(
                tuple(
                    replace(entry, fingerprint=None, reason=UNLOADED)
                    if entry.name == name and entry.fingerprint
                    else entry
                    for entry in entries
                )
            )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            with self._state.changing():
                yield
        except OSError as reason:  # a full disk, a directory that is gone
            raise LoadError(f"nothing was changed: {reason.strerror}") from reason

    def _read(self, sources: Iterable[Source]) -> list[Entry]:
        """Put the layers of sources into the shared state; the first of each name and version counts."""
        entries: dict[tuple[str, str], Entry] = {}
        for source in sources:
            entry = self._read_one(source)
            if entry.fingerprint:
                logger.info("model %s is loaded, fingerprint %s", _label(*_key(entry)), entry.fingerprint)
            else:
                logger.error("model %s is not loaded: %s", _label(*_key(entry)), entry.reason)
            entries.setdefault(_key(entry), entry)
        return list(entries.values())

    def _read_one(self, source: Source) -> Entry:
        # A file name may have bytes that are not UTF-8.
        name, version = (
            text.encode(errors="backslashreplace").decode() for text in (source.name, source.version)
        )
        scratch = self._state.scratch()
        try:
            layer = self._directory.read(source, scratch)
            self._state.put(layer)
        # Whatever is wrong with one file must not stop the others.
        except Exception as reason:
            return Entry(name, version, None, self._directory.explain(source, scratch, reason))
        finally:
            scratch.unlink(missing_ok=True)
        return Entry(name, version, layer.fingerprint)


def _key(entry: Entry) -> tuple[str, str]:
    return entry.name, entry.version


def _reason(entry: Entry) -> str:
    return f"version {entry.version}: {entry.reason}" if entry.version else entry.reason


def _label(name: str, version: str | None) -> str:
    return f"{name!r} version {version!r}" if version else repr(name)
