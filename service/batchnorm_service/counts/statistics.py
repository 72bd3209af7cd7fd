"""Statistics of inference in the form of the protocol's statistics extension.

A model's counters are one row of integers; the storage of the rows (`Rows`) sums them over processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any, Final, Protocol

from batchnorm_service.models.model import Model

# Batch sizes that are listed one by one; larger ones are counted in the sums only, so that rows are finite.
BATCH_SIZES: Final = 128

# The numbers in a row, in this order; times in nanoseconds, `LAST` in milliseconds since 1970. From `BATCHES`
# on there are four numbers for each batch size: executions, input, infer, output.
LAST, ROWS, SUCCESSES, FAILURES, SUCCESS_NS, FAILURE_NS, QUEUE_NS, INPUT_NS, INFER_NS, OUTPUT_NS, BATCHES = (
    range(11)
)
LENGTH: Final = BATCHES + 4 * BATCH_SIZES


class Rows(Protocol):
    """Storage of the counters."""

    def mine(self, name: str, version: str) -> MutableSequence[int]:
        """Return the row of a model to which this process adds; it starts as zeros."""

    def total(self, name: str, version: str) -> Sequence[int]:
        """Return the sums over all processes, and for `LAST` the maximum."""


class Statistics:
    """Counts inference requests, and reports the counters as `/stats` gives them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def succeeded(self, model: Model, rows: int, queue: int, read: int, compute: int, write: int) -> None:
        """Count a successful request.

        Args:
            model: The model that answered.
            rows: Size of the batch.
            queue: Nanoseconds between the arrival of the whole message and the start of work on it.
            read: Nanoseconds that parsing took.
            compute: Nanoseconds that the layer took.
            write: Nanoseconds that printing took.
        """
        row = self._rows.mine(model.name, model.version)
        row[LAST] = time.time_ns() // 1_000_000
        row[ROWS] += rows
        row[SUCCESSES] += 1
        row[SUCCESS_NS] += queue + read + compute + write
        row[QUEUE_NS] += queue
        row[INPUT_NS] += read
        row[INFER_NS] += compute
        row[OUTPUT_NS] += write
        if 0 < rows <= BATCH_SIZES:
            at = BATCHES + 4 * (rows - 1)
            row[at] += 1
            row[at + 1] += read
            row[at + 2] += compute
            row[at + 3] += write

    def failed(self, model: Model, duration: int) -> None:
        """Count a request that failed after its model was found, and its duration in nanoseconds."""
        row = self._rows.mine(model.name, model.version)
        row[FAILURES] += 1
        row[FAILURE_NS] += duration

    def of(self, models: Iterable[Model]) -> dict[str, Any]:
        """Return the statistics of these models as the protocol's body."""
        return {"model_stats": [_of(model, self._rows.total(model.name, model.version)) for model in models]}


def _of(model: Model, row: Sequence[int]) -> dict[str, Any]:
    done = row[SUCCESSES]
    times = {
        "success": (done, row[SUCCESS_NS]),
        "fail": (row[FAILURES], row[FAILURE_NS]),
        "queue": (done, row[QUEUE_NS]),
        "compute_input": (done, row[INPUT_NS]),
        "compute_infer": (done, row[INFER_NS]),
        "compute_output": (done, row[OUTPUT_NS]),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    batches = []
    for size in range(1, BATCH_SIZES + 1):
        count, *spent = row[BATCHES + 4 * (size - 1) : BATCHES + 4 * size]
        if count:
            names = "compute_input", "compute_infer", "compute_output"
            parts = {name: {"count": count, "ns": ns} for name, ns in zip(names, spent, strict=True)}
            batches.append({"batch_size": size} | parts)
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": row[LAST],
        "inference_count": row[ROWS],
        "execution_count": done,
        "inference_stats": {name: {"count": count, "ns": ns} for name, (count, ns) in times.items()},
        "response_stats": {},
        "batch_stats": batches,
        "memory_usage": [],
    }
