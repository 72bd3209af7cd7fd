"""Import of a frozen layer from an ONNX model, written by `to_onnx` or by other programs."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from batchnorm._file import BATCH_NORM, WHITENING, kind_of, restore
from batchnorm._kinds import MAKERS
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.frozen_whitening import FrozenWhitening
from batchnorm.onnx import whitening
from batchnorm.onnx.graph import Graph, is_standard, operator_name

# Since BatchNormalization-9 the inference form has meant the same; 14 and 15 changed training and the types.
_OLDEST_OPSET = 9
_INPUTS = {"Cast": 1, "Sqrt": 1}  # all others of mode "exact" have 2
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def load_frozen(model: onnx.ModelProto | str | os.PathLike[str] | bytes) -> FrozenBatchNorm | FrozenWhitening:
    """Load the frozen layer of an ONNX model.

    The model was written by `FrozenBatchNorm.to_onnx`, in either mode, by `FrozenWhitening.to_onnx`, or by
    another program.

    In a model of another program, the one BatchNormalization node of the main graph is read. It must be in
    inference mode, and its parameters must be constant: initializers, every form of Constant, and Identity,
    Cast and Reshape of these. The rest of the model is ignored. The layer is float64 if a parameter is, else
    float32, which holds 16-bit parameters exactly.

    Args:
        model: The model, its path, or its bytes. If parameters have their data in other files, it must be the
            path, and those files must be in the same folder.

    Raises:
        OSError: The model's file, or one with data of the parameters, cannot be read.
        ValueError: There is no such layer, or more than one; or data of the parameters are in a file outside
            the folder of the model, or in one that is not found because `model` is not a path; or the model
            was written by this package and its parameters are not those of its fingerprint.
    """
    graph = Graph(model)
    props = {prop.key: prop.value for prop in graph.model.metadata_props}
    if "fingerprint" not in props:
        parameters, eps = _inference(graph)
        wide = any(values.dtype == np.float64 for values in parameters.values())
        return FrozenBatchNorm(**_float64(parameters), eps=eps, dtype="float64" if wide else "float32")
    keys = (WHITENING if props.get("format") == WHITENING.format else BATCH_NORM).keys
    found = {key: value for key, value in props.items() if key in keys}  # tools add entries of their own
    if kind_of(graph.where, found, MAKERS) is WHITENING:
        parameters = _float64(whitening.parameters(graph))
        layer = restore(FrozenWhitening, graph.where, found, parameters, WHITENING)
        whitening.check(graph, layer)
        return layer
    parameters, eps = _inference(graph) if graph.nodes("BatchNormalization") else _exact(graph)
    return restore(FrozenBatchNorm, graph.where, found, _float64(parameters) | {"eps": eps}, BATCH_NORM)


def _float64(parameters: dict[str, NDArray[Any]]) -> dict[str, Any]:
    return {name: values.astype(np.float64) for name, values in parameters.items()}


def _inference(graph: Graph) -> tuple[dict[str, NDArray[Any]], float]:
    """Read gamma, beta, mean, var and eps of the one BatchNormalization node."""
    where, normalizations = graph.where, graph.nodes("BatchNormalization")
    if len(normalizations) != 1:
        operators = Counter(operator_name(node) for node in graph.model.graph.node)
        there = ", ".join(f"{count} {name}" for name, count in operators.items()) or "no nodes"
        raise ValueError(f"{where}: one BatchNormalization is wanted, found {there}")
    (node,) = normalizations
    if graph.opset < _OLDEST_OPSET:
        raise ValueError(f"{where}: opset {_OLDEST_OPSET} or newer is wanted, found {graph.opset}")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("training_mode", 0) or any(node.output[1:]):
        raise ValueError(f"{where}: BatchNormalization for inference wanted, found training mode")
    if attributes.get("spatial", 1) != 1:
        raise ValueError(f"{where}: BatchNormalization by channels wanted, found spatial=0")
    if len(node.input) != 5:
        raise ValueError(f"{where}: BatchNormalization of 5 inputs wanted, found {len(node.input)}")
    names = zip(("gamma", "beta", "mean", "var"), node.input[1:], strict=True)
    parameters = {role: _parameter(graph, role, name) for role, name in names}
    for role, values in parameters.items():
        if values.ndim != 1 or values.shape != parameters["gamma"].shape:
            shapes = ", ".join(f"{other} {v.shape}" for other, v in parameters.items())
            raise ValueError(f"{where}: {role} of shape (channels,) is wanted, found {shapes}")
    return parameters, attributes.get("epsilon", float(np.float32(1e-5)))


def _exact(graph: Graph) -> tuple[dict[str, NDArray[Any]], float]:
    """Read the parameters from mode "exact": (x − mean)·(gamma/√(var + eps)) + beta, with any casts."""
    y = next((output.name for output in graph.model.graph.output), "")
    if _is_computed_by(graph, "Cast", y):
        (y,) = _inputs_of(graph, "Cast", y)
    scaled, beta = _inputs_of(graph, "Add", y)
    centred, scale = _inputs_of(graph, "Mul", scaled)
    x, mean = _inputs_of(graph, "Sub", centred)
    gamma, sigma = _inputs_of(graph, "Div", scale)
    (var_eps,) = _inputs_of(graph, "Sqrt", sigma)
    var, eps = _inputs_of(graph, "Add", var_eps)
    if _is_computed_by(graph, "Cast", x):
        (x,) = _inputs_of(graph, "Cast", x)
    inputs = [entry.name for entry in graph.model.graph.input]
    if inputs != [x]:
        raise ValueError(f"{graph.where}: not mode 'exact': {x!r} is normalized, but inputs are {inputs}")
    names = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    parameters = {role: _parameter(graph, role, name).ravel() for role, name in names.items()}
    constant = _parameter(graph, "eps", eps)
    if constant.size != 1:
        raise ValueError(f"{graph.where}: eps of one value is wanted, found shape {constant.shape}")
    return parameters, constant.item()


def _parameter(graph: Graph, role: str, name: str) -> NDArray[Any]:
    values = graph.constant(role, name)
    if values.dtype.name not in _FLOATS:
        raise ValueError(f"{graph.where}: {role} ({name!r}) of floats is wanted, found {values.dtype}")
    return values


def _is_computed_by(graph: Graph, operator: str, name: str) -> bool:
    return name in graph.producer and is_standard(graph.producer[name], operator)


def _inputs_of(graph: Graph, operator: str, name: str) -> list[str]:
    expected = f"{graph.where}: not mode 'exact'"
    if not _is_computed_by(graph, operator, name):
        found = operator_name(graph.producer[name]) if name in graph.producer else "none"
        raise ValueError(f"{expected}: {name!r} by a node {operator} wanted, found {found}")
    inputs, wanted = list(graph.producer[name].input), _INPUTS.get(operator, 2)
    if len(inputs) != wanted:
        raise ValueError(f"{expected}: {operator} of {wanted} inputs wanted, found {len(inputs)}")
    return inputs
