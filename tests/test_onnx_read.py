"""Where `load_frozen` finds parameters in models of other programs, and where it must not look for them."""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import batchnorm as bn
from batchnorm.onnx import load_frozen
from test_onnx import bound

ROLES = ("gamma", "beta", "mean", "var")
MEAN = np.array([1.5, -2.0, 0.25], np.float32)
LAYER = bn.FrozenBatchNorm(MEAN, [1, 1, 1], [1, 1, 1], [1, 1, 1])


def model_of(*nodes, mean="mean", opset=15, extra=(), sparse=(), imports=(), channels=3):
    """A model that normalizes x; ones, but for the mean, which `nodes` and `extra` give."""
    ones = [numpy_helper.from_array(np.ones(channels, np.float32), name) for name in ROLES if name != "mean"]
    inputs = ["x", "gamma", "beta", mean, "var"]
    graph = helper.make_graph(
        [*nodes, helper.make_node("BatchNormalization", inputs, ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", channels])],
        [*ones, *(numpy_helper.from_array(values, name) for name, values in extra)],
        sparse_initializer=list(sparse),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in imports)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def constant(**value):
    return helper.make_node("Constant", [], ["mean"], **value)


def sparse(indices, shape=(3,), values=MEAN, name="mean"):
    return helper.make_sparse_tensor(
        numpy_helper.from_array(np.asarray(values), name), numpy_helper.from_array(np.array(indices)), shape
    )


def node(operator, *inputs, output="mean", **attributes):
    return helper.make_node(operator, inputs, [output], **attributes)


W = ("w", MEAN)
SHAPE = ("shape", np.array([-1], np.int64))
CONSTANTS = {
    "value": model_of(constant(value=numpy_helper.from_array(MEAN))),
    "value_floats": model_of(constant(value_floats=MEAN.tolist())),
    "value_float": model_of(
        node("Constant", output="w", value_float=1.5),
        node("Reshape", "w", "shape"),
        extra=[SHAPE],
        channels=1,
    ),
    "value_int": model_of(
        node("Constant", output="w", value_float=1.5),
        node("Constant", output="one", value_int=1),
        node("Reshape", "one", "shape", output="size"),
        node("Reshape", "w", "size"),
        extra=[SHAPE],
        channels=1,
    ),
    "value_ints": model_of(
        node("Constant", output="w", value_ints=[2, -3, 4]), node("Cast", "w", to=TensorProto.FLOAT)
    ),
    "sparse_value": model_of(constant(sparse_value=sparse([0, 1, 2]))),
    "sparse_value of rank 2": model_of(
        node("Constant", output="w", sparse_value=sparse([[2, 0], [0, 0]], (3, 1), MEAN[:2])),
        node("Reshape", "w", "shape"),
        extra=[SHAPE],
    ),
    "sparse initializer": model_of(sparse=[sparse([2, 0], values=MEAN[:2])]),
    "Identity": model_of(node("Identity", "w"), extra=[W]),
    "Identity of Identity": model_of(node("Identity", "w", output="v"), node("Identity", "v"), extra=[W]),
    "Identity of Constant": model_of(
        node("Constant", output="w", value_floats=MEAN.tolist()), node("Identity", "w")
    ),
    "Cast": model_of(node("Cast", "w", to=TensorProto.FLOAT), extra=[("w", MEAN.astype(np.float64) + 1e-12)]),
    "Cast of Cast": model_of(
        node("Cast", "w", output="v", to=TensorProto.FLOAT16),
        node("Cast", "v", to=TensorProto.FLOAT),
        extra=[("w", MEAN + np.float32(1e-4))],
    ),
    "Reshape": model_of(node("Reshape", "w", "shape"), extra=[("w", MEAN.reshape(1, 3)), SHAPE]),
    "Reshape with 0": model_of(
        node("Constant", output="shape", value_ints=[0]),
        node("Reshape", "w", "shape"),
        extra=[("w", MEAN.reshape(3, 1, 1))],
    ),
    "domain by its other name": model_of(
        helper.make_node("Identity", ["w"], ["mean"], domain="ai.onnx"), extra=[W]
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(rng, name):
    """The layer computes what ONNX Runtime does, so the same parameters were found."""
    model = CONSTANTS[name]
    layer = load_frozen(model)
    assert layer.mean.any()
    x = rng.normal(size=(20, layer.channels)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.all(np.abs(layer(x) - session.run(None, {"x": x})[0]) <= bound(layer, x))


def test_equal_parameters_by_pytorch():
    """Its older exporter writes equal parameters once, and Identity for the others."""
    nodes = [helper.make_node("Identity", ["w"], [name]) for name in ROLES[1:]]
    nodes.append(helper.make_node("BatchNormalization", ["x", "w", *ROLES[1:]], ["y"]))
    ones = numpy_helper.from_array(np.ones(3, np.float32), "w")
    graph = helper.make_graph(nodes, "g", [], [], [ones])
    assert load_frozen(helper.make_model(graph)) == bn.FrozenBatchNorm([1, 1, 1], [1, 1, 1], 1, 1)


NOT_CONSTANT = {
    "computed by Neg": model_of(node("Neg", "w"), extra=[W]),
    r"mean \('v'\) is computed by Neg": model_of(
        node("Neg", "w", output="v"), node("Identity", "v"), extra=[W]
    ),
    r"mean \('x'\) is an input": model_of(node("Identity", "x")),
    r"computed by com\.acme\.Constant": model_of(
        helper.make_node("Constant", [], ["mean"], domain="com.acme", value_floats=[1, 1, 1]),
        imports=["com.acme"],
    ),
    "is used before it is computed": model_of(node("Identity", "v"), node("Identity", "mean", output="v")),
    "Constant with value_strings": model_of(constant(value_strings=["a"])),
    "Constant with no value": model_of(constant()),
    "Cast cannot be evaluated: to=8": model_of(node("Cast", "w", to=TensorProto.STRING), extra=[W]),
    "Reshape cannot be evaluated": model_of(
        node("Reshape", "w", "shape"), extra=[W, ("shape", np.array([2, 2]))]
    ),
    r"damaged: index 3 is out of bounds": model_of(constant(sparse_value=sparse([0, 1, 3]))),
    r"damaged: negative index": model_of(constant(sparse_value=sparse([0, 1, -1]))),
    r"damaged: .*reshape": model_of(
        constant(value=TensorProto(dims=[4], data_type=TensorProto.FLOAT, raw_data=MEAN.tobytes()))
    ),
    "of floats is wanted, found int64": model_of(constant(value_ints=[1, 2, 3])),
    r"mean of shape \(channels,\) is wanted, found .*mean \(\)": model_of(constant(value_float=1.0)),
    r"mean of shape .*mean \(3, 1\)": model_of(extra=[("mean", MEAN.reshape(3, 1))]),
    r"mean of shape .*mean \(1,\)": model_of(extra=[("mean", MEAN[:1])]),
}


@pytest.mark.parametrize("match", NOT_CONSTANT)
def test_what_is_no_constant_of_floats(match):
    with pytest.raises(ValueError, match=f"^model: .*{match}"):
        load_frozen(NOT_CONSTANT[match])


def test_only_the_operator_of_onnx_is_read():
    other = helper.make_node("BatchNormalization", ["y", *ROLES], ["z"], domain="com.acme")
    model = model_of(extra=[("mean", MEAN)], imports=["com.acme"])
    model.graph.node.append(other)
    assert load_frozen(model) == LAYER
    del model.graph.node[0]
    with pytest.raises(ValueError, match=r"one BatchNormalization is wanted, found 1 com\.acme\.BatchNormal"):
        load_frozen(model)
    model.graph.node[0].domain = "ai.onnx"
    assert load_frozen(model) == LAYER


def test_not_by_channels():
    model = model_of(extra=[("mean", MEAN)])
    model.graph.node[0].attribute.append(helper.make_attribute("spatial", 1))
    assert load_frozen(model) == LAYER
    model.graph.node[0].attribute[0].i = 0
    with pytest.raises(ValueError, match="BatchNormalization by channels wanted, found spatial=0"):
        load_frozen(model)


def test_operators_of_other_domains_are_no_exact_mode():
    model = LAYER.to_onnx(mode="exact", rank=2)
    model.graph.node[4].domain = "com.acme"
    with pytest.raises(ValueError, match=r"by a node Sub wanted, found com\.acme\.Sub"):
        load_frozen(model)


# Data in other files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose parameters are all in weights.bin; and the working directory with another such file."""
    place = tmp_path / "model"
    place.mkdir()
    options = {"all_tensors_to_one_file": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(model_of(extra=[("mean", MEAN)]), place / "bn.onnx", save_as_external_data=True, **options)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights.bin").write_bytes(bytes(len((place / "weights.bin").read_bytes())))
    monkeypatch.chdir(elsewhere)
    return place


def edit(path, **entries):
    """Change entries of the external data of every tensor."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = str(entries.get(entry.key, entry.value))
    path.write_bytes(model.SerializeToString())


def test_data_beside_the_model(folder, monkeypatch):
    assert load_frozen(folder / "bn.onnx") == load_frozen(str(folder / "bn.onnx")) == LAYER
    assert load_frozen(onnx.load(folder / "bn.onnx")) == LAYER
    monkeypatch.chdir(folder)
    assert load_frozen("bn.onnx") == LAYER
    (folder / "sub").mkdir()
    shutil.move("weights.bin", "sub/weights.bin")
    edit(folder / "bn.onnx", location="sub/../sub/weights.bin")
    assert load_frozen("bn.onnx") == LAYER


def test_data_that_were_not_loaded(folder):
    """The working directory has a file of that name, which is another model's."""
    proto = onnx.load(folder / "bn.onnx", load_external_data=False)
    for model in (proto, (folder / "bn.onnx").read_bytes()):
        with pytest.raises(
            ValueError,
            match=r"^model: the data of gamma \('gamma'\) are in the file "
            r"'weights\.bin', which was not loaded; give the path of the model$",
        ):
            load_frozen(model)


def test_data_of_a_constant(folder):
    model = onnx.load(folder / "bn.onnx", load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "mean")
    model.graph.node.insert(0, constant(value=tensor))
    model.graph.initializer.remove(tensor)
    with pytest.raises(ValueError, match=r"gamma.*weights"):
        load_frozen(model)
    (folder / "bn.onnx").write_bytes(model.SerializeToString())
    assert load_frozen(folder / "bn.onnx") == LAYER


def test_data_that_are_not_asked_for_are_not_read(folder):
    model = onnx.load(folder / "bn.onnx", load_external_data=False)
    other = model.graph.initializer.add()
    other.CopyFrom(model.graph.initializer[0])
    other.name = "other"
    other.external_data[0].value = "huge.bin"
    (folder / "bn.onnx").write_bytes(model.SerializeToString())
    assert load_frozen(folder / "bn.onnx") == LAYER


@pytest.mark.parametrize("kind", ["..", "absolute", "symbolic link", "symbolic link to a folder"])
def test_data_outside_the_folder_of_the_model(folder, kind):
    outside = folder.parent / "weights.bin"
    shutil.move(folder / "weights.bin", outside)
    if kind == "..":
        edit(folder / "bn.onnx", location="../weights.bin")
    elif kind == "absolute":
        edit(folder / "bn.onnx", location=outside)
    elif kind == "symbolic link":
        (folder / "weights.bin").symlink_to(outside)
    else:
        (folder / "sub").symlink_to(folder.parent)
        edit(folder / "bn.onnx", location="sub/weights.bin")
    with pytest.raises(ValueError, match=r"bn\.onnx: the data of gamma .* outside the folder of the model"):
        load_frozen(folder / "bn.onnx")


@pytest.mark.parametrize("kind", ["nothing", "folder", "pipe", "loop"])
def test_data_that_are_missing(folder, kind):
    path = folder / "weights.bin"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to("weights.bin")
    with pytest.raises(FileNotFoundError, match=r"bn\.onnx: .*'weights\.bin', but there is no such file in"):
        load_frozen(folder / "bn.onnx")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"offset": 10**9}, r"from 1000000000 on, but it has"),
        ({"offset": -1}, r"from -1 on, but it has"),
        ({"length": 10**15}, r"1000000000000000 bytes from \d+ on, but it has"),
        ({"offset": "x"}, "invalid literal"),
        ({"length": 8}, "is damaged: cannot reshape"),
    ],
)
def test_damaged_places_of_data(folder, entries, match):
    edit(folder / "bn.onnx", **entries)
    with pytest.raises(ValueError, match=match):
        load_frozen(folder / "bn.onnx")
