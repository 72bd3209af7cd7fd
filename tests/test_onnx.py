"""Frozen layers in ONNX: ONNX Runtime computes what is promised, and what is written can be read back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import batchnorm as bn
import cases
from batchnorm.onnx import load_frozen

HERE = Path(__file__).parent
NEWEST = onnx.defs.onnx_opset_version()
NEWEST_IN_RUNTIME = 26  # of ONNX Runtime 1.31
HALF_ULP = {"float32": 2.0**-24, "float64": 2.0**-53}
MODES = pytest.mark.parametrize("mode", ["inference", "exact"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        cases.Layout((9, 17)),
        cases.Layout((2, 5, 40)),
        cases.Layout((2, 17, 7, 9)),
        cases.Layout((2, 3, 4, 5, 3)),
        cases.Layout((9, 17), channel_axis=-1),
        cases.Layout((2, 7, 9, 17), channel_axis=-1),
        cases.Layout((2, 3, 5, 7), channel_axis=2),
        cases.Layout((5, 4, 3), channel_axis=0),
        cases.Layout((5, 4, 3), channel_axis=-3),
        cases.Layout((1, 64, 33, 31)),
        cases.Layout((0, 5)),
        cases.Layout((0, 5, 4, 4)),
    ],
    ids=str,
)


def frozen_of(rng, layout, dtype, ratio=3.0):
    """A layer with |mean| = ratio·√var, and as many values of its distribution as `layout` holds."""
    _, var, gamma, beta = (p.astype(dtype) for p in cases.parameters(rng, layout.channels))
    mean = (ratio * np.sqrt(var) * rng.choice([-1, 1], layout.channels)).astype(dtype)
    frozen = bn.FrozenBatchNorm(mean, var, gamma, beta, channel_axis=layout.channel_axis, dtype=dtype)
    return frozen, layout.normal(rng, dtype, frozen.mean, np.sqrt(frozen.var))


def run(model, *tensors):
    """Checks the model and runs it in ONNX Runtime, all optimizations on (its default)."""
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in (*session.get_inputs(), *session.get_outputs())] == ["x", "y"]
    results = [session.run(None, {"x": x})[0] for x in tensors]
    assert [(y.dtype, y.shape) for y in results] == [(x.dtype, x.shape) for x in tensors]
    return results


def bound(frozen, x):
    """The documented bound on the difference of ONNX Runtime's node from ours."""
    mean, var, gamma, beta = (
        np.abs(getattr(frozen, name)).astype(np.float64) for name in ("mean", "var", "gamma", "beta")
    )
    by_channel = np.moveaxis(np.abs(x).astype(np.float64), frozen.channel_axis, -1)
    limit = 8 * HALF_ULP[frozen.dtype.name] * (gamma * (by_channel + mean) / np.sqrt(var + frozen.eps) + beta)
    return np.moveaxis(limit, -1, frozen.channel_axis)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("ratio", [0.0, 3.0, 1e3, 1e6])
def test_inference_mode_is_as_accurate_as_promised(rng, layout, dtype, ratio):
    frozen, x = frozen_of(rng, layout, dtype, ratio)
    (y,) = run(frozen.to_onnx(rank=x.ndim), x)
    assert np.all(np.abs(y.astype(np.float64) - frozen(x)) <= bound(frozen, x))


def test_inference_mode_loses_digits_where_the_mean_is_large(rng):
    """What docs/onnx.md warns of; were it otherwise, mode "exact" would not be needed."""
    frozen, x = frozen_of(rng, cases.Layout((100, 17)), "float32", ratio=1e6)
    (y,) = run(frozen.to_onnx(rank=2), x)
    assert 0.02 < np.max(np.abs(y - frozen(x)) / np.abs(frozen.gamma)) < 1


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("ratio", [0.0, 3.0, 1e6])
def test_exact_mode_has_our_bits(rng, layout, dtype, ratio):
    frozen, x = frozen_of(rng, layout, dtype, ratio)
    (y,) = run(frozen.to_onnx(mode="exact", rank=x.ndim), x)
    assert y.tobytes() == frozen(x).tobytes()


@DTYPES
def test_exact_mode_has_our_bits_for_extreme_values(rng, dtype):
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    frozen = bn.FrozenBatchNorm(
        np.array([0, 1, -1, tiny, 3], dtype),
        np.array([0, tiny, huge, 1, 1e-30], dtype),
        np.array([1, 1, 1, 1e-40, 1e30], dtype),
        np.array([-0.0, tiny, -huge, 0, 1], dtype),
        dtype=dtype,
    )
    specials = [0, -0.0, tiny, -tiny, 1, -1, 1e-30, huge, -huge, np.inf, -np.inf, np.nan]
    x = np.repeat(np.array(specials, dtype)[:, None], 5, axis=1)
    x = np.concatenate([x, rng.normal(size=(1000, 5)).astype(dtype)])
    (y,) = run(frozen.to_onnx(mode="exact", rank=2), x)
    assert cases.bits(y) == cases.bits(frozen(x))


@MODES
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_and_spatial_axes_are_dynamic(rng, mode, channel_axis):
    frozen = bn.FrozenBatchNorm([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], channel_axis=channel_axis)
    model = frozen.to_onnx(mode=mode)
    shapes = [(1, 3, 1, 1), (2, 3, 7, 5), (5, 3, 1, 9), (0, 3, 4, 4), (2, 3, 0, 3)]
    tensors = [np.moveaxis(rng.normal(size=shape).astype(np.float32), 1, channel_axis) for shape in shapes]
    for x, y in zip(tensors, run(model, *tensors), strict=True):
        assert np.all(np.abs(y.astype(np.float64) - frozen(x)) <= bound(frozen, x))
    for entry in (model.graph.input[0], model.graph.output[0]):
        sizes = [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        assert sizes == ([0, 3, 0, 0] if channel_axis == 1 else [0, 0, 0, 3])


@MODES
@DTYPES
@pytest.mark.parametrize("opset", range(9, NEWEST + 1))
def test_every_opset(rng, mode, dtype, opset):
    frozen, x = frozen_of(rng, cases.Layout((4, 5)), dtype)
    model = frozen.to_onnx(mode=mode, opset=opset, rank=2)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    onnx.checker.check_model(model, full_check=True)
    assert load_frozen(model) == frozen
    if opset <= NEWEST_IN_RUNTIME:
        (y,) = run(model, x)
        assert np.all(np.abs(y.astype(np.float64) - frozen(x)) <= bound(frozen, x))


def test_the_default_is_one_node_of_opset_15_for_four_axes():
    frozen = bn.FrozenBatchNorm([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], eps=1e-3)
    model = frozen.to_onnx()
    (node,) = model.graph.node
    assert node.op_type == "BatchNormalization"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 15)]
    assert [(a.name, a.f) for a in node.attribute] == [("epsilon", frozen.eps)]
    assert list(node.input) == ["x", "gamma", "beta", "mean", "var"]
    constants = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}
    assert constants == {"gamma": [5, 6], "beta": [7, 8], "mean": [1, 2], "var": [3, 4]}
    assert len(model.graph.input[0].type.tensor_type.shape.dim) == 4
    assert (model.producer_name, model.producer_version) == ("batchnorm", bn.__version__)
    assert {prop.key: prop.value for prop in model.metadata_props} == {
        "format": "batchnorm-frozen",
        "version": "1",
        "channel_axis": "1",
        "eps": frozen.eps.hex(),
        "dtype": "float32",
        "fingerprint": frozen.fingerprint,
        "batchnorm.version": bn.__version__,
        "batchnorm.onnx_version": onnx.__version__,
        "batchnorm.batchnorm.mode": "inference",
        "batchnorm.batchnorm.fingerprint": frozen.fingerprint,
    }


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"opset": 8}, f"opset: was 8, wanted 9 to {NEWEST}"),
        ({"opset": NEWEST + 1}, f"opset: was {NEWEST + 1}, wanted 9 to {NEWEST}"),
        ({"mode": "folded"}, "mode: was 'folded', wanted 'inference', 'exact', 'affine' or 'training'"),
        ({"rank": 1}, "rank: was 1, wanted 2 to 64, with an axis 2"),
        ({"rank": 2}, "rank: was 2, wanted 2 to 64, with an axis 2"),
        ({"rank": 10**12}, "rank: was 1000000000000, wanted 2 to 64, with an axis 2"),
    ],
)
def test_arguments_out_of_range(arguments, match):
    with pytest.raises(ValueError, match=match):
        bn.FrozenBatchNorm([0.0], [1.0], channel_axis=2).to_onnx(**arguments)


@pytest.mark.parametrize("name", ["rank", "opset"])
@pytest.mark.parametrize("value", ["2", 4.0, 1j, True])
def test_arguments_that_are_no_integers(name, value):
    with pytest.raises(TypeError, match=f"^{name}: was {value!r}, wanted an integer$"):
        bn.FrozenBatchNorm([0.0], [1.0]).to_onnx(**{name: value})
    bn.FrozenBatchNorm([0.0], [1.0]).to_onnx(**{name: np.int64(15)})


@MODES
@DTYPES
@LAYOUTS
def test_what_is_written_is_read_back(rng, tmp_path, layout, dtype, mode):
    frozen, _ = frozen_of(rng, layout, dtype)
    model = frozen.to_onnx(mode=mode, rank=len(layout.shape))
    path = tmp_path / "bn.onnx"
    onnx.save(model, path)
    for source in (model, path, str(path), model.SerializeToString()):
        loaded = load_frozen(source)
        assert loaded == frozen
        assert (loaded.eps, loaded.dtype, loaded.channel_axis) == (frozen.eps, dtype, frozen.channel_axis)


@MODES
@DTYPES
@pytest.mark.parametrize("bit", [0, 7])
def test_a_changed_byte_in_a_parameter_is_refused(mode, dtype, bit):
    model = bn.FrozenBatchNorm([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], dtype=dtype).to_onnx(mode=mode)
    assert len(model.graph.initializer) == (4 if mode == "inference" else 5)
    for tensor in model.graph.initializer:
        for position in range(len(tensor.raw_data)):
            before = tensor.raw_data
            changed = bytearray(before)
            changed[position] ^= 1 << bit
            tensor.raw_data = bytes(changed)
            with pytest.raises(ValueError, match=r"damaged|finite|wanted|range|eps"):
                load_frozen(model)
            tensor.raw_data = before
    load_frozen(model)


@MODES
@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "other", "format 'batchnorm-frozen' or '.*-whitening' wanted, found 'other'"),
        ("version", "2", "version '1' wanted, found '2'"),
        ("channel_axis", "-1", "fingerprint is"),
        ("eps", "0x0p+0", "eps is '0x0p.0', but that of the layer is"),
        ("dtype", "float64", "fingerprint is"),
        ("fingerprint", "0" * 64, "fingerprint is '0+', but"),
    ],
)
def test_changed_metadata_is_refused(mode, key, value, match):
    model = bn.FrozenBatchNorm([1.0], [2.0]).to_onnx(mode=mode)
    (prop,) = (prop for prop in model.metadata_props if prop.key == key)
    prop.value = value
    with pytest.raises(ValueError, match=match):
        load_frozen(model)


@pytest.mark.parametrize("key", ["format", "version", "channel_axis", "eps", "dtype"])
def test_missing_metadata_is_refused(key):
    model = bn.FrozenBatchNorm([1.0], [2.0]).to_onnx()
    (prop,) = (prop for prop in model.metadata_props if prop.key == key)
    model.metadata_props.remove(prop)
    with pytest.raises(ValueError, match="wanted, found"):
        load_frozen(model)


def test_without_any_metadata_it_is_a_model_like_others():
    frozen = bn.FrozenBatchNorm([1.0], [2.0])
    model = frozen.to_onnx()
    del model.metadata_props[:]
    assert load_frozen(model) == frozen
    exact = frozen.to_onnx(mode="exact")
    del exact.metadata_props[:]
    with pytest.raises(ValueError, match="one BatchNormalization is wanted, found 2 Cast, 2 Add, 1 Sqrt"):
        load_frozen(exact)


def test_a_changed_eps_is_refused():
    model = bn.FrozenBatchNorm([1.0], [2.0]).to_onnx()
    model.graph.node[0].attribute[0].f = 1e-3
    with pytest.raises(ValueError, match=r"eps is .*, but that of the layer is"):
        load_frozen(model)


def test_a_changed_exact_graph_is_refused():
    model = bn.FrozenBatchNorm([1.0], [2.0]).to_onnx(mode="exact")
    operators = [node.op_type for node in model.graph.node]
    assert operators == ["Cast", "Add", "Sqrt", "Div", "Sub", "Mul", "Add", "Cast"]
    for node in model.graph.node:
        before = node.op_type
        node.op_type = "Relu"
        with pytest.raises(ValueError, match="not mode 'exact'"):
            load_frozen(model)
        node.op_type = before
    model.graph.node[4].input[0] = "var"
    with pytest.raises(ValueError, match=r"'var' is normalized, but inputs are \['x'\]"):
        load_frozen(model)
    del model.graph.output[:]
    with pytest.raises(ValueError, match="not mode 'exact': '' by a node Add wanted"):
        load_frozen(model)


GOLDEN = json.loads((HERE / "data" / "onnx" / "manifest.json").read_text())["files"]
REFUSED = {"training_mode": "found training mode"}


def test_there_are_models_of_pytorch():
    assert len(GOLDEN) == 25
    assert sum(name.startswith(tuple(REFUSED)) for name in GOLDEN) == 1


@pytest.mark.parametrize("name", GOLDEN)
def test_models_of_pytorch(name):
    path = HERE / "data" / "onnx" / name
    for start, match in REFUSED.items():
        if name.startswith(start):
            with pytest.raises(ValueError, match=match):
                load_frozen(path)
            return
    frozen = load_frozen(path)
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (prefix,) = (key.removesuffix("running_mean") for key in constants if key.endswith("running_mean"))
    assert frozen == bn.FrozenBatchNorm.from_torch(constants, prefix)
    if len(model.graph.node) == 1:
        with np.load(path.with_suffix(".npz")) as stored:
            x, y = stored["x"], stored["y"]
        assert np.all(np.abs(frozen(x) - y) <= bound(frozen, x))


def model_of(nodes, *, opset=15, inputs=("x",), constants=("gamma", "beta", "mean", "var"), dtype=np.float32):
    def entry(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    tensors = [numpy_helper.from_array(np.ones(2, dtype), name) for name in constants]
    graph = helper.make_graph(nodes, "g", [entry(name) for name in inputs], [entry("y")], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def normalization(x="x", *outputs, **attributes):
    inputs = [x, "gamma", "beta", "mean", "var"]
    return helper.make_node("BatchNormalization", inputs, outputs or ["y"], **attributes)


def test_models_of_others():
    assert load_frozen(model_of([normalization()])) == bn.FrozenBatchNorm([1, 1], [1, 1], 1, 1)
    eps = float(np.float32(0.5))
    assert load_frozen(model_of([normalization(epsilon=eps)], opset=9)).eps == eps
    assert load_frozen(model_of([normalization()], dtype=np.float64)).dtype == np.float64
    assert load_frozen(model_of([normalization()], dtype=np.float16)).dtype == np.float32


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (model_of([]), "one BatchNormalization is wanted, found no nodes"),
        (model_of([helper.make_node("Relu", ["x"], ["y"])]), "one BatchNormalization is wanted, found 1 R"),
        (model_of([normalization("x", "a"), normalization("a")]), "wanted, found 2 BatchNormalization"),
        (model_of([normalization()], opset=5), "opset 6 or newer is wanted, found 5"),
        (model_of([normalization(training_mode=1)]), "found training mode"),
        (model_of([normalization("x", "y", "m", "v")], opset=9), "found training mode"),
        (
            model_of([normalization()], inputs=("x", "var"), constants=("gamma", "beta", "mean")),
            r"var \('var'\) is an input, but a constant is wanted",
        ),
        (b"this is no ONNX model", "model: not an ONNX model"),
    ],
)
def test_refused_models(model, match):
    with pytest.raises(ValueError, match=match):
        load_frozen(model)


def test_refused_files(tmp_path):
    path = tmp_path / "bn.onnx"
    with pytest.raises(FileNotFoundError):
        load_frozen(path)
    path.write_bytes(b"this is no ONNX model")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: not an ONNX model"):
        load_frozen(path)


def test_a_missing_onnx_is_told():
    code = """
import sys
sys.modules["onnx"] = None
import batchnorm as bn
for call in (lambda: bn.FrozenBatchNorm([0.0], [1.0]).to_onnx(), lambda: __import__("batchnorm.onnx")):
    try:
        call()
    except ImportError as error:
        assert "pip install 'batchnorm[onnx]'" in str(error)
    else:
        raise SystemExit("ImportError wanted")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_examples_in_the_documentation():
    blocks = re.findall(r"```python\n(.*?)```", (HERE.parent / "docs" / "onnx.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/onnx.md", "exec"), {})
