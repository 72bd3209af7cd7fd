"""Time us, NumPy's two-pass expression and the floor of a copy side by side; `make bench`.

Every round times each of them once, in turn, so that a noisy machine slows them alike; medians are
shown. The floor is what it costs to move the memory on the same threads: read x and write y, or for
the backward pass read dy and x and write dx; the faster of ordinary stores and of stores past the
caches. Exits with 1 if a row of ours is slower than NumPy's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import batchnorm as bn
from batchnorm._core import copy

Array = NDArray[np.float32]
EPS = 1e-5

# (shape, channel axis): the rows of convolutional and dense layers in common networks.
ROWS: list[tuple[tuple[int, ...], int]] = [
    ((32, 64, 112, 112), 1),
    ((32, 256, 56, 56), 1),
    ((32, 2048, 7, 7), 1),
    ((64, 64, 32, 32), 1),
    ((1, 64, 56, 56), 1),
    ((32, 56, 56, 256), -1),
    ((64, 32, 32, 64), -1),
    ((128, 1024), 1),
    ((4096, 512), 1),
    ((200_000, 64), 1),
]


def numpy_forward(x: Array, axes: tuple[int, ...], out: Array) -> None:
    """NumPy's two-pass expression: mean, then deviations and their mean square, in float32."""
    mean = x.mean(axis=axes, keepdims=True)
    np.subtract(x, mean, out=out)
    var = np.mean(out * out, axis=axes, keepdims=True)
    np.multiply(out, 1 / np.sqrt(var + np.float32(EPS)), out=out)


def numpy_infer(x: Array, mean: Array, invstd: Array, out: Array) -> None:
    np.subtract(x, mean, out=out)
    np.multiply(out, invstd, out=out)


def numpy_backward(
    dy: Array, x: Array, mean: Array, invstd: Array, axes: tuple[int, ...], out: Array
) -> None:
    x_hat = (x - mean) * invstd
    dbeta = dy.mean(axis=axes, keepdims=True)
    dgamma = (dy * x_hat).mean(axis=axes, keepdims=True)
    np.multiply(dy - dbeta - x_hat * dgamma, invstd, out=out)


def contenders(shape: tuple[int, ...], axis: int) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """What is timed for a shape: by pass, by contender."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    out = np.empty_like(x)
    channels = shape[axis]
    axes = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    mean, var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    wide = np.zeros([channels if a == axis % len(shape) else 1 for a in range(len(shape))], np.float32)
    _, cache = bn.train_forward(x, channel_axis=axis)

    def floors(**inputs: Array) -> dict[str, Callable[[], object]]:
        return {
            "floor": lambda: copy(x, out, **inputs),
            "streaming floor": lambda: copy(x, out, streaming=True, **inputs),
        }

    yield (
        "forward",
        {
            "ours": lambda: bn.train_forward(x, eps=EPS, channel_axis=axis, out=out),
            "NumPy": lambda: numpy_forward(x, axes, out),
            **floors(),
        },
    )
    yield (
        "inference",
        {
            "ours": lambda: bn.infer(x, mean, var, eps=EPS, channel_axis=axis, out=out),
            "NumPy": lambda: numpy_infer(x, wide, wide + 1, out),
            **floors(),
        },
    )
    yield (
        "backward",
        {
            "ours": lambda: bn.backward(dy, cache, out=out),
            "NumPy": lambda: numpy_backward(dy, x, wide, wide + 1, axes, out),
            **floors(z=dy),
        },
    )


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call: medians of interleaved rounds, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only shapes whose text contains this, such as 56x56")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    rows = [row for row in ROWS if args.only in "x".join(map(str, row[0]))]
    if not rows:
        parser.error(f"--only {args.only}: no such shape")

    table = Table(title=f"float32, {bn.get_num_threads()} threads, {bn.simd_level()}; milliseconds, medians")
    for column in ("shape", "pass", "ours", "NumPy", "floor", "ours / floor", "NumPy / ours"):
        table.add_column(column, justify="left" if column in ("shape", "pass") else "right")
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for shape, axis in progress.track(rows, description="timing"):
            name = "x".join(map(str, shape)) + (" channels last" if axis == -1 else "")
            for direction, calls in contenders(shape, axis):
                ms = medians(calls, args.rounds)
                ms["floor"] = min(ms["floor"], ms.pop("streaming floor"))
                results.append({"shape": name, "pass": direction, **ms})
                ratios = (ms["ours"] / ms["floor"], ms["NumPy"] / ms["ours"])
                cells = [f"{ms[who]:.3f}" for who in ("ours", "NumPy", "floor")] + [
                    f"{r:.2f}" for r in ratios
                ]
                table.add_row(name, direction, *cells)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    slower = [f"{r['shape']} {r['pass']}" for r in results if float(r["ours"]) > float(r["NumPy"])]
    if slower:
        print("slower than NumPy: " + "; ".join(slower), file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
