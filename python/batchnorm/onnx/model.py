"""What the ONNX models of all frozen layers have in common."""

from __future__ import annotations

from typing import Any, TypeAlias

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from batchnorm._core import __version__
from batchnorm._file import Kind, metadata
from batchnorm._types import FrozenLayer

Parts: TypeAlias = tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]
"""Nodes and constants."""

# BatchNormalization has had its present types and attributes since opset 15.
_OLDEST_OPSET = 15
_LARGEST_RANK = 64  # of an array of NumPy


def axis_of(layer: FrozenLayer, rank: int) -> int:
    """Return the channel axis, 0 or more, of a tensor of this rank, or raise ValueError if it has none."""
    if not 2 <= rank <= _LARGEST_RANK or not -rank <= layer.channel_axis < rank:
        wanted = f"2 to {_LARGEST_RANK}, with an axis {layer.channel_axis}"
        raise ValueError(f"rank: was {rank}, wanted {wanted}")
    return layer.channel_axis % rank


def make_model(layer: FrozenLayer, kind: Kind, parts: Parts, *, opset: int, rank: int) -> onnx.ModelProto:
    """Return the model with these nodes from x to y, and with the metadata of the layer."""
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"opset: was {opset}, wanted {_OLDEST_OPSET} to {newest}")
    nodes, constants = parts
    element = helper.np_dtype_to_tensor_dtype(layer.dtype)
    shape = [layer.channels if k == axis_of(layer, rank) else f"d{k}" for k in range(rank)]
    graph = helper.make_graph(
        nodes,
        "batchnorm",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, shape)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
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
    helper.set_model_props(model, metadata(layer, kind))
    return model


def swapped(nodes: list[onnx.NodeProto], axis: int, wanted: int, rank: int) -> list[onnx.NodeProto]:
    """Put nodes from x to y between two Transposes if the channels are not on the axis that they want."""
    if axis == wanted:
        return nodes
    nodes[0].input[0], nodes[-1].output[0] = "x_swapped", "y_swapped"
    swap = list(range(rank))
    swap[wanted], swap[axis] = swap[axis], swap[wanted]
    before = helper.make_node("Transpose", ["x"], ["x_swapped"], perm=swap)
    return [before, *nodes, helper.make_node("Transpose", ["y_swapped"], ["y"], perm=swap)]
