"""One network: its variants are compared, timed in turn, and profiled."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench_network.networks import evaluate, made, original, step, tensors
from bench_network.rows import EAGER, OPERATORS, PASSES, PYTORCH, REST, STEP, Row

LOSS, OUTPUT, GRADIENT = 1e-3, 1e-2, 5e-2  # relative differences that variants may have
WARM = 2  # calls of each variant and pass before rounds begin
PROFILED = 3  # steps


class DifferentError(Exception):
    """A variant computes something else than PyTorch's; the message says what."""


def variants(row: Row, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The network in each variant, from the same weights."""
    model = original(row)
    return {name: made(name, model, row) for name in names}


def answers(model: nn.Module, row: Row) -> dict[str, torch.Tensor]:
    """Loss and gradients of a step, and the output in eval mode after it."""
    x, classes = tensors(row)
    loss = step(model.train(), x, classes)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"loss": loss, "gradient": gradients, "output": evaluate(model.eval(), x)}


def compare(models: Mapping[str, nn.Module], row: Row, told: Callable[[str], object]) -> None:
    """Take a step and an eval pass of every variant; of the rest, look whether its values can be timed.

    Raises:
        DifferentError: a loss, gradient or output is not PyTorch's, or a gradient of the rest is no
            ordinary number.
    """
    wanted = answers(models[PYTORCH], row)
    for name, model in models.items():
        if name == PYTORCH:
            continue
        told(f"comparing {name}")
        got = answers(model, row)
        if name == REST:
            for parameter, p in model.named_parameters():
                largest = float(p.grad.abs().max())
                if not 1e-20 < largest < 1e20:
                    raise DifferentError(f"{row.name}: {REST}: gradient of {parameter} is {largest:g}")
        else:
            for what, limit in (("loss", LOSS), ("gradient", GRADIENT), ("output", OUTPUT)):
                difference = float((got[what] - wanted[what]).norm() / wanted[what].norm())
                if not difference <= limit:
                    raise DifferentError(f"{row.name}: {what} of {name} is off by {difference:.2g}")


def once(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds_of(
    models: Mapping[str, nn.Module],
    row: Row,
    direction: str,
    rounds: int,
    told: Callable[[str], object],
) -> dict[str, list[float]]:
    """Seconds of every variant in each round, in another order each round."""
    x, classes = tensors(row)
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        model.train(direction == STEP)
        calls[name] = partial(step, model, x, classes) if direction == STEP else partial(evaluate, model, x)
        for _ in range(WARM):
            calls[name]()
        model.zero_grad(set_to_none=True)  # as after each call, so that none is timed that frees gradients
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    told(f"{direction}: {rounds} rounds")
    gc.disable()  # runs between the rounds
    try:
        for _ in range(rounds):
            gc.collect()
            shuffled.shuffle(order)
            for name in order:
                seconds[name].append(once(calls[name]))
                models[name].zero_grad(set_to_none=True)
    finally:
        gc.enable()
    return seconds


def profiled(model: nn.Module, row: Row) -> dict[str, float]:
    """Milliseconds of a step that the profiler sees inside operators of each kind, and in all."""
    x, classes = tensors(row)
    model.train()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(PROFILED):
            step(model, x, classes)
    events = [(e.key, e.self_cpu_time_total / 1e3 / PROFILED) for e in seen.key_averages()]
    kinds = {kind: sum(ms for key, ms in events if name.search(key)) for kind, name in OPERATORS.items()}
    return kinds | {"all": sum(ms for _, ms in events)}


def measure(
    row: Row, names: tuple[str, ...], rounds: int, told: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Both passes of a row: the seconds of every round, and of the step what the profiler sees."""
    told("making the variants")
    models = variants(row, names)
    compare(models, row, told)
    lines = []
    for direction in PASSES:
        seconds = rounds_of(models, row, direction, rounds, told)
        lines.append({"row": row.name, "pass": direction, "seconds": seconds})
    told("profiling")
    lines[0]["operators"] = {name: profiled(models[name], row) for name in EAGER if name in models}
    return lines
