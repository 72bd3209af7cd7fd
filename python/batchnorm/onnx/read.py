"""Import of frozen layers from ONNX models, written by `to_onnx` or by other programs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from batchnorm._file import BATCH_NORM, WHITENING, kind_of, restore
from batchnorm._kinds import MAKERS
from batchnorm.conventions import onnx_variance
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.frozen_whitening import FrozenWhitening
from batchnorm.onnx import whitening
from batchnorm.onnx.graph import Graph, ModelSource
from batchnorm.onnx.nodes import attributes_of, is_standard, operator_name
from batchnorm.onnx.normalizations import (
    OPERATOR,
    Reading,
    normalizations,
    normalizations_elsewhere,
    read,
    vector,
)

Made = TypeVar("Made")

_INPUTS = {"Cast": 1, "Sqrt": 1}  # all others of mode "exact" have 2


def load_frozen(model: ModelSource) -> FrozenBatchNorm | FrozenWhitening:
    """Load the frozen layer of an ONNX model.

    The model was written by `FrozenBatchNorm.to_onnx`, in any mode but "affine", by
    `FrozenWhitening.to_onnx`, or by another program.

    In a model of another program, the one BatchNormalization node of the main graph is read, as
    `frozen_layers` reads it. The rest of the model is ignored.

    Args:
        model: The model, its path, or its bytes. If parameters have their data in other files, it must be the
            path, and those files must be in the same folder.

    Raises:
        OSError: The model's file, or one with data of the parameters, cannot be read.
        ValueError: There is no such layer, or more than one; or data of the parameters are in a file outside
            the folder of the model, or in one that is not found because `model` is not a path; or the model
            was written by this package and its parameters are not those of its fingerprint, or in mode
            "affine", which does not hold them.
    """
    graph = Graph(model)
    props = {prop.key: prop.value for prop in graph.model.metadata_props}
    if "fingerprint" not in props:
        return _inference(graph).layer()
    keys = (WHITENING if props.get("format") == WHITENING.format else BATCH_NORM).keys
    found = {key: value for key, value in props.items() if key in keys}  # tools add entries of their own
    if kind_of(graph.where, found, MAKERS) is WHITENING:
        parameters = _float64(whitening.parameters(graph))
        layer = restore(FrozenWhitening, graph.where, found, parameters, WHITENING)
        whitening.check(graph, layer)
        return layer
    parameters = _parameters(graph, props)._asdict()
    return restore(FrozenBatchNorm, graph.where, found, _float64(parameters), BATCH_NORM)


def frozen_layers(model: ModelSource, *, skip: bool = False) -> dict[str, FrozenBatchNorm]:
    """Return the batch normalizations of a model as frozen layers.

    They are the BatchNormalization nodes of the main graph. Such a node must be in inference mode: by its
    attribute `is_test` in opset 6, by a single output in opsets 7 to 13, by `training_mode` from 14 on. Its
    parameters must be constant: initializers, every form of Constant, ConstantOfShape, and Identity, Cast,
    CastLike, Expand, Reshape, Transpose and Unsqueeze of these. A layer is float64 if a parameter is, else
    float32, which holds 16-bit parameters exactly.

    Args:
        model: The model, its path, or its bytes. If parameters have their data in other files, it must be the
            path, and those files must be in the same folder.
        skip: Leave out, with a warning, what cannot be read.

    Returns:
        The layers by name of the node, in the order of the nodes. The name of a node that has none, or the
        name of another too, is that of its first output.

    Raises:
        OSError: The model's file, or one with data of the parameters, cannot be read.
        ValueError: Batch normalizations cannot be read, all of which it lists with the reasons: they are in
            training mode, in a subgraph or function, or have parameters that are computed or make no layer.

    Warns:
        UserWarning: A parameter is an input of the model too, so that a caller may give another (from IR
            version 4 on); or what `skip` leaves out.
    """
    return read_all(Graph(model), Reading.layer, skip)


def read_all(graph: Graph, make: Callable[[Reading], Made], skip: bool) -> dict[str, Made]:
    """Return what `make` makes of each batch normalization of a model; see `frozen_layers`, which it serves.

    Args:
        graph: The model.
        make: Is called with the parameters of a node; may raise ValueError or TypeError saying what is wrong.
        skip: Leave out, with a warning, what cannot be read.
    """
    made: dict[str, Made] = {}
    refused: dict[str, str] = {}
    changeable: list[str] = []
    found = normalizations(graph)
    for entry in found:
        try:
            made[entry.key] = make(read(graph, entry.node))
        except (ValueError, TypeError) as error:
            refused[entry.key] = str(error).removeprefix(f"{graph.where}: ")
            continue
        sources = {name for p in entry.node.input[1:] for name in graph.sources("", p)}
        changeable.extend(f"{name!r} of {entry.key!r}" for name in sorted(sources & graph.overridable))
    elsewhere = normalizations_elsewhere(graph)
    listed = [f"{key!r}: {reason}" for key, reason in refused.items()]
    listed += [f"{entry.key!r}: is {entry.place}, not in the main graph" for entry in elsewhere]
    if listed:
        message = f"{len(listed)} of {len(found) + len(elsewhere)} batch normalizations cannot be read"
        message = f"{graph.where}: {message}: {'; '.join(listed)}"
        if not skip:
            raise ValueError(f"{message}; skip=True leaves them out")
        warnings.warn(message, stacklevel=3)
    if changeable:
        names = ", ".join(changeable)
        message = f"{graph.where}: inputs of the model too, so that a caller may give others: {names}"
        warnings.warn(message, stacklevel=3)
    return made


@np.errstate(invalid="ignore")  # of a signaling NaN, which the layer refuses
def _float64(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(values, np.float64) for name, values in parameters.items()}


def _parameters(graph: Graph, props: dict[str, str]) -> Reading:
    """Read the parameters of a model that `FrozenBatchNorm.to_onnx` wrote."""
    nodes = graph.nodes(OPERATOR)
    if len(nodes) == 1 and f"batchnorm.{nodes[0].name}.count" in props:
        return _training(graph, nodes[0], props)
    if nodes:
        return _inference(graph)
    if "affine" in (value for key, value in props.items() if key.startswith("batchnorm.")):
        raise ValueError(
            f"{graph.where}: mode 'affine' holds x·scale + shift, from which no layer can be read"
        )
    return _exact(graph)


def _training(graph: Graph, node: onnx.NodeProto, props: dict[str, str]) -> Reading:
    """Read the parameters from mode "training", whose metadata hold the variance before it was converted."""
    prefix = f"batchnorm.{node.name}"
    try:
        count = int(props[f"{prefix}.count"])
        var = np.frombuffer(bytes.fromhex(props[f"{prefix}.var"]), np.dtype(props["dtype"]).newbyteorder("<"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{graph.where}: damaged: metadata {prefix}: {error}") from error
    attributes = attributes_of(node)
    inference = onnx.NodeProto()
    inference.CopyFrom(node)
    del inference.output[1:]
    del inference.attribute[:]
    inference.attribute.extend(a for a in node.attribute if a.name == "epsilon")
    found = read(graph, inference)
    if attributes.get("training_mode") != 1 or not np.array_equal(
        found.var, onnx_variance(var, count).astype(var.dtype)
    ):
        raise ValueError(
            f"{graph.where}: damaged: not what mode 'training' writes for the variance in {prefix}.var"
        )
    return found._replace(var=var)


def _inference(graph: Graph) -> Reading:
    """Read the one BatchNormalization node of the main graph."""
    found = graph.nodes(OPERATOR)
    if len(found) != 1:
        operators = Counter(operator_name(node) for node in graph.model.graph.node)
        there = ", ".join(f"{count} {name}" for name, count in operators.items()) or "no nodes"
        raise ValueError(f"{graph.where}: one {OPERATOR} is wanted, found {there}")
    return read(graph, found[0])


def _exact(graph: Graph) -> Reading:
    """Read the parameters from mode "exact": (x − mean)·(gamma/√(var + eps)) + beta, with any casts.

    For 16-bit x it is ((x − high) − low)·(gamma/√(var + eps)) + beta, where high + low is the mean.
    """
    y = _before_cast(graph, next((output.name for output in graph.model.graph.output), ""))
    scaled, beta = _inputs_of(graph, "Add", y)
    centred, scale = _inputs_of(graph, "Mul", scaled)
    x, mean = _inputs_of(graph, "Sub", centred)
    if _is_computed_by(graph, "Sub", x):
        whole, high = _inputs_of(graph, "Sub", _before_cast(graph, mean))
        x, mean = _inputs_of(graph, "Sub", x)
        if _before_cast(graph, high) != mean or _before_cast(graph, mean) != whole:
            raise ValueError(f"{graph.where}: not mode 'exact': {mean!r} is not the high part of {whole!r}")
    gamma, sigma = _inputs_of(graph, "Div", _before_cast(graph, scale))
    (var_eps,) = _inputs_of(graph, "Sqrt", sigma)
    var, eps = _inputs_of(graph, "Add", var_eps)
    x = _before_cast(graph, x)
    inputs = [entry.name for entry in graph.model.graph.input]
    if inputs != [x]:
        raise ValueError(f"{graph.where}: not mode 'exact': {x!r} is normalized, but inputs are {inputs}")
    names = {
        "gamma": gamma,
        "beta": _before_cast(graph, beta),
        "mean": _before_cast(graph, mean),
        "var": var,
    }
    parameters: dict[str, NDArray[Any]] = {
        role: vector(graph, role, name).ravel() for role, name in names.items()
    }
    constant = vector(graph, "eps", eps)
    if constant.size != 1:
        raise ValueError(f"{graph.where}: eps of one value is wanted, found shape {constant.shape}")
    return Reading(**parameters, eps=constant.item())


def _before_cast(graph: Graph, name: str) -> str:
    """Return the value that was cast to this one; this one itself if none was."""
    return _inputs_of(graph, "Cast", name)[0] if _is_computed_by(graph, "Cast", name) else name


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
