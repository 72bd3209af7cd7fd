"""Statistics that are stale after a change of the weights or the data, and recalibration of the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from batchnorm.demo import report
from batchnorm.demo.network import PIXELS, Array, Classes, dense_network, load_digits
from batchnorm.demo.onnx_model import to_onnx
from batchnorm.demo.training import EVALUATE_EVERY, train
from batchnorm.onnx import recalibrate
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.runtime import open_session, run

__all__ = ["Row", "main", "measure", "quantized"]

BITS: Final = (4, 3, 2)
CONTRASTS: Final = ((1.0, 0.5), (0.3, 0.0), (0.3, 0.5))
"""Images x become scale·x + offset."""

_RATE: Final = 1.0
_HEAD: Final = ("model, data", "before", "plain", "layerwise")


class Row(NamedTuple):
    """Accuracy on held-out digits of a model with stale statistics, and recalibrated in both ways."""

    what: str
    before: float
    plain: float
    layerwise: float


def quantized(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """Return a copy of a model with the weights of its MatMuls and Gemms rounded to integers of so many bits.

    They are stored as int8 behind a DequantizeLinear each, with one scale for a matrix: max |weight| becomes
    the largest integer.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {node.input[1] for node in copy.graph.node if node.op_type in ("MatMul", "Gemm")}
    largest = 2 ** (bits - 1) - 1
    nodes = []
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            values, name = numpy_helper.to_array(tensor), tensor.name
            scale = np.float32(abs(values).max() / largest)
            tensor.CopyFrom(numpy_helper.from_array(np.rint(values / scale).astype(np.int8), f"{name}.int8"))
            copy.graph.initializer.append(numpy_helper.from_array(np.array(scale), f"{name}.scale"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name]))
    nodes.extend(copy.graph.node)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def measure(*, steps: int, advance: Callable[[float], None]) -> list[Row]:
    """Train a network, make its statistics stale, recalibrate, and return the accuracies.

    Args:
        steps: Training steps.
        advance: Is called with the accuracy after every 10 steps.

    Raises:
        ValueError: `steps` is not a positive multiple of 10.
    """
    if steps < EVALUATE_EVERY or steps % EVALUATE_EVERY:
        raise ValueError(f"steps: was {steps}, wanted a multiple of {EVALUATE_EVERY}")
    digits = load_digits()
    network = train(
        dense_network(PIXELS, normalized=True), digits, rate=_RATE, steps=steps, advance=advance
    ).network
    model = to_onnx(network.freeze(digits.batches(np.random.default_rng(3), 100)))

    def row(what: str, stale: onnx.ModelProto, change: Callable[[Array], Array]) -> Row:
        seen, held_out = change(digits.x), change(digits.held_out_x)
        with warnings.catch_warnings():  # with 2 bits some units are constant
            warnings.simplefilter("ignore", UserWarning)
            new = [recalibrate(stale, seen, layerwise=layerwise)[0] for layerwise in (False, True)]
        return Row(what, *(_accuracy(each, held_out, digits.held_out_digit) for each in (stale, *new)))

    rows = [row("float32 weights, the same data", model, lambda x: x)]
    rows += [row(f"{bits}-bit weights, the same data", quantized(model, bits), lambda x: x) for bits in BITS]
    for scale, offset in CONTRASTS:
        what = f"float32 weights, {scale:g}·x + {offset:g}"
        rows.append(row(what, model, partial(_contrast, scale, offset)))
    return rows


def _contrast(scale: float, offset: float, x: Array) -> Array:
    return (scale * x + offset).astype(np.float32)


def _accuracy(model: onnx.ModelProto, x: Array, digit: Classes) -> float:
    graph = Graph(model)
    (logits,) = run(graph, open_session(graph), {"x": x}, ["logits"])
    return float((logits.argmax(1) == digit).mean())


def main(output: Path, *, steps: int = 1000) -> None:
    """Print a table of accuracies before and after recalibration, and write it.

    Args:
        output: Folder for report.md; created if it does not exist.
        steps: Training steps, a multiple of 10.

    Raises:
        ValueError: `steps` is not a positive multiple of 10.
    """
    console = Console(highlight=False)
    # Matrices this small gain nothing from a second thread.
    with threadpool_limits(1, user_api="blas"), report.progress(console) as bar:
        task = bar.add_task("train, then recalibrate", total=steps, state="")
        rows = measure(steps=steps, advance=report.mover(bar, task, EVALUATE_EVERY))
    cells = [(row.what, *(f"{accuracy:.1%}" for accuracy in row[1:])) for row in rows]
    report.show(console, "Accuracy on held-out digits", _HEAD, cells)
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "report.md", cells, steps)
    print(f"{output}: report.md")


def _write(path: Path, rows: Sequence[Sequence[str]], steps: int) -> None:
    lines = [
        "# Recalibration of stale statistics",
        "",
        report.environment(),
        "",
        "The network of `batchnorm demo` with batch normalization, three hidden layers of 100 sigmoid units,",
        f"trained for {steps} steps at the rate {_RATE:g} and exported to ONNX. Its weights are rounded to",
        "few bits, or its data x become a·x + b. Then `batchnorm.onnx.recalibrate` takes the statistics of",
        "the training images, without labels. The accuracy is that on held-out digits in ONNX Runtime:",
        "",
        *report.markdown(_HEAD, rows),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
