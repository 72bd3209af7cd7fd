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
        accuracy: On held-out digits, after every tenth step.
    """

    network: Network
    rate: float
    accuracy: list[float]

    @property
    def steps_to_target(self) -> int | None:
        """Number of steps until nine of ten held-out digits were recognized; None if they never were."""
        good = (k for k, a in enumerate(self.accuracy, 1) if a >= TARGET)
        first = next(good, None)
        return None if first is None else first * EVALUATE_EVERY

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key, greater is better: first fewer steps to the target, then higher final accuracy."""
        return -(self.steps_to_target or np.inf), self.accuracy[-1]


def train(
    digits: Digits, *, normalized: bool, rate: float, steps: int, advance: Callable[[float], None]
) -> Run:
    """Train one network; call `advance` with the accuracy after every tenth step."""
    network = Network(normalized=normalized)
    accuracy: list[float] = []
    for k, (x, digit) in enumerate(digits.batches(np.random.default_rng(2), steps), 1):
        network.step(x, digit, rate)
        if k % EVALUATE_EVERY == 0:
            accuracy.append(network.accuracy(digits.held_out_x, digits.held_out_digit))
            advance(accuracy[-1])
    return Run(network, rate, accuracy)
