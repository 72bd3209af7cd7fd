"""What `lint` says that runtimes refuse is what ONNX Runtime and OpenVINO do refuse."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import helper, numpy_helper

from batchnorm.onnx import lint
from onnx_models import NEWEST_IN_RUNTIME, batch_norm

TYPES = ("float16", "bfloat16", "float32", "float64")
X = np.zeros((2, 3, 4))
RUNTIMES = ("ONNX Runtime", "OpenVINO")


def model_of(opset, x, affine, statistics, ir=None):
    """One layer of x, γ and β, and mean and variance of these types."""
    kinds = {"gamma": affine, "beta": affine, "mean": statistics, "var": statistics}
    values = {"gamma": [1, 2, 3], "beta": [1, 2, 3], "mean": [1, 2, 3], "var": [1, 2, 3]}
    tensors = [
        numpy_helper.from_array(np.array(values[role]).astype(np.dtype(kind)), role)
        for role, kind in kinds.items()
    ]
    imports = [helper.make_opsetid("", opset)]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(x))
    graph = helper.make_graph(
        [batch_norm(**({"is_test": 1} if opset <= 6 else {}))],
        "g",
        [helper.make_tensor_value_info("x", element, X.shape)],
        [helper.make_tensor_value_info("y", element, X.shape)],
        tensors,
    )
    ir = ir or max(8, helper.find_min_ir_version_for(imports))
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def refusing(model, x):
    """The runtimes that do not take a model."""
    found = set()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    feed = X.astype(np.dtype(x))
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        if x != "bfloat16":  # which it cannot be fed with
            session.run(None, {"x": feed})
    except Exception:
        found.add("ONNX Runtime")
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
        if x != "bfloat16":
            compiled(feed)
    except RuntimeError:
        found.add("OpenVINO")
    return found


def said(model):
    """The runtimes that lint says do not take a model."""
    messages = [finding.message for finding in lint(model) if finding.name == "runtime"]
    return {name for name in RUNTIMES for message in messages if name in message}


def test_versions_are_those_that_the_table_names():
    assert onnxruntime.__version__.startswith("1.31.")
    assert openvino.__version__.startswith("2026.4")


@pytest.mark.parametrize("opset", [1, 6, 7, 9, 13, 14, 15, 20, NEWEST_IN_RUNTIME, NEWEST_IN_RUNTIME + 1])
def test_opsets(opset):
    kinds = TYPES if opset >= 14 else [kind for kind in TYPES if kind != "bfloat16"]  # ONNX has it from 14 on
    for kind in kinds:
        model = model_of(opset, kind, kind, kind)
        assert said(model) == refusing(model, kind), (opset, kind)


def test_all_mixes_of_types():
    taken = dict.fromkeys(RUNTIMES, 0)
    mixes = list(itertools.product(TYPES, TYPES, TYPES))
    assert len(mixes) == 64
    for mix in mixes:
        model = model_of(15, *mix)
        refused = refusing(model, mix[0])
        assert said(model) == refused, mix
        for name in set(RUNTIMES) - refused:
            taken[name] += 1
    assert taken == {"ONNX Runtime": 9, "OpenVINO": 4}
    assert np.dtype("bfloat16") == ml_dtypes.bfloat16


@pytest.mark.parametrize("ir", [4, 8, 13, 14])
def test_ir_versions(ir):
    model = model_of(15, "float32", "float32", "float32", ir)
    assert said(model) == refusing(model, "float32")
    assert (said(model) == {"ONNX Runtime"}) == (ir == 14)


def test_a_message_names_what_refuses_what():
    (finding,) = lint(model_of(15, "float16", "float32", "float64"))
    assert finding.severity == "warning"
    assert finding.message == (
        "ONNX Runtime 1.31 (CPU) and OpenVINO 2026.4 (CPU) refuse x of float16 with gamma float32, "
        "beta float32, mean float64, var float64"
    )
    assert finding.node == "y"
    (finding,) = lint(model_of(27, "float32", "float32", "float32"))
    assert finding.message == "ONNX Runtime 1.31 (CPU) takes opsets 7 to 26, not 27"
    assert finding.node == ""


def test_models_without_batch_normalization_are_not_judged():
    model = model_of(27, "float32", "float32", "float32")
    model.graph.node[0].CopyFrom(helper.make_node("Relu", ["x"], ["y"]))
    assert lint(model) == []
    onnx.checker.check_model(model)
