"""What is not one tensor against peers: call overhead, fresh memory, threads, bytes of unusual shapes.

Each gives records of two times whose ratio has a goal of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import batchnorm as bn
from bench.case import Case
from bench.rows import (
    CALL_OVERHEAD,
    DIRECTIONS,
    FORWARD,
    FRESH,
    FRESH_LIMIT,
    INFERENCE,
    PER_BYTE,
    PER_BYTE_LIMIT,
    PER_BYTE_REFERENCE,
    THREADS,
    TWO_THREADS,
    Row,
)
from bench.timing import medians

Records = list[dict[str, Any]]
Told = Callable[[str], object]


def record(
    group: str, row: str, direction: str, ms: dict[str, float], ratio: float, goal: str, ok: bool
) -> dict[str, Any]:
    """One line: `ms` of two contenders, their ratio and what it is to be."""
    return {
        "group": group,
        "row": row,
        "pass": direction,
        "ms": ms,
        "ratio": ratio,
        "goal": goal,
        "reached": ok,
    }


def overhead(rounds: int, threads: int, told: Told) -> Records:
    """A call on next to nothing against np.add(x, b, out=out), both in loops of some milliseconds."""
    records = []
    for direction, shape in ((INFERENCE, (1, 64)), (FORWARD, (2, 64))):
        case = Case.of(Row(shape, group="call overhead"))
        x, out, gamma, beta, mean, var = case.x, case.out, case.gamma, case.beta, case.mean, case.var
        b = np.ones(64, np.float32)
        ours = {
            INFERENCE: lambda: bn.infer(x, mean, var, gamma, beta, out=out),  # noqa: B023 (called in this turn)
            FORWARD: lambda: bn.train_forward(x, gamma, beta, out=out),  # noqa: B023
        }
        calls = {"ours": ours[direction], "np.add": lambda: np.add(x, b, out=out)}  # noqa: B023
        times = medians(calls, rounds, told=lambda name, d=direction: told(f"call overhead {d}: {name}"))
        ms = {name: median.ms for name, median in times.items()}
        ratio, limit = ms["ours"] / ms["np.add"], CALL_OVERHEAD[direction]
        records.append(
            record("call overhead", case.row.name, direction, ms, ratio, f"≤ {limit:g}", ratio <= limit)
        )
    return records


def fresh_memory(rounds: int, threads: int, told: Told) -> Records:
    """New memory for each result, which is dropped before the next call, against `out=`."""
    records = []
    for row in FRESH:
        case = Case.of(row)
        into, fresh = case.ours(), case.ours(fresh=True)
        for direction in DIRECTIONS:
            told(f"fresh memory {row.name} {direction}")
            times = medians({"fresh": fresh[direction], "out=": into[direction]}, rounds)
            ms = {name: median.ms for name, median in times.items()}
            ratio = ms["fresh"] / ms["out="]
            goal = f"≤ {FRESH_LIMIT:g}"
            records.append(record("fresh memory", row.name, direction, ms, ratio, goal, ratio <= FRESH_LIMIT))
    return records


def scaling(rounds: int, threads: int, told: Told) -> Records:
    """One thread against two, in turns; the pool is made before the clock starts."""
    records = []
    for row in THREADS:
        case = Case.of(row)
        for direction, call in case.ours().items():
            told(f"threads {row.name} {direction}")

            def on(n: int, call: Callable[[], object] = call) -> Callable[[], object]:
                def prepare() -> None:
                    bn.set_num_threads(n)
                    call()

                return prepare

            times = medians(
                {"1 thread": call, "2 threads": call}, rounds, before={"1 thread": on(1), "2 threads": on(2)}
            )
            ms = {name: median.ms for name, median in times.items()}
            ratio = ms["1 thread"] / ms["2 threads"]
            limit = next(limit for size, limit in TWO_THREADS if row.nbytes >= size)
            records.append(record("threads", row.name, direction, ms, ratio, f"≥ {limit:g}", ratio >= limit))
    bn.set_num_threads(threads)
    return records


def per_byte(rounds: int, threads: int, told: Told) -> Records:
    """Few channels or a small inner size against 64 channels in long runs, by the byte."""
    references = {planar: Case.of(row) for planar, row in PER_BYTE_REFERENCE.items()}
    records = []
    for row in PER_BYTE:
        case, reference = Case.of(row), references[row.planar]
        for direction in DIRECTIONS:
            told(f"per byte {row.name} {direction}")
            calls = {"ours": case.ours()[direction], reference.row.name: reference.ours()[direction]}
            times = medians(calls, rounds)
            ms = {name: median.ms for name, median in times.items()}
            ratio = ms["ours"] / row.nbytes / (ms[reference.row.name] / reference.row.nbytes)
            goal = f"≤ {PER_BYTE_LIMIT:g}"
            records.append(record("per byte", row.name, direction, ms, ratio, goal, ratio <= PER_BYTE_LIMIT))
    return records


class Measurement(NamedTuple):
    """A group of special rows, by the name that `--only` knows."""

    group: str
    run: Callable[[int, int, Told], Records]


ALL = (
    Measurement("call overhead", overhead),
    Measurement("fresh memory", fresh_memory),
    Measurement("threads", scaling),
    Measurement("per byte", per_byte),
)
