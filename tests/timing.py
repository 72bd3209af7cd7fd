"""Times that are compared with each other, never with a number of seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 15, repeat: int = 1
) -> dict[str, float]:
    """Seconds of each call: medians of rounds, which time `repeat` runs of every call after one untimed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            times[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(values) for name, values in times.items()}
