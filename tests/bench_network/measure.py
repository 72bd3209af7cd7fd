"""One network: its variants are compared, timed in turn, and profiled."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench_network.rows import EAGER, PASSES, PYTORCH, REST, STEP, Row
from bench_network.variant import Answers, Process, Timed

LOSS, OUTPUT, GRADIENT = 1e-3, 1e-2, 5e-2  # relative differences that variants may have
SETTLE = 0.02  # seconds after a call, in which the threads of its process go to sleep


class DifferentError(Exception):
    """A variant computes something else than PyTorch's; the message says what."""


def flat(answer: Any) -> np.ndarray:
    """An answer as one array of float64."""
    parts = answer if isinstance(answer, list) else [answer]
    return np.concatenate([np.ravel(part) for part in parts]).astype(np.float64)


def compare(variants: Mapping[str, Timed], row: Row, told: Callable[[str], object]) -> None:
    """Take a step and an eval pass of every variant; of the rest, look whether its values can be timed.

    Raises:
        DifferentError: a loss, gradient or output is not PyTorch's, or a gradient of the rest is no
            ordinary number.
    """
    wanted = variants[PYTORCH].answers()
    for name, variant in variants.items():
        if name == PYTORCH:
            continue
        told(f"comparing {name}")
        got = variant.answers()
        if name == REST:
            for parameter, largest in variant.gradients().items():
                if not 1e-20 < largest < 1e20:
                    raise DifferentError(f"{row.name}: {REST}: gradient of {parameter} is {largest:g}")
        else:
            for what, limit in (("loss", LOSS), ("gradient", GRADIENT), ("output", OUTPUT)):
                difference = apart(got, wanted, what)
                if not difference <= limit:
                    raise DifferentError(f"{row.name}: {what} of {name} is off by {difference:.2g}")


def apart(got: Answers, wanted: Answers, what: str) -> float:
    """The relative difference of two answers."""
    a, b = flat(got[what]), flat(wanted[what])
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def rounds_of(
    variants: Mapping[str, Timed], direction: str, rounds: int, told: Callable[[str], object]
) -> dict[str, list[float]]:
    """Seconds of every variant in each round, in another order each round."""
    for variant in variants.values():
        variant.prepare(direction)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffled = list(variants), random.Random(0)
    told(f"{direction}: {rounds} rounds")
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            time.sleep(SETTLE)
            seconds[name].append(variants[name].seconds())
    return seconds


def timed(
    variants: Mapping[str, Timed], row: Row, rounds: int, told: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Both passes of a row: the seconds of every round, and of the step what the profiler sees."""
    compare(variants, row, told)
    lines: list[dict[str, Any]] = [
        {"row": row.name, "pass": direction, "seconds": rounds_of(variants, direction, rounds, told)}
        for direction in PASSES
    ]
    told("profiling")
    of_step = next(line for line in lines if line["pass"] == STEP)
    of_step["operators"] = {name: variants[name].profiled() for name in EAGER if name in variants}
    return lines


def measure(
    row: Row, names: tuple[str, ...], rounds: int, threads: int, told: Callable[[str], object]
) -> list[dict[str, Any]]:
    """`timed`, of variants in processes of their own."""
    told("making the variants")
    with ExitStack() as stack:
        variants = {name: Process(row, name, threads) for name in names}
        for variant in variants.values():
            stack.callback(variant.close)
        return timed(variants, row, rounds, told)
