"""Batch normalizations of ONNX models that are not folded, with the reason."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from batchnorm.onnx import fold
from onnx_models import batch_norm, make, parameters

RNG = np.random.default_rng(0)
PARAMETERS = parameters(RNG)
W = RNG.normal(size=(3, 3, 1, 2)).astype(np.float32)
CONV = helper.make_node("Conv", ["x", "w"], ["h"], name="conv")
AHEAD = helper.make_node("Conv", ["h", "w"], ["y"], name="conv")
NORM = batch_norm("h", name="bn")
FIRST = batch_norm("x", "h", name="bn")


def conv_model(*nodes, constants=None, outputs=(), inputs=(), x=(1, 3, 4, 5), **extra):
    model = make(list(nodes), {"w": W, **PARAMETERS} | (constants or {}), x=x, y=None, **extra)
    for name in outputs:
        model.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    for name in inputs:
        shape = next(list(t.dims) for t in model.graph.initializer if t.name == name)
        model.graph.input.append(helper.make_tensor_value_info(name, 1, shape))
    return model


def node(operator, *inputs, output="h", name="", **attributes):
    return helper.make_node(operator, list(inputs), [output], name=name, **attributes)


def conv(x="x", y="h", **attributes):
    return helper.make_node("Conv", [x, "w"], [y], name="conv", **attributes)


def in_a_branch():
    """The weight is read by a branch of an If, and a batch normalization is in it."""
    branches = {}
    for branch, y in (("then_branch", "t"), ("else_branch", "e")):
        out = helper.make_tensor_value_info(y, 1, None)
        inner = [node("Conv", "x", "w", output=f"{y}h"), batch_norm(f"{y}h", y, name="inner")]
        branches[branch] = helper.make_graph(inner, branch, [], [out])
    return conv_model(
        CONV, NORM, node("If", "yes", output="z", name="if", **branches), constants={"yes": np.array(True)}
    )


def quantized():
    constants = {"q": np.ones(W.shape, np.int8), "s": np.float32(0.1), "z": np.int8(0)}
    dequantize = node("DequantizeLinear", "q", "s", "z", output="v", name="dq")
    return conv_model(dequantize, node("Conv", "x", "v", name="conv"), NORM, constants=constants)


def matmul(x, *nodes, **constants):
    """A model of float32 with a weight (4, 6) and parameters for 6 channels."""
    values = {"w": np.ones((4, 6), np.float32), **parameters(RNG, 6), **constants}
    return make(list(nodes), values, x=x, y=None)


MATMUL = node("MatMul", "x", "w", name="mm")
REFUSED = {
    "shared weight": (
        conv_model(CONV, NORM, node("Conv", "x", "w", output="z", name="other")),
        r"the weight of Conv 'conv' is shared: Conv 'other' reads 'w' too",
    ),
    "weight shared through an Identity": (
        conv_model(
            node("Identity", "w", output="v"),
            node("Conv", "x", "v", name="conv"),
            NORM,
            node("Conv", "x", "w", output="z", name="other"),
        ),
        r"is shared: Conv 'other' reads 'w' too",
    ),
    "weight that a subgraph reads": (in_a_branch(), r"is shared: If 'if' reads 'w' too"),
    "weight that is an output": (conv_model(CONV, NORM, outputs=["w"]), r"'w' is an output of the model"),
    "second consumer": (
        conv_model(CONV, NORM, node("Relu", "h", output="z", name="relu")),
        r"'h', which lies between, is read by Relu 'relu' too",
    ),
    "second consumer of what goes on": (
        conv_model(FIRST, AHEAD, node("Relu", "h", output="z", name="relu")),
        r"'h', which lies between, is read by Relu 'relu' too",
    ),
    "output in between": (conv_model(CONV, NORM, outputs=["h"]), "'h', .*, is an output of the model"),
    "output before conv": (conv_model(FIRST, AHEAD, outputs=["h"]), "'h', .*, is an output of the model"),
    "padding": (conv_model(FIRST, conv("h", "y", pads=[0, 0, 0, 1])), "padded: .* in channels 0, 1, 2"),
    "SAME_UPPER": (conv_model(FIRST, conv("h", "y", auto_pad="SAME_UPPER")), "padded: "),
    "SAME_LOWER": (conv_model(FIRST, conv("h", "y", auto_pad="SAME_LOWER")), "padded: "),
    "before ConvTranspose": (
        conv_model(FIRST, node("ConvTranspose", "h", "w", output="y", name="up")),
        "depend on the position in the result of ConvTranspose 'up'",
    ),
    "computed weight": (
        conv_model(node("Neg", "w", output="v"), node("Conv", "x", "v"), NORM),
        r"the weight of Conv 'h' \('v'\) is computed by Neg, but a constant is wanted",
    ),
    "computed bias": (
        conv_model(node("Neg", "mean", output="b"), node("Conv", "x", "w", "b"), NORM),
        r"the bias of Conv 'h' \('b'\) is computed by Neg",
    ),
    "computed parameter": (
        conv_model(
            CONV,
            node("Abs", "var", output="v"),
            node("BatchNormalization", "h", "gamma", "beta", "mean", "v", output="y"),
        ),
        r"var \('v'\) is computed by Abs",
    ),
    "quantized weight": (quantized(), "is computed by DequantizeLinear"),
    "weight that a caller may give": (
        conv_model(CONV, NORM, inputs=["w"]),
        "weight .* is an input of the model too",
    ),
    "parameter that a caller may give": (
        conv_model(CONV, NORM, inputs=["beta"]),
        "'beta' is an input of the model too",
    ),
    "training mode": (
        conv_model(CONV, batch_norm("h", training_mode=1)),
        r"training mode \(training_mode=1\)",
    ),
    "training mode before opset 14": (
        conv_model(CONV, helper.make_node("BatchNormalization", list(NORM.input), ["y", "m", "v"]), opset=13),
        r"training mode \(3 outputs\)",
    ),
    "training mode in opset 6": (conv_model(CONV, NORM, opset=6), r"training mode \(is_test=0\)"),
    "nothing linear": (
        conv_model(node("Relu", "x", name="relu"), NORM, node("Sigmoid", "y", output="z", name="end")),
        "no linear node beside it; its input is computed by Relu 'relu'; its output is read by Sigmoid 'end'",
    ),
    "another domain": (
        conv_model(helper.make_node("Conv", ["x", "w"], ["h"], domain="com.acme", name="c"), NORM),
        r"its input is computed by com\.acme\.Conv 'c'",
    ),
    "another number of channels": (
        conv_model(CONV, NORM, constants=parameters(RNG, 4)),
        "weight: was of 3 output channels .*, wanted 4",
    ),
    "groups that do not fit": (conv_model(conv(group=2), NORM), "groups: was 2, wanted a divisor of 3"),
    "groups that are no number": (
        conv_model(conv(group="a"), NORM),
        "group of Conv 'conv' is b'a', wanted int",
    ),
    "weight that is not finite": (
        conv_model(CONV, NORM, constants={"w": W * np.nan}),
        "weight: not finite in",
    ),
    "no weight": (
        conv_model(node("Conv", "x", name="conv"), NORM),
        "Conv 'conv' has no weight",
    ),
    "no output": (
        conv_model(CONV, helper.make_node("BatchNormalization", list(NORM.input), [""])),
        "it has no output",
    ),
    "negative variance": (conv_model(CONV, NORM, constants={"var": np.float32([1, -1, 1])}), "var"),
    "overflow": (
        make(
            [CONV, NORM],
            {"w": np.full((3, 3, 1), 1e3, np.float16), **PARAMETERS, "var": np.float32([1, 1e-5, 1])},
            x=(1, 3, 4),
            dtype="float16",
        ),
        "weight: out of the range of float16 after folding in channel 1",
    ),
    "MatMul of rank 3": (
        matmul((2, 6, 4), MATMUL, NORM),
        "'h', which lies between, has 3 axes; 2 are wanted",
    ),
    "MatMul of unknown rank": (matmul(None, MATMUL, NORM), "has an unknown number of axes; 2 are wanted"),
    "MatMul of rank 3 behind": (
        make(
            [FIRST, node("MatMul", "h", "w", output="y")],
            {"w": np.ones((3, 2), np.float32), **PARAMETERS},
            x=(5, 3, 3),
        ),
        "'h', which lies between, has 3 axes",
    ),
    "MatMul that has the weight first": (
        matmul((6, 6), node("MatMul", "w", "x", name="mm"), NORM),
        r"the weight of MatMul 'mm' \('x'\) is an input",
    ),
    "MatMul that has the weight first, behind": (
        make(
            [FIRST, node("MatMul", "w", "h", output="y")],
            {"w": np.ones((2, 5), np.float32), **PARAMETERS},
            x=(5, 3),
        ),
        "its output is not the first input of MatMul",
    ),
    "MatMul of vectors": (
        matmul((5, 6, 4), MATMUL, NORM, w=np.ones(4, np.float32)),
        r"the weight of MatMul 'mm' has shape \(4,\), wanted 2 axes",
    ),
    "Add of what is computed": (
        matmul(
            (5, 4), MATMUL, node("Neg", "h", output="n"), node("Add", "n", "h", output="a"), batch_norm("a")
        ),
        "'h', which lies between, is read by Neg 'n' too",
    ),
    "Add of no MatMul": (
        matmul((5, 6), node("Add", "x", "gamma", name="add"), NORM),
        "its input is computed by Add 'add'",
    ),
    "Add of nothing": (
        matmul((5, 4), MATMUL, node("Add", "h", output="a", name="add"), batch_norm("a")),
        "its input is computed by Add 'add'",
    ),
    "Add of more axes": (
        matmul(
            (5, 4),
            MATMUL,
            node("Add", "h", "c", output="a", name="add"),
            batch_norm("a"),
            c=np.ones((2, 6, 1), np.float32),
        ),
        r"the bias of MatMul 'mm' has shape \(2, 6, 1\), wanted at most 2 axes",
    ),
    "MatMul that is read twice": (
        matmul((5, 4), MATMUL, node("Add", "h", "h", output="a", name="add"), batch_norm("a")),
        "'h', which lies between, is read twice by Add 'add'",
    ),
    "Gemm with transA behind": (
        make(
            [FIRST, node("Gemm", "h", "w", output="y", name="gemm", transA=1)],
            {"w": np.ones((5, 2), np.float32), **PARAMETERS},
            x=(5, 3),
        ),
        "Gemm 'gemm' has transA=1 and does not sum over its channels",
    ),
    "Gemm with alpha that is no number": (
        matmul((5, 4), node("Gemm", "x", "w", name="gemm", alpha="a"), NORM),
        "alpha of Gemm 'gemm' is b'a', wanted float",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    model, reason = REFUSED[case]
    before = model.SerializeToString()
    unchanged, report = fold(model)
    assert report.folded == 0
    assert report.errors == ()
    with pytest.raises(ValueError, match=reason):
        raise ValueError(report.nodes[0].reason)
    assert unchanged.SerializeToString() == model.SerializeToString() == before
    assert unchanged is not model


def test_those_of_subgraphs_are_listed():
    model, _ = REFUSED["weight that a subgraph reads"]
    _, report = fold(model, verify=False)
    assert [node.name for node in report.nodes] == ["bn", "inner", "inner"]
    reasons = {node.reason for node in report.nodes[1:]}
    assert reasons == {
        f"is in {name} of If 'if', not in the main graph" for name in ("then_branch", "else_branch")
    }


def test_function_is_listed():
    model = conv_model(CONV, NORM)
    inner = [batch_norm("a", "b", name="inner")]
    imports = [helper.make_opsetid("", 15)]
    inputs = ["a", "gamma", "beta", "mean", "var"]
    model.functions.append(helper.make_function("f", "f", inputs, ["b"], inner, imports))
    _, report = fold(model, verify=False)
    assert [(node.name, node.into is None) for node in report.nodes] == [("bn", False), ("inner", True)]


@pytest.mark.parametrize("auto_pad", ["VALID", "NOTSET"])
def test_no_padding_by_name(auto_pad):
    _, report = fold(
        conv_model(
            FIRST, conv("h", "y", auto_pad=auto_pad, **{"pads": [0] * 4} if auto_pad == "NOTSET" else {})
        )
    )
    assert report.nodes[0].into == "Conv 'conv'"
    assert report.max_error < 1e-6


def test_bfloat16():
    """ONNX Runtime has no Conv of it, but nothing need be run."""
    conv = helper.make_node("Conv", ["x", "w"], ["h"])
    constants = {"w": np.ones((3, 3, 1), ml_dtypes.bfloat16), **parameters(RNG, dtype=ml_dtypes.bfloat16)}
    model = make([conv, batch_norm("h")], constants, x=(1, 3, 4), y=(None,) * 3, dtype=ml_dtypes.bfloat16)
    folded, report = fold(model, verify=False)
    assert report.folded == 1
    assert {tensor.data_type for tensor in folded.graph.initializer} == {TensorProto.BFLOAT16}
