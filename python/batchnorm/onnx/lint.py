"""Checks of the batch normalizations of an ONNX model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from batchnorm.onnx.chains import foldable_into
from batchnorm.onnx.findings import Finding
from batchnorm.onnx.graph import Graph, ModelSource
from batchnorm.onnx.inference_mode import training
from batchnorm.onnx.lint_values import parameter_findings
from batchnorm.onnx.nodes import attributes_of
from batchnorm.onnx.normalizations import (
    DEFAULT_EPS,
    PARAMETERS,
    Normalization,
    normalizations,
    normalizations_elsewhere,
    training_sign,
    vector,
)
from batchnorm.onnx.support import model_refused, types_refused

_OLDEST_OPSET = 6
_DEFAULT_MOMENTUM = 0.9


def lint(model: ModelSource) -> list[Finding]:
    """Return what is wrong, or may be, with the batch normalizations of a model.

    The table in docs/lint.md lists the findings. The model is only read, not run.

    Args:
        model: The model, its path, or its bytes. If parameters have their data in other files, it must be the
            path; see `frozen_layers`.

    Returns:
        The findings in the order of the nodes, first those about the whole model.

    Raises:
        OSError: The model's file cannot be read.
        ValueError: It is not an ONNX model, or two nodes compute the same value.
    """
    graph = Graph(model)
    here, elsewhere = normalizations(graph), normalizations_elsewhere(graph)
    found: list[Finding] = []
    if (here or elsewhere) and (reason := model_refused(graph)):
        found.append(Finding("runtime", "warning", "", reason))
    for entry in here:
        of_node = [*_node(graph, entry)]
        damaged = any(finding.severity == "error" for finding in of_node)
        found.extend(finding for finding in of_node if finding.name != "unfolded" or not damaged)
    found.extend(_shared(graph, here))
    for entry in elsewhere:
        found.extend(_elsewhere(graph, entry))
    return found


def _node(graph: Graph, entry: Normalization) -> Iterator[Finding]:
    """Yield the findings about a node of the main graph."""
    node, key = entry.node, entry.key
    try:
        attributes = attributes_of(node)
        sign = training_sign(graph, node)
    except (ValueError, TypeError) as error:
        yield Finding("damaged", "error", key, f"an attribute is damaged: {error}")
        return
    if graph.opset < _OLDEST_OPSET:
        yield Finding("unchecked", "info", key, f"is of opset {graph.opset}, whose form is not known here")
        return
    if sign:
        yield training(graph, entry, sign)
    yield from _momentum(key, attributes.get("momentum", _DEFAULT_MOMENTUM), bool(sign))
    if attributes.get("spatial", 1) != 1:
        yield Finding(
            "unchecked", "info", key, "has statistics for each position, not each channel (spatial=0)"
        )
        return
    eps = attributes.get("epsilon", DEFAULT_EPS)
    if problem := _malformed(graph, node, eps):
        yield Finding("damaged", "error", key, problem)
        return
    values: dict[str, NDArray[Any]] = {}
    for role, name in zip(PARAMETERS, node.input[1:], strict=True):
        value = _parameter(graph, key, role, name)
        if isinstance(value, Finding):
            yield value
        else:
            values[role] = value
    changeable = {n for p in node.input[1:] for n in _sources(graph, p)} & graph.overridable
    if changeable:
        names = ", ".join(map(repr, sorted(changeable)))
        yield Finding("overridable", "warning", key, f"a caller can replace {names}")
    x = node.input[0]
    element = graph.elements.get(x) or next((value.dtype for value in values.values()), None)
    if element is not None:
        refused = types_refused(element.name, {role: value.dtype.name for role, value in values.items()})
        if refused:
            yield Finding("runtime", "warning", key, refused)
        yield from parameter_findings(key, values, eps, element, graph.shapes.get(x))
    constant = len(values) == len(PARAMETERS) and not changeable
    if not sign and constant and (neighbour := foldable_into(graph, node)):
        yield Finding("unfolded", "info", key, f"could be folded into {neighbour}")


def _malformed(graph: Graph, node: onnx.NodeProto, eps: object) -> str:
    """Return what is wrong with the form of a node, or ""."""
    if len(node.input) != 1 + len(PARAMETERS):
        return f"has {len(node.input)} inputs, wanted {1 + len(PARAMETERS)}"
    if not node.output or not node.output[0]:
        return "has no output"
    if not isinstance(eps, float):
        return f"epsilon is {eps!r}, wanted one float"
    known = (graph.initializers, graph.producer, graph.inputs)
    missing = [name for name in node.input if not any(name in names for names in known)]
    if missing:
        return f"its input {missing[0]!r} is no initializer, no input of the model, and computed by no node"
    return ""


def _parameter(graph: Graph, key: str, role: str, name: str) -> NDArray[Any] | Finding:
    """Return the values of a parameter, or the finding that says why they cannot be read."""
    constant = bool(_sources(graph, name))
    try:
        return vector(graph, role, name)
    except (ValueError, OSError) as error:
        message = str(error).removeprefix(f"{graph.where}: ")
        if constant:
            return Finding("damaged", "error", key, message)
        return Finding("unchecked", "info", key, message)


def _sources(graph: Graph, name: str) -> set[str]:
    """Return the values from which a constant is computed; none if it is no constant."""
    try:
        return graph.sources("", name)
    except ValueError:
        return set()


def _momentum(key: str, momentum: object, used: bool) -> Iterator[Finding]:
    if not isinstance(momentum, float):
        yield Finding("damaged", "error", key, f"momentum is {momentum!r}, wanted one float")
    elif not np.float32(0.5) <= momentum <= 1:
        text = f"momentum is {np.float32(momentum)!s}, in ONNX the weight of the old value"
        use = "" if used else ", but is not used in inference mode"
        yield Finding("momentum", "warning" if used else "info", key, f"{text}{use}")


def _shared(graph: Graph, entries: list[Normalization]) -> Iterator[Finding]:
    """Yield a finding for each node that has a statistic of a node before it."""
    first: dict[str, str] = {}
    for key, node, _ in entries:
        for role, name in zip(PARAMETERS, node.input[1:], strict=False):
            if role not in ("mean", "var") or not name:
                continue
            owner = first.setdefault(name, key)
            if owner != key:
                yield Finding("shared-statistics", "info", key, f"has its {role} {name!r} from {owner!r}")


def _elsewhere(graph: Graph, entry: Normalization) -> Iterator[Finding]:
    """Yield the findings about a node in a subgraph or function."""
    try:
        sign = training_sign(graph, entry.node)
    except (ValueError, TypeError):  # an attribute that a caller of the function gives
        sign = ""
    if sign:
        yield training(graph, entry, sign)
    yield Finding("unchecked", "info", entry.key, f"is {entry.place}, not in the main graph")
