"""Export of a frozen batch norm as an ONNX model; `docs/onnx.md` says what each mode promises."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from batchnorm._file import BATCH_NORM
from batchnorm._types import BatchNormParameters
from batchnorm.onnx.model import Parts, axis_of, make_model, swapped

_PARAMETERS = ("gamma", "beta", "mean", "var")  # in the order of the node's inputs


def build_model(layer: BatchNormParameters, *, opset: int, mode: str, rank: int) -> onnx.ModelProto:
    """Return the layer as a model; `FrozenBatchNorm.to_onnx` documents the arguments."""
    if mode not in ("inference", "exact"):
        raise ValueError(f"mode: was {mode!r}, wanted 'inference' or 'exact'")
    build = _inference if mode == "inference" else _exact
    return make_model(layer, BATCH_NORM, build(layer, axis_of(layer, rank), rank), opset=opset, rank=rank)


def _inference(layer: BatchNormParameters, axis: int, rank: int) -> Parts:
    """Return the nodes of mode "inference": one BatchNormalization.

    If the channels are not on axis 1, there is a Transpose on either side of it.
    """
    constants = {name: getattr(layer, name) for name in _PARAMETERS}
    node = helper.make_node("BatchNormalization", ["x", *constants], ["y"], epsilon=layer.eps)
    return swapped([node], axis, 1, rank), constants


def _exact(layer: BatchNormParameters, axis: int, rank: int) -> Parts:
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
