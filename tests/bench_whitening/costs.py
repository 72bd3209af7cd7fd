"""Time and memory of batch norm and of whitening by each method, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import batchnorm as bn
from bench.process import STATUS, Process, forget_peak, peak_mib
from bench.timing import medians, once
from bench_whitening.rows import BACKWARD, BATCH_NORM, BUDGET, CONTENDERS, EPS, FORWARD, PASSES, POSITIONS

Line = dict[str, Any]


def correlated(rows: int, size: int, dtype: DTypeLike, seed: int = 0) -> NDArray[Any]:
    """Normal values, each channel with half of the one before it; the condition of their covariance is 9."""
    x = np.random.default_rng(seed).standard_normal((rows, size), dtype)
    for i in range(size - 1, 0, -1):  # in place: memory freed here would be there for what is measured
        x[:, i] += x[:, i - 1] / 2
    return x


class Passes:
    """Forward and backward of one contender; x, dy and the output are there before."""

    def __init__(self, name: str, size: int, threads: int) -> None:
        bn.set_num_threads(threads)
        x, dy = (correlated(POSITIONS, size, np.float32, seed) for seed in range(2))
        out = np.ones_like(x)
        self.cache: Any = None

        def forward() -> None:
            self.cache = None  # or two would be in memory
            if name == BATCH_NORM:
                self.cache = bn.train_forward(x, eps=EPS, out=out)[1]
            else:
                self.cache = bn.whiten_forward(x, method=name, eps=EPS, out=out)[1]

        def backward() -> None:
            (bn.backward if name == BATCH_NORM else bn.whiten_backward)(dy, self.cache, out=out)

        self.calls = {FORWARD: forward, BACKWARD: backward}
        self.before = None
        if STATUS.exists():
            forget_peak()
            self.before = peak_mib()

    def timed(self, direction: str, number: int) -> float:
        """Seconds of a call, of `number` in a row."""
        return once(self.calls[direction], number)

    def added(self) -> float | None:
        """MiB at the peak so far beyond those before the first pass; None where the system doesn't tell."""
        return None if self.before is None else peak_mib() - self.before

    def steps(self) -> int | None:
        """The steps that the forward pass took, if its method has steps."""
        return getattr(self.cache, "steps", None)


class Call:
    """A pass of a contender in another process, as `bench.timing` times it."""

    def __init__(self, process: Process, direction: str) -> None:
        self.process, self.direction = process, direction

    def __call__(self) -> None:
        self.timed(1)

    def timed(self, number: int) -> float:
        """Seconds of a call there, of `number` in a row."""
        return float(self.process.ask("timed", self.direction, number))


def measure(size: int, rounds: int, threads: int, told: Callable[[str], object]) -> list[Line]:
    """The lines of a number of channels, one for each pass."""
    lines = []
    with ExitStack() as stack:
        processes = {}
        for name in CONTENDERS:
            processes[name] = Process(f"D = {size}: {name}", Passes, name, size, threads)
            stack.callback(processes[name].close)
        for direction in PASSES:
            told(f"D = {size}: {direction}")
            calls = {name: Call(process, direction) for name, process in processes.items()}
            times = medians(calls, rounds, budget=BUDGET)
            added = {name: process.ask("added") for name, process in processes.items()}
            lines.append(
                {
                    "size": size,
                    "pass": direction,
                    "ms": {name: median.ms for name, median in times.items()},
                    "rounds": {name: median.rounds for name, median in times.items()},
                    "added_mib": {name: mib for name, mib in added.items() if mib is not None},
                    "steps": processes["iterative"].ask("steps"),
                }
            )
    return lines
