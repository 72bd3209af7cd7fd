"""Export of a frozen layer as an ONNX model; `docs/onnx.md` says what each mode promises."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from batchnorm._checks import integer
from batchnorm._core import __version__
from batchnorm._file import metadata
from batchnorm._types import FrozenLayer

# BatchNormalization has had its present types and attributes since opset 15.
_OLDEST_OPSET = 15
_LARGEST_RANK = 64  # of an array of NumPy
_PARAMETERS = ("gamma", "beta", "mean", "var")  # in the order of the node's inputs
_Parts: TypeAlias = tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]


def build_model(layer: FrozenLayer, *, opset: int, mode: str, rank: int) -> onnx.ModelProto:
    """Return the layer as a model; `FrozenBatchNorm.to_onnx` documents the arguments."""
    opset, rank = integer("opset", opset), integer("rank", rank)
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"opset: was {opset}, wanted {_OLDEST_OPSET} to {newest}")
    if not 2 <= rank <= _LARGEST_RANK or not -rank <= layer.channel_axis < rank:
        wanted = f"2 to {_LARGEST_RANK}, with an axis {layer.channel_axis}"
        raise ValueError(f"rank: was {rank}, wanted {wanted}")
    if mode not in ("inference", "exact"):
        raise ValueError(f"mode: was {mode!r}, wanted 'inference' or 'exact'")

    axis = layer.channel_axis % rank
    build = _inference if mode == "inference" else _exact
    nodes, constants = build(layer, axis, rank)
    element = helper.np_dtype_to_tensor_dtype(layer.dtype)
    shape = [layer.channels if k == axis else f"d{k}" for k in range(rank)]
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
    helper.set_model_props(model, metadata(layer))
    return model


def _inference(layer: FrozenLayer, axis: int, rank: int) -> _Parts:
    """Return the nodes of mode "inference": one BatchNormalization.

    If the channels are not on axis 1, there is a Transpose on either side of it.
    """
    constants = {name: getattr(layer, name) for name in _PARAMETERS}
    swap = list(range(rank))
    swap[1], swap[axis] = swap[axis], swap[1]
    x, y = ("x", "y") if axis == 1 else ("x_swapped", "y_swapped")
    nodes = [helper.make_node("BatchNormalization", [x, *constants], [y], epsilon=layer.eps)]
    if axis != 1:
        nodes.insert(0, helper.make_node("Transpose", ["x"], [x], perm=swap))
        nodes.append(helper.make_node("Transpose", [y], ["y"], perm=swap))
    return nodes, constants


def _exact(layer: FrozenLayer, axis: int, rank: int) -> _Parts:
    """Return the nodes of mode "exact": the expression that defines inference.

    Nothing is folded, so that the parameters can be read back.
    """
    broadcast = (layer.channels,) + (1,) * (rank - 1 - axis)
    constants = {name: getattr(layer, name).astype(np.float64).reshape(broadcast) for name in _PARAMETERS}
    constants["eps"] = np.array(layer.eps)
    narrow = layer.dtype == np.float32
    x, y = ("x_double", "y_double") if narrow else ("x", "y")
    nodes = [
        helper.make_node(op, inputs, [output])
        for op, inputs, output in (
            ("Add", ["var", "eps"], "var_eps"),
            ("Sqrt", ["var_eps"], "sigma"),
            ("Div", ["gamma", "sigma"], "scale"),
            ("Sub", [x, "mean"], "centred"),
            ("Mul", ["centred", "scale"], "scaled"),
            ("Add", ["scaled", "beta"], y),
        )
    ]
    if narrow:
        nodes.insert(0, helper.make_node("Cast", ["x"], [x], to=onnx.TensorProto.DOUBLE))
        nodes.append(helper.make_node("Cast", [y], ["y"], to=onnx.TensorProto.FLOAT))
    return nodes, constants
