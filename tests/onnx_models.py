"""ONNX models that tests are made of: small ones by their nodes, and real graphs with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NORMALIZATIONS = {"densenet121": 121, "inception_v2": 69, "resnet50": 53, "shufflenet": 49}
"""Number of BatchNormalization nodes of each real graph that has any."""
FOLDED = {"densenet121": 59, "inception_v2": 69, "resnet50": 53, "shufflenet": 49}
"""How many of these can be folded; in densenet121, 62 come behind a Concat or pooling and before a Relu."""
GOLDEN = sorted((Path(__file__).parent / "data" / "onnx").glob("*.onnx"))
"""Models written by PyTorch's two exporters; NAME.npz holds x and PyTorch's y."""
NEWEST_IN_RUNTIME = 26  # opset of ONNX Runtime 1.31


def make(nodes, constants, *, x=("n", 3), y=None, opset=15, ir=8, dtype="float32", **extra):
    """A model from x to y of these nodes; each constant is an initializer, before IR 4 an input too.

    x and y are shapes, y that of x by default: names are dynamic sizes. `extra` goes to `make_graph`.
    """
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    inputs = [helper.make_tensor_value_info("x", element, x)]
    if ir < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
    outputs = [helper.make_tensor_value_info("y", element, x if y is None else y)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors, **extra)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def batch_norm(x="x", y="y", prefix="", name="", **attributes):
    """A BatchNormalization node whose parameters are named gamma, beta, mean and var behind the prefix."""
    inputs = [x, *(prefix + role for role in ("gamma", "beta", "mean", "var"))]
    return helper.make_node("BatchNormalization", inputs, [y], name=name, **attributes)


def parameters(rng, channels=3, prefix="", dtype="float32"):
    """Random parameters of such a node, by name."""
    values = {
        "gamma": rng.uniform(0.5, 2, channels),
        "beta": rng.normal(size=channels),
        "mean": rng.normal(size=channels),
        "var": rng.uniform(0.5, 2, channels),
    }
    return {prefix + role: array.astype(dtype) for role, array in values.items()}


def real_graph(name, seed=0):
    """One of the real graphs in the onnx package (IR 3, opset 9) with random weights.

    As shipped, its parameters come from ConstantOfShape nodes, and most are all equal; here they are
    initializers, and inputs too, as IR 3 wants.
    """
    rng = np.random.default_rng(seed)
    model = onnx.load(LIGHT / f"light_{name}.onnx")
    graph = model.graph
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    roles = {}
    for node in graph.node:
        kinds = {"BatchNormalization": ("x", "gamma", "beta", "mean", "var"), "Conv": ("x", "weight", "bias")}
        for role, value in zip(kinds.get(node.op_type, ()), node.input, strict=False):
            roles[value] = role
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(shapes[node.input[0]].tolist())
        role = roles.get(node.output[0], "")
        if role in ("gamma", "var"):
            values = rng.uniform(0.5, 1.5, shape)
        elif role == "weight":
            values = rng.normal(size=shape) * np.sqrt(2 / max(1, np.prod(shape[1:])))
        else:
            values = 0.1 * rng.normal(size=shape) + (role == "")
        tensor = numpy_helper.from_array(values.astype(np.float32), node.output[0])
        graph.initializer.append(tensor)
        graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(kept)
    return model


def run(model, feeds, names=None, optimize=True):
    """Outputs of a model in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(names, feeds)
