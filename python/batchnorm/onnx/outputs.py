"""How far the first output of a model is from what is wanted: labels, or the output of another model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._core import real_array
from batchnorm.onnx.calibration import Calibration
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.runtime import open_session, run
from batchnorm.onnx.taps import Advance


@dataclass(frozen=True, slots=True)
class Outcome:
    """The first output of a model compared with what is wanted; None where nothing is.

    Attributes:
        accuracy: Fraction of the labels that are the largest value along axis 1.
        rms: Root mean square of the differences from the reference; inf if the output is not finite.
        largest: Largest difference from the reference; likewise.
    """

    accuracy: float | None = None
    rms: float | None = None
    largest: float | None = None


def wanted_outputs(labels: ArrayLike | None, reference: ArrayLike | None) -> dict[str, NDArray[Any]]:
    """Return the labels and the reference that are not None, checked, by these names.

    Raises:
        TypeError: The labels are no integers, or the reference is no array of real numbers.
        ValueError: There are none of them, or the reference is not finite.
    """
    wanted: dict[str, NDArray[Any]] = {}
    if labels is not None:
        wanted["labels"] = np.asarray(labels)
        if wanted["labels"].dtype.kind not in "iu":
            raise TypeError(f"labels: dtype was {wanted['labels'].dtype}, wanted integers")
    if reference is not None:
        wanted["reference"] = real_array("reference", reference)
        if not np.isfinite(wanted["reference"]).all():
            raise ValueError("reference: values are not finite, wanted finite ones")
    for name, array in wanted.items():
        if not array.ndim or not array.size:
            raise ValueError(f"{name}: shape was {array.shape}, wanted an entry for each example on axis 0")
    return wanted


def outcome(
    graph: Graph, data: Calibration, wanted: dict[str, NDArray[Any]], threads: int, advance: Advance
) -> Outcome:
    """Run a model over the data, as ONNX Runtime optimizes it, and compare its first output.

    Args:
        graph: The model.
        data: The data.
        wanted: What `wanted_outputs` returned, with an entry for each example of the data.
        threads: Number of threads of an operator.
        advance: Is called after each batch with the fraction that is done.

    Raises:
        ImportError: The package onnxruntime is not installed.
        OSError: A file cannot be read.
        ValueError: ONNX Runtime cannot run the model, or a batch is not as it wants it; or what is wanted has
            another shape than the output.
        TypeError: A batch has another dtype than the model wants.
    """
    session = open_session(graph, threads=threads)
    examples, right, answers, values = 0, 0, 0, 0
    squares = largest = 0.0
    for done, feeds in data:
        (output,) = run(graph, session, feeds, graph.outputs[:1])
        if output.ndim < 1 + ("labels" in wanted):
            raise ValueError(f"labels: the output has shape {output.shape}, wanted classes on axis 1")
        here = slice(examples, examples + len(output))
        examples = here.stop
        if "labels" in wanted:
            answer = output.argmax(1)
            _check_classes(wanted["labels"][here], output.shape[1])
            right += int((answer == _same_shape("labels", wanted["labels"][here], answer)).sum())
            answers += answer.size
        if "reference" in wanted:
            target = _same_shape("reference", wanted["reference"][here], output).astype(np.float64)
            difference = np.abs(output.astype(np.float64) - target)
            difference[np.isnan(difference)] = np.inf
            squares += float((difference**2).sum())
            largest = max(largest, float(difference.max(initial=0)))
            values += difference.size
        if done is not None:
            advance(done)
    for name, array in wanted.items():
        # Examples that fill no batch of a fixed size are left out.
        if len(array) not in (examples, examples + data.left_out):
            found = f"{examples + data.left_out}, one for each example"
            raise ValueError(f"{name}: had {len(array)} entries, wanted {found}")
    return Outcome(
        accuracy=right / answers if answers else None,
        rms=math.sqrt(squares / values) if values else None,
        largest=largest if values else None,
    )


def _check_classes(labels: NDArray[Any], classes: int) -> None:
    if outside := [int(label) for label in labels.ravel() if not 0 <= label < classes]:
        raise ValueError(f"labels: {outside[0]} is none of the {classes} classes, 0 to {classes - 1}")


def _same_shape(name: str, part: NDArray[Any], output: NDArray[Any]) -> NDArray[Any]:
    """Return what is wanted of a batch, or raise ValueError if it has another shape than what there is."""
    if len(part) < len(output) and part.shape[1:] == output.shape[1:]:
        raise ValueError(f"{name}: had fewer entries than there are examples, wanted one for each")
    if part.shape != output.shape:
        raise ValueError(f"{name}: shape for a batch was {part.shape}, wanted {output.shape}")
    return part
