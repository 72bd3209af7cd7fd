"""One variant of a network: what it computes, and how long it takes; in its own process, as users run it.

PyTorch is imported where it is used, since the process that asks does without it.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from bench import process
from bench_network.rows import OPERATORS, STEP, Row

WARM = 2  # calls before those that are timed
PROFILED = 3  # steps
Answers = dict[str, Any]  # arrays by name


class Variant:
    """A variant in this process."""

    def __init__(self, row: Row, name: str) -> None:
        from bench_network.networks import made, original, tensors

        self.model = made(name, original(row), row)
        self.x, self.classes = tensors(row)
        self.direction = STEP

    def step(self) -> Any:
        """Take a step; its loss."""
        from bench_network.networks import step

        return step(self.model, self.x, self.classes)

    def evaluate(self) -> Any:
        """The output without gradients."""
        from bench_network.networks import evaluate

        return evaluate(self.model, self.x)

    def answers(self) -> Answers:
        """Loss and gradients of a step, and the output in eval mode after it."""
        self.model.train()
        loss = self.step()
        gradients = [p.grad.flatten() for p in self.model.parameters()]
        answers = {"loss": loss.numpy(), "gradient": [g.numpy().copy() for g in gradients]}
        self.model.eval()
        return answers | {"output": self.evaluate().numpy()}

    def gradients(self) -> dict[str, float]:
        """The largest gradient of each parameter, of the last step."""
        return {name: float(p.grad.abs().max()) for name, p in self.model.named_parameters()}

    def prepare(self, direction: str) -> None:
        """Get ready for a pass, by calls that are not timed."""
        self.direction = direction
        self.model.train(direction == STEP)
        for _ in range(WARM):
            self.call()
        self.model.zero_grad(
            set_to_none=True
        )  # as after each call, so that none is timed that frees gradients

    def call(self) -> Any:
        """One call of the pass that was prepared."""
        return self.step() if self.direction == STEP else self.evaluate()

    def seconds(self) -> float:
        """Time one call of that pass."""
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            self.call()
            return time.perf_counter() - start
        finally:
            gc.enable()
            self.model.zero_grad(set_to_none=True)

    def profiled(self) -> dict[str, float]:
        """Milliseconds of a step that the profiler sees inside operators of each kind, and in all."""
        from torch.profiler import ProfilerActivity, profile

        self.model.train()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(PROFILED):
                self.step()
        events = [(e.key, e.self_cpu_time_total / 1e3 / PROFILED) for e in seen.key_averages()]
        kinds = {kind: sum(ms for key, ms in events if name.search(key)) for kind, name in OPERATORS.items()}
        return kinds | {"all": sum(ms for _, ms in events)}


class Process(process.Process):
    """A variant in a process of its own."""

    def __init__(self, row: Row, name: str, threads: int) -> None:
        super().__init__(f"{row.name}: {name}", on_threads, row, name, threads)

    def answers(self) -> Answers:
        """See `Variant`."""
        return self.ask("answers")

    def gradients(self) -> dict[str, float]:
        """See `Variant`."""
        return self.ask("gradients")

    def prepare(self, direction: str) -> None:
        """See `Variant`."""
        self.ask("prepare", direction)

    def seconds(self) -> float:
        """See `Variant`."""
        return self.ask("seconds")

    def profiled(self) -> dict[str, float]:
        """See `Variant`."""
        return self.ask("profiled")


def on_threads(row: Row, name: str, threads: int) -> Variant:
    """A variant, when PyTorch has been told how many threads to use."""
    import torch

    torch.set_num_threads(threads)
    return Variant(row, name)


Timed = Variant | Process
