"""Frozen whitening layers in ONNX: ONNX Runtime is as close as promised, and what is written is read back."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import batchnorm as bn
import cases
from batchnorm.onnx import load_frozen
from test_frozen_whitening import layer_of

NEWEST = onnx.defs.onnx_opset_version()
NEWEST_IN_RUNTIME = 26  # of ONNX Runtime 1.31
HALF_ULP = {"float32": 2.0**-24, "float64": 2.0**-53}
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
LAYOUTS = pytest.mark.parametrize(
    ("groups", "layout"),
    [
        (1, cases.Layout((9, 17))),
        (3, cases.Layout((9, 18))),
        (1, cases.Layout((2, 5, 40))),
        (1, cases.Layout((2, 17, 7, 9))),
        (4, cases.Layout((2, 32, 7, 9))),
        (3, cases.Layout((2, 3, 4, 5, 3))),
        (2, cases.Layout((2, 4, 3, 2, 3, 2))),
        (1, cases.Layout((9, 17), channel_axis=-1)),
        (2, cases.Layout((6, 17), channel_axis=0)),
        (1, cases.Layout((6, 17), channel_axis=-2)),
        (1, cases.Layout((2, 7, 9, 17), channel_axis=-1)),
        (2, cases.Layout((2, 7, 9, 18), channel_axis=-1)),
        (5, cases.Layout((2, 3, 5, 7), channel_axis=2)),
        (1, cases.Layout((6, 4, 3), channel_axis=-3)),
        (1, cases.Layout((1, 64, 33, 31))),
        (1, cases.Layout((0, 5))),
        (5, cases.Layout((0, 5))),
        (1, cases.Layout((0, 5, 4, 4))),
    ],
    ids=str,
)
# Each form of the graph: groups, rank, dtype, channel axis, and its operators.
FORMS = [
    (1, 2, "float32", 1, ["Sub", "Gemm"]),
    (1, 2, "float64", -1, ["Sub", "Gemm"]),
    (1, 2, "float32", 0, ["Transpose", "Sub", "Gemm", "Transpose"]),
    (1, 4, "float32", 1, ["Sub", "Conv"]),
    (2, 3, "float32", 1, ["Sub", "Conv"]),
    (2, 4, "float32", -1, ["Transpose", "Sub", "Conv", "Transpose"]),
    (2, 2, "float32", 1, ["Sub", "Reshape", "Einsum", "Reshape", "Add"]),
    (1, 4, "float64", -1, ["Sub", "Reshape", "Einsum", "Reshape", "Add"]),
    (2, 4, "float64", 1, ["Transpose", "Sub", "Reshape", "Einsum", "Reshape", "Add", "Transpose"]),
]


def run(model, *tensors):
    """Checks the model and runs it in ONNX Runtime, all optimizations on (its default)."""
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in (*session.get_inputs(), *session.get_outputs())] == ["x", "y"]
    results = [session.run(None, {"x": x})[0] for x in tensors]
    assert [(y.dtype, y.shape) for y in results] == [(x.dtype, x.shape) for x in tensors]
    return results


def bound(frozen, x):
    """The documented bound on the difference of ONNX Runtime from ours."""
    size = frozen.channels // frozen.groups
    matrix, mean, bias = (getattr(frozen, name).astype(np.float64) for name in ("matrix", "mean", "bias"))
    centred = np.abs(np.moveaxis(x, frozen.channel_axis, -1).astype(np.float64) - mean)
    by_group = centred.reshape(*centred.shape[:-1], frozen.groups, size)
    sums = np.einsum("...gi,goi->...go", by_group, np.abs(matrix).reshape(-1, size, size))
    limit = 2 * (size + 2) * HALF_ULP[frozen.dtype.name] * (sums.reshape(centred.shape) + np.abs(bias))
    return np.moveaxis(limit, -1, frozen.channel_axis)


def assert_close(frozen, x, y):
    assert np.all(np.abs(y.astype(np.float64) - frozen(x)) <= bound(frozen, x))


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_it_is_as_close_as_promised(rng, groups, layout, dtype, mean):
    """Also where the mean is large: it is subtracted first, so nothing cancels."""
    frozen = layer_of(rng, layout.channels, groups, channel_axis=layout.channel_axis, dtype=dtype)
    frozen = bn.FrozenWhitening(
        frozen.matrix, frozen.mean + mean, frozen.bias, channel_axis=layout.channel_axis, dtype=dtype
    )
    x = layout.normal(rng, dtype, frozen.mean, 3.0)
    (y,) = run(frozen.to_onnx(rank=x.ndim), x)
    assert_close(frozen, x, y)


@pytest.mark.parametrize(("groups", "rank", "dtype", "axis", "operators"), FORMS)
def test_the_forms(rng, groups, rank, dtype, axis, operators):
    frozen = layer_of(rng, 6, groups, channel_axis=axis, dtype=dtype)
    model = frozen.to_onnx(rank=rank)
    assert [node.op_type for node in model.graph.node] == operators
    sizes = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [6 if k == axis % rank else 0 for k in range(rank)]
    shapes = [[2, 3, 4, 5][:rank], [5, 1, 7, 2][:rank]]
    tensors = []
    for shape in shapes:
        shape[axis] = 6
        tensors.append(rng.normal(size=shape).astype(dtype))
    for x, y in zip(tensors, run(model, *tensors), strict=True):
        assert_close(frozen, x, y)


def test_the_default_is_a_convolution_of_opset_15(rng):
    frozen = layer_of(rng, 6, 2)
    model = frozen.to_onnx()
    subtract, convolve = model.graph.node
    assert list(subtract.input) == ["x", "mean"]
    assert list(convolve.input) == ["centred", "matrix", "bias"]
    assert [(a.name, a.i) for a in convolve.attribute] == [("group", 2)]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 15)]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert {name: values.shape for name, values in constants.items()} == {
        "matrix": (6, 3, 1, 1), "mean": (6, 1, 1), "bias": (6,)
    }  # fmt: skip
    for name, values in constants.items():
        assert values.tobytes() == getattr(frozen, name).tobytes()
    assert {prop.key: prop.value for prop in model.metadata_props} == {
        "format": "batchnorm-frozen-whitening",
        "version": "1",
        "channel_axis": "1",
        "dtype": "float32",
        "fingerprint": frozen.fingerprint,
        "batchnorm.version": bn.__version__,
        "batchnorm.onnx_version": onnx.__version__,
    }


@pytest.mark.parametrize(("groups", "rank", "dtype", "axis", "_"), FORMS)
@pytest.mark.parametrize("opset", range(15, NEWEST + 1))
def test_every_opset(rng, groups, rank, dtype, axis, _, opset):
    frozen = layer_of(rng, 6, groups, channel_axis=axis, dtype=dtype)
    model = frozen.to_onnx(opset=opset, rank=rank)
    onnx.checker.check_model(model, full_check=True)
    assert load_frozen(model) == frozen
    if opset <= NEWEST_IN_RUNTIME:
        shape = [2, 3, 4, 5][:rank]
        shape[axis] = 6
        x = rng.normal(size=shape).astype(dtype)
        assert_close(frozen, x, *run(model, x))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"opset": 14}, ValueError, f"opset: was 14, wanted 15 to {NEWEST}"),
        ({"opset": NEWEST + 1}, ValueError, f"opset: was {NEWEST + 1}, wanted 15 to {NEWEST}"),
        ({"rank": 2}, ValueError, "rank: was 2, wanted 2 to 64, with an axis 2"),
        ({"rank": 65}, ValueError, "rank: was 65, wanted 2 to 64, with an axis 2"),
        ({"rank": "4"}, TypeError, "rank: was '4', wanted an integer"),
        ({"opset": None}, TypeError, "opset: was None, wanted an integer"),
    ],
)
def test_refused_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        bn.FrozenWhitening([[1.0]], 0.0, channel_axis=2).to_onnx(**arguments)


@DTYPES
@LAYOUTS
def test_what_is_written_is_read_back(rng, tmp_path, groups, layout, dtype):
    frozen = layer_of(rng, layout.channels, groups, channel_axis=layout.channel_axis, dtype=dtype)
    model = frozen.to_onnx(rank=len(layout.shape))
    path = tmp_path / "bn.onnx"
    onnx.save(model, path)
    for source in (model, path, str(path), model.SerializeToString()):
        loaded = load_frozen(source)
        assert type(loaded) is bn.FrozenWhitening
        assert loaded == frozen
    model.graph.node[0].name, model.graph.doc_string = "named", "by another tool"
    assert load_frozen(model) == frozen


@pytest.mark.parametrize(("groups", "rank", "dtype", "axis", "_"), FORMS)
def test_a_changed_byte_in_a_constant_is_refused(rng, groups, rank, dtype, axis, _):
    model = layer_of(rng, 2, groups, channel_axis=axis, dtype=dtype).to_onnx(rank=rank)
    assert len(model.graph.initializer) in (3, 5)
    for tensor in model.graph.initializer:
        for position in range(len(tensor.raw_data)):
            before = tensor.raw_data
            changed = bytearray(before)
            changed[position] ^= 0x80
            tensor.raw_data = bytes(changed)
            with pytest.raises(ValueError, match=r"damaged|not the nodes"):
                load_frozen(model)
            tensor.raw_data = before
    load_frozen(model)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "other", "format 'batchnorm-frozen' or 'batchnorm-frozen-whitening' wanted, found 'oth"),
        ("format", "batchnorm-frozen", "metadata format, version, channel_axis, eps, dtype, fingerp"),
        ("version", "2", "version '1' wanted, found '2'"),
        ("channel_axis", "-1", "fingerprint is"),
        ("dtype", "float64", "fingerprint is"),
        ("fingerprint", "0" * 64, "fingerprint is '0+', but"),
    ],
)
def test_changed_metadata_is_refused(key, value, match):
    model = bn.FrozenWhitening([[1.0]], 2.0).to_onnx()
    (prop,) = (prop for prop in model.metadata_props if prop.key == key)
    prop.value = value
    with pytest.raises(ValueError, match=match):
        load_frozen(model)


@pytest.mark.parametrize(("groups", "rank", "dtype", "axis", "_"), FORMS)
def test_a_changed_graph_is_refused(rng, groups, rank, dtype, axis, _):
    """Every operator, every input and output of every node, and every attribute."""
    frozen = layer_of(rng, 6, groups, channel_axis=axis, dtype=dtype)
    changed = 0

    def refused(change):
        nonlocal changed
        model = frozen.to_onnx(rank=rank)
        change(model.graph)
        with pytest.raises(ValueError, match=r"not the nodes that FrozenWhitening\.to_onnx writes"):
            load_frozen(model)
        changed += 1

    for k, node in enumerate(frozen.to_onnx(rank=rank).graph.node):
        refused(lambda graph, k=k: setattr(graph.node[k], "op_type", "Relu"))
        refused(lambda graph, k=k: setattr(graph.node[k], "domain", "other"))
        for names in ("input", "output"):
            for i in range(len(getattr(node, names))):
                refused(lambda graph, k=k, i=i, names=names: getattr(graph.node[k], names).insert(i, "other"))
        if node.attribute:
            refused(lambda graph, k=k: graph.node[k].ClearField("attribute"))
    refused(lambda graph: graph.node.append(helper.make_node("Identity", ["y"], ["z"])))
    refused(lambda graph: setattr(graph.output[0], "name", "x"))
    refused(lambda graph: graph.output.append(graph.output[0]))
    assert changed > 12


def test_damaged_models():
    frozen = bn.FrozenWhitening(np.eye(2), 0.0)
    model = frozen.to_onnx()
    del model.graph.input[:]
    with pytest.raises(ValueError, match="model: rank: was 0, wanted 2 to 64"):
        load_frozen(model)
    model = frozen.to_onnx()
    del model.graph.initializer[0]
    with pytest.raises(ValueError, match=r"matrix \('matrix'\) is an input, but a constant is wanted"):
        load_frozen(model)
    model = frozen.to_onnx()
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros((3, 1, 1), np.float32), "mean"))
    with pytest.raises(ValueError, match=r"matrix of 3 rows wanted, found shape \(2, 2, 1, 1\)"):
        load_frozen(model)
    model = frozen.to_onnx()
    del model.metadata_props[:]
    with pytest.raises(ValueError, match="one BatchNormalization is wanted, found 1 Sub, 1 Conv"):
        load_frozen(model)
