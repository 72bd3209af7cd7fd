"""What the ONNX models that this package writes have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import helper, numpy_helper

from batchnorm._checks import integer
from batchnorm._core import __version__
from batchnorm._file import Kind, metadata
from batchnorm._types import FrozenLayer

Parts: TypeAlias = tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]
"""Nodes and constants."""

_OLDEST_OPSET_OF_WHITENING = 15
_OLDEST_OPSET_OF_BFLOAT16 = 13  # of Cast and Transpose
_LARGEST_RANK = 64  # of an array of NumPy
_LARGEST_SIZE = 2**63 - 1
_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Value(NamedTuple):
    """An input or output of a model: its name, dtype and sizes, a name where one varies."""

    name: str
    dtype: np.dtype[Any]
    sizes: list[int | str]


class Block:
    """Nodes and constants of a model in the making, whose names begin with that of their layer.

    Args:
        name: The name of the layer, of which its main node has the same. All other names begin with it and a
            dot; if there is no name, with nothing.

    Attributes:
        nodes: The nodes, in order.
        constants: The constants by name.
        main: Name of the main node of the layer.
    """

    def __init__(self, name: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self.begin(name)

    def begin(self, name: str) -> None:
        """Begin another layer."""
        self.main, self._prefix = name or "batchnorm", f"{name}." if name else ""

    def name(self, role: str) -> str:
        """Return the name of a value of the layer."""
        return self._prefix + role

    def constant(self, role: str, values: NDArray[Any]) -> str:
        """Add a constant, and return its name."""
        self.constants[self.name(role)] = values
        return self.name(role)

    def add(
        self, operator: str, inputs: Sequence[str], *roles: str, main: bool = False, **attributes: Any
    ) -> str:
        """Add a node, and return the name of its first output.

        Args:
            operator: Its operator.
            inputs: The names of its inputs.
            roles: What its outputs are, by which they are named.
            main: Whether it is the node that stands for the layer.
            attributes: Its attributes.
        """
        outputs = [self.name(role) for role in roles]
        name = self.main if main else outputs[0]
        self.nodes.append(helper.make_node(operator, [*inputs], outputs, name, **attributes))
        return outputs[0]

    def cast(self, value: str, found: np.dtype[Any], wanted: np.dtype[Any], role: str) -> str:
        """Convert a value to a dtype, unless it is of that already, and return its name."""
        if found == wanted:
            return value
        return self.add("Cast", [value], role, to=helper.np_dtype_to_tensor_dtype(wanted))

    def exchange(self, value: str, axis: int, other: int, rank: int, role: str) -> str:
        """Exchange two axes of a value, unless they are the same, and return its name."""
        if axis == other:
            return value
        return self.add("Transpose", [value], role, perm=_exchanged(axis, other, rank))


def axis_of(layer: FrozenLayer, rank: int) -> int:
    """Return the channel axis, 0 or more, of a tensor of this rank, or raise ValueError if it has none."""
    if not 2 <= rank <= _LARGEST_RANK or not -rank <= layer.channel_axis < rank:
        wanted = f"2 to {_LARGEST_RANK}, with an axis {layer.channel_axis}"
        raise ValueError(f"rank: was {rank}, wanted {wanted}")
    return layer.channel_axis % rank


def sizes_of(
    layer: FrozenLayer, rank: int | None, shape: Sequence[int | str | None] | None
) -> list[int | str]:
    """Return the sizes of x's axes, as the arguments rank and shape of `to_onnx` say.

    Raises:
        TypeError: A size is not an integer, a name or None.
        ValueError: The rank is not possible or not that of the shape, or a size is negative or not that of
            the channels.
    """
    if shape is None:
        rank = 4 if rank is None else rank
        axis_of(layer, rank)  # a list of any rank would not fit into memory
        shape = [None] * rank
    elif rank is not None and rank != len(shape):
        raise ValueError(f"rank: was {rank}, wanted {len(shape)}, the number of sizes of shape {shape}")
    axis = axis_of(layer, len(shape))
    sizes = dynamic(shape)
    if shape[axis] is not None and sizes[axis] != layer.channels:
        raise ValueError(f"shape: was {shape}, wanted {layer.channels} channels on axis {axis}")
    sizes[axis] = layer.channels
    return sizes


def dynamic(shape: Sequence[int | str | None]) -> list[int | str]:
    """Return a shape with a name, d0, d1 and so on, for each size that is None.

    Raises:
        TypeError: A size is not an integer, a name or None.
        ValueError: A size is negative or too large.
    """
    sizes: list[int | str] = []
    for k, size in enumerate(shape):
        sizes.append(f"d{k}" if size is None else size if isinstance(size, str) else integer("shape", size))
        if isinstance(sizes[-1], int) and not 0 <= sizes[-1] <= _LARGEST_SIZE:
            raise ValueError(f"shape: was {shape}, wanted no size below 0 or above {_LARGEST_SIZE}")
    return sizes


def checked_opset(opset: int, oldest: int, what: str = "") -> int:
    """Return the opset, or raise ValueError if it is older than `oldest`, or newer than onnx knows."""
    newest = onnx.defs.onnx_opset_version()
    if not oldest <= opset <= newest:
        raise ValueError(f"opset: was {opset}, wanted {oldest} to {newest}{what}")
    return opset


def tensor_dtype(dtype: DTypeLike | None, opset: int, default: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the tensors of a model.

    Raises:
        TypeError: It is none of float16, bfloat16, float32 and float64.
        ValueError: It is bfloat16, and the opset does not have it yet.
    """
    if dtype is None:
        return default
    try:
        # onnx brings the package that gives NumPy the name bfloat16.
        wanted = np.dtype(dtype)
    except TypeError:
        wanted = np.dtype(object)
    if wanted.name not in _DTYPES:
        raise TypeError(f"dtype: was {dtype!r}, wanted {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
    if wanted.name == "bfloat16":
        checked_opset(opset, _OLDEST_OPSET_OF_BFLOAT16, " for bfloat16")
    return wanted


def assemble(
    block: Block,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    *,
    opset: int,
    properties: Mapping[str, str],
) -> onnx.ModelProto:
    """Return the model of these nodes and constants, with metadata, the versions included.

    Args:
        block: The nodes and constants.
        inputs: The input, and constants that are inputs too, so that a caller may give other values.
        outputs: The outputs.
        opset: Version of the ONNX operators.
        properties: The metadata.

    Raises:
        ValueError: Two values have the same name.
    """
    named = [name for node in block.nodes for name in node.output] + [*block.constants]
    named += [value.name for value in inputs[:1]]  # all others have their first values as constants
    if again := [name for name, count in Counter(named).items() if count > 1 or not name]:
        raise ValueError(f"x, y or name: {again[0]!r} names two values, wanted names of their own")
    graph = helper.make_graph(
        block.nodes,
        "batchnorm",
        [_entry(value) for value in inputs],
        [_entry(value) for value in outputs],
        [numpy_helper.from_array(np.asarray(v, order="C"), name) for name, v in block.constants.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        graph,
        opset_imports=imports,
        # The oldest IR version that has this opset: runtimes reject a newer one than they know.
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="batchnorm",
        producer_version=__version__,
    )
    versions = {"batchnorm.version": __version__, "batchnorm.onnx_version": onnx.__version__}
    helper.set_model_props(model, {**properties, **versions})
    return model


def make_model(layer: FrozenLayer, kind: Kind, parts: Parts, *, opset: int, rank: int) -> onnx.ModelProto:
    """Return the model of a whitening layer with these nodes from x to y, and its metadata."""
    block = Block()
    block.nodes, block.constants = parts
    x, y = (Value(name, layer.dtype, sizes_of(layer, rank, None)) for name in "xy")
    opset = checked_opset(opset, _OLDEST_OPSET_OF_WHITENING)
    return assemble(block, [x], [y], opset=opset, properties=metadata(layer, kind))


def swapped(nodes: list[onnx.NodeProto], axis: int, wanted: int, rank: int) -> list[onnx.NodeProto]:
    """Put nodes from x to y between two Transposes if the channels are not on the axis that they want."""
    if axis == wanted:
        return nodes
    nodes[0].input[0], nodes[-1].output[0] = "x_swapped", "y_swapped"
    swap = _exchanged(axis, wanted, rank)
    before = helper.make_node("Transpose", ["x"], ["x_swapped"], perm=swap)
    return [before, *nodes, helper.make_node("Transpose", ["y_swapped"], ["y"], perm=swap)]


def _exchanged(axis: int, other: int, rank: int) -> list[int]:
    order = list(range(rank))
    order[axis], order[other] = other, axis
    return order


def _entry(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        value.name, helper.np_dtype_to_tensor_dtype(value.dtype), value.sizes
    )
