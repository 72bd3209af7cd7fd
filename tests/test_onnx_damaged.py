"""Damage to ONNX models that mutating them found: each is named in a ValueError."""

from __future__ import annotations

import resource
import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.onnx import affines, frozen_layers, lint
from batchnorm.onnx.graph import Graph
from onnx_hostile import long_vectors, node, with_mean
from onnx_models import batch_norm, make, parameters


def attribute(name, **value):
    """An attribute, of any type, for a node that wants another."""
    return onnx.AttributeProto(name=name, **value)


def with_attribute(operator, *inputs, name, **value):
    made = node(operator, *inputs, output="mean")
    made.attribute.append(attribute(name, **value))
    return with_mean(made, constants={"w": np.ones(3, np.float32), "axes": np.array([2**40])})


SPARSE = helper.make_sparse_tensor(
    numpy_helper.from_array(np.ones(1, np.float32)), numpy_helper.from_array(np.array([0])), [3]
)
DAMAGED = {
    "Shape has 0 inputs": with_mean(node("Shape", output="mean")),
    "CastLike has 1 inputs": with_mean(node("CastLike", "w", output="mean"), constants={"w": np.ones(3)}),
    "Identity cannot be evaluated": with_mean(node("Identity", output="mean")),
    "is made by a Shape from b'a' to None": with_attribute("Shape", "x", name="start", type="STRING", s=b"a"),
    "is made by a Shape from 0 to 1.5": with_attribute("Shape", "x", name="end", type="FLOAT", f=1.5),
    "is a Constant whose value_float is damaged": with_attribute(
        "Constant", name="value_float", type="SPARSE_TENSOR", sparse_tensor=SPARSE
    ),
    "Unsqueeze cannot be evaluated: .* too large": with_mean(
        node("Unsqueeze", "w", "axes", output="mean"),
        constants={"w": np.ones(3, np.float32), "axes": np.array([2**40])},
    ),
}


@pytest.mark.parametrize("match", DAMAGED)
def test_damaged_constants(match):
    with pytest.raises(ValueError, match=match):
        frozen_layers(DAMAGED[match])
    assert [finding.name for finding in lint(DAMAGED[match])] == ["damaged"]


@pytest.mark.parametrize("field", ["name", "op_type", "output", "attribute"])
def test_names_that_are_not_text(field):
    """Protobuf gives them as bytes."""
    model = make([batch_norm(name="text", y="text", text=1)], parameters(np.random.default_rng(0)))
    changed = model.graph.node[0]
    for other in {"name", "output", "attribute"} - {field}:
        changed.ClearField(other)
    if field == "op_type":
        changed.op_type = "text"
    with pytest.raises(ValueError, match=r"model: not an ONNX model: b'te\\xfft' is not UTF-8"):
        Graph(model.SerializeToString().replace(b"text", b"te\xfft"))


def test_an_affine_without_outputs():
    add = node("Add", "m", "w", output="y")
    model = make([node("Mul", "x", "w", output="m"), add], {"w": np.ones(3, np.float32)})
    assert list(affines(model)) == ["m"]
    del model.graph.node[1].output[:]
    assert affines(model)["m"].y == ""
    del model.graph.node[0].output[:]
    assert affines(model) == {}


def test_signaling_nans_are_found_without_a_warning():
    values = np.array([0x7F800001, 0, 0], np.uint32).view(np.float32)
    model = with_mean(constants={"mean": values})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [finding.name for finding in lint(model)] == ["non-finite"]
        with pytest.raises(ValueError, match="mean is NaN in channel 0"):
            frozen_layers(model)


def test_a_sparse_constant_is_not_made_at_any_size():
    model = with_mean()
    values = TensorProto(name="mean", dims=[1], data_type=1, raw_data=bytes(4))
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0])), [2**26 + 1])
    )
    with pytest.raises(ValueError, match="at most 67108864 values are made"):
        frozen_layers(model)


def test_one_value_broadcast_is_cast_without_a_copy():
    sizes = {"s": np.array([2**28])}
    cast = [node("ConstantOfShape", "s", output="b"), node("Cast", "b", output="mean", to=TensorProto.DOUBLE)]
    values = Graph(with_mean(*cast, constants=sizes)).constant("mean", "mean")
    assert (values.shape, values.dtype, values.strides) == ((2**28,), np.float64, (0,))


@pytest.mark.parametrize("index", range(4))
def test_shapes_of_long_vectors_take_no_memory(index):
    """Onnx would make an object for each of the 2^24 entries."""
    name, model = list(long_vectors(2**24))[index]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shapes = Graph(model).shapes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, name  # KiB
    assert shapes["gamma"] == [3]


def test_values_of_shapes_are_followed():
    """Where no vector is long: a Reshape to sizes that are computed from another shape."""
    nodes = [
        node("Shape", "x", output="sizes"),
        node("Gather", "sizes", "zero", output="first"),
        node("Concat", "first", "last", output="shape", axis=0),
        node("Reshape", "x", "shape", output="h"),
        batch_norm("h"),
    ]
    values = parameters(np.random.default_rng(0)) | {"zero": np.array([0]), "last": np.array([-1])}
    assert Graph(make(nodes, values, x=(5, 3, 1))).shapes["h"] == [5, 3]
