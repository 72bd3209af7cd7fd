"""Counters of all processes of a service: rows of integers in small memory-mapped files.

Counting adds to memory; reading sums the files, those of processes that have ended too.
"""

from __future__ import annotations

import logging
import mmap
from array import array
from collections.abc import Iterable, MutableSequence, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from batchnorm_service.counts.statistics import LAST, LENGTH
from batchnorm_service.models.shared_state import SharedState

logger = logging.getLogger(__name__)

# Counters of a process: what is in flight now, then inference requests by duration, then answers by status.
IN_FLIGHT, BYTES_IN_FLIGHT, SECONDS_NS, DURATIONS = range(4)
# Upper bounds in seconds; one more counter has the requests that took longer.
BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STATUSES: Final = DURATIONS + len(BOUNDS) + 1
PROCESS_LENGTH: Final = STATUSES + 600

# Not the beginning of any model's name.
_PROCESS: Final = "@process"


class SharedRows:
    """Rows of counters of this process, and their sums over all processes.

    Args:
        state: What the processes share; this one is registered.
    """

    def __init__(self, state: SharedState) -> None:
        self._state = state
        self._folder = state.path / "counters"
        self._own = self._folder / state.identity
        self._own.mkdir(parents=True)
        self._rows: dict[tuple[str, str], MutableSequence[int]] = {}
        self.process = self._mapped(_PROCESS, PROCESS_LENGTH)

    def mine(self, name: str, version: str) -> MutableSequence[int]:
        """Return the row of a model to which this process adds; it starts as zeros."""
        row = self._rows.get((name, version))
        if row is None:
            row = self._rows[name, version] = self._mapped(f"{name}@{version}", LENGTH)
        return row

    def total(self, name: str, version: str) -> Sequence[int]:
        """Return the sums over all processes, and for `LAST` the maximum."""
        rows = _read(self._folder.glob(f"*/{name}@{version}"), LENGTH)
        sums: list[int] = rows.sum(axis=0).tolist()
        sums[LAST] = int(rows[:, LAST].max(initial=0))
        return sums

    def total_of_processes(self) -> Sequence[int]:
        """Return the sums over all processes; what is in flight is summed over live ones."""
        sums: list[int] = _read(self._folder.glob(f"*/{_PROCESS}"), PROCESS_LENGTH).sum(axis=0).tolist()
        live = _read((self._folder / worker / _PROCESS for worker in self._state.live()), PROCESS_LENGTH)
        sums[:SECONDS_NS] = live[:, :SECONDS_NS].sum(axis=0).tolist()
        return sums

    def models(self) -> set[tuple[str, str]]:
        """Return the names and versions of the models that have counters."""
        found = (path.name.split("@") for path in self._folder.glob("*/[!@]*"))
        return {(name, version) for name, version in found}

    def _mapped(self, name: str, length: int) -> MutableSequence[int]:
        path = self._own / name
        row: Any  # a memoryview of integers is a sequence that can be assigned to; its type does not say so
        try:
            # Written, not only made long: a hole that a full disk cannot fill would end the process later.
            path.write_bytes(bytes(8 * length))
            with path.open("r+b") as file:
                row = memoryview(mmap.mmap(file.fileno(), 8 * length)).cast("q")
        except OSError as reason:
            path.unlink(missing_ok=True)
            logger.error("the counters %s are of this process alone: %s", name, reason.strerror)
            row = array("q", bytes(8 * length))
        counters: MutableSequence[int] = row
        return counters


def _read(paths: Iterable[Path], length: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    rows = []
    for path in paths:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        if len(data) == 8 * length:  # else it is just being made
            rows.append(np.frombuffer(data, np.int64))
    return np.array(rows, np.int64).reshape(len(rows), length)
