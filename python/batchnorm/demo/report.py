"""The plot and the short report that the demonstration writes, and what all demonstrations print with."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import batchnorm as bn
from batchnorm.demo.training import EVALUATE_EVERY, TARGET, Run

NAMES: Final = {False: "without batch normalization", True: "with batch normalization"}
COLORS: Final = {False: "tab:orange", True: "tab:blue"}


def accuracy_rows(plain: Run, normalized: Run) -> list[tuple[str, ...]]:
    """Return rows of step, accuracy without and with batch normalization, for ten log-spaced steps."""
    last = len(plain.accuracy)
    return [
        (str(k * EVALUATE_EVERY), f"{plain.accuracy[k - 1]:.1%}", f"{normalized.accuracy[k - 1]:.1%}")
        for k in sorted({round(last ** (i / 9)) for i in range(10)})
    ]


def rate_rows(runs: dict[bool, Sequence[Run]]) -> list[tuple[str, ...]]:
    """Return rows of learning rate, and for both networks the steps to the target and the final accuracy."""
    return [
        (f"{pair[0].rate:g}", *(f"{steps(run)}, {run.accuracy[-1]:.1%}" for run in pair))
        for pair in zip(runs[False], runs[True], strict=True)
    ]


def steps(run: Run) -> str:
    """Return the steps to the target accuracy, in words."""
    return "not reached" if run.steps_to_target is None else str(run.steps_to_target)


def plot(path: Path, runs: dict[bool, Sequence[Run]], rate: float) -> None:
    """Plot the accuracy of every run by step, with the runs at `rate` highlighted."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for normalized, of_kind in runs.items():
        for run in of_kind:
            chosen = run.rate == rate
            axes.plot(
                np.arange(1, len(run.accuracy) + 1) * EVALUATE_EVERY,
                run.accuracy,
                color=COLORS[normalized],
                linewidth=2.0 if chosen else 0.7,
                alpha=1.0 if chosen else 0.35,
                label=f"{NAMES[normalized]}, learning rate {rate:g}" if chosen else None,
            )
    axes.axhline(TARGET, color="gray", linewidth=0.7, linestyle=":")
    axes.set(xlabel="training step", ylabel="accuracy on held-out digits", ylim=(0, 1))
    axes.set_title("Pale: the same networks at other learning rates", fontsize="medium")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def write(path: Path, runs: dict[bool, Sequence[Run]], rate: float, checks: Sequence[str]) -> None:
    """Write the report, in Markdown."""
    plain, normalized = (next(r for r in runs[kind] if r.rate == rate) for kind in (False, True))
    last = len(plain.accuracy) * EVALUATE_EVERY
    lines = [
        "# Batch normalization on handwritten digits",
        "",
        environment(),
        "",
        "The first experiment of Ioffe and Szegedy 2015 (section 4.1), on the 1,797 digits of 8×8 pixels",
        "that ship with scikit-learn: three hidden layers of 100 sigmoid units, batches of 60, gradient",
        f"descent on the cross entropy, {last} steps. Both networks start from the same weights and see the",
        "same batches. A layer that batch normalization follows has no bias: β takes its place.",
        "",
        f"Both were trained at the same learning rates. They are compared at {rate:g}, which of these suits",
        "the network *without* batch normalization best, as the held-out digits tell. While a network",
        "trains, its accuracy is taken with moving averages of the batch statistics.",
        "",
        "![Accuracy by step](accuracy.png)",
        "",
        *markdown(("step", *NAMES.values()), accuracy_rows(plain, normalized)),
        "",
        f"Steps until {TARGET:.0%} of the held-out digits are recognized, and the accuracy at the end:",
        "",
        *markdown(("learning rate", *NAMES.values()), rate_rows(runs)),
        "",
        "## What was checked",
        "",
        *(f"- {check}" for check in checks),
        "",
        "## Files",
        "",
        "- `models/hidden1.safetensors`, `hidden2`, `hidden3`: the frozen layers, as the service loads them",
        "- `network.onnx`: the whole trained network",
        "- `activations.npy`: what reaches the first frozen layer for the held-out digits, float32",
        "- `service.log`: what the service wrote",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def progress(console: Console) -> Progress:
    """Return a progress bar whose tasks have a field `state`."""
    columns = TextColumn("    {task.description}"), BarColumn(), TextColumn("{task.fields[state]}")
    return Progress(*columns, TimeElapsedColumn(), console=console)


def mover(bar: Progress, task: TaskID, every: int, what: str = "") -> Callable[[float], None]:
    """Return a function that takes an accuracy, shows it, and moves the task's bar by `every` steps."""

    def advance(accuracy: float) -> None:
        bar.update(task, advance=every, state=f"{what}accuracy {accuracy:.1%}")

    return advance


def show(console: Console, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def environment() -> str:
    """Return a sentence with the versions and the machine that a report's figures come from."""
    return (
        f"batchnorm {bn.__version__}, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"{platform.machine()}, {bn.get_num_threads()} threads, SIMD level {bn.simd_level()}."
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, its columns aligned to the right."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---:"] * len(head), *rows)]
