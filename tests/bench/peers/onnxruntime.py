"""ONNX Runtime: one BatchNormalization node, in inference and in training mode, bound to given memory."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bench.case import EPS, Call, Case
from bench.rows import FORWARD, INFERENCE

TYPES = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


def version() -> str:
    return onnxruntime.__version__


def model(case: Case, *, training: bool) -> onnx.ModelProto:
    shape, kind = case.rows(case.x).shape, TYPES[case.row.dtype]
    parameters = {"gamma": case.gamma, "beta": case.beta, "mean": case.mean, "var": case.var}
    # In training mode the node also gives running statistics, which nobody here wants but it computes.
    outputs = ["y", "running_mean", "running_var"] if training else ["y"]
    node = helper.make_node(
        "BatchNormalization", ["x", *parameters], outputs, epsilon=EPS, training_mode=int(training)
    )
    graph = helper.make_graph(
        [node],
        "batch_norm",
        [helper.make_tensor_value_info("x", kind, shape)],
        [
            helper.make_tensor_value_info(name, kind, shape if name == "y" else case.gamma.shape)
            for name in outputs
        ],
        [numpy_helper.from_array(p.astype(case.x.dtype), name) for name, p in parameters.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9)


def bound(case: Case, threads: int, *, training: bool) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model(case, training=training).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x, out = case.rows(case.x), case.rows(case.out)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    spare = [np.empty_like(p) for p in (case.mean, case.var)]
    for output, memory in zip(session.get_outputs(), [out, *spare], strict=False):
        binding.bind_output(output.name, "cpu", 0, x.dtype.type, memory.shape, memory.ctypes.data)

    def run():
        session.run_with_iobinding(binding)
        return out

    run.kept = spare  # bound by address
    return run


def calls(case: Case, threads: int) -> dict[str, Call]:
    if case.row.dtype not in TYPES:
        return {}
    return {
        FORWARD: bound(case, threads, training=True),
        INFERENCE: bound(case, threads, training=False),
    }
