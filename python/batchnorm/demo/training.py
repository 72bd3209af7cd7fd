"""Training with and without batch normalization: the same digits, batches, weights and learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from batchnorm.demo.network import Digits, Network

EVALUATE_EVERY = 10
TARGET = 0.9


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        network: The trained network.
        rate: Learning rate.
        accuracy: On held-out digits, after every `every` steps.
        every: Steps from one accuracy to the next.
    """

    network: Network
    rate: float
    accuracy: list[float]
    every: int = EVALUATE_EVERY

    @property
    def steps_to_target(self) -> int | None:
        """Number of steps until nine of ten held-out digits were recognized; None if they never were."""
        return self.steps_to(TARGET)

    def steps_to(self, accuracy: float) -> int | None:
        """Return the number of steps until the accuracy was at least this; None if it never was."""
        good = (k for k, a in enumerate(self.accuracy, 1) if a >= accuracy)
        first = next(good, None)
        return None if first is None else first * self.every

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key, greater is better: first fewer steps to the target, then higher final accuracy."""
        return -(self.steps_to_target or np.inf), self.accuracy[-1]


def train(
    network: Network,
    digits: Digits,
    *,
    rate: float,
    steps: int,
    advance: Callable[[float], None],
    every: int = EVALUATE_EVERY,
    seed: int = 2,
) -> Run:
    """Train on the batches of a seed; call `advance` with the accuracy after every `every` steps."""
    accuracy: list[float] = []
    for k, (x, digit) in enumerate(digits.batches(np.random.default_rng(seed), steps), 1):
        network.step(x, digit, rate)
        if k % every == 0:
            accuracy.append(network.accuracy(digits.held_out_x, digits.held_out_digit))
            advance(accuracy[-1])
    return Run(network, rate, accuracy, every)
