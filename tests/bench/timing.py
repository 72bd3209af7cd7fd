"""Medians of interleaved rounds."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

REST = 0.03  # seconds before each timing: peers' worker threads spin for a while after a call
# Seconds that one timing takes at least: shorter calls are timed several in a row. Long enough for every
# tensor that caches hold, so that nobody is timed on what another process or kernel left in them.
BATCH = 0.01
SLOW = 8  # so many times slower than the fastest is no contest: timed in five rounds


class Median(NamedTuple):
    """Milliseconds of one call, and how many timings that is the median of."""

    ms: float
    rounds: int


def once(call: Callable[[], object], number: int = 1) -> float:
    """Seconds that a call takes, of `number` in a row.

    Several are timed after one that brings threads and caches back from the rest. A call of another process
    has a method `timed` that does the same there, so that the way to it is not timed.
    """
    if hasattr(call, "timed"):
        return float(call.timed(number))
    if number > 1:
        call()
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def medians(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
    told: Callable[[str], object] = lambda name: None,
    budget: float = math.inf,
    rest: float = REST,
) -> dict[str, Median]:
    """Times every call once a round, in another order each round; `before` it, untimed, what prepares it.

    Before each timing nothing happens for `rest` seconds.

    The rounds of a call end when they have taken about `budget` seconds. A call that takes more by itself is
    made once: it needs no call to warm it up.
    """
    before = before or {}

    def prepare(name: str) -> None:
        if name in before:
            before[name]()

    first = {}
    for name, call in calls.items():
        prepare(name)
        time.sleep(rest)
        start = time.perf_counter()
        call()
        cold = time.perf_counter() - start
        first[name] = cold if cold > budget else once(call)
    number = {name: math.ceil(BATCH / seconds) for name, seconds in first.items()}
    times: dict[str, list[float]] = {name: [s] if s > budget else [] for name, s in first.items()}

    def turns(name: str) -> float:
        if times[name]:
            return 0
        most = 5 if first[name] > SLOW * min(first.values()) else rounds
        return min(most, budget / first[name])

    allowed = {name: turns(name) for name in calls}
    order = list(calls)
    shuffled = random.Random(0)
    for turn in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            if turn >= allowed[name]:
                continue
            told(name)
            prepare(name)
            time.sleep(rest)
            times[name].append(once(calls[name], number[name]))
    return {name: Median(statistics.median(t) * 1e3, len(t)) for name, t in times.items()}
