"""Nodes of ONNX graphs: their operators, attributes and subgraphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
from onnx import helper

_STANDARD_DOMAINS = ("", "ai.onnx")  # two names of ONNX's own domain


def is_standard(node: onnx.NodeProto, *operators: str) -> bool:
    """Return whether a node is one of the operators of ONNX's own domain, since other domains share names."""
    return node.op_type in operators and node.domain in _STANDARD_DOMAINS


def operator_name(node: onnx.NodeProto) -> str:
    """Return the operator of a node, with its domain if that is not ONNX's own."""
    return node.op_type if node.domain in _STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"


def described(node: onnx.NodeProto) -> str:
    """Return the operator of a node and its name, or its first output if it has none, for messages."""
    return f"{operator_name(node)} {node.name or next(iter(node.output), '')!r}"


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the values of the attributes of a node by name.

    Raises:
        ValueError: One has no value.
    """
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def opset_of(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    """Return the version of ONNX's own operators that a model or function imports; 0 if none."""
    return max((entry.version for entry in imports if entry.domain in _STANDARD_DOMAINS), default=0)


def subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield the graphs that a node has as attributes (the branches of If, the body of Loop), with names."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def graphs_of(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the main graph of a model and all graphs within nodes, those of functions included."""
    pending = [
        model.graph,
        *(g for function in model.functions for n in function.node for _, g in subgraphs(n)),
    ]
    while pending:
        graph = pending.pop()
        yield graph
        pending.extend(inner for node in graph.node for _, inner in subgraphs(node))


def names_of(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """Yield all names in the graphs and functions of a model, and its metadata; bytes are damaged text."""
    for prop in model.metadata_props:
        yield from (prop.key, prop.value)
    for function in model.functions:
        yield from (function.name, function.domain)
        yield from _names_of_nodes(function.node)
    for graph in graphs_of(model):
        yield from _names_of_nodes(graph.node)
        yield from (
            entry.name for entries in (graph.input, graph.output, graph.initializer) for entry in entries
        )
        yield from (sparse.values.name for sparse in graph.sparse_initializer)


def _names_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[str | bytes]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def values_used(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of the values that a node reads, those that its subgraphs read included, once each.

    A subgraph reads values of the graph around it by name. Names of its own values are yielded too: ONNX
    wants the names of all graphs of a model to differ.
    """
    seen: set[str] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        names = list(current.input)
        for _, graph in subgraphs(current):
            pending.extend(graph.node)
            names.extend(output.name for output in graph.output)
        for name in names:
            if name and name not in seen:
                seen.add(name)
                yield name
