"""The whole trained network as one ONNX model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from batchnorm import FrozenBatchNorm
from batchnorm.demo.network import CLASSES, PIXELS, Dense, FrozenNetwork

_OPSET = 15


def to_onnx(network: FrozenNetwork) -> onnx.ModelProto:
    """Return the network as an ONNX model from x to logits.

    Each hidden layer is MatMul, BatchNormalization and Sigmoid; the last layer is MatMul and Add.
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    value = "x"

    def add(operator: str, parameters: dict[str, NDArray[Any]], **attributes: Any) -> None:
        nonlocal value
        name = f"{operator}_{len(nodes)}"
        named = {f"{name}.{key}": array for key, array in parameters.items()}
        nodes.append(helper.make_node(operator, [value, *named], [name], name, **attributes))
        constants.extend(numpy_helper.from_array(np.asarray(array), key) for key, array in named.items())
        value = name

    for layer in network.layers:
        if isinstance(layer, Dense):
            add("MatMul", {"weight": layer.weight})
            if layer.bias is not None:
                add("Add", {"bias": layer.bias})
        elif isinstance(layer, FrozenBatchNorm):
            order = {key: getattr(layer, key) for key in ("gamma", "beta", "mean", "var")}
            add("BatchNormalization", order, epsilon=layer.eps)
        else:
            add("Sigmoid", {})
    nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", PIXELS])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["rows", CLASSES])],
        constants,
    )
    imports = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports)
    )
    onnx.checker.check_model(model, full_check=True)
    return model
