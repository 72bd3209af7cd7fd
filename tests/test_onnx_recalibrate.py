"""`recalibrate` against statistics taken by NumPy, and against a literal loop over the layers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import batchnorm as bn
from batchnorm.onnx import frozen_layers, recalibrate, replace_layers
from onnx_models import GOLDEN, NEWEST_IN_RUNTIME, batch_norm, make, parameters, real_graph, run

EPS64 = np.finfo(np.float64).eps


def network(opset=15, ir=8, dtype="float32", channels=4, layers=3, x=("n", 4, 5, 5)):
    """Convolutions, each with batch normalization and Relu, the first of which reads x itself."""
    rng = np.random.default_rng(0)
    nodes, constants, value = [], {}, "x"
    for k in range(layers):
        if k:
            constants[f"w{k}"] = (rng.normal(size=(channels, channels, 3, 3)) / 6).astype(dtype)
            nodes.append(helper.make_node("Conv", [value, f"w{k}"], [f"c{k}"], pads=[1, 1, 1, 1]))
            value = f"c{k}"
        constants.update(parameters(rng, channels, f"b{k}.", dtype))
        nodes.append(batch_norm(value, f"n{k}", f"b{k}.", f"bn{k}"))
        value = "y" if k == layers - 1 else f"r{k}"
        nodes.append(helper.make_node("Relu", [f"n{k}"], [value]))
    return make(nodes, constants, x=x, y=x, opset=opset, ir=ir, dtype=dtype)


def batches(sizes=(6, 3, 6), shape=(4, 5, 5), dtype="float32", seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(k, 1 + k, (size, *shape)).astype(dtype) for k, size in enumerate(sizes)]


def tapped(model, value, data):
    """A value of a model for each batch, by the plainest copy of it."""
    if value == "x":
        return data
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.append(helper.make_empty_tensor_value_info(value))
    return [run(copy, {"x": x}, [value], optimize=False)[0] for x in data]


def oracle(taps, population):
    """Mean and unbiased variance in float64 by NumPy."""
    flat = [np.moveaxis(x.astype(np.float64), 1, 0).reshape(x.shape[1], -1) for x in taps]
    if population == "pooled":
        values = np.concatenate(flat, axis=1)
        return values.mean(1), values.var(1, ddof=1)
    m = np.array([x.shape[1] for x in flat])
    mean = sum(x.mean(1) * x.shape[1] for x in flat) / m.sum()
    return mean, sum(x.var(1) * x.shape[1] for x in flat) / (m - 1).sum()


def layer_keys(model):
    return {node.name: node for node in model.graph.node if node.op_type == "BatchNormalization"}


def assert_statistics(layer, mean, var, dtype="float32"):
    """The layer's statistics are those, rounded to the type of the model."""
    ulp = {"float16": 2**-10, "float32": 2**-23, "float64": 64 * EPS64}[dtype]
    sigma = np.sqrt(var)
    np.testing.assert_allclose(layer.mean, mean, rtol=ulp, atol=1e-13 * sigma.max())
    np.testing.assert_allclose(layer.var, var, rtol=ulp)


def everything_else(model):
    """The bytes of a model with the values of all means and variances left out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name.endswith((".mean", ".var")):
            for field in ("raw_data", "float_data"):
                tensor.ClearField(field)
    return copy.SerializeToString(deterministic=True)


@pytest.mark.parametrize("population", ["algorithm2", "pooled"])
def test_plain_statistics_are_those_of_numpy_and_all_else_stays(population):
    model, data = network(), batches()
    before = model.SerializeToString()
    new, report = recalibrate(model, data, population=population)
    assert model.SerializeToString() == before
    layers = frozen_layers(new)
    assert [*layers] == [layer.name for layer in report.layers] == ["bn0", "bn1", "bn2"]
    for key, node in layer_keys(model).items():
        assert_statistics(layers[key], *oracle(tapped(model, node.input[0], data), population))
    assert new.SerializeToString() != before
    assert everything_else(new) == everything_else(model)
    onnx.checker.check_model(new, full_check=True)
    assert (report.population, report.reason) == (population, "asked for")
    assert (report.batches, report.passes) == (3, 1)
    assert [layer.values for layer in report.layers] == [15 * 25] * 3
    assert report.memory == 3 * 6 * 4 * 25 * 4


def test_the_populations_differ_and_only_pooled_does_not_depend_on_the_cut():
    model, data = network(layers=1), np.concatenate(batches((8, 8, 8)))
    found = {}
    for population in ("algorithm2", "pooled"):
        for size in (4, 24):
            new, _ = recalibrate(model, data, population=population, batch_size=size)
            found[population, size] = frozen_layers(new)["bn0"].var
    assert (found["algorithm2", 4] < 0.9 * found["algorithm2", 24]).all()
    assert np.allclose(found["pooled", 4], found["pooled", 24], rtol=1e-6)
    assert np.array_equal(found["pooled", 24], found["algorithm2", 24])


def literal_loop(model, data, population):
    """Layer after layer: tap it alone, go over the data, write, and go on with the model written."""
    for key, layer in frozen_layers(model).items():
        node = layer_keys(model)[key]
        taps = tapped(model, node.input[0], data)
        if population == "pooled":
            total = None
            for x in taps:
                total = bn.moments(x) if total is None else total.merge(bn.moments(x))
            mean, var = total.mean, total.var_unbiased
        else:
            estimate = bn.Algorithm2()
            for x in taps:
                estimate.update(bn.moments(x))
            mean, var = estimate.mean, estimate.var
        changed = bn.FrozenBatchNorm(mean, var, layer.gamma, layer.beta, eps=layer.eps, dtype=layer.dtype)
        model = replace_layers(model, {key: changed})
    return model


@pytest.mark.parametrize("population", ["algorithm2", "pooled"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layerwise_is_a_literal_loop_bit_for_bit(dtype, population):
    model, data = network(dtype=dtype), batches(dtype=dtype)
    new, report = recalibrate(model, data, layerwise=True, population=population)
    expected = literal_loop(model, data, population)
    assert new.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    plain, _ = recalibrate(model, data, population=population)
    assert frozen_layers(plain)["bn0"] == frozen_layers(new)["bn0"]
    assert frozen_layers(plain)["bn2"] != frozen_layers(new)["bn2"]
    assert report.layerwise
    assert report.passes == 3


def branches():
    """Two branches of two layers each, of which the sum goes into a fifth; the first two read one value."""
    rng = np.random.default_rng(3)
    constants, nodes = {}, []
    for name, x in (("a1", "x"), ("b1", "x"), ("a2", "a1.r"), ("b2", "b1.r"), ("z", "sum")):
        constants.update(parameters(rng, 3, f"{name}."))
        if name == "z":
            nodes.append(helper.make_node("Add", ["a2.r", "b2.r"], ["sum"]))
        nodes.append(batch_norm(x, f"{name}.y", f"{name}.", name))
        output = "y" if name == "z" else f"{name}.r"
        nodes.append(helper.make_node("Sigmoid", [f"{name}.y"], [output]))
    return make(nodes, constants)


def test_layers_that_do_not_depend_on_each_other_are_measured_together():
    model, data = branches(), batches((10, 20), (3,))
    new, report = recalibrate(model, data, layerwise=True)
    assert report.passes == 3
    assert [layer.name for layer in report.layers] == ["a1", "b1", "a2", "b2", "z"]
    assert new == literal_loop(model, data, "algorithm2")
    assert recalibrate(model, data)[1].memory == 4 * 20 * 3 * 4  # the value that two layers read counts once


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_memory_changes_no_bit(dtype, layerwise):
    model, data = network(dtype=dtype, layers=5), batches(dtype=dtype)
    size = data[0].nbytes
    whole, report = recalibrate(model, data, layerwise=layerwise)
    assert report.memory == 5 * size
    for memory, chunks in ((1, 5), (2 * size, 3), (5 * size - 1, 2), (5 * size, 1)):
        new, parts = recalibrate(model, data, layerwise=layerwise, memory=memory)
        assert new == whole
        assert parts.passes == chunks + 4 * layerwise
        assert parts.memory == -(-5 // chunks) * size or parts.memory <= memory


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, NEWEST_IN_RUNTIME])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_opsets_and_types(opset, dtype):
    conv = dtype != "float64"  # of which ONNX Runtime has no Conv of float64
    model = network(
        opset, ir=3 if opset < 9 else 8 if opset < 25 else 11, dtype=dtype, layers=2 if conv else 1
    )
    data = batches(dtype=dtype)
    new, report = recalibrate(model, data)
    layers = frozen_layers(new)
    assert len(layers) == len(report.layers) == 1 + conv
    for key, node in layer_keys(model).items():
        assert_statistics(layers[key], *oracle(tapped(model, node.input[0], data), "algorithm2"), dtype)
    assert {t.name: t.data_type for t in new.graph.initializer} == {
        t.name: t.data_type for t in model.graph.initializer
    }
    assert everything_else(new) == everything_else(model)


def test_statistics_wider_than_a_float16_x_keep_their_type():
    rng = np.random.default_rng(0)
    model = make([batch_norm(name="bn")], parameters(rng, 3), dtype="float16")
    data = batches((8, 8), (3,), "float16")
    new, _ = recalibrate(model, data)
    assert {tensor.data_type for tensor in new.graph.initializer} == {TensorProto.FLOAT}
    assert_statistics(frozen_layers(new)["bn"], *oracle(data, "algorithm2"))


def test_a_bfloat16_tap():
    """ONNX Runtime has no such layer, but a value before the last one can be measured."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    cast = helper.make_node("Cast", ["x"], ["a"], to=TensorProto.BFLOAT16)
    constants = parameters(rng, 3, dtype=ml_dtypes.bfloat16)
    back = helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT)
    model = make([cast, batch_norm("a", "b", name="bn"), back], constants)
    data = batches((8, 8), (3,))
    new, _ = recalibrate(model, data, memory=1)
    layer = frozen_layers(new)["bn"]
    rounded = [x.astype(ml_dtypes.bfloat16) for x in data]
    mean, var = oracle(rounded, "algorithm2")
    assert np.array_equal(layer.mean, mean.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.array_equal(layer.var, var.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_blend_mixes_in_float64():
    model, data = network(), batches()
    old, measured = frozen_layers(model), frozen_layers(recalibrate(model, data)[0])
    new, report = recalibrate(model, data, blend=0.25)
    assert report.blend == 0.25
    for key, layer in frozen_layers(new).items():
        for role in ("mean", "var"):
            expected = 0.75 * getattr(old[key], role) + 0.25 * getattr(measured[key], role)
            np.testing.assert_allclose(getattr(layer, role), expected, rtol=1e-6, atol=1e-7)


def test_the_report_measures_by_shift():
    model, data = network(), batches()
    old = frozen_layers(model)
    new, report = recalibrate(model, data)
    for layer in report.layers:
        before, after = old[layer.name], frozen_layers(new)[layer.name]
        sigma = np.sqrt(before.var.astype(float) + before.eps)
        np.testing.assert_allclose(layer.shift.mean_shift, (after.mean.astype(float) - before.mean) / sigma)
        ratio = np.log((after.var.astype(float) + before.eps) / (before.var.astype(float) + before.eps))
        np.testing.assert_allclose(layer.shift.log_variance_ratio, ratio, rtol=1e-12)
    again = recalibrate(new, data, layerwise=True)[1].layers[0]
    assert again.shift.summary()["mean_shift"].max == 0


def test_shared_statistics_become_own_ones():
    """In IR 3 the new initializers are inputs too; a Constant is left to its other reader."""
    rng = np.random.default_rng(0)
    second = helper.make_node("BatchNormalization", ["h", "gamma", "beta", "mean", "var"], ["y"], "two")
    model = make(
        [batch_norm("x", "g", name="one"), helper.make_node("Exp", ["g"], ["h"]), second],
        parameters(rng),
        y=("n", 3),
        opset=9,
        ir=3,
    )
    data = batches((8, 8), (3,))
    new, _ = recalibrate(model, data)
    layers = frozen_layers(new)
    assert_statistics(layers["one"], *oracle(data, "algorithm2"))
    assert_statistics(layers["two"], *oracle(tapped(model, "h", data), "algorithm2"))
    names = {"mean/one", "var/one", "mean/two", "var/two"}
    assert names <= {tensor.name for tensor in new.graph.initializer}
    assert names <= {entry.name for entry in new.graph.input}
    assert new == replace_layers(model, layers)
    onnx.checker.check_model(new, full_check=True)
    run(new, {"x": data[0]})


def test_statistics_that_are_constants_of_nodes():
    values = parameters(np.random.default_rng(0))
    constant = helper.make_node("Constant", [], ["mean"], value=numpy_helper.from_array(values.pop("mean")))
    model = make([constant, batch_norm(name="bn")], values)
    data = batches((8, 8), (3,))
    new, _ = recalibrate(model, data)
    assert "mean/bn" in {tensor.name for tensor in new.graph.initializer}
    assert_statistics(frozen_layers(new)["bn"], *oracle(data, "algorithm2"))


def test_taps_that_are_outputs_inputs_or_initializers():
    rng = np.random.default_rng(0)
    constants = parameters(rng, 3, "a.") | parameters(rng, 3, "b.") | parameters(rng, 3, "c.")
    constants["k"] = rng.normal(size=(5, 3)).astype(np.float32)
    nodes = [
        batch_norm("x", "p", "a.", "a"),
        batch_norm("p", "y", "b.", "b"),
        batch_norm("k", "q", "c.", "c"),
    ]
    model = make(nodes, constants)
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, None))
    model.graph.output.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, None))
    data = batches((8, 8), (3,))
    new, _ = recalibrate(model, data)
    layers = frozen_layers(new)
    assert_statistics(layers["a"], *oracle(data, "algorithm2"))
    assert_statistics(
        layers["b"], *oracle([run(model, {"x": x}, ["p"], optimize=False)[0] for x in data], "algorithm2")
    )
    assert_statistics(layers["c"], *oracle([constants["k"]] * 2, "algorithm2"))
    assert new.graph.output == model.graph.output


def test_quantized_weights():
    """Weights behind DequantizeLinear, and activations through QuantizeLinear and back."""
    rng = np.random.default_rng(0)
    constants = parameters(rng, 4, "b.") | {
        "w8": rng.integers(-128, 128, (4, 3), dtype=np.int8),
        "scale": np.float32(0.02),
        "zero": np.int8(0),
        "x.scale": np.float32(0.05),
        "x.zero": np.uint8(128),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "scale", "zero"], ["w"]),
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "x.scale", "x.zero"], ["xq"]),
        helper.make_node("Gemm", ["xq", "w"], ["h"], transB=1),
        batch_norm("h", "y", "b.", "bn"),
    ]
    model = make(nodes, constants)
    data = batches((16, 16), (3,))
    new, _ = recalibrate(model, data)
    assert everything_else(new) == everything_else(model)
    assert_statistics(frozen_layers(new)["bn"], *oracle(tapped(model, "h", data), "algorithm2"))


def test_models_of_pytorchs_exporters():
    assert len(GOLDEN) == 25
    layers = 0
    for path in GOLDEN:
        model = onnx.load(path)
        with np.load(path.with_suffix(".npz")) as file:
            x = file["x"]
        if "training_mode" in path.name:
            with pytest.raises(ValueError, match="training mode"):
                recalibrate(path, [x])
            continue
        name = model.graph.input[0].name
        new, report = recalibrate(path, [x, x[::-1].copy() * 2], population="pooled")
        found = frozen_layers(new)
        for node in model.graph.node:
            if node.op_type == "BatchNormalization":
                copy = onnx.load(path)
                copy.graph.output.append(helper.make_empty_tensor_value_info(node.input[0]))
                taps = [
                    v if node.input[0] == name else run(copy, {name: v}, [node.input[0]], optimize=False)[0]
                    for v in (x, x[::-1].copy() * 2)
                ]
                key = node.name if node.name in found else node.output[0]
                assert_statistics(found[key], *oracle(taps, "pooled"))
                layers += 1
        assert len(report.layers) == len(found)
    assert layers == 24


def real(name, layerwise):
    model = real_graph(name)
    (x,) = {entry.name for entry in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    rng = np.random.default_rng(0)
    data = [{x: rng.normal(size=(1, 3, 224, 224)).astype(np.float32)} for _ in range(2)]
    new, report = recalibrate(model, data, layerwise=layerwise)
    assert (report.population, report.batches) == ("pooled", 2)
    assert "fixes its batch axis at 1" in report.reason
    keys = layer_keys(model)
    taps = [keys[layer.name].input[0] for layer in report.layers]
    copy = onnx.ModelProto()
    copy.CopyFrom(new if layerwise else model)
    copy.graph.output.extend(helper.make_empty_tensor_value_info(tap) for tap in taps)
    values = [run(copy, feeds, taps, optimize=False) for feeds in data]
    layers = frozen_layers(new)
    for k, layer in enumerate(report.layers):
        mean, var = oracle([batch[k] for batch in values], "pooled")
        assert np.array_equal(np.flatnonzero(var == 0), layer.constant)
        np.testing.assert_allclose(layers[layer.name].mean, mean, rtol=2e-7, atol=1e-10 * abs(mean).max())
        np.testing.assert_allclose(layers[layer.name].var, var, rtol=2e-7)
    return len(report.layers)


@pytest.mark.filterwarnings("ignore:.*constant over the data")
def test_a_real_graph():
    assert real("shufflenet", layerwise=False) == 49


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*constant over the data")
@pytest.mark.parametrize(
    ("name", "count", "layerwise"),
    [("resnet50", 53, False), ("resnet50", 53, True), ("shufflenet", 49, True)],
)
def test_real_graphs(name, count, layerwise):
    """After the layerwise form, every layer has the statistics of what reaches it in the new model."""
    assert real(name, layerwise=layerwise) == count


@pytest.mark.parametrize(
    ("role", "value"), [("var", -1.0), ("var", np.nan), ("mean", np.nan), ("mean", np.inf)]
)
def test_impossible_statistics_are_healed(role, value):
    """They are what one recalibrates for: the measured ones do not depend on them, and there is no shift."""
    values, data = parameters(np.random.default_rng(1)), batches(shape=(3,))
    model = make([batch_norm(name="bn")], values)
    wanted, _ = recalibrate(model, data)
    values[role][1] = value
    broken = make([batch_norm(name="bn")], values)
    with pytest.raises(ValueError, match=f"'bn': {role} is"):
        frozen_layers(broken)
    new, report = recalibrate(broken, data)
    assert frozen_layers(new) == frozen_layers(wanted)
    assert report.layers[0].shift is None
    assert report.to_dict()["layers"][0]["mean_shift"] is None
    with pytest.raises(ValueError, match=r"blend: was 0\.5, wanted 1, since the old statistics of 'bn'"):
        recalibrate(broken, data, blend=0.5)
    values["gamma"][0] = np.inf
    with pytest.raises(ValueError, match="'bn': gamma is"):
        recalibrate(make([batch_norm(name="bn")], values), data)
