"""Exports in every mode: what they hold, what runtimes make of them, and what is read back."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

import batchnorm as bn
import cases
import onnx_runtimes
from batchnorm.onnx import frozen_layers, load_frozen, verify
from onnx_models import NEWEST_IN_RUNTIME

PAGE = Path(__file__).parent.parent / "docs" / "onnx.md"
NEWEST = onnx.defs.onnx_opset_version()
TRAINING = {"mode": "training", "update_weight": 0.1, "count": 20}
MODES = pytest.mark.parametrize(
    "arguments",
    [{"mode": "inference"}, {"mode": "exact"}, {"mode": "affine"}, TRAINING],
    ids=lambda a: a["mode"],
)
# Each dtype of parameters with each dtype of x that such a layer takes.
PAIRS = [
    *(("float32", dtype) for dtype in ("float16", "bfloat16", "float32")),
    *(("float64", dtype) for dtype in ("float16", "bfloat16", "float32", "float64")),
]


def layer_of(rng, channels=7, dtype="float32", channel_axis=1, ratio=3.0):
    _, var, gamma, beta = (p.astype(dtype) for p in cases.parameters(rng, channels))
    mean = (ratio * np.sqrt(var) * rng.choice([-1, 1], channels)).astype(dtype)
    return bn.FrozenBatchNorm(mean, var, gamma, beta, channel_axis=channel_axis, dtype=dtype)


def properties(model):
    return {prop.key: prop.value for prop in model.metadata_props}


def checked(model):
    """The model, after the full check and strict shape inference."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return model


def session_of(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        checked(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize(("parameters", "dtype"), PAIRS)
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 3.0, 200.0])
def test_exact_mode_has_our_bits_in_16_bits_too(rng, parameters, dtype, optimize, ratio):
    from batchnorm.onnx.graph import Graph
    from batchnorm.onnx.runtime import open_session
    from batchnorm.onnx.verify import infer

    for axis, shape in ((1, (60, 7, 5)), (-1, (9, 4, 7)), (0, (7, 50))):
        layer = layer_of(rng, dtype=parameters, channel_axis=axis, ratio=ratio)
        x = cases.Layout(shape, channel_axis=axis).normal(
            rng, dtype, layer.mean.astype(float), np.sqrt(layer.var.astype(float))
        )
        model = checked(layer.to_onnx(mode="exact", dtype=dtype, rank=len(shape)))
        graph = Graph(model)
        y = infer(graph, open_session(graph, optimize=optimize), x)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert y.tobytes() == layer(x).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_exact_mode_has_our_bits_for_every_16_bit_number(dtype):
    """All 65,536 bit patterns of x, and means that one float32 does not hold."""
    from batchnorm.onnx.graph import Graph
    from batchnorm.onnx.runtime import open_session
    from batchnorm.onnx.verify import infer

    layer = bn.FrozenBatchNorm(
        [1 / 3, 1e4 + 1 / 3, -1e-9 / 3, 0.0],
        [1 / 3, 2.0, 1e-6, 1e6],
        [1 / 3, -1, 1e-3, 7],
        [0.1, 0, -0.0, 3],
        dtype="float64",
    )
    assert (layer.mean[:3] != layer.mean[:3].astype(np.float32)).all()
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    x = np.ascontiguousarray(np.broadcast_to(every[:, None], (2**16, 4)))
    graph = Graph(checked(layer.to_onnx(mode="exact", dtype=dtype, rank=2)))
    y = infer(graph, open_session(graph), x)
    ours = layer(x)
    nan = np.isnan(ours.astype(np.float32))
    assert 0 < nan.sum() < y.size // 10
    assert (np.isnan(y.astype(np.float32)) == nan).all()
    assert (y.view(np.uint16)[~nan] == ours.view(np.uint16)[~nan]).all()


@MODES
@pytest.mark.parametrize("opset", range(9, NEWEST + 1))
def test_every_opset_and_dtype(rng, arguments, opset):
    tried = 0
    for parameters, dtype in PAIRS:
        oldest = max(14 if arguments is TRAINING else 9, 13 if dtype == "bfloat16" else 9)
        layer = layer_of(rng, dtype=parameters, channel_axis=-1)
        make = {**arguments, "dtype": dtype, "opset": opset, "rank": 3}
        if opset < oldest:
            with pytest.raises(ValueError, match=f"opset: was {opset}, wanted 1[34] to {NEWEST} for"):
                layer.to_onnx(**make)
            continue
        model = checked(layer.to_onnx(**make))
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
        assert properties(model)["batchnorm.batchnorm.fingerprint"] == layer.fingerprint
        if arguments["mode"] == "affine":
            with pytest.raises(ValueError, match="mode 'affine' holds x·scale"):
                load_frozen(model)
        else:
            assert load_frozen(model) == layer
        if opset <= NEWEST_IN_RUNTIME:
            session_of(model)
        tried += 1
    assert tried in (0, 5, 7)
    assert tried or opset < 14


@MODES
def test_the_same_layer_gives_the_same_bytes(rng, arguments):
    layer = layer_of(rng)
    again = bn.FrozenBatchNorm(layer.mean, layer.var, layer.gamma, layer.beta)
    first = layer.to_onnx(**arguments).SerializeToString()
    assert first == again.to_onnx(**arguments).SerializeToString()
    assert first != layer.to_onnx(**arguments, rank=3).SerializeToString()


@MODES
def test_names_begin_with_that_of_the_layer(rng, arguments):
    layer = layer_of(rng, channel_axis=-1)
    model = checked(layer.to_onnx(**arguments, dtype="float16", name="block.bn1", x="image", y="features"))
    graph = model.graph
    assert graph.input[0].name == "image"
    assert graph.output[0].name == "features"
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    names |= {tensor.name for tensor in graph.initializer}
    others = names - {"image", "features"}
    assert len(others) > 4
    assert [name for name in sorted(others) if not name.startswith("block.bn1.")] == []
    nodes = [node.name for node in graph.node]
    assert len({*nodes}) == len(nodes)
    assert nodes.count("block.bn1") == 1
    assert properties(model)["batchnorm.block.bn1.mode"] == arguments["mode"]
    assert properties(model)["batchnorm.block.bn1.fingerprint"] == layer.fingerprint
    if arguments["mode"] == "inference":
        (read,) = frozen_layers(model).items()
        assert read == ("block.bn1", bn.FrozenBatchNorm(layer.mean, layer.var, layer.gamma, layer.beta))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 7, 5), [2, 7, 5]),
        (("batch", 7, None), ["batch", 7, "d2"]),
        ((None, None), ["d0", 7]),
        ((0, 7, 3), [0, 7, 3]),
    ],
)
def test_shapes(rng, shape, sizes):
    model = checked(layer_of(rng).to_onnx(shape=shape))
    for entry in (*model.graph.input, *model.graph.output):
        assert [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] == sizes
    (x,) = session_of(model).get_inputs()
    assert x.shape == sizes


def test_training_mode_computes_what_the_layer_does_in_training(rng):
    """Several batches, each starting from the running statistics of the one before."""
    layer = bn.BatchNorm(3, dtype="float64", eps=2**-10, population=bn.MovingAverage(update_weight=0.25))
    layer(rng.normal(5, 3, size=(10, 3, 2)))
    frozen = layer.freeze()
    model = frozen.to_onnx(mode="training", rank=3, update_weight=0.25, count=20)
    session = session_of(model)
    assert [entry.name for entry in session.get_inputs()] == ["x"]
    assert [entry.name for entry in session.get_overridable_initializers()] == ["mean", "var"]
    state = {}
    for _ in range(6):
        x = rng.normal(rng.normal(), rng.uniform(1, 2), size=(10, 3, 2))
        y, mean, var = session.run(["y", "running_mean", "running_var"], {"x": x, **state})
        state = {"mean": mean, "var": var}
        np.testing.assert_allclose(y, layer(x), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(mean, layer.population.mean, rtol=1e-6)
        np.testing.assert_allclose(var * 20 / 19, layer.population.var, rtol=1e-6)
        assert (abs(var / layer.population.var - 1) > 0.04).all()  # were it not converted, this would be 0


def test_the_attributes_of_training_mode(rng):
    layer = layer_of(rng)
    model = layer.to_onnx(mode="training", rank=2, update_weight=0.1, count=20)
    (node,) = model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"epsilon": layer.eps, "momentum": float(np.float32(0.9)), "training_mode": 1}
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert (constants["var"] == (layer.var.astype(float) * 0.95).astype(np.float32)).all()


def test_damaged_training_models_are_refused(rng):
    def damaged(change):
        model = layer_of(rng).to_onnx(**TRAINING)
        change(model, {prop.key: prop for prop in model.metadata_props})
        return model

    def key(name, value):
        return lambda model, props: setattr(props[f"batchnorm.batchnorm.{name}"], "value", value)

    def weights(model, props):
        model.graph.initializer[3].raw_data = bytes(28)

    for change, match in (
        (key("count", "21"), "not what mode 'training' writes"),
        (key("count", "many"), "damaged: metadata"),
        (key("count", "1"), "count: was 1"),
        (key("var", "0"), "damaged: metadata"),
        (key("var", "00" * 4), "not what mode 'training' writes"),
        (key("var", "00" * 28), "not what mode 'training' writes"),
        (weights, "not what mode 'training' writes"),
    ):
        with pytest.raises(ValueError, match=match):
            load_frozen(damaged(change))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mode": "training"}, "update_weight: was None, wanted a number for mode 'training'"),
        ({"mode": "training", "update_weight": 0.1}, "count: was None, wanted a number for mode 'training'"),
        (TRAINING | {"count": 1}, "count: was 1, wanted 2 or more"),
        (TRAINING | {"update_weight": 0}, "update_weight: was 0.0, wanted a number above 0"),
        (TRAINING | {"update_weight": 1.5}, "update_weight: was 1.5, wanted a number above 0"),
        (TRAINING | {"update_weight": float("nan")}, "update_weight: was nan, wanted a number above 0"),
        (TRAINING | {"update_weight": 1e-9}, "update_weight: was 1e-09, wanted more than 3e-8"),
        (TRAINING | {"shape": (5, 7, 3)}, "count: was 20, wanted 15 values per channel"),
        (TRAINING | {"opset": 13}, "opset: was 13, wanted 14 to .* for mode 'training', since"),
        ({"count": 3}, "count: is of mode 'training', and the mode was 'inference'"),
        ({"mode": "exact", "update_weight": 0.1}, "update_weight: is of mode 'training'"),
        ({"dtype": "float64"}, "dtype: was float64, wanted one that the layer takes"),
        ({"dtype": "bfloat16", "opset": 12}, "opset: was 12, wanted 13 to .* for bfloat16"),
        ({"shape": (3, 7), "rank": 3}, "rank: was 3, wanted 2, the number of sizes"),
        ({"shape": (3, "channels")}, "shape: was .*, wanted 7 channels on axis 1"),
        ({"shape": (3, 8)}, "shape: was .*, wanted 7 channels on axis 1"),
        ({"shape": (-1, 7)}, "shape: was .*, wanted no size below 0"),
        ({"shape": (2**70, 7)}, "shape: was .*, wanted no size below 0 or above"),
        ({"shape": (7,)}, "rank: was 1, wanted 2 to 64"),
        ({"x": "y"}, "'y' names two values"),
        ({"x": "gamma", "y": "z"}, "'gamma' names two values"),
        ({"y": ""}, "'' names two values|wanted names"),
        ({"x": ""}, "'' names two values|wanted names"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_reason(rng, arguments, match):
    with pytest.raises(ValueError, match=match):
        layer_of(rng).to_onnx(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dtype": "int32"}, "dtype: was 'int32', wanted float16, bfloat16, float32 or float64"),
        ({"dtype": "nonsense"}, "dtype: was 'nonsense', wanted float16"),
        ({"shape": (1.5, 7)}, "shape: was 1.5, wanted an integer"),
        (TRAINING | {"count": 2.5}, "count: was 2.5, wanted an integer"),
        (TRAINING | {"update_weight": "1"}, "update_weight: was '1', wanted a number"),
    ],
)
def test_arguments_of_wrong_types(rng, arguments, match):
    with pytest.raises(TypeError, match=match):
        layer_of(rng).to_onnx(**arguments)


def test_what_a_type_cannot_hold_is_refused():
    large = bn.FrozenBatchNorm([1e300], [1.0], dtype="float64")
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match=r"mean is beyond float32.* in channel 0"):
            large.to_onnx(mode="exact", dtype=dtype)
    large.to_onnx(mode="exact", dtype="float32")
    folded = bn.FrozenBatchNorm([2.0**127, 0], [2.0**-20, 1], eps=0)
    with pytest.raises(ValueError, match=r"mode 'affine': shift is beyond float32.* in channel 0"):
        folded.to_onnx(mode="affine")
    tiny = bn.FrozenBatchNorm([0], [1e-45], eps=1)
    with pytest.raises(ValueError, match="mode 'training': var is positive, but 0"):
        tiny.to_onnx(mode="training", update_weight=0.5, count=2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_changed_exact_graph_for_16_bits_is_refused(rng, dtype):
    layer = layer_of(rng)
    count = len(layer.to_onnx(mode="exact", dtype=dtype).graph.node)
    assert count == 15
    for k in range(count):
        model = layer.to_onnx(mode="exact", dtype=dtype)
        model.graph.node[k].op_type = "Relu"
        with pytest.raises(ValueError, match=r"not mode 'exact'|a constant is wanted"):
            load_frozen(model)


def test_files_of_the_version_before_are_read(rng):
    """Their nodes have no names, and their metadata only the first six entries."""
    layer = layer_of(rng)
    for mode in ("inference", "exact"):
        model = layer.to_onnx(mode=mode)
        del model.metadata_props[6:]
        for node in model.graph.node:
            node.name = ""
        assert load_frozen(model) == layer


# Verification


@pytest.mark.parametrize(("parameters", "dtype"), PAIRS)
def test_verify_finds_no_difference_in_exact_mode(rng, parameters, dtype):
    layer = layer_of(rng, dtype=parameters, channel_axis=-1)
    report = verify(layer.to_onnx(mode="exact", dtype=dtype, rank=3), layer)
    assert report.values == 64 * 64 * 7
    assert (report.differing, report.between) == (0, (0, 0))
    assert report.runtime == report.ours
    assert 0 < report.ours.mean < report.ours.max <= (0.51 if dtype != "float64" else 16)


def test_verify_sees_what_folding_costs(rng):
    layer = layer_of(rng, ratio=1e5)
    for mode in ("inference", "affine"):
        report = verify(layer.to_onnx(mode=mode, rank=2), layer)
        assert report.runtime.max > 1e3
        assert report.ours.max <= 0.51
        assert abs(report.between.max - report.runtime.max) < 2
        assert report.differing > report.values / 2


def test_verify_with_values_at_the_ends_of_the_range():
    layer = bn.FrozenBatchNorm([0.0, 1.0], [1.0, 4.0])
    x = np.array([[np.inf, -np.inf], [np.nan, 3e38], [-0.0, 1e-45]], np.float32)
    report = verify(layer.to_onnx(mode="exact", rank=2), layer, x)
    assert report.differing == 0
    assert report.runtime.max <= 0.51


def test_verify_refuses_what_does_not_fit(rng):
    layer = layer_of(rng)
    model = layer.to_onnx(rank=2)
    with pytest.raises(TypeError, match="x: was float64, wanted float32"):
        verify(model, layer, np.ones((2, 7)))
    with pytest.raises(ValueError, match="ONNX Runtime cannot run the model"):
        verify(model, layer, np.ones((2, 7, 1), np.float32))
    with pytest.raises(ValueError, match=r"x: was of shape \(0, 7\), wanted values"):
        verify(model, layer, np.ones((0, 7), np.float32))
    with pytest.raises(ValueError, match="from one x to one y wanted, found 1 inputs and 3 outputs"):
        verify(layer.to_onnx(**TRAINING), layer)


# Runtimes


@pytest.mark.parametrize("mode", onnx_runtimes.MODES)
def test_runtimes_run_what_the_page_says_in_opset_15(mode):
    rows = table_of_the_page()
    assert len(rows) == len(onnx_runtimes.MODES) * len(onnx_runtimes.DTYPES)
    for dtype in onnx_runtimes.DTYPES:
        for runtime in onnx_runtimes.RUNTIMES:
            found = onnx_runtimes.outcome(runtime, mode, dtype, 15)
            assert found != onnx_runtimes.NO
            printed, _, opsets = rows[mode, dtype][runtime].partition(", ")
            assert opsets
            if runtime != "OpenVINO":  # whose arithmetic depends on the processor
                assert printed == found


@pytest.mark.long
def test_the_table_of_runtimes_is_what_is_measured():
    """But for how exact OpenVINO is, which depends on the processor."""
    printed, measured = table_of_the_page(), table_of(onnx_runtimes.table())
    for of in (*printed.values(), *measured.values()):
        of["OpenVINO"] = of["OpenVINO"].rpartition(", ")[2]
    assert printed == measured


def table_of_the_page():
    return table_of(PAGE.read_text().split(onnx_runtimes.MARK)[1].split(onnx_runtimes.END)[0])


def table_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (_, _, *runtimes), _, *rest = rows
    return {(mode.strip("`"), dtype): dict(zip(runtimes, cells, strict=True)) for mode, dtype, *cells in rest}


def test_a_dtype_is_taken_by_its_name_or_as_a_type(rng):
    layer = layer_of(rng)
    for name, kind in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)):
        assert layer.to_onnx(dtype=kind) == layer.to_onnx(dtype=name) == layer.to_onnx(dtype=np.dtype(kind))
