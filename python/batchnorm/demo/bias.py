"""The example of the paper's section 2: an optimizer that knows of the normalization, and one that does not.

A layer adds a learned bias b to its input u and subtracts the mean: x = u + b, x̂ = x − E[x]. So b has no
effect on x̂, and none on the loss. If the gradient takes E[x] as a constant, b grows all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

import batchnorm as bn
from batchnorm.demo import report

__all__ = ["Descent", "descend", "main"]

RATE: Final = 0.1
TARGET: Final = 1.0  # the mean of the targets: out of reach, since the mean of x̂ is 0
_EXAMPLES: Final = 60
_EPS: Final = 1e-5
_NAMES: Final = {False: "mean taken as constant", True: "through the mean"}
_HEAD: Final = ("step", *(f"{what}, {name}" for name in _NAMES.values() for what in ("loss", "b")))


class Descent(NamedTuple):
    """The loss and b before each step and after the last: two float64 arrays of shape (steps + 1,)."""

    loss: NDArray[np.float64]
    b: NDArray[np.float64]


def descend(steps: int, *, through_statistics: bool, seed: int = 0) -> Descent:
    """Learn the bias b of x̂ = (u + b) − E[u + b] by gradient descent on ½·mean((x̂ − target)²).

    The layer is batch norm with γ = √(Var[x] + ε), which leaves the subtraction of the mean (section 3: with
    β = E[x] too, it would be the identity). b does not change Var[x], so γ is a constant. All is float64.

    Args:
        steps: Number of steps, at a rate of 0.1, on one batch of 60 values u.
        through_statistics: Whether ∂ℓ/∂x is `batchnorm.backward`, which goes through E[x], or
            `batchnorm.infer_backward`, which takes E[x] as a constant.
        seed: Seed of u, which is normal, and of the targets, which are normal with mean 1.
    """
    rng = np.random.default_rng(seed)
    u = rng.normal(0, 1, (_EXAMPLES, 1))
    target = rng.normal(0, 1, u.shape)
    target += TARGET - target.mean()
    gamma = np.sqrt(bn.moments(u).var + _EPS)
    losses, biases, b = [], [], 0.0
    for step in range(steps + 1):
        x = u + b
        xhat, cache = bn.train_forward(x, gamma, eps=_EPS)
        losses.append(0.5 * np.mean((xhat - target) ** 2))
        biases.append(b)
        if step < steps:
            dxhat = (xhat - target) / _EXAMPLES
            if through_statistics:
                dx = bn.backward(dxhat, cache).dx
            else:
                statistics = cache.moments
                dx = bn.infer_backward(dxhat, x, statistics.mean, statistics.var, gamma, eps=_EPS).dx
            b -= RATE * float(dx.sum())
    return Descent(np.array(losses), np.array(biases))


def main(output: Path, *, steps: int = 10_000) -> None:
    """Learn the bias by both gradients; print a table of loss and b, and write it with a plot.

    Args:
        output: Folder for bias.png and report.md; created if it does not exist.
        steps: Steps of gradient descent.
    """
    output.mkdir(parents=True, exist_ok=True)
    descents = {through: descend(steps, through_statistics=through) for through in _NAMES}
    rows = _rows(steps, descents.values())
    report.show(Console(highlight=False), "A bias before the subtraction of the mean", _HEAD, rows)
    _plot(output / "bias.png", descents)
    _write(output / "report.md", rows)
    print(f"{output}: bias.png, report.md")


def _rows(steps: int, descents: Iterable[Descent]) -> list[tuple[str, ...]]:
    shown = sorted({0, *(10**k for k in range(len(str(steps)))), steps})
    return [
        (str(k), *(cell for d in descents for cell in (f"{d.loss[k]:.12f}", f"{d.b[k]:.6g}"))) for k in shown
    ]


def _plot(path: Path, descents: dict[bool, Descent]) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, b = figure.subplots(1, 2)
    for through, descent in descents.items():
        style = {
            "color": report.COLORS[through],
            "linestyle": "--" if through else "-",
            "label": _NAMES[through],
        }
        loss.plot(descent.loss, **style)
        b.plot(descent.b, **style)
    loss.set(xlabel="step", ylabel="loss", ylim=(0, 2 * descents[True].loss[0]))
    b.set(xlabel="step", ylabel="b")
    b.legend(title="gradient")
    figure.savefig(path, dpi=100)


def _write(path: Path, rows: Sequence[Sequence[str]]) -> None:
    lines = [
        "# A bias before the subtraction of the mean",
        "",
        report.environment(),
        "",
        "The example of Ioffe and Szegedy 2015, section 2: x = u + b, x̂ = x − E[x]. b is learned by",
        f"gradient descent on ½·mean((x̂ − target)²), in float64, at the rate {RATE:g}. The mean of the",
        f"targets is {TARGET:g}, and x̂ has mean 0. The gradient that takes E[x] as a constant moves b by the",
        "same amount at every step, and the loss stays as it is. The gradient through E[x] is 0, since b has",
        "no effect.",
        "",
        "![Loss and b by step](bias.png)",
        "",
        *report.markdown(_HEAD, rows),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
