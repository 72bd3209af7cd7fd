"""Frozen whitening layers as ONNX models, written and read; `docs/onnx.md` says what is promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from batchnorm._file import WHITENING
from batchnorm._types import WhiteningParameters
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.model import Parts, axis_of, make_model, swapped
from batchnorm.onnx.nodes import attributes_of, operator_name


def build_model(layer: WhiteningParameters, *, opset: int, rank: int) -> onnx.ModelProto:
    """Return the layer as a model; `FrozenWhitening.to_onnx` documents the arguments."""
    return make_model(layer, WHITENING, _parts(layer, rank), opset=opset, rank=rank)


def _parts(layer: WhiteningParameters, rank: int) -> Parts:
    """Return the nodes and constants: Sub of the mean, then Gemm, Conv or Einsum.

    The mean is not folded into the bias: in float32 two large numbers would cancel.
    """
    axis, groups, size = axis_of(layer, rank), layer.groups, layer.channels // layer.groups
    if rank == 2 and groups == 1:
        channels_on, matrix = 1, layer.matrix
        transform = [helper.make_node("Gemm", ["centred", "matrix", "bias"], ["y"], transB=1)]
    elif rank > 2 and layer.dtype == np.float32:
        channels_on, matrix = 1, layer.matrix.reshape(layer.matrix.shape + (1,) * (rank - 2))
        transform = [helper.make_node("Conv", ["centred", "matrix", "bias"], ["y"], group=groups)]
    else:  # ONNX Runtime has no Conv of float64, and there is none without a spatial axis
        channels_on, matrix = rank - 1, layer.matrix.reshape(groups, size, size)
        transform = [
            helper.make_node("Reshape", ["centred", "split"], ["by_group"]),
            helper.make_node("Einsum", ["by_group", "matrix"], ["product"], equation="...gi,goi->...go"),
            helper.make_node("Reshape", ["product", "joined"], ["whitened"]),
            helper.make_node("Add", ["whitened", "bias"], ["y"]),
        ]
    nodes = [helper.make_node("Sub", ["x", "mean"], ["centred"]), *transform]
    mean = layer.mean.reshape((layer.channels,) + (1,) * (rank - 1 - channels_on))
    constants: dict[str, NDArray[Any]] = {"matrix": matrix, "mean": mean, "bias": layer.bias}
    if transform[0].op_type == "Reshape":
        kept = [0] * (rank - 1)  # which Reshape reads as the size of the same axis of its input
        constants |= {"split": np.array([*kept, groups, size]), "joined": np.array([*kept, layer.channels])}
    return swapped(nodes, axis, channels_on, rank), constants


def parameters(graph: Graph) -> dict[str, NDArray[Any]]:
    """Return matrix, mean and bias of a model that `build_model` made.

    Raises:
        ValueError: One of the constants is missing, or the matrix is not one for these channels.
    """
    values = {name: graph.constant(name, name) for name in WHITENING.tensors}
    mean = values["mean"].ravel()
    try:
        return values | {"mean": mean, "matrix": values["matrix"].reshape(len(mean), -1)}
    except ValueError as error:
        shape = values["matrix"].shape
        raise ValueError(f"{graph.where}: matrix of {len(mean)} rows wanted, found shape {shape}") from error


def check(graph: Graph, layer: WhiteningParameters) -> None:
    """Raise ValueError unless the graph is the one that `build_model` makes of the layer."""
    inputs, outputs = graph.model.graph.input, graph.model.graph.output
    rank = len(inputs[0].type.tensor_type.shape.dim) if len(inputs) else 0
    try:
        nodes, constants = _parts(layer, rank)
    except ValueError as error:
        raise ValueError(f"{graph.where}: {error}") from error
    ends = [[entry.name for entry in entries] for entries in (inputs, outputs)]
    found = [_signature(node) for node in graph.model.graph.node]
    same = ends == [["x"], ["y"]] and found == [_signature(node) for node in nodes]
    if not same or not all(np.array_equal(graph.constant(k, k), v) for k, v in constants.items()):
        raise ValueError(f"{graph.where}: not the nodes that FrozenWhitening.to_onnx writes for this layer")


def _signature(node: onnx.NodeProto) -> tuple[Any, ...]:
    """Return what a node computes; its name and documentation may be changed by other tools."""
    return operator_name(node), list(node.input), list(node.output), attributes_of(node)
