"""Pairs of Mul and Add by constants in ONNX models: batch normalizations of which only the result is left."""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx
from numpy.typing import NDArray

from batchnorm.onnx.graph import Graph, ModelSource
from batchnorm.onnx.nodes import is_standard


class Affine(NamedTuple):
    """The map y = x·scale + shift of a Mul and an Add in a model.

    Attributes:
        x: Name of the value that is mapped.
        y: Name of the result.
        scale: The factors, in the shape that they have in the model.
        shift: The summands, in the shape that they have in the model.
    """

    x: str
    y: str
    scale: NDArray[Any]
    shift: NDArray[Any]


def affines(model: ModelSource) -> dict[str, Affine]:
    """Return the pairs of Mul and Add by constants in the main graph of a model.

    Some exporters write a batch normalization in this form. Which mean, variance, γ and β it had cannot be
    told from scale and shift, so it is never read as a frozen layer.

    Args:
        model: The model, its path, or its bytes; see `frozen_layers`.

    Returns:
        The pairs by the name of the Mul, or of its output if it has none or the name is taken.

    Raises:
        OSError: A file with data of the model cannot be read.
        ValueError: It is not an ONNX model.
    """
    graph = Graph(model)
    found: dict[str, Affine] = {}
    for mul in graph.nodes("Mul"):
        y = next(iter(mul.output), "")
        followers = graph.consumers.get(y, [])
        if len(followers) != 1 or y in graph.outputs or not is_standard(followers[0], "Add"):
            continue
        by, plus = _constant_of(graph, mul), _constant_of(graph, followers[0])
        if by is None or plus is None:
            continue
        (x, scale), (_, shift) = by, plus
        key = mul.name if mul.name and mul.name not in found else y
        found[key] = Affine(x, next(iter(followers[0].output), ""), scale, shift)
    return found


def _constant_of(graph: Graph, node: onnx.NodeProto) -> tuple[str, NDArray[Any]] | None:
    """Return the other input of a node of two inputs, one of which is constant, and that constant."""
    if len(node.input) != 2:
        return None
    for other, name in (node.input, reversed(node.input)):
        try:
            sources = graph.sources("constant", name)
        except ValueError:
            continue
        if sources & graph.overridable:
            continue
        return other, graph.constant("constant", name)
    return None
