"""Conformance: the test cases that the onnx package has for BatchNormalization, run by our kernels."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.case import node as node_cases
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from onnx_backend import OPSETS, BatchNormBackend, compute
from onnx_models import NEWEST_IN_RUNTIME, batch_norm, parameters

NODE_CASES = (
    "test_batchnorm_example",
    "test_batchnorm_epsilon",
    "test_batchnorm_example_training_mode",
    "test_batchnorm_epsilon_training_mode",
)
CONVERTED = (  # of PyTorch, opset 6
    "test_BatchNorm1d_3d_input_eval",
    "test_BatchNorm2d_eval",
    "test_BatchNorm2d_momentum_eval",
    "test_BatchNorm3d_eval",
    "test_BatchNorm3d_momentum_eval",
)


@pytest.fixture(scope="module")
def generated():
    """The cases that onnx generates for this operator, without the seconds that those of all others take."""
    importlib.import_module("onnx.backend.test.case.node.batch_normalization")
    return [case for case in node_cases._NodeTestCases if case.name.startswith("test_batchnorm")]


def check(case, model, data_sets):
    """Compare the results as the onnx package does, within the tolerances of the case."""
    prepared = BatchNormBackend.prepare(model)
    for inputs, expected in data_sets:
        Runner.assert_similar_outputs(expected, prepared.run(inputs), case.rtol, case.atol)


def test_generated_cases(generated):
    assert sorted(case.name for case in generated) == sorted(NODE_CASES)
    outputs = []
    for case in generated:
        assert case.rtol <= 1e-3
        assert case.atol <= 1e-7
        check(case, case.model, case.data_sets)
        outputs.append(sum(len(expected) for _, expected in case.data_sets))
    assert sorted(outputs) == [1, 1, 3, 3]


@pytest.mark.long
def test_there_are_no_other_generated_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cases of other operators
        cases = node_cases.collect_testcases("BatchNormalization")
    assert {case.name for case in cases} == set(NODE_CASES)
    for case in cases:
        check(case, case.model, case.data_sets)


def test_cases_converted_from_pytorch():
    cases = [case for case in load_model_tests(kind="pytorch-converted") if "BatchNorm" in case.name]
    assert sorted(case.name for case in cases) == list(CONVERTED)
    for case in cases:
        model = onnx.load(f"{case.model_dir}/model.onnx")
        assert [entry.version for entry in model.opset_import] == [6]
        (folder,) = Path(case.model_dir).glob("test_data_set_*")
        inputs, expected = (
            [numpy_helper.to_array(onnx.load_tensor(folder / f"{name}_0.pb"))] for name in ("input", "output")
        )
        check(case, model, [(inputs, expected)])


def model_of(opset, outputs, dtype, statistics, **attributes):
    node = batch_norm(momentum=0.75, epsilon=1e-3, **attributes)
    node.output[:] = outputs
    kinds = {"gamma": dtype, "beta": dtype, "mean": statistics, "var": statistics}
    entries = [
        helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), (4, 3, 5)),
        *(
            helper.make_tensor_value_info(role, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), (3,))
            for role, kind in kinds.items()
        ),
    ]
    results = [onnx.ValueInfoProto(name=name, type=entries[0 if name == "y" else 3].type) for name in outputs]
    graph = helper.make_graph([node], "g", entries, results)
    imports = [helper.make_opsetid("", opset)]
    ir = max(8, helper.find_min_ir_version_for(imports))
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


FORMS = {  # opset, outputs, attributes
    "7": (7, ["y"], {}),
    "8 by channels": (8, ["y"], {"spatial": 1}),
    "9": (9, ["y"], {}),
    "9 training": (9, ["y", "m", "v", "sm", "sv"], {}),
    "13 training": (13, ["y", "m", "v", "sm", "sv"], {}),
    "14": (14, ["y"], {"training_mode": 0}),
    "14 training": (14, ["y", "m", "v"], {"training_mode": 1}),
    "15 training": (15, ["y", "m", "v"], {"training_mode": 1}),
    "newest training": (NEWEST_IN_RUNTIME, ["y", "m", "v"], {"training_mode": 1}),
}


@pytest.mark.parametrize(
    ("dtype", "statistics"), [("float32",) * 2, ("float64",) * 2, ("float16", "float32")]
)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_as_onnx_runtime_has_it(rng, name, dtype, statistics):
    """In training too: the weight of the old statistics, and the variance that is averaged."""
    opset, outputs, attributes = FORMS[name]
    statistics = statistics if opset >= 14 else dtype  # one type before
    model = model_of(opset, outputs, dtype, statistics, **attributes)
    kinds = {"gamma": dtype, "beta": dtype, "mean": statistics, "var": statistics}
    feeds = {role: value.astype(kinds[role]) for role, value in parameters(rng).items()}
    feeds = {"x": (2 + rng.normal(size=(4, 3, 5))).astype(dtype), **feeds}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, feeds)
    found = BatchNormBackend.run_model(model, list(feeds.values()))
    assert len(found) == len(expected) == len(outputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        step = float(ml_dtypes.finfo(ours.dtype).eps)
        assert np.abs(ours.astype(float) - theirs.astype(float)).max() < 16 * step


def test_training_differs_from_inference(rng):
    """So that the comparisons above can tell them apart."""
    x = rng.normal(size=(4, 3, 5)).astype(np.float32) + 2
    roles = list(parameters(rng).values())
    in_training = compute(batch_norm(), 15, "sign", x, *roles)["y"]
    assert np.abs(compute(batch_norm(), 15, "", x, *roles)["y"] - in_training).max() > 0.1


def test_opset_6_in_training_mode(rng):
    """ONNX Runtime has no kernel of it; it is what opset 9 computes."""
    outputs = ["y", "m", "v", "sm", "sv"]
    feeds = [rng.normal(size=(4, 3, 5)).astype(np.float32), *parameters(rng).values()]
    old = BatchNormBackend.run_model(model_of(6, outputs, "float32", "float32", is_test=0), feeds)
    new = BatchNormBackend.run_model(model_of(9, outputs, "float32", "float32"), feeds)
    assert len(old) == len(new) == 5
    assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))


def test_bfloat16(rng):
    """Which neither ONNX Runtime nor the cases of onnx have."""
    model = model_of(15, ["y"], "bfloat16", "float32")
    feeds = [rng.normal(size=(4, 3, 5)).astype(ml_dtypes.bfloat16)]
    roles = parameters(rng)
    feeds += [roles[r].astype(ml_dtypes.bfloat16) for r in ("gamma", "beta")] + [roles["mean"], roles["var"]]
    (y,) = BatchNormBackend.run_model(model, feeds)
    x, gamma, beta, mean, var = (value.astype(np.float64) for value in feeds)
    columns = [value[:, None] for value in (gamma, beta, mean, var)]
    exact = (x - columns[2]) / np.sqrt(columns[3] + np.float32(1e-3)) * columns[0] + columns[1]
    assert y.dtype == ml_dtypes.bfloat16
    assert np.all(np.abs(y.astype(float) - exact) <= 2.0**-8 * np.abs(exact))


def test_what_is_not_run():
    assert not BatchNormBackend.supports_device("CUDA:1")
    assert onnx.defs.onnx_opset_version() in OPSETS
    not_by_channels = model_of(7, ["y"], "float32", "float32", spatial=0)
    other = model_of(15, ["y"], "float32", "float32")
    other.graph.node[0].CopyFrom(helper.make_node("Relu", ["x"], ["y"]))
    for model in (not_by_channels, other):
        assert not BatchNormBackend.is_compatible(model)
        with pytest.raises(ValueError, match="only BatchNormalization nodes"):
            BatchNormBackend.prepare(model)
