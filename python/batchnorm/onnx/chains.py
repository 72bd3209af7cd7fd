"""Nodes next to a batch normalization into which it could be folded, by the structure of the graph alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from batchnorm.onnx.graph import Graph
from batchnorm.onnx.nodes import attributes_of, described, is_standard
from batchnorm.onnx.normalizations import OPERATOR, training_sign

_UNPADDED = (b"NOTSET", b"VALID")


def foldable_into(graph: Graph, node: onnx.NodeProto) -> str:
    """Return the neighbour that a node in inference mode with constant parameters could be folded into.

    Returns:
        Its operator and name; or "" if there is none: its weights are not constant or shared, the value
        between the two is used elsewhere, or the result would be another.
    """
    x, y = node.input[0], node.output[0]
    before = graph.producer.get(x)
    try:
        if before is not None and _alone(graph, x) and _takes_what_follows(graph, before):
            return described(before)
        after = graph.consumers[y][0] if _alone(graph, y) else None
        if after is not None and _takes_what_precedes(graph, after, y):
            return described(after)
    except ValueError:  # a damaged attribute of the neighbour
        pass
    return ""


def _takes_what_follows(graph: Graph, node: onnx.NodeProto) -> bool:
    if is_standard(node, "Conv", "ConvTranspose", "Gemm"):
        return _weights_are_its_own(graph, node.input[1:])
    if is_standard(node, "Add"):
        products = [graph.producer.get(name) for name in node.input]
        product = next((p for p in products if p is not None and is_standard(p, "MatMul")), None)
        if product is None or not _alone(graph, product.output[0]):
            return False
        bias = [name for name in node.input if name != product.output[0]]
        return _takes_what_follows(graph, product) and _weights_are_its_own(graph, bias)
    if is_standard(node, "MatMul"):  # of rank 3 or more its channels are last, not on axis 1
        return len(graph.shapes.get(node.output[0], ())) == 2 and _weights_are_its_own(graph, node.input[1:])
    return is_standard(node, OPERATOR) and not training_sign(graph, node) and _constant(graph, node.input[1:])


def _takes_what_precedes(graph: Graph, node: onnx.NodeProto, y: str) -> bool:
    others = [name for name in node.input if name != y]
    if len(others) != len(node.input) - 1:
        return False
    if is_standard(node, "Mul", "Add"):
        return _by_channel(graph, others, len(graph.shapes.get(y, ())))
    if node.input[0] != y or not _weights_are_its_own(graph, others):
        return False
    attributes = attributes_of(node)
    if is_standard(node, "Conv"):  # zeros of a padding are not what the shift makes of zeros
        pads = attributes.get("pads", [])
        return attributes.get("auto_pad", b"NOTSET") in _UNPADDED and isinstance(pads, list) and not any(pads)
    if is_standard(node, "Gemm"):
        return not attributes.get("transA", 0)
    return is_standard(node, "MatMul") and len(graph.shapes.get(y, ())) == 2


def _alone(graph: Graph, name: str) -> bool:
    """Return whether a value is read once, by one node."""
    readers = graph.consumers.get(name, [])
    return len(readers) == 1 and list(readers[0].input).count(name) == 1 and name not in graph.outputs


def _weights_are_its_own(graph: Graph, names: Sequence[str]) -> bool:
    """Return whether weights, and the bias behind them, are constant, and no other node has the weights."""
    if not names or not _constant(graph, names):
        return False
    readers = [node for node in graph.consumers.get(names[0], []) if not is_standard(node, "Shape")]
    return len(readers) == 1 and names[0] not in graph.outputs


def _constant(graph: Graph, names: Sequence[str]) -> bool:
    try:
        return not any(graph.sources("", name) & graph.overridable for name in names if name)
    except ValueError:
        return False


def _by_channel(graph: Graph, names: list[str], rank: int) -> bool:
    """Return whether a constant is one number, or one for each channel of a tensor of this rank."""
    if rank < 2 or not _constant(graph, names):
        return False
    try:
        shape = np.shape(graph.constant("", names[0]))
    except (ValueError, OSError):
        return False
    sizes = (1,) * (rank - len(shape)) + shape
    return len(sizes) == rank and all(size == 1 for axis, size in enumerate(sizes) if axis != 1)
