"""Nodes that were left in training mode, and how they are turned to inference mode."""

from __future__ import annotations

import os

import onnx
from onnx import helper

from batchnorm.onnx.edit import Editor
from batchnorm.onnx.findings import Finding
from batchnorm.onnx.graph import Graph, ModelSource
from batchnorm.onnx.nodes import described
from batchnorm.onnx.normalizations import (
    OPSET_OF_IS_TEST,
    Normalization,
    normalizations,
    training_sign,
)


def fix(
    model: ModelSource, *, out: str | os.PathLike[str] | None = None
) -> tuple[onnx.ModelProto, list[Finding]]:
    """Return a copy of a model whose batch normalizations are in inference mode, and what was repaired.

    A node that was left in training mode then normalizes by its running mean and variance, as they are in the
    model. Its outputs of statistics are removed. A node of which such an output is used stays as it is, as do
    those in subgraphs and functions, and everything else; `lint` of the result tells what is left.

    Args:
        model: The model, its path, or its bytes.
        out: File to write the result to. If the model has data in other files, they are copied to one beside
            it, `<out>.data`.

    Returns:
        The changed copy, and the findings of `lint` that no longer hold for it.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: It is not an ONNX model.
    """
    graph = Graph(model)
    editor = Editor(graph)
    fixed: list[Finding] = []
    removed: set[str] = set()
    for entry in normalizations(editor.graph):
        try:
            sign = training_sign(editor.graph, entry.node)
        except ValueError:  # a damaged attribute, which lint reports
            continue
        if not sign or hindrance(editor.graph, entry.node):
            continue
        fixed.append(training(editor.graph, entry, sign))
        removed.update(entry.node.output[1:])
        _turn(entry.node, editor.graph.opset)
    types = editor.model.graph.value_info
    for value in [value for value in types if value.name in removed]:
        types.remove(value)
    return editor.finish(out), fixed


def training(graph: Graph, entry: Normalization, sign: str) -> Finding:
    """Return the finding about a node in training mode, which `sign` shows."""
    message = f"is in training mode ({sign})"
    reason = f"it is {entry.place}" if entry.place else hindrance(graph, entry.node)
    if reason:
        message = f"{message}, and --fix leaves it so: {reason}"
    return Finding("training-mode", "error", entry.key, message)


def hindrance(graph: Graph, node: onnx.NodeProto) -> str:
    """Return why the outputs of statistics of a node cannot be removed, or "" if they can."""
    for name in filter(None, node.output[1:]):
        if name in graph.outputs:
            return f"its output {name!r} is an output of the model"
        if readers := graph.consumers.get(name):
            return f"its output {name!r} is read by {described(readers[0])}"
    return ""


def _turn(node: onnx.NodeProto, opset: int) -> None:
    del node.output[1:]
    kept = [a for a in node.attribute if a.name not in ("training_mode", "is_test")]
    if opset == OPSET_OF_IS_TEST:
        kept.append(helper.make_attribute("is_test", 1))
    del node.attribute[:]
    node.attribute.extend(kept)
