"""The BatchNormalization nodes of an ONNX model, and their parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from batchnorm.frozen import FrozenBatchNorm
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.nodes import attributes_of, described, is_standard, subgraphs

OPERATOR = "BatchNormalization"
PARAMETERS = ("gamma", "beta", "mean", "var")
"""The parameters in the order of the node's inputs, of which the first is x."""
DEFAULT_EPS = float(np.float32(1e-5))  # the default of the attribute epsilon
OLDEST_IN_RUNTIME = 7
"""The oldest opset whose BatchNormalization ONNX Runtime computes."""
OPSET_OF_IS_TEST = 6
"""The opset whose nodes are in inference mode by the attribute is_test."""

_OLDEST_OPSET = 6
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_MOST_CHANNELS = 2**24


class Normalization(NamedTuple):
    """A BatchNormalization of a model.

    Attributes:
        key: The name of the node; if it has none, or another has the same, that of its first output.
        node: The node.
        place: Where it is, if not in the main graph, such as "in then_branch of If 'choice'"; else "".
    """

    key: str
    node: onnx.NodeProto
    place: str = ""


class Reading(NamedTuple):
    """The parameters of a node in inference mode: four vectors, as they are in the model, and ε."""

    gamma: NDArray[Any]
    beta: NDArray[Any]
    mean: NDArray[Any]
    var: NDArray[Any]
    eps: float

    def layer(self) -> FrozenBatchNorm:
        """Return the layer: of float64 if a parameter is, else of float32, which holds 16 bits exactly.

        Raises:
            ValueError: The parameters make no layer, such as a negative variance.
        """
        wide = any(values.dtype == np.float64 for values in self[:4])
        with np.errstate(invalid="ignore"):  # of a signaling NaN, which the layer refuses
            gamma, beta, mean, var = (values.astype(np.float64) for values in self[:4])
        dtype = "float64" if wide else "float32"
        return FrozenBatchNorm(mean, var, gamma, beta, eps=self.eps, dtype=dtype)


def normalizations(graph: Graph) -> list[Normalization]:
    """Return the BatchNormalization nodes of the main graph, in order."""
    nodes = graph.nodes(OPERATOR)
    outputs = [next(iter(node.output), "") for node in nodes]
    counts = Counter(node.name for node in nodes)  # a key must not be the output of another node either
    counts.update(output for node, output in zip(nodes, outputs, strict=True) if output != node.name)
    return [
        Normalization(node.name if node.name and counts[node.name] == 1 else output, node)
        for node, output in zip(nodes, outputs, strict=True)
    ]


def normalizations_elsewhere(graph: Graph) -> list[Normalization]:
    """Return the BatchNormalization nodes in subgraphs of nodes and in functions of the model."""
    found: list[Normalization] = []
    pending: list[tuple[str, Iterable[onnx.NodeProto]]] = list(_within(graph.model.graph.node))
    for function in graph.model.functions:
        pending.append((f"in the function {function.name}", function.node))
    while pending:
        place, nodes = pending.pop(0)
        for node in nodes:
            if is_standard(node, OPERATOR):
                found.append(Normalization(node.name or next(iter(node.output), ""), node, place))
        pending.extend(_within(nodes))
    return found


def _within(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, Iterable[onnx.NodeProto]]]:
    for node in nodes:
        for name, graph in subgraphs(node):
            yield f"in {name} of {described(node)}", graph.node


def training_sign(graph: Graph, node: onnx.NodeProto) -> str:
    """Return what shows that a node is in training mode, or "" if it is in inference mode.

    It is the attribute `is_test` in opset 6, more than one output in 7 to 13, and `training_mode` from 14 on.
    """
    attributes = attributes_of(node)
    if graph.opset == OPSET_OF_IS_TEST and not attributes.get("is_test", 0):
        return "is_test=0"
    if attributes.get("training_mode", 0):
        return "training_mode=1"
    extra = sum(map(bool, node.output[1:]))
    return f"{extra + 1} outputs" if extra else ""


def read(graph: Graph, node: onnx.NodeProto) -> Reading:
    """Return the parameters of a BatchNormalization node of the main graph.

    Raises:
        OSError: A file with their data cannot be read.
        ValueError: The node is in training mode or damaged, or a parameter is no constant vector of floats.
    """
    where = graph.where
    if graph.opset < _OLDEST_OPSET:
        raise ValueError(f"{where}: opset {_OLDEST_OPSET} or newer is wanted, found {graph.opset}")
    attributes = attributes_of(node)
    if sign := training_sign(graph, node):
        raise ValueError(f"{where}: {OPERATOR} for inference wanted, found training mode ({sign})")
    if attributes.get("spatial", 1) != 1:
        raise ValueError(f"{where}: {OPERATOR} by channels wanted, found spatial=0")
    if len(node.input) != 1 + len(PARAMETERS):
        raise ValueError(f"{where}: {OPERATOR} of 5 inputs wanted, found {len(node.input)}")
    found = {role: vector(graph, role, name) for role, name in zip(PARAMETERS, node.input[1:], strict=True)}
    for role, values in found.items():
        if values.ndim != 1 or values.shape != found["gamma"].shape:
            shapes = ", ".join(f"{other} {v.shape}" for other, v in found.items())
            raise ValueError(f"{where}: {role} of shape (channels,) is wanted, found {shapes}")
    eps = attributes.get("epsilon", DEFAULT_EPS)
    if not isinstance(eps, float):
        raise ValueError(f"{where}: epsilon of one float is wanted, found {eps!r}")
    return Reading(**found, eps=eps)


def vector(graph: Graph, role: str, name: str) -> NDArray[Any]:
    """Return a constant of floats, of at most so many values as there may be channels.

    Raises:
        OSError: A file with its data cannot be read.
        ValueError: It is not constant, of another type, or too large.
    """
    values = graph.constant(role, name)
    if values.dtype.name not in _FLOATS:
        raise ValueError(f"{graph.where}: {role} ({name!r}) of floats is wanted, found {values.dtype}")
    if math.prod(values.shape) > _MOST_CHANNELS:
        wanted = f"at most {_MOST_CHANNELS} values is wanted, found shape {values.shape}"
        raise ValueError(f"{graph.where}: {role} ({name!r}) of {wanted}")
    return values
