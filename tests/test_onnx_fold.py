"""Batch normalizations of ONNX models folded into linear nodes: ONNX Runtime computes the same."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import helper

import linear_oracle
from batchnorm.onnx import fold, frozen_layers
from onnx_models import (
    FOLDED,
    GOLDEN,
    NEWEST_IN_RUNTIME,
    NORMALIZATIONS,
    batch_norm,
    make,
    parameters,
    real_graph,
    run,
)

EPS = float(np.float32(1e-5))
CONVS = {
    "1-D": ((2, 6, 9), (4, 6, 3), {"pads": [1, 2]}),
    "2-D": ((2, 6, 8, 7), (4, 6, 3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    "3-D": ((2, 4, 5, 4, 3), (6, 4, 2, 2, 1), {"dilations": [2, 1, 1]}),
    "grouped": ((2, 6, 7, 7), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 6, 7, 7), (6, 1, 3, 3), {"group": 6}),
    "depthwise, two for one": ((2, 3, 7), (6, 1, 3), {"group": 3}),
    "1×1": ((2, 6, 3, 3), (5, 6, 1, 1), {}),
}
TRANSPOSED = {
    "1-D": ((2, 6, 5), (6, 4, 3), {"strides": [2], "output_padding": [1]}),
    "2-D": ((2, 6, 5, 4), (6, 4, 3, 2), {"pads": [1, 1, 1, 1]}),
    "3-D": ((2, 4, 3, 2, 3), (4, 5, 2, 2, 2), {"strides": [2, 2, 2]}),
    "grouped": ((2, 6, 5, 5), (6, 2, 3, 3), {"group": 2, "strides": [2, 2], "output_padding": [1, 1]}),
    "depthwise": ((2, 4, 5, 5), (4, 1, 3, 3), {"group": 4, "strides": [3, 3]}),
}


def constants_of(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def operators(model):
    return [node.op_type for node in model.graph.node]


def folded_of(model, count=1, **how):
    """The folded model, which is valid; `count` were folded, and folding it again changes nothing."""
    before = model.SerializeToString()
    folded, report = fold(model, **how)
    assert model.SerializeToString() == before
    assert [report.folded, len(report.nodes)] == [count, len(frozen_layers(model, skip=True))], report
    onnx.checker.check_model(folded, full_check=True)
    assert constants_of(folded).keys() <= {name for node in folded.graph.node for name in node.input}
    again, second = fold(folded, verify=False)
    assert second.folded == 0
    assert again.SerializeToString() == folded.SerializeToString()
    return folded, report


def conv_model(rng, operator, shape, weight, how, *, biased=True, before=False, bn=None, **extra):
    channels = weight[0] if operator == "Conv" else weight[1] * how.get("group", 1)
    constants = {"w": rng.normal(size=weight).astype(np.float32)}
    if biased:
        constants["b"] = rng.normal(size=channels).astype(np.float32)
    constants |= parameters(rng, shape[1] if before else channels) if bn is None else bn
    ends = ("h", "y") if before else ("x", "h")
    conv = helper.make_node(operator, [ends[0], "w", *["b"] * biased], [ends[1]], name="conv", **how)
    norm = batch_norm(*(("x", "h") if before else ("h", "y")), name="bn")
    nodes = [norm, conv] if before else [conv, norm]
    return make(nodes, constants, x=shape, y=(None,) * len(shape), **extra)


def oracle(model, x, how, *, magnitude=False):
    """What the nodes of a model compute in float64; or the sum of all magnitudes that its last conv adds."""
    values = constants_of(model)
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            x = linear_oracle.batch_norm(x, *(values[name] for name in node.input[1:]), EPS)
            continue
        weight, bias = values[node.input[1]], values[node.input[2]] if len(node.input) > 2 else None
        if magnitude:
            x, weight, bias = np.abs(x), np.abs(weight), np.abs(bias)
        given = {
            "groups": how.get("group", 1),
            "strides": how.get("strides", 1),
            "pads": how.get("pads", 0),
        }
        if node.op_type == "Conv":
            x = linear_oracle.conv(x, weight, bias, dilations=how.get("dilations", 1), **given)
        else:
            one = {name: np.max(value) for name, value in given.items()}
            padding = np.max(how.get("output_padding", 0))
            x = linear_oracle.conv_transpose(x, weight, bias, output_padding=padding, **one)
    return x


def assert_computes(folded, model, how, x):
    """The folded model differs from the original in float64 by its own roundings alone."""
    wanted, found = oracle(model, x, how), run(folded, {"x": x})[0]
    assert found.shape == wanted.shape
    terms = np.prod(constants_of(folded)["w"].shape[1:]) + 4
    bound = terms * 2.0**-24 * oracle(folded, x, how, magnitude=True)
    assert np.all(np.abs(found - wanted) <= bound)
    assert np.abs(wanted).max() > 100 * bound.max() > 0


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", CONVS)
def test_after_conv(rng, case, biased):
    shape, weight, how = CONVS[case]
    model = conv_model(rng, "Conv", shape, weight, how, biased=biased)
    folded, report = folded_of(model)
    assert (report.nodes[0].into, report.nodes[0].before) == ("Conv 'conv'", False)
    assert operators(folded) == ["Conv"]
    assert_computes(folded, model, how, rng.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", [case for case in CONVS if "pads" not in CONVS[case][2]])
def test_before_conv(rng, case, biased):
    shape, weight, how = CONVS[case]
    model = conv_model(rng, "Conv", shape, weight, how, biased=biased, before=True)
    folded, report = folded_of(model)
    assert report.nodes[0].before
    assert operators(folded) == ["Conv"]
    assert_computes(folded, model, how, rng.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_after_conv_transpose(rng, case, biased):
    shape, weight, how = TRANSPOSED[case]
    model = conv_model(rng, "ConvTranspose", shape, weight, how, biased=biased)
    folded, _ = folded_of(model)
    assert operators(folded) == ["ConvTranspose"]
    assert_computes(folded, model, how, rng.normal(size=shape).astype(np.float32))


def test_before_padded_conv_that_gets_nothing_added(rng):
    how = {"pads": [1, 1, 1, 1]}
    scaling = {
        "gamma": np.float32([1, -2, 3]),
        "beta": np.zeros(3, np.float32),
        "mean": np.zeros(3, np.float32),
        "var": np.float32([1, 2, 3]),
    }
    model = conv_model(rng, "Conv", (1, 3, 5, 5), (4, 3, 3, 3), how, before=True, bn=scaling)
    folded, _ = folded_of(model)
    assert_computes(folded, model, how, rng.normal(size=(1, 3, 5, 5)).astype(np.float32))


def linear_model(rng, *nodes, dtype="float64", x=(5, 4), channels=6, opset=15, ir=8, **constants):
    """Nodes with a weight w of shape (4, 6) unless another is given, and a batch norm of 6 channels."""
    constants.setdefault("w", rng.normal(size=(4, 6)))
    values = {name: np.asarray(value).astype(dtype) for name, value in constants.items()}
    values |= parameters(rng, channels, dtype=dtype)
    return make(list(nodes), values, x=x, y=(None, None), dtype=dtype, opset=opset, ir=ir)


def node(operator, *inputs, output="y", **attributes):
    return helper.make_node(operator, list(inputs), [output], name=operator.lower(), **attributes)


def assert_same_results(model, folded, x):
    """In ONNX Runtime, in float64."""
    (wanted,), (found,) = run(model, {"x": x}, optimize=False), run(folded, {"x": x}, optimize=False)
    assert found.dtype == np.float64
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())


GEMMS = {
    "plain": {},
    "transB": {"transB": 1},
    "transA": {"transA": 1},
    "both": {"transA": 1, "transB": 1},
    "alpha": {"alpha": 0.5},
    "alpha, beta": {"alpha": -1.5, "beta": 0.25},
    "beta of 0": {"beta": 0.0},
}
SUMMANDS = {
    "none": None,
    "vector": (6,),
    "row": (1, 6),
    "column": (5, 1),
    "matrix": (5, 6),
    "number": (),
    "one": (1,),
}


@pytest.mark.parametrize("shape", SUMMANDS.values(), ids=SUMMANDS)
@pytest.mark.parametrize("how", GEMMS.values(), ids=GEMMS)
def test_after_gemm(rng, how, shape):
    c = {} if shape is None else {"c": rng.normal(size=shape)}
    x = (4, 5) if how.get("transA") else (5, 4)
    w = rng.normal(size=(6, 4) if how.get("transB") else (4, 6))
    gemm = node("Gemm", "x", "w", *c, output="h", **how)
    model = linear_model(rng, gemm, batch_norm("h"), x=x, w=w, **c)
    folded, report = folded_of(model)
    assert report.nodes[0].into == "Gemm 'gemm'"
    assert operators(folded) == ["Gemm"]
    assert_same_results(model, folded, rng.normal(size=x))


@pytest.mark.parametrize("shape", SUMMANDS.values(), ids=SUMMANDS)
@pytest.mark.parametrize("how", [how for how in GEMMS.values() if "transA" not in how], ids=str)
def test_before_gemm(rng, how, shape):
    c = {} if shape is None else {"c": rng.normal(size=shape)}
    w = rng.normal(size=(6, 4) if how.get("transB") else (4, 6))
    gemm = node("Gemm", "h", "w", *c, **how)
    model = linear_model(rng, batch_norm("x", "h"), gemm, w=w, channels=4, **c)
    folded, report = folded_of(model)
    assert report.nodes[0].before
    assert operators(folded) == ["Gemm"]
    assert_same_results(model, folded, rng.normal(size=(5, 4)))


@pytest.mark.parametrize("shape", SUMMANDS.values(), ids=SUMMANDS)
@pytest.mark.parametrize("first", [True, False])
def test_matmul(rng, shape, first):
    c = {} if shape is None else {"c": rng.normal(size=shape)}
    summands = ["h", "c"] if first else ["c", "h"]
    after = [node("MatMul", "x", "w", output="h" if c else "g"), batch_norm("g", name="bn")]
    before = [batch_norm("x", "g", name="bn"), node("MatMul", "g", "w", output="h" if c else "y")]
    if c:
        after.insert(1, node("Add", *summands, output="g"))
        before.append(node("Add", *summands))
    for nodes, channels in ((after, 6), (before, 4)):
        model = linear_model(rng, *nodes, channels=channels, **c)
        folded, report = folded_of(model)
        assert report.nodes[0].into == "MatMul 'matmul'"
        assert operators(folded) == ["MatMul", "Add"]
        assert folded.graph.node[1].name == ("add" if c else "bn")
        assert_same_results(model, folded, rng.normal(size=(5, 4)))


def test_matmul_of_dynamic_rows_and_a_batch_norm_on_either_side(rng):
    nodes = [batch_norm("x", "g", "one/"), node("MatMul", "g", "w", output="h"), batch_norm("h", "y", "two/")]
    constants = {"w": rng.normal(size=(4, 6))}
    constants |= parameters(rng, 4, "one/", "float64") | parameters(rng, 6, "two/", "float64")
    model = make(nodes, constants, x=("n", 4), y=(None, None), dtype="float64")
    folded, _ = folded_of(model, 2)
    assert operators(folded) == ["MatMul", "Add"]
    assert_same_results(model, folded, rng.normal(size=(7, 4)))


@pytest.mark.parametrize("positions", ["cnn", "nnc", "ncn", "nncnn", "ncnnc"])
def test_chains(rng, positions):
    """c is a convolution and n a batch norm: all of a chain are folded, whatever their order."""
    nodes, constants = [], {}
    for i, kind in enumerate(positions):
        x = "x" if i == 0 else f"h{i}"
        y = "y" if i == len(positions) - 1 else f"h{i + 1}"
        if kind == "n":
            nodes.append(batch_norm(x, y, f"{i}/", f"bn{i}"))
            constants |= parameters(rng, 3, f"{i}/")
        else:
            nodes.append(helper.make_node("Conv", [x, f"w{i}"], [y]))
            constants[f"w{i}"] = rng.normal(size=(3, 3, 1, 2)).astype(np.float32)
    model = make(nodes, constants, x=(1, 3, 4, 5), y=(None,) * 4)
    folded, report = folded_of(model, positions.count("n"))
    assert operators(folded) == ["Conv"] * positions.count("c")
    assert report.max_error < 1e-5
    assert folded.graph.output == model.graph.output


def test_nothing_else_changes(rng):
    """All other nodes, initializers and entries keep their bytes and their order."""
    how = {"pads": [1, 1, 1, 1]}
    model = conv_model(rng, "Conv", (1, 3, 5, 5), (4, 3, 3, 3), how)
    model.graph.node[1].output[0] = "z"
    model.graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"], name="first"))
    model.graph.node[1].input[0] = "r"
    model.graph.node.append(helper.make_node("Mul", ["z", "k"], ["y"], name="last"))
    model.graph.initializer.insert(1, onnx.numpy_helper.from_array(np.float32([2]), "k"))
    for name in ("r", "h", "z"):
        shape = [1, 3, 5, 5] if name == "r" else [1, 4, 5, 5]
        model.graph.value_info.append(helper.make_tensor_value_info(name, 1, shape))
    entries = {"author": "me", "batchnorm.bn.fingerprint": "12", "batchnorm.other.fingerprint": "34"}
    helper.set_model_props(model, entries)
    folded, _ = folded_of(model)
    wanted = onnx.ModelProto()
    wanted.CopyFrom(model)
    del wanted.graph.node[2]
    wanted.graph.node[1].output[0] = "z"
    for name in ("gamma", "beta", "mean", "var"):
        names = [tensor.name for tensor in wanted.graph.initializer]
        del wanted.graph.initializer[names.index(name)]
    del wanted.graph.value_info[1]
    del wanted.metadata_props[1]
    assert [t.name for t in folded.graph.initializer] == ["w", "k", "b"]
    for name in ("w", "b"):
        (old,) = (tensor for tensor in wanted.graph.initializer if tensor.name == name)
        (new,) = (tensor for tensor in folded.graph.initializer if tensor.name == name)
        assert old.raw_data != new.raw_data
        old.CopyFrom(new)
    assert wanted.SerializeToString(deterministic=True) == folded.SerializeToString(deterministic=True)


def test_equal_biases_may_be_shared(rng):
    """A bias that two convolutions read is copied, since exporters write equal tensors once."""
    nodes = [
        helper.make_node("Conv", ["x", "v", "b"], ["g"]),
        helper.make_node("Conv", ["g", "w", "b"], ["h"]),
        batch_norm("h"),
    ]
    constants = {name: rng.normal(size=(3, 3, 1)).astype(np.float32) for name in "vw"}
    constants |= {"b": np.float32([1, 2, 3]), **parameters(rng)}
    model = make(nodes, constants, x=(1, 3, 4), y=(None,) * 3)
    folded, report = folded_of(model)
    assert report.max_error < 1e-6
    assert np.array_equal(constants_of(folded)["b"], [1, 2, 3])


def test_parameter_that_is_an_output_stays(rng):
    model = conv_model(rng, "Conv", (1, 3, 5), (3, 3, 2), {})
    model.graph.output.append(helper.make_tensor_value_info("beta", 1, [3]))
    folded, report = fold(model)
    assert report.folded == 1
    feeds = {"x": rng.normal(size=(1, 3, 5)).astype(np.float32)}
    assert np.array_equal(run(folded, feeds)[1], constants_of(model)["beta"])
    assert constants_of(folded).keys() == {"w", "b", "beta"}


def test_affine_off_and_constants_of_all_kinds(rng):
    """The weight is a ConstantOfShape behind an Identity, γ and β are expanded; both become initializers."""
    shape = {"shape": np.array([4, 3, 1, 1]), "channels": np.array([4])}
    half = onnx.numpy_helper.from_array(np.float32([0.5]))
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["w0"], value=half),
        helper.make_node("Identity", ["w0"], ["w"]),
        helper.make_node("Constant", [], ["1"], value_float=1.0),
        helper.make_node("Constant", [], ["0"], value_float=0.0),
        helper.make_node("Expand", ["1", "channels"], ["gamma"]),
        helper.make_node("Expand", ["0", "channels"], ["beta"]),
        helper.make_node("Conv", ["x", "w"], ["h"]),
        batch_norm("h", name="bn"),
    ]
    statistics = {name: v for name, v in parameters(rng, 4).items() if name in ("mean", "var")}
    model = make(nodes, shape | statistics, x=(2, 3, 4, 4), y=(None,) * 4)
    folded, report = folded_of(model)
    assert operators(folded) == ["Conv"]
    assert [tensor.name for tensor in folded.graph.initializer] == ["w/bn", "bn/bias"]
    assert report.max_error < 1e-6


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, NEWEST_IN_RUNTIME])
def test_opsets(rng, opset):
    ir = 3 if opset < 9 else 8
    shape, weight, how = CONVS["grouped"]
    model = conv_model(rng, "Conv", shape, weight, how, opset=opset, ir=ir)
    folded, _ = folded_of(model)
    assert_computes(folded, model, how, rng.normal(size=shape).astype(np.float32))
    assert [entry.name for entry in folded.graph.input] == ["x", *["w", "b"] * (ir == 3)]
    gemm = node("Gemm", "x", "w", "c", output="h", alpha=0.5)
    model = linear_model(rng, gemm, batch_norm("h"), c=np.ones((5, 1)), opset=opset, ir=ir)
    if opset >= 9:  # ONNX Runtime's older kernels of Gemm are of float32
        assert_same_results(model, folded_of(model)[0], rng.normal(size=(5, 4)))
    model = linear_model(
        rng, node("MatMul", "x", "w", output="h"), batch_norm("h", name="bn"), opset=opset, ir=ir
    )
    assert_same_results(model, folded_of(model)[0], rng.normal(size=(5, 4)))


def test_opset_6(rng):
    """ONNX Runtime has no kernels of it, so the reference implementation of onnx runs what is left."""
    x = rng.normal(size=(5, 4)).astype(np.float32)
    gemm = node("Gemm", "x", "w", "c", output="h", broadcast=1)
    matmul = node("MatMul", "x", "w", output="h")
    for first in (gemm, matmul):
        norm = batch_norm("h", is_test=1)
        model = linear_model(rng, first, norm, c=np.ones(6), opset=6, ir=3, dtype="float32")
        folded, report = fold(model, verify=False)
        assert report.folded == 1
        onnx.checker.check_model(folded, full_check=True)
        assert folded.graph.node[-1].attribute == [helper.make_attribute("broadcast", 1)]
        values = constants_of(model)
        h = linear_oracle.linear(x, values["w"].T, values["c"] if first is gemm else None)
        wanted = linear_oracle.batch_norm(h, *(values[name] for name in norm.input[1:]), EPS)
        new = constants_of(folded)
        found = linear_oracle.linear(x, new["w"].T, new[folded.graph.node[-1].input[-1]])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
        assert fold(folded, verify=False)[1].nodes == ()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_16_bits(rng, dtype):
    """From opset 15 on the parameters may have another type than x; the weights keep theirs."""
    conv = helper.make_node("Conv", ["x", "w"], ["h"])
    constants = {"w": rng.normal(size=(3, 3, 1)).astype(np.float16), **parameters(rng, dtype=dtype)}
    model = make([conv, batch_norm("h")], constants, x=(1, 3, 4), y=(None,) * 3, dtype="float16")
    folded, report = folded_of(model)
    assert {values.dtype.name for values in constants_of(folded).values()} == {"float16"}
    assert report.errors[0].ulps <= 4


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_models_of_pytorch(path):
    wanted = path.stem.split(".")[0] in ("mlp", "depthwise")
    model = onnx.load(path)
    folded, report = fold(model)
    assert [report.folded, len(report.nodes)] == [int(wanted), 1]
    data = np.load(path.with_suffix(".npz"))
    feeds, y = {model.graph.input[0].name: data["x"]}, data["y"]
    assert np.abs(run(folded, feeds)[0] - y).max() <= 2e-6 * np.abs(y).max()
    if not wanted:
        assert folded.SerializeToString() == model.SerializeToString()
        expected = {"bn_first": "must add 0", "training_mode": r"training mode \(training_mode=1\)"}
        assert re.search(
            expected.get(path.stem.split(".")[0], "no linear node beside it"), report.nodes[0].reason
        )


@pytest.mark.parametrize(
    "name", ["shufflenet", *(pytest.param(n, marks=pytest.mark.long) for n in FOLDED if n != "shufflenet")]
)
def test_real_graphs(name):
    model = real_graph(name)
    if model.graph.node[-1].op_type == "Softmax":  # it would hide all differences
        model.graph.output[0].name = model.graph.node[-1].input[0]
        del model.graph.node[-1]
    before = model.SerializeToString()
    folded, report = fold(model)
    assert model.SerializeToString() == before
    assert [report.folded, len(report.nodes)] == [FOLDED[name], NORMALIZATIONS[name]]
    assert len(folded.graph.node) == len(model.graph.node) - FOLDED[name]
    assert not [n for n in report.nodes if n.into is None and "no linear node beside it" not in n.reason]
    assert 0 < report.max_error < 1e-5
    onnx.checker.check_model(folded, full_check=True)
    assert fold(folded, verify=False)[1].folded == 0
