"""A backend of ONNX over this package's kernels, by which the test cases of the onnx package are run.

It runs models of BatchNormalization nodes alone. That is what conformance is about, and nothing that a user
of the package needs, who has the layers themselves; so it is part of the tests.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.base import Backend, BackendRep

import batchnorm as bn
from batchnorm.onnx.graph import Graph
from batchnorm.onnx.nodes import attributes_of
from batchnorm.onnx.normalizations import DEFAULT_EPS, OPERATOR, training_sign

DEFAULT_MOMENTUM = float(np.float32(0.9))
OPSETS = range(6, 29)


def compute(node, opset, sign, x, gamma, beta, mean, var):
    """The outputs of a node by name, of which `sign` shows training mode."""
    attributes = attributes_of(node)
    eps = attributes.get("epsilon", DEFAULT_EPS)
    if not sign:
        return {node.output[0]: bn.infer(x, mean, var, gamma, beta, eps=eps)}
    y, cache = bn.train_forward(x, gamma, beta, eps=eps)
    moments = cache.moments
    # ONNX averages the biased variance, and its momentum is the weight of the old value.
    old, batch = (mean.astype(np.float64), var.astype(np.float64)), (moments.mean, moments.var)
    kept = attributes.get("momentum", DEFAULT_MOMENTUM)
    running = [kept * before + (1 - kept) * now for before, now in zip(old, batch, strict=True)]
    # Before opset 14 follows what a backward pass needs of the batch: 1/√(var + ε) as "saved_var", which
    # ONNX does not define, in ONNX Runtime.
    results = [y, *running, *([cache.mean, cache.invstd] if opset < 14 else [])]
    return {
        name: value.astype(mean.dtype) if value is not y else y
        for name, value in zip(node.output, results, strict=False)
        if name
    }


class Prepared(BackendRep):
    """A model that is ready to run."""

    def __init__(self, graph):
        self.graph = graph

    def run(self, inputs, **kwargs):
        """The outputs of the model; `inputs` are in the order of those that have no initializer."""
        graph = self.graph
        values = dict(zip(graph.inputs, inputs, strict=True))
        values |= {name: numpy_helper.to_array(tensor) for name, tensor in graph.initializers.items()}
        for node in graph.model.graph.node:
            arguments = [values[name] for name in node.input]
            values |= compute(node, graph.opset, training_sign(graph, node), *arguments)
        return tuple(values[name] for name in graph.outputs)


class BatchNormBackend(Backend):
    """Runs models of BatchNormalization nodes in the kernels of this package."""

    @classmethod
    def is_compatible(cls, model, device="CPU", **kwargs):
        """Whether all nodes are batch normalizations by channels, of an opset from 6 on."""
        graph = Graph(model)
        nodes = graph.nodes(OPERATOR)
        return (
            cls.supports_device(device)
            and graph.opset in OPSETS
            and len(nodes) == len(model.graph.node) > 0
            and all(attributes_of(node).get("spatial", 1) == 1 for node in nodes)
        )

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        """Check a model and return it, ready to run."""
        onnx.checker.check_model(model)
        if not cls.is_compatible(model, device):
            raise ValueError("model: only BatchNormalization nodes by channels, of opset 6 or newer, are run")
        return Prepared(Graph(model))

    @classmethod
    def supports_device(cls, device):
        """Whether the device is the CPU."""
        return device.split(":")[0] == "CPU"
