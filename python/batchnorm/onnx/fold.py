"""Batch normalizations of an ONNX model folded into the linear nodes beside them; see `docs/folding.md`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from batchnorm import folding
from batchnorm._checks import number
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.onnx.compare import Feeds, OutputError, compare, generated
from batchnorm.onnx.edit import Editor, remove
from batchnorm.onnx.graph import Graph, ModelSource
from batchnorm.onnx.linear import NoLinearError, check_only_reader, linear_ahead, linear_behind, write
from batchnorm.onnx.nodes import described
from batchnorm.onnx.normalizations import (
    OLDEST_IN_RUNTIME,
    OPERATOR,
    Normalization,
    normalizations,
    normalizations_elsewhere,
    read,
)


@dataclass(frozen=True, slots=True)
class FoldedNode:
    """What became of one batch normalization.

    Attributes:
        name: Name of the node, as `frozen_layers` gives it.
        into: The linear node that it was folded into, such as "Conv 'conv1'"; None if it was not folded.
        before: Whether it came before that node, and not after it.
        reason: Why it was not folded; "" if it was.
    """

    name: str
    into: str | None = None
    before: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What `fold` did, and what it changed in the outputs.

    Attributes:
        nodes: All batch normalizations of the model, those in subgraphs and functions last.
        errors: How far each output of floats is from that of the original model; empty if nothing was folded
            or nothing was run.
    """

    nodes: tuple[FoldedNode, ...]
    errors: tuple[OutputError, ...] = ()

    @property
    def folded(self) -> int:
        """Number of batch normalizations that were folded."""
        return sum(node.into is not None for node in self.nodes)

    @property
    def max_error(self) -> float:
        """The largest relative error of the outputs; 0 if there are none."""
        return max((error.relative for error in self.errors), default=0.0)


class InexactFoldError(ValueError):
    """Folding changes an output by more than the bound.

    Attributes:
        report: The report of what was folded and measured.
    """

    def __init__(self, message: str, report: FoldReport) -> None:
        super().__init__(message)
        self.report = report


def fold(
    model: ModelSource,
    *,
    inputs: Feeds | Iterable[Feeds] | None = None,
    max_error: float | None = None,
    verify: bool = True,
    out: str | os.PathLike[str] | None = None,
) -> tuple[onnx.ModelProto, FoldReport]:
    """Return a copy of a model with its batch normalizations folded into linear nodes, and a report.

    A BatchNormalization in inference mode is folded into the Conv, ConvTranspose, Gemm or MatMul (with or
    without an Add of a constant) before it; or else into the Conv, Gemm or MatMul after it, if that is exact.
    Weights and biases are computed in float64 and rounded once to the type of the weight. The linear node
    keeps its name, and its result gets the name of the result of the batch normalization. All other nodes
    stay as they are, and so does each batch normalization that cannot be folded; the report says why.

    Then the original and the folded model are run in ONNX Runtime, without its optimizations, which fold too.

    Args:
        model: The model, its path, or its bytes. If weights have their data in other files, it must be the
            path, and those files must be in the same folder; only the data of what is folded are read.
        inputs: What to run the models on: the inputs by name, or any iterable of such mappings, one for each
            run. By default one run on standard normal values, where a dynamic size is 4 on the first axis
            and 32 on others; this wants inputs of floats.
        max_error: The largest error that is allowed in an output, relative to its largest magnitude.
        verify: Whether the models are run.
        out: File to write the result to. If the model has data in other files, they are copied to one beside
            it, `<out>.data`. A model of more than 2 GB needs this argument, and its path as `model`.

    Returns:
        The folded copy and the report.

    Raises:
        ImportError: `verify` is true and onnxruntime is not installed.
        OSError: A file cannot be read or written.
        InexactFoldError: An error is greater than `max_error`. Nothing is written then.
        TypeError: `inputs` are neither a mapping nor an iterable of mappings.
        ValueError: `model` is no ONNX model; or ONNX Runtime cannot run it on these inputs; or `inputs` or
            `max_error` are given and `verify` is false.
    """
    if not verify and not (inputs is None and max_error is None):
        raise ValueError("verify: was False, wanted True with inputs or max_error")
    if max_error is not None and not number("max_error", max_error) >= 0:
        raise ValueError(f"max_error: was {max_error!r}, wanted 0 or more")
    original = Graph(model)
    editor = Editor(original)
    report = FoldReport(_fold_nodes(editor, original))
    if verify and report.folded:
        if original.opset < OLDEST_IN_RUNTIME:
            found = f"ONNX Runtime has no {OPERATOR} of opset {original.opset}"
            raise ValueError(f"verify: was True, but {found}; convert {original.where}, or do not verify")
        if inputs is None:
            inputs = generated(original)
        feeds: Iterable[Feeds] = [inputs] if isinstance(inputs, Mapping) else inputs
        report = FoldReport(report.nodes, compare(original, editor.model, feeds))
        if max_error is not None and not report.errors:
            raise ValueError(f"max_error: was {max_error}, but {original.where} has no output of floats")
    if max_error is not None and report.max_error > max_error:
        worst = max(report.errors, key=lambda error: error.relative)
        message = f"{worst.relative:.3g} of its largest magnitude, and max_error={max_error:g} is allowed"
        raise InexactFoldError(f"{original.where}: folding changes {worst.output!r} by {message}", report)
    return editor.finish(out), report


def _fold_nodes(editor: Editor, original: Graph) -> tuple[FoldedNode, ...]:
    """Fold what can be folded, in the editor's copy, and return what became of each node."""
    entries = normalizations(original)
    layers: dict[str, FrozenBatchNorm] = {}
    found: dict[str, FoldedNode] = {}
    for entry in entries:
        try:
            layers[entry.key] = _layer(original, entry.node)
        except (ValueError, TypeError) as error:
            found[entry.key] = _refused(entry.key, error, original)
    unused: set[str] = set()
    waiting = [entry for entry in entries if entry.key in layers]
    while waiting:  # again, since a batch norm may wait for the one behind it to be folded
        left = []
        for entry in waiting:
            try:
                found[entry.key] = _fold_node(editor, original, entry, layers[entry.key], unused)
            except ValueError as error:
                found[entry.key] = _refused(entry.key, error, original)
                left.append(entry)
        if len(left) == len(waiting):
            break
        waiting = left
    editor.remove_unused(unused)
    folded = {f"batchnorm.{node.name}.fingerprint" for node in found.values() if node.into is not None}
    remove(editor.model.metadata_props, lambda prop: prop.key in folded)
    elsewhere = [
        FoldedNode(entry.key, reason=f"is {entry.place}, not in the main graph")
        for entry in normalizations_elsewhere(original)
    ]
    return (*(found[entry.key] for entry in entries), *elsewhere)


def _refused(key: str, error: Exception, graph: Graph) -> FoldedNode:
    return FoldedNode(key, reason=str(error).replace(f"{graph.where}: ", ""))


def _layer(graph: Graph, node: onnx.NodeProto) -> FrozenBatchNorm:
    """Return the layer of a node that has an output, and that a caller of the model cannot change."""
    layer = read(graph, node).layer()
    if not any(node.output[:1]):
        raise ValueError("it has no output")
    sources = set().union(*(graph.sources("", name) for name in node.input[1:]))
    if given := sorted(sources & graph.overridable):
        raise ValueError(f"{given[0]!r} is an input of the model too, so that a caller may give another")
    return layer


def _fold_node(
    editor: Editor, original: Graph, entry: Normalization, layer: FrozenBatchNorm, unused: set[str]
) -> FoldedNode:
    """Fold one node, and add to `unused` what it read; raise ValueError if that is not possible."""
    graph = editor.graph
    x, y = entry.node.input[0], entry.node.output[0]
    node = graph.producer[y]
    refused: list[str] = []
    missing: list[str] = []
    for before in (False, True):
        try:
            if before:
                linear = linear_ahead(graph, y, original)
            else:
                linear = linear_behind(graph, x, original)
                check_only_reader(graph, x, node)
            weight, bias = folding.fold(
                layer,
                linear.kind,
                linear.weight,
                linear.bias,
                groups=linear.groups,
                before=before,
                padded=linear.padded,
                dtype=linear.dtype,
            )
            break
        except NoLinearError as error:
            missing.append(str(error))
        except ValueError as error:
            refused.append(str(error))
    else:
        raise ValueError("; ".join(refused or ["no linear node beside it", *missing]))
    last = linear.add or linear.node
    unused.update(node.input[1:], linear.node.input[1:], last.input)
    remove(editor.model.graph.node, lambda other: y in other.output)
    write(editor, linear, weight, bias, entry.key, last.output[0] if before else y)
    if before:
        linear.node.input[0] = x
    editor.refresh()
    return FoldedNode(entry.key, described(linear.node), before)
