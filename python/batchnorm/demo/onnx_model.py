"""The whole trained network as one ONNX model."""

from __future__ import annotations

import onnx

from batchnorm import FrozenBatchNorm
from batchnorm.demo.network import PIXELS, Dense, FrozenNetwork
from batchnorm.onnx import Activation, Linear, export_network


def to_onnx(network: FrozenNetwork) -> onnx.ModelProto:
    """Return the network as an ONNX model from x to logits.

    Each hidden layer is MatMul, BatchNormalization and Sigmoid; the last layer is a Gemm.
    """
    layers: list[Linear | FrozenBatchNorm | Activation] = []
    for layer in network.layers:
        if isinstance(layer, Dense):
            layers.append(Linear(layer.weight.T, layer.bias))
        elif isinstance(layer, FrozenBatchNorm):
            layers.append(layer)
        else:
            layers.append(Activation("sigmoid"))
    return export_network(layers, ("rows", PIXELS), y="logits")
