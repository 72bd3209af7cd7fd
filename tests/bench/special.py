"""What is not one tensor against all peers: overhead, memory, threads, unusual shapes, moments, a network.

Each gives records of times and a ratio of them that has a goal of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import batchnorm as bn
from bench.case import TOLERANCE, Call, Case
from bench.rows import (
    BACKWARD,
    BASELINE,
    CALL_OVERHEAD,
    DIRECTIONS,
    EQUAL,
    FORWARD,
    FRESH,
    FRESH_LIMIT,
    FROZEN_OVERHEAD,
    IN_CACHE,
    INFERENCE,
    LARGE,
    MOBILENET,
    MOBILENET_LIMITS,
    MOMENTS_LIMIT,
    PER_BYTE,
    PER_BYTE_LIMIT,
    PER_BYTE_REFERENCE,
    THREADS,
    TWO_THREADS,
    Row,
)
from bench.timing import medians

Record = dict[str, Any]
# Peers that can be told to use one thread at any time.
ON_ONE_THREAD = ("NumPy", "ONNX Runtime", "PyTorch")
NETWORK = "MobileNetV2"


class Setting(NamedTuple):
    """How to measure, what is installed, and whom to tell what is being measured."""

    rounds: int
    threads: int
    installed: Mapping[str, Any]
    told: Callable[[str], object]

    def times(self, what: str, calls: Mapping[str, Call], **options: Any) -> dict[str, float]:
        """Milliseconds of each call."""
        self.told(what)
        return {name: median.ms for name, median in medians(calls, self.rounds, **options).items()}


def record(
    group: str,
    row: str,
    direction: str,
    ms: dict[str, float],
    ratio: float | None,
    limit: float,
    *,
    at_least: bool = False,
    unit: tuple[float, str] = (1, ""),
) -> Record:
    """One line: times, shown in `unit`, the ratio of two of them, and its limit, mostly an upper one."""
    return {
        "group": group,
        "row": row,
        "pass": direction,
        "ms": ms,
        "ratio": ratio,
        "limit": limit,
        "at_least": at_least,
        "unit": unit,
    }


def overhead(setting: Setting) -> list[Record]:
    """A call on next to nothing against np.add(x, b, out=out)."""
    records = []
    b = np.ones(64, np.float32)
    for name, direction, rank, limit in (
        ("", INFERENCE, 1, CALL_OVERHEAD[INFERENCE]),
        (" frozen layer", INFERENCE, 1, FROZEN_OVERHEAD),
        ("", FORWARD, 2, CALL_OVERHEAD[FORWARD]),
    ):
        case = Case.of(Row((rank, 64), group="call overhead"))
        call = case.ours()[direction]
        if name:
            frozen = bn.FrozenBatchNorm(case.mean, case.var, case.gamma, case.beta)

            def call(case: Case = case, frozen: bn.FrozenBatchNorm = frozen) -> object:
                return frozen(case.x, out=case.out)

        calls = {"ours": call, "np.add": lambda case=case: np.add(case.x, b, out=case.out)}
        ms = setting.times(f"call overhead {direction}{name}", calls)
        ratio = ms["ours"] / ms["np.add"]
        records.append(record("call overhead", case.row.name + name, direction, ms, ratio, limit))
    return records


def fresh_memory(setting: Setting) -> list[Record]:
    """New memory for each result, which is dropped before the next call, against `out=`."""
    records = []
    for row in FRESH:
        case = Case.of(row)
        into, fresh = case.ours(), case.ours(fresh=True)
        for direction in DIRECTIONS:
            calls = {"fresh": fresh[direction], "out=": into[direction]}
            ms = setting.times(f"fresh memory {row.name} {direction}", calls)
            ratio = ms["fresh"] / ms["out="]
            records.append(record("fresh memory", row.name, direction, ms, ratio, FRESH_LIMIT))
    return records


def scaling(setting: Setting) -> list[Record]:
    """One thread against two, in turns; the pool is made before the clock starts. Needs two processors."""
    records: list[Record] = []
    if setting.threads < 2:
        return records
    for row in THREADS:
        case = Case.of(row)
        for direction, call in case.ours().items():

            def on(n: int, call: Call = call) -> Call:
                def prepare() -> None:
                    bn.set_num_threads(n)
                    call()

                return prepare

            ms = setting.times(
                f"threads {row.name} {direction}",
                {"1 thread": call, "2 threads": call},
                before={"1 thread": on(1), "2 threads": on(2)},
            )
            ratio = ms["1 thread"] / ms["2 threads"]
            limit = next(limit for size, limit in TWO_THREADS if row.nbytes >= size)
            records.append(record("threads", row.name, direction, ms, ratio, limit, at_least=True))
    bn.set_num_threads(setting.threads)
    return records


def per_byte(setting: Setting) -> list[Record]:
    """Few channels or a small inner size against 64 channels in long runs, by the byte."""
    references = {planar: Case.of(row) for planar, row in PER_BYTE_REFERENCE.items()}
    records = []
    for row in PER_BYTE:
        case, reference = Case.of(row), references[row.planar]
        for direction in DIRECTIONS:
            calls = {"ours": case.ours()[direction], reference.row.name: reference.ours()[direction]}
            ms = setting.times(f"per byte {row.name} {direction}", calls)
            ratio = ms["ours"] / row.nbytes / (ms[reference.row.name] / reference.row.nbytes)
            records.append(record("per byte", row.name, direction, ms, ratio, PER_BYTE_LIMIT))
    return records


def moments(setting: Setting) -> list[Record]:
    """What only reads against the copy, which reads and writes."""
    records = []
    for row in (row for row in BASELINE if row.nbytes > LARGE):
        case = Case.of(row)
        calls = {"ours": lambda case=case: bn.moments(case.x, channel_axis=case.row.axis)}
        ms = with_floor(setting.times(f"moments {row.name}", calls | case.floors(FORWARD)))
        ratio = ms["ours"] / ms["floor"]
        records.append(record("moments", row.name, "moments", ms, ratio, MOMENTS_LIMIT))
    return records


def with_floor(ms: dict[str, float]) -> dict[str, float]:
    """`ms` with the faster of the two copies alone."""
    floors = [ms[name] for name in ms if name.startswith("floor, ")]
    return {name: t for name, t in ms.items() if not name.startswith("floor, ")} | {"floor": min(floors)}


def in_cache(setting: Setting) -> list[Record]:
    """Tensors that caches hold, on one thread, beside the best peer."""
    bn.set_num_threads(1)
    records = []
    for row in IN_CACHE:
        case = Case.of(row)
        case.answer_all()
        peers = {
            name: setting.installed[name].calls(case, 1)
            for name in ON_ONE_THREAD
            if name in setting.installed
        }
        for direction in DIRECTIONS:
            calls = {"ours": case.ours()[direction]}
            for name, passes in peers.items():
                if direction in passes and not differs([case], direction, [passes[direction]()]):
                    calls[name] = passes[direction]
            ms = setting.times(f"in cache {row.name} {direction}", calls)
            best = min((t for name, t in ms.items() if name != "ours"), default=None)
            ratio = None if best is None else ms["ours"] / best
            unit = (1e6 / case.x.size, " ns an element")
            records.append(record("in cache", row.name, direction, ms, ratio, 1 / EQUAL, unit=unit))
    bn.set_num_threads(setting.threads)
    return records


def differs(cases: list[Case], direction: str, answers: list[Any]) -> bool:
    """Whether a peer computes something else than we."""
    return any(
        case.difference(direction, answer) > TOLERANCE[case.row.dtype]
        for case, answer in zip(cases, answers, strict=True)
    )


def network(setting: Setting) -> list[Record]:
    """Its batch norms one after the other, against copies of their bytes, and against PyTorch's."""
    setting.told(f"{NETWORK}: {len(MOBILENET)} layers")
    cases = [Case.of(row) for row in MOBILENET]
    for case in cases:
        case.answer_all()
    torch = setting.installed.get("PyTorch")
    theirs = torch.together(cases, setting.threads) if torch else {}
    records = []
    for direction in (FORWARD, BACKWARD):
        calls = {"ours": every(case.ours()[direction] for case in cases)}
        copies = [case.floors(direction) for case in cases]
        calls |= {name: every(of[name] for of in copies) for name in copies[0]}
        if direction in theirs and not differs(cases, direction, theirs[direction].answers()):
            calls["PyTorch"] = theirs[direction]
        ms = with_floor(setting.times(f"{NETWORK} {direction}", calls))
        name = f"{len(cases)} layers"
        copied = {"ours": ms["ours"], "copies": ms["floor"]}
        ratio, limit = ms["ours"] / ms["floor"], MOBILENET_LIMITS[direction]
        records.append(record(NETWORK, name, direction, copied, ratio, limit))
        peer = {name: ms[name] for name in ("ours", "PyTorch") if name in ms}
        ratio = ms["ours"] / ms["PyTorch"] if "PyTorch" in ms else None
        records.append(record(NETWORK, name, direction, peer, ratio, 1 / EQUAL))
    return records


def every(calls: Any) -> Call:
    """One after the other."""
    calls = list(calls)

    def run() -> None:
        for call in calls:
            call()

    return run


class Measurement(NamedTuple):
    """A group of special rows, by the name that `--only` knows."""

    group: str
    run: Callable[[Setting], list[Record]]


ALL = (
    Measurement("call overhead", overhead),
    Measurement("fresh memory", fresh_memory),
    Measurement("threads", scaling),
    Measurement("per byte", per_byte),
    Measurement("moments", moments),
    Measurement("in cache", in_cache),
    Measurement(NETWORK, network),
)
