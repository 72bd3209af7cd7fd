"""`frozen_layers` and `replace_layers`: all batch normalizations of a model, read and put back."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import batchnorm as bn
import onnx_models
from batchnorm.onnx import affines, frozen_layers, load_frozen, replace_layers
from onnx_models import batch_norm, make, parameters, run

NEWEST = onnx.defs.onnx_opset_version()
ROLES = ("gamma", "beta", "mean", "var")


@pytest.fixture
def values(rng):
    return parameters(rng)


def layer_of(values, prefix="", **options):
    return bn.FrozenBatchNorm(**{role: values[prefix + role] for role in ROLES}, **options)


def other(layer, **options):
    """A layer with other parameters for the same channels."""
    changed = {role: getattr(layer, role) * 2 for role in ROLES}
    return bn.FrozenBatchNorm(**changed, **{"eps": layer.eps, "dtype": layer.dtype} | options)


def without(model, *names):
    """The bytes of a model but for the initializers of these names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in [t for t in copy.graph.initializer if t.name in names]:
        copy.graph.initializer.remove(tensor)
    return copy.SerializeToString()


# Reading


@pytest.mark.parametrize("opset", range(6, NEWEST + 1))
def test_every_opset(values, opset):
    """Inference is is_test=1 in opset 6, one output up to 13, and training_mode=0 from 14 on."""
    inference = {"is_test": 1} if opset == 6 else {}
    model = make([batch_norm(name="bn", **inference)], values, opset=opset)
    assert frozen_layers(model) == {"bn": layer_of(values)}

    training = make([batch_norm(name="bn", **inference)], values, opset=opset)
    (node,) = training.graph.node
    if opset == 6:
        node.attribute[0].i, sign = 0, "is_test=0"
    elif opset < 14:
        node.output.extend(["mean_out", "var_out"])
        sign = "3 outputs"
    else:
        node.attribute.append(helper.make_attribute("training_mode", 1))
        sign = "training_mode=1"
    with pytest.raises(ValueError, match=rf"1 of 1 .* 'bn': .*found training mode \({sign}\)"):
        frozen_layers(training)
    with pytest.warns(UserWarning, match="1 of 1 batch normalizations cannot be read: 'bn'"):
        assert frozen_layers(training, skip=True) == {}


def test_outputs_without_names_are_none(values):
    model = make([batch_norm(name="bn")], values, opset=9)
    model.graph.node[0].output.extend(["", ""])
    assert list(frozen_layers(model)) == ["bn"]


def test_opset_5_is_refused(values):
    with pytest.raises(ValueError, match="'bn': opset 6 or newer is wanted, found 5"):
        frozen_layers(make([batch_norm(name="bn")], values, opset=5))


def test_names_of_layers(rng):
    """The node's name; that of its first output if it has none, or one that another has too."""
    prefixes = ["a.", "b.", "c.", "d.", "e."]
    names = ["first", "", "twice", "twice", "c_out"]
    outputs = ["a_out", "b_out", "c_out", "d_out", "y"]
    inputs = ["x", *outputs]
    nodes = [batch_norm(*pair) for pair in zip(inputs, outputs, prefixes, names, strict=False)]
    values = {k: v for prefix in prefixes for k, v in parameters(rng, prefix=prefix).items()}
    layers = frozen_layers(make(nodes, values))
    # The last node has the name of another's output, so it is named by its own.
    assert list(layers) == ["first", "b_out", "c_out", "d_out", "y"]
    assert list(layers.values()) == [layer_of(values, prefix) for prefix in prefixes]


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_types_of_layers(rng, dtype, wanted):
    values = parameters(rng, dtype=dtype)
    layer = frozen_layers(make([batch_norm()], values, dtype=dtype))["y"]
    assert layer.dtype == wanted
    for role in ROLES:
        assert np.array_equal(getattr(layer, role), values[role].astype(wanted))


def test_types_may_differ_from_opset_15_on(rng):
    values = parameters(rng, dtype="float16")
    values["var"] = np.array([1e-9, 1, 1e9], np.float64)
    assert frozen_layers(make([batch_norm()], values, dtype="float16"))["y"].var.tolist() == [1e-9, 1, 1e9]


def test_epsilon(values):
    assert frozen_layers(make([batch_norm(epsilon=0.25)], values))["y"].eps == 0.25
    assert frozen_layers(make([batch_norm()], values))["y"].eps == np.float32(1e-5)
    model = make([batch_norm()], values)
    model.graph.node[0].attribute.append(helper.make_attribute("epsilon", "tiny"))
    with pytest.raises(ValueError, match="epsilon of one float is wanted, found b'tiny'"):
        frozen_layers(model)


CONSTANTS = {
    "ConstantOfShape": [helper.make_node("ConstantOfShape", ["three"], ["mean"])],
    "ConstantOfShape with a value": [
        helper.make_node(
            "ConstantOfShape", ["three"], ["mean"], value=numpy_helper.from_array(np.float32([2.5]))
        )
    ],
    "Expand": [helper.make_node("Expand", ["one", "three"], ["mean"])],
    "Expand of CastLike": [
        helper.make_node("Constant", [], ["w"], value_int=2),
        helper.make_node("CastLike", ["w", "one"], ["v"]),
        helper.make_node("Expand", ["v", "three"], ["mean"]),
    ],
    "CastLike x": [
        helper.make_node("Constant", [], ["w"], value_ints=[1, 2, 3]),
        helper.make_node("CastLike", ["w", "x"], ["mean"]),
    ],
    "Shape of x": [
        helper.make_node("Shape", ["x"], ["c"], start=1, end=2),
        helper.make_node("Expand", ["one", "c"], ["mean"]),
    ],
    "Shape of an initializer": [
        helper.make_node("Shape", ["gamma"], ["c"]),
        helper.make_node("Expand", ["one", "c"], ["mean"]),
    ],
    "Unsqueeze": [
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        helper.make_node("Constant", [], ["w"], value_float=4.0),
        helper.make_node("Unsqueeze", ["w", "zero"], ["v"]),
        helper.make_node("Expand", ["v", "three"], ["mean"]),
    ],
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_parameters_behind_constants(rng, values, name):
    """The layer computes what ONNX Runtime does, so the same parameter was found."""
    del values["mean"]
    extra = {"three": np.array([3]), "one": np.array([1.5], np.float32)}
    model = make([*CONSTANTS[name], batch_norm()], values | extra)
    onnx.checker.check_model(model, full_check=True)
    (layer,) = frozen_layers(model).values()
    x = rng.normal(size=(5, 3)).astype(np.float32)
    assert np.allclose(layer(x), run(model, {"x": x})[0], rtol=1e-5, atol=1e-5)
    assert load_frozen(model) == layer


@pytest.mark.parametrize(
    ("node", "match"),
    [
        (helper.make_node("ConstantOfShape", ["huge"], ["mean"]), r"at most 268435456 values are made"),
        (
            helper.make_node("ConstantOfShape", ["large"], ["mean"]),
            r"mean .* at most 16777216 values is",
        ),
        (helper.make_node("Expand", ["one", "huge"], ["mean"]), r"Expand cannot be evaluated: .* are made"),
        (helper.make_node("ConstantOfShape", ["negative"], ["mean"]), r"shape \(-3,\) wanted"),
        (helper.make_node("ConstantOfShape", ["one"], ["mean"]), "wanted a list of integers"),
        (helper.make_node("Shape", ["x"], ["mean"]), "made by the Shape of 'x', whose sizes vary"),
        (helper.make_node("Shape", ["what"], ["mean"]), "made by the Shape of 'what', whose rank varies"),
        (helper.make_node("CastLike", ["one", "what"], ["mean"]), "the type of 'what', which is not known"),
    ],
)
def test_constants_that_are_refused(values, node, match):
    del values["mean"]
    extra = {"huge": np.array([2**60]), "large": np.array([2**27]), "negative": np.array([-3])}
    model = make([node, batch_norm()], values | extra | {"one": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=match):
        frozen_layers(model)


def test_initializers_are_inputs_too_in_ir_3(values):
    model = make([batch_norm()], values, opset=9, ir=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frozen_layers(model) == {"y": layer_of(values)}


def test_an_initializer_that_a_caller_may_override_gives_a_warning(values):
    model = make([batch_norm(name="bn")], values)
    model.graph.input.append(helper.make_tensor_value_info("var", TensorProto.FLOAT, [3]))
    with pytest.warns(UserWarning, match="a caller may give others: 'var' of 'bn'$"):
        assert frozen_layers(model) == {"bn": layer_of(values)}


def elsewhere(values):
    """One batch norm in the main graph, one in a branch of an If, one in a function."""
    branch = helper.make_graph(
        [batch_norm("x", "inner", name="branch bn")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["n", 3])],
    )
    same = helper.make_graph([helper.make_node("Identity", ["x"], ["same"])], "same", [], [branch.output[0]])
    same.output[0].name = "same"
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["z"], name="choice", then_branch=branch, else_branch=same),
        helper.make_node("Scaled", ["z", *ROLES], ["w"], domain="acme"),
        batch_norm("w", name="main bn"),
    ]
    model = make(nodes, values)
    imports = [helper.make_opsetid("", 15)]
    body = [helper.make_node("BatchNormalization", ["a", *ROLES], ["b"], name="function bn")]
    model.functions.append(helper.make_function("acme", "Scaled", ["a", *ROLES], ["b"], body, imports))
    model.opset_import.append(helper.make_opsetid("acme", 1))
    onnx.checker.check_model(model)
    return model


def test_all_that_cannot_be_read_is_listed(values):
    model = elsewhere(values)
    model.graph.node.insert(0, batch_norm("x", "lost", "no."))
    with pytest.raises(ValueError, match=r"3 of 4 .*; skip=True leaves them out") as caught:
        frozen_layers(model)
    for reason in (
        "'lost': gamma ('no.gamma') is an input, but a constant is wanted",
        "'branch bn': is in then_branch of If 'choice', not in the main graph",
        "'function bn': is in the function Scaled, not in the main graph",
    ):
        assert reason in str(caught.value)
    with pytest.warns(UserWarning, match=r"3 of 4 batch normalizations cannot be read: .*branch bn"):
        assert frozen_layers(model, skip=True) == {"main bn": layer_of(values)}


def test_what_makes_no_layer_is_listed(values):
    values["var"] = np.array([1, -1, 1], np.float32)
    with pytest.raises(ValueError, match="'y': var is -1 in channel 1"):
        frozen_layers(make([batch_norm()], values))


def test_two_nodes_that_compute_one_value(values):
    with pytest.raises(ValueError, match="'y' is computed twice"):
        frozen_layers(make([batch_norm(), batch_norm()], values))


@pytest.mark.parametrize("path", onnx_models.GOLDEN, ids=lambda path: path.stem)
def test_models_of_pytorch(path):
    """Each has one batch norm; put back as it is, not a byte changes."""
    if path.stem.startswith("training_mode"):
        with pytest.raises(ValueError, match="found training mode"):
            frozen_layers(path)
        return
    layers = frozen_layers(path)
    assert list(layers.values()) == [load_frozen(path)]
    assert replace_layers(path, layers).SerializeToString() == path.read_bytes()


@pytest.mark.parametrize("name", onnx_models.NORMALIZATIONS)
def test_real_graphs(name):
    """As they are shipped: in IR 3, with parameters by ConstantOfShape."""
    path = onnx_models.LIGHT / f"light_{name}.onnx"
    layers = frozen_layers(path)
    assert len(layers) == onnx_models.NORMALIZATIONS[name]
    model = onnx.load(path)
    assert replace_layers(path, layers).SerializeToString() == model.SerializeToString()

    changed = {key: other(layer) for key, layer in layers.items()}
    result = replace_layers(path, changed)
    assert frozen_layers(result) == changed
    assert len(result.graph.node) == len(model.graph.node)
    onnx.checker.check_model(result)


# Putting back


def test_only_what_changed_is_written(values):
    """An initializer that this node alone reads is changed in place."""
    model = make([batch_norm(name="bn")], values)
    before = model.SerializeToString()
    layer = layer_of(values)
    changed = bn.FrozenBatchNorm(layer.mean + 1, layer.var, layer.gamma, layer.beta, eps=layer.eps)
    result = replace_layers(model, {"bn": changed})
    assert model.SerializeToString() == before
    assert frozen_layers(result) == {"bn": changed}
    assert without(result, "mean") == without(model, "mean")
    assert without(result, "mean") != result.SerializeToString()
    assert replace_layers(model, {}).SerializeToString() == before


def test_fingerprints_of_our_exports_stay_true(values):
    """`load_frozen` compares the fingerprint of a model with its parameters."""
    layer = layer_of(values)
    model = layer.to_onnx()
    (name,) = frozen_layers(model)
    assert load_frozen(replace_layers(model, {name: other(layer)})) == other(layer)
    assert replace_layers(model, {name: layer}).SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize("raw", [True, False])
def test_epsilon_alone(values, raw):
    model = make([batch_norm(name="bn")], values)
    if not raw:
        for tensor in model.graph.initializer:
            tensor.CopyFrom(helper.make_tensor(tensor.name, 1, [3], values[tensor.name]))
    result = replace_layers(model, {"bn": layer_of(values, eps=0.5)})
    assert frozen_layers(result)["bn"].eps == 0.5
    del result.graph.node[0].attribute[:]
    assert result.SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize("ir", [3, 8])
def test_shared_parameters_become_two(rng, ir):
    """Each node gets its own, named after the old one and the node; in IR 3 it is an input too."""
    values = parameters(rng)
    nodes = [batch_norm("x", "h", name="a"), batch_norm("h", "y", name="b")]
    model = make(nodes, values, ir=ir, opset=9)
    layer = layer_of(values)
    a, b = (
        bn.FrozenBatchNorm(layer.mean + shift, layer.var, layer.gamma, layer.beta, eps=layer.eps)
        for shift in (1, 2)
    )
    result = replace_layers(model, {"a": a, "b": b})
    assert frozen_layers(result) == {"a": a, "b": b}
    names = [tensor.name for tensor in result.graph.initializer]
    assert names == [*ROLES, "mean/a", "mean/b"]
    assert [entry.name for entry in result.graph.input] == ["x", *(names if ir == 3 else [])]
    x = rng.normal(size=(4, 3)).astype(np.float32)
    assert np.allclose(run(result, {"x": x})[0], b(a(x)), rtol=1e-5, atol=1e-5)
    assert frozen_layers(replace_layers(model, {"b": b})) == {"a": layer, "b": b}


def test_a_new_name_is_a_free_one(values):
    nodes = [batch_norm("x", "h", name="a"), batch_norm("h", "mean/a", name="b")]
    model = make([*nodes, helper.make_node("Identity", ["mean/a"], ["y"])], values)
    result = replace_layers(model, {"a": other(layer_of(values))})
    assert [tensor.name for tensor in result.graph.initializer][4:] == [
        "gamma/a", "beta/a", "mean/a_2", "var/a"
    ]  # fmt: skip
    assert frozen_layers(result)["a"] == other(layer_of(values))


def test_a_parameter_that_is_an_output_keeps_its_value(values):
    model = make([batch_norm(name="bn")], values)
    model.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, [3]))
    result = replace_layers(model, {"bn": other(layer_of(values))})
    old = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}["mean"]
    assert np.array_equal(old, values["mean"])
    assert frozen_layers(result)["bn"] == other(layer_of(values))


def test_parameters_keep_the_type_of_the_model(rng):
    model = make([batch_norm(name="bn")], parameters(rng, dtype="float16"), dtype="float16")
    layer = bn.FrozenBatchNorm([0.1, 0.2, 0.3], [1, 2, 3])
    result = replace_layers(model, {"bn": layer})
    assert {tensor.data_type for tensor in result.graph.initializer} == {TensorProto.FLOAT16}
    assert np.array_equal(frozen_layers(result)["bn"].mean, layer.mean.astype(np.float16).astype(np.float32))


def test_statistics_that_make_no_layer_can_be_replaced(values):
    broken = values | {"var": np.array([1, -1, np.nan], np.float32)}
    result = replace_layers(make([batch_norm(name="bn")], broken), {"bn": layer_of(values)})
    assert frozen_layers(result) == {"bn": layer_of(values)}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mean": [1e6, 0, 0]}, "'bn': mean is beyond float16, in which the model holds it, in channel 0"),
        ({"var": [1, 1e-9, 1]}, "'bn': var is positive, but 0 in float16, the model's type, in channel 1"),
        ({"mean": [0, 0], "var": [1, 1]}, r"layers\['bn'\]: 2 channels on axis 1, wanted 3 on axis 1"),
        ({"channel_axis": -1}, r"layers\['bn'\]: 3 channels on axis -1, wanted 3 on axis 1"),
    ],
)
def test_layers_that_do_not_fit(rng, changes, match):
    model = make([batch_norm(name="bn")], parameters(rng, dtype="float16"), dtype="float16")
    arguments = {"mean": [0, 0, 0], "var": [1, 1, 1]} | changes
    with pytest.raises(ValueError, match=match):
        replace_layers(model, {"bn": bn.FrozenBatchNorm(**arguments)})


def test_names_and_things_that_are_no_layers(values):
    model = make([batch_norm(name="bn")], values)
    with pytest.raises(ValueError, match="layers: 'bm' is no batch normalization of model, which has 'bn'"):
        replace_layers(model, {"bm": layer_of(values)})
    with pytest.raises(TypeError, match=r"layers\['bn'\]: was ndarray, wanted a FrozenBatchNorm"):
        replace_layers(model, {"bn": np.zeros(3)})  # type: ignore[dict-item]


# Pairs of Mul and Add


def test_pairs_of_mul_and_add(rng):
    scale, shift = rng.normal(size=(2, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["scale", "x"], ["a"], name="pair"),
        helper.make_node("Add", ["a", "shift"], ["b"]),
        helper.make_node("Mul", ["b", "scale"], ["c"], name="alone"),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Mul", ["d", "scale"], ["e"], name="used twice"),
        helper.make_node("Add", ["e", "shift"], ["f"]),
        helper.make_node("Add", ["e", "f"], ["g"]),
        helper.make_node("Mul", ["g", "given"], ["h"], name="by an input"),
        helper.make_node("Add", ["h", "shift"], ["i"]),
        helper.make_node("Mul", ["i", "open"], ["j"], name="by what a caller may override"),
        helper.make_node("Add", ["j", "shift"], ["k"]),
        helper.make_node("Mul", ["k", "scale"], ["l"]),
        helper.make_node("Add", ["l", "shift"], ["y"]),
    ]
    constants = {"scale": scale, "shift": shift, "open": scale}
    model = make(nodes, constants, x=("n", 3, 4, 4))
    for name in ("given", "open"):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 1, 1]))
    found = affines(model)
    assert {key: (pair.x, pair.y) for key, pair in found.items()} == {"pair": ("x", "b"), "l": ("k", "y")}
    for pair in found.values():
        assert np.array_equal(pair.scale, scale)
        assert np.array_equal(pair.shift, shift)
    assert frozen_layers(model) == {}


@pytest.mark.parametrize("name", onnx_models.NORMALIZATIONS)
def test_pairs_in_real_graphs(name):
    """Caffe2 wrote γ and β of two of them as a pair behind each batch norm."""
    count = onnx_models.NORMALIZATIONS[name] if name in ("densenet121", "inception_v2") else 0
    assert len(affines(onnx_models.LIGHT / f"light_{name}.onnx")) == count


def test_layers_that_are_no_mapping(values):
    with pytest.raises(TypeError, match="layers: was NoneType, wanted a mapping of names to layers"):
        replace_layers(make([batch_norm()], values), None)  # type: ignore[arg-type]
