"""The linear nodes of an ONNX model that a batch normalization can be folded into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from batchnorm.folding import LinearKind
from batchnorm.onnx.edit import Editor, remove
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.nodes import attributes_of, described, is_standard

OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_PADDING = (b"SAME_UPPER", b"SAME_LOWER")  # values of auto_pad
_OF_SHAPE_ALONE = ("ConstantOfShape", "Shape")  # what they read is not what they compute
_OPSET_OF_BROADCASTING = 7  # before it, Add and Gemm broadcast only if an attribute says so

Array = NDArray[Any]


class NoLinearError(ValueError):
    """There is no linear node where one is looked for."""


class Linear(NamedTuple):
    """A linear node, or a MatMul and the Add of a constant behind it, read from a graph.

    Attributes:
        node: The node.
        add: The Add behind a MatMul, if there is one.
        kind: Which axes `weight` has.
        weight: The weight as `batchnorm.folding` takes it. That of a Gemm or MatMul has the axes (out, in);
            that of a Gemm is in float64, multiplied by alpha.
        bias: The bias, multiplied by beta of a Gemm; None if there is none.
        dtype: Type of the weight in the model.
        groups: Number of groups of a convolution.
        padded: Whether a convolution pads its input.
        transposed: Whether the model holds the weight with the axes (in, out).
    """

    node: onnx.NodeProto
    add: onnx.NodeProto | None
    kind: LinearKind
    weight: Array
    bias: Array | None
    dtype: np.dtype[Any]
    groups: int = 1
    padded: bool = False
    transposed: bool = False


def linear_behind(graph: Graph, value: str, original: Graph) -> Linear:
    """Read the linear node that computes `value`.

    Args:
        graph: The graph.
        value: Name of the value.
        original: The graph before it was changed, in which `value` has the same shape.

    Raises:
        OSError: A file with the weight or bias cannot be read.
        NoLinearError: There is no such node.
        ValueError: Nothing can be folded into it.
    """
    node = graph.producer.get(value)
    if node is None:
        raise NoLinearError(f"its input {value!r} is an input of the model or a constant")
    if is_standard(node, *OPERATORS):
        return _read(graph, node, None, value, original)
    for name in node.input if is_standard(node, "Add") and len(node.input) == 2 else ():
        inner = graph.producer.get(name)
        if inner is not None and is_standard(inner, "MatMul"):
            check_only_reader(graph, name, node)
            return _read(graph, inner, node, value, original)
    raise NoLinearError(f"its input is computed by {described(node)}")


def linear_ahead(graph: Graph, value: str, original: Graph) -> Linear:
    """Read the linear node that alone reads `value`, as its first input; see `linear_behind`."""
    readers = graph.consumers.get(value, [])
    node = next((reader for reader in readers if is_standard(reader, *OPERATORS)), None)
    if node is None:
        others = ", ".join(map(described, readers[:3])) or "no node"
        raise NoLinearError(f"its output is read by {others}")
    check_only_reader(graph, value, node)
    if node.input[0] != value:
        raise ValueError(f"its output is not the first input of {described(node)}")
    if node.op_type == "ConvTranspose":
        raise ValueError(f"what it adds would depend on the position in the result of {described(node)}")
    if node.op_type == "Gemm" and _attribute(node, "transA", 0):
        raise ValueError(f"{described(node)} has transA=1 and does not sum over its channels")
    add = None
    if node.op_type == "MatMul" and node.output[0] not in graph.outputs:
        followers = graph.consumers.get(node.output[0], [])
        if len(followers) == 1 and _adds_constant(graph, node.output[0], followers[0]):
            (add,) = followers
    return _read(graph, node, add, value, original)


def check_only_reader(graph: Graph, value: str, node: onnx.NodeProto) -> None:
    """Raise ValueError unless a node alone reads a value, and only once."""
    if others := [other for other in graph.consumers.get(value, []) if other.output != node.output]:
        raise ValueError(f"{value!r}, which lies between, is read by {described(others[0])} too")
    if value in graph.outputs:
        raise ValueError(f"{value!r}, which lies between, is an output of the model")
    if list(node.input).count(value) != 1:
        raise ValueError(f"{value!r}, which lies between, is read twice by {described(node)}")


def write(editor: Editor, linear: Linear, weight: Array, bias: Array, key: str, result: str) -> None:
    """Write another weight and bias into the nodes of a `Linear` of an editor's copy.

    A Gemm then has alpha = beta = 1, and a MatMul without Add gets one.

    Args:
        editor: The editor.
        linear: The nodes.
        weight: The weight, with the axes of `linear.weight`.
        bias: The bias.
        key: Name for what is added.
        result: Name that the result gets.
    """
    node, last = linear.node, linear.add or linear.node
    editor.write(node, 1, weight.T if linear.transposed else weight, key)
    broadcast = {"broadcast": 1} if editor.graph.opset < _OPSET_OF_BROADCASTING else {}
    if node.op_type == "MatMul" and linear.add is None:
        if node.output[0] == result:
            node.output[0] = editor.new_name(f"{result}/{key}")
        inputs = [node.output[0], editor.add_initializer(f"{key}/bias", bias)]
        nodes = editor.model.graph.node
        position = next(i for i, other in enumerate(nodes) if other.output == node.output)
        add = helper.make_node("Add", inputs, [result], name=key)
        add.attribute.extend(helper.make_attribute(*entry) for entry in broadcast.items())
        nodes.insert(position + 1, add)
        return
    if node.op_type == "Gemm":
        remove(node.attribute, lambda attribute: attribute.name in ("alpha", "beta", *broadcast))
        node.attribute.extend(helper.make_attribute(*entry) for entry in broadcast.items())
    if linear.add is not None:
        editor.write(linear.add, _other_input(linear.add, node.output[0]), bias, key)
    elif linear.bias is not None:
        editor.write(node, 2, bias, key)
    else:
        del node.input[2:]
        node.input.append(editor.add_initializer(f"{key}/bias", bias))
    last.output[0] = result


def _read(
    graph: Graph, node: onnx.NodeProto, add: onnx.NodeProto | None, between: str, original: Graph
) -> Linear:
    what = described(node)
    if len(node.input) < 2:
        raise ValueError(f"{what} has no weight")
    weight = _constant(graph, f"the weight of {what}", node.input[1])
    _check_not_shared(graph, f"the weight of {what}", node)
    bias = None
    if add is not None:
        summand = add.input[_other_input(add, node.output[0])]
        bias = _constant(graph, f"the summand of {described(add)}", summand)
    elif len(node.input) > 2 and node.input[2]:
        bias = _constant(graph, f"the bias of {what}", node.input[2])
    if node.op_type in ("Conv", "ConvTranspose"):
        pads = any(_attribute(node, "pads", [])) or _attribute(node, "auto_pad", b"NOTSET") in _PADDING
        kind: LinearKind = "conv" if node.op_type == "Conv" else "conv_transpose"
        return Linear(node, None, kind, weight, bias, weight.dtype, _attribute(node, "group", 1), pads)
    if weight.ndim != 2:
        raise ValueError(f"the weight of {what} has shape {weight.shape}, wanted 2 axes")
    if bias is not None and bias.ndim > 2:
        raise ValueError(f"the bias of {what} has shape {bias.shape}, wanted at most 2 axes")
    transposed, dtype = True, weight.dtype
    if node.op_type == "MatMul":
        # With more axes, the channels of MatMul are the last axis, and those of batch normalization axis 1.
        rank = len(original.shapes[between]) if between in original.shapes else "an unknown number of"
        if rank != 2:
            message = f"2 are wanted, so that {what} has the same channels"
            raise ValueError(f"{between!r}, which lies between, has {rank} axes; {message}")
    else:
        transposed = not _attribute(node, "transB", 0)
        weight = weight.astype(np.float64) * _attribute(node, "alpha", 1.0)
        bias = None if bias is None else bias.astype(np.float64) * _attribute(node, "beta", 1.0)
    weight = weight.T if transposed else weight
    return Linear(node, add, "linear", weight, bias, dtype, transposed=transposed)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    value = attributes_of(node).get(name, default)
    if type(value) is not type(default):
        wanted = type(default).__name__
        raise ValueError(f"{name} of {described(node)} is {value!r}, wanted {wanted}")
    return value


def _constant(graph: Graph, role: str, name: str) -> Array:
    """Return a constant of floats for which a caller of the model cannot give another."""
    values = graph.constant(role, name)
    if graph.sources(role, name) & graph.overridable:
        raise ValueError(f"{role} is an input of the model too, so that a caller may give another")
    if values.dtype.name not in _FLOATS:
        raise ValueError(f"{role} is of {values.dtype}, wanted floats")
    return values


def _check_not_shared(graph: Graph, role: str, node: onnx.NodeProto) -> None:
    """Raise ValueError if a weight, or what it is a copy of, is read elsewhere or is an output."""
    reader = node
    for name in _copied(graph, node.input[1]):
        readers = [other for other in graph.consumers.get(name, []) if _reads_values(other, name)]
        if others := [other for other in readers if other.output != reader.output]:
            raise ValueError(f"{role} is shared: {described(others[0])} reads {name!r} too")
        if name in graph.outputs:
            raise ValueError(f"{role} is shared: {name!r} is an output of the model")
        reader = graph.producer.get(name, reader)


def _reads_values(node: onnx.NodeProto, name: str) -> bool:
    """Return whether a node that reads a constant depends on more than its shape or type."""
    if is_standard(node, "CastLike"):
        return bool(node.input[0] == name)
    return not is_standard(node, "Shape")


def _copied(graph: Graph, name: str) -> Iterator[str]:
    """Yield a constant and what it was made from by changes of type or shape."""
    yield name
    while (node := graph.producer.get(name)) is not None:
        if not node.input or is_standard(node, *_OF_SHAPE_ALONE):
            return
        name = node.input[0]
        yield name


def _adds_constant(graph: Graph, value: str, node: onnx.NodeProto) -> bool:
    """Return whether a node adds a constant to a value."""
    if not is_standard(node, "Add") or len(node.input) != 2 or list(node.input).count(value) != 1:
        return False
    try:
        _constant(graph, "summand", node.input[_other_input(node, value)])
    except ValueError:
        return False
    return True


def _other_input(node: onnx.NodeProto, value: str) -> int:
    """Return the position of the input of a node of two inputs that is not `value`."""
    return 1 if node.input[0] == value else 0
