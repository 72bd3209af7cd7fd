"""What `recalibrate` takes as calibration data, and what it refuses and warns of."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import batchnorm as bn
from batchnorm.onnx import frozen_layers, load_frozen, recalibrate
from onnx_models import batch_norm, make, parameters, run


def model_of(x=("n", 3), dtype="float32", names=("bn",), **extra):
    """Batch normalizations, one after another, with an Exp before each but the first."""
    rng = np.random.default_rng(0)
    constants, nodes, value = {}, [], "x"
    for k, name in enumerate(names):
        if k:
            nodes.append(helper.make_node("Exp", [value], [f"e{k}"]))
            value = f"e{k}"
        constants.update(parameters(rng, 3, f"{name}.", dtype))
        output = "y" if k == len(names) - 1 else f"n{k}"
        nodes.append(batch_norm(value, output, f"{name}.", name))
        value = output
    return make(nodes, constants, x=x, dtype=dtype, **extra)


def rows(count, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(2, 3, (count, 3)).astype(dtype)


def two_inputs(a=("n", 3), b=("n", 3)):
    """Adds a and b, then normalizes."""
    model = make(
        [helper.make_node("Add", ["x", "b"], ["s"]), batch_norm("s", name="bn")], parameters_of(), x=a
    )
    model.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, b))
    return model


def parameters_of():
    return parameters(np.random.default_rng(0))


def mean_of(model, *arguments, **options):
    return frozen_layers(recalibrate(model, *arguments, **options)[0])["bn"].mean


def test_forms_of_data(tmp_path):
    model, x = model_of(), rows(70)
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "a.npy", x[:41])
    np.savez(folder / "b.npz", x=x[41:])
    (folder / "notes.txt").write_text("not data")
    np.save(tmp_path / "x.npy", x)
    expected, report = recalibrate(model, [x[:32], x[32:64], x[64:]])
    assert report.batches == 3
    forms = {
        "array": x,
        "dict": {"x": x},
        "dicts": [{"x": x[:32]}, {"x": x[32:64]}, {"x": x[64:]}],
        "iterator": iter([x[:32], x[32:64], x[64:]]),
        "callable": lambda: (x[k : k + 32] for k in (0, 32, 64)),
        "path": tmp_path / "x.npy",
        "text": str(tmp_path / "x.npy"),
        "folder": folder,
        "files": [folder / "a.npy", folder / "b.npz"],
    }
    for name, data in forms.items():
        new, report = recalibrate(model, data)
        assert new == expected, name
        assert report.batches == 3
    assert len(forms) == 9


def test_a_model_that_fixes_its_batch_axis():
    x = rows(22)
    with pytest.warns(UserWarning, match=r"batches: 2 examples at the end fill no batch of the model"):
        new, report = recalibrate(model_of((4, 3)), x)
    assert (report.batches, report.left_out, report.population) == (5, 2, "pooled")
    assert report.reason == "the model fixes its batch axis at 4, below 32"
    np.testing.assert_allclose(frozen_layers(new)["bn"].var, x[:20].astype(float).var(0, ddof=1), rtol=1e-6)
    for memory in (None, 1):
        with pytest.raises(ValueError, match="batches: 3 examples fill no batch of 4, which the model fixes"):
            recalibrate(model_of((4, 3)), rows(3), memory=memory)
    report = recalibrate(model_of((32, 3)), rows(64))[1]
    assert (report.population, report.left_out) == ("algorithm2", 0)
    assert report.reason.startswith("the model fixes its batch axis at 32, and every batch has 2 or more")


def test_a_batch_axis_of_size_0_is_refused_by_onnx_runtime():
    model = model_of((1, 3))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot run the model: .*Expected: 0"):
        recalibrate(model, rows(64))


def test_a_batch_of_one_value_makes_pooled_the_default():
    model, x = model_of(names=("bn", "second")), rows(33)
    report = recalibrate(model, x)[1]
    assert (report.population, report.reason) == (
        "pooled",
        "batch 2 has one value in a channel before 'bn'",
    )
    assert recalibrate(model, x, layerwise=True)[1].population == "pooled"
    assert recalibrate(model, x[:32])[1].population == "algorithm2"
    with pytest.raises(
        ValueError, match=r"batch 2 has one value in a channel before 'bn', but population='alg"
    ):
        recalibrate(model, x, population="algorithm2")


def test_several_inputs(tmp_path):
    model, a, b = two_inputs(), rows(40), rows(40, 1)
    np.savez(tmp_path / "d.npz", x=a, b=b)
    expected = (a.astype(float) + b).mean(0)
    for data in ([{"x": a, "b": b}], {"x": a, "b": b}, tmp_path / "d.npz"):
        np.testing.assert_allclose(mean_of(model, data), expected, rtol=1e-6)
    np.testing.assert_allclose(
        mean_of(two_inputs(b=()), [{"x": a, "b": np.float32(1)}]), a.mean(0) + 1, rtol=1e-5
    )
    np.save(tmp_path / "x.npy", a)
    for data, match in {
        "array": ([a], r"batch 1: was one array, wanted a dict by the inputs of the model: 'x', 'b'"),
        "missing": ([{"x": a, "b": b}, {"x": a}], r"batch 2: names were \['x'\], wanted \['b', 'x'\]"),
        "file": (tmp_path / "x.npy", r"x\.npy: was one array, wanted one for each input of the model"),
        "lengths": ({"x": a, "b": b[:5]}, r"batches: shapes were .*, wanted the same number of examples"),
    }.values():
        with pytest.raises(ValueError, match=match):
            recalibrate(model, data)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([], ValueError, "batches: there is none"),
        (iter([]), ValueError, "batches: there is none"),
        (np.empty((0, 3), np.float32), ValueError, "batches: there is none"),
        ([rows(4), {"y": rows(4)}], ValueError, r"batch 2: names were \['y'\], wanted \['x'\]"),
        ([rows(4), rows(4, dtype="float64")], TypeError, "batch 2: 'x': dtype was float64, wanted float32"),
        ([rows(4)[0]], ValueError, r"batch 1: 'x': shape was \(3,\), wanted \(any, 3\)"),
        ([rows(4), rows(4)[:, :2]], ValueError, r"batch 2: 'x': shape was \(4, 2\), wanted \(any, 3\)"),
        ([rows(0)], ValueError, r"batch 1: 'x': shape was \(0, 3\), wanted one example or more"),
        ([rows(4), (rows(4), 1)], TypeError, "batch 2: was tuple, wanted an array, or a dict of arrays"),
        (3, TypeError, "batches: was int, wanted a path"),
        (lambda: None, TypeError, "batches: the callable returned NoneType"),
        ([rows(1)], ValueError, "one value in all before 'bn' in channels 0, 1, 2, wanted 2 or more"),
        (
            [rows(4), rows(4) * np.inf],
            ValueError,
            "batch 2: values before 'bn' are not finite in channels 0, 1",
        ),
        ("none.npy", OSError, "none.npy"),
        ("none.csv", ValueError, "none.csv: wanted a name that ends in .npy or .npz"),
    ],
)
def test_data_that_are_refused(data, error, match):
    with pytest.raises(error, match=match):
        recalibrate(model_of(), data)


def test_damaged_files_and_empty_folders(tmp_path):
    for name in ("bad.npy", "bad.npz"):
        (tmp_path / name).write_bytes(b"\x93NUMPY nonsense")
        with pytest.raises(ValueError, match=rf"{name}: no array can be read"):
            recalibrate(model_of(), tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no \.npy or \.npz in this folder"):
        recalibrate(model_of(), tmp_path / "empty")


def test_values_within_the_model_that_are_not_finite_name_the_layer():
    model = model_of(names=("bn", "second"))
    model.graph.initializer[1].CopyFrom(  # beta, so large that Exp overflows
        onnx.numpy_helper.from_array(np.array([0, 1000, 0], np.float32), "bn.beta")
    )
    with pytest.raises(ValueError, match="batch 1: values before 'second' are not finite in channel 1"):
        recalibrate(model, rows(10))


def test_layerwise_heals_what_the_old_statistics_made_infinite():
    """The statistics of the first layer are far off; with its new ones Exp does not overflow."""
    model = model_of(names=("bn", "second"))
    mean = next(t for t in model.graph.initializer if t.name == "bn.mean")
    mean.CopyFrom(onnx.numpy_helper.from_array(np.full(3, -1e6, np.float32), "bn.mean"))
    with pytest.raises(ValueError, match="values before 'second' are not finite"):
        recalibrate(model, rows(64))
    new, _ = recalibrate(model, rows(64), layerwise=True)
    assert np.isfinite(run(new, {"x": rows(5)})[0]).all()


def test_data_that_can_be_gone_over_only_once():
    model, x = model_of(names=("bn", "second")), rows(8)
    wanted = "wanted a list, a path, or a callable that returns an iterable"
    with pytest.raises(ValueError, match=f"layerwise: .*{wanted}"):
        recalibrate(model, iter([x]), layerwise=True)
    with pytest.raises(ValueError, match=f"labels: .*{wanted}"):
        recalibrate(model, iter([x]), labels=np.zeros(8, int))
    with pytest.raises(ValueError, match=f"memory: was 1 bytes, .*{wanted}"):
        recalibrate(model, iter([x]), memory=1)
    # The first batch, by which the chunks are made, is not lost.
    whole, _ = recalibrate(model, [x, 2 * x])
    assert recalibrate(model, iter([x, 2 * x]), memory=10**6)[0] == whole


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"blend": 0}, ValueError, "blend: was 0.0, wanted 0 < blend <= 1"),
        ({"blend": float("nan")}, ValueError, "blend: was nan"),
        ({"blend": "1"}, TypeError, "blend: was '1', wanted a number"),
        ({"population": "mean"}, ValueError, "population: was 'mean'"),
        ({"memory": 0}, ValueError, "memory: was 0, wanted 1 or more bytes"),
        ({"threads": 0}, ValueError, "threads: was 0"),
        ({"batch_size": 0}, ValueError, "batch_size: was 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size: was 2.5, wanted an integer"),
        ({"labels": np.zeros(8)}, TypeError, "labels: dtype was float64, wanted integers"),
        ({"labels": np.zeros(7, int)}, ValueError, r"labels: had fewer entries than there are examples"),
        ({"labels": np.zeros(9, int)}, ValueError, "labels: had 9 entries, wanted 8"),
        ({"reference": np.full((8, 3), np.nan)}, ValueError, "reference: values are not finite"),
        (
            {"reference": np.zeros((8, 2))},
            ValueError,
            r"reference: shape for a batch was \(8, 2\), wanted \(8, 3\)",
        ),
    ],
)
def test_options_that_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        recalibrate(model_of(), rows(8), **options)


def test_a_batch_size_other_than_the_fixed_one_is_refused():
    with pytest.raises(ValueError, match="batch_size: was 8, wanted 4, which the model fixes"):
        recalibrate(model_of((4, 3)), rows(8), batch_size=8)
    assert recalibrate(model_of((4, 3)), rows(8), batch_size=4)[1].batches == 2
    with pytest.raises(ValueError, match=r"batch 1: 'x': shape was \(8, 3\), wanted \(4, 3\)"):
        recalibrate(model_of((4, 3)), [rows(8)])


def test_models_that_are_refused(tmp_path):
    folded = make([helper.make_node("Relu", ["x"], ["y"])], {})
    with pytest.raises(ValueError, match="no BatchNormalization to recalibrate; where they were folded"):
        recalibrate(folded, rows(8))
    training = make([batch_norm(name="bn", training_mode=1)], parameters_of())
    training.graph.node[0].output.extend(["m", "v"])
    with pytest.raises(ValueError, match=r"'bn': .*training mode .*; skip=True leaves them out"):
        recalibrate(training, rows(8))
    mixed = model_of(names=("bn", "second"))
    mixed.graph.node[2].output.extend(["m", "v"])
    mixed.graph.node[2].attribute.append(helper.make_attribute("training_mode", 1))
    with pytest.warns(UserWarning, match="'second': .*training mode"):
        new, report = recalibrate(mixed, rows(8), skip=True)
    assert [layer.name for layer in report.layers] == ["bn"]
    assert new.graph.node == mixed.graph.node


def test_opset_6_says_how_to_convert_and_that_works():
    model = make([batch_norm(name="bn", is_test=1)], parameters_of(), y=("n", 3), opset=6)
    with pytest.raises(ValueError, match=r"no BatchNormalization of opset 6; .*convert_version\(model, 15\)"):
        recalibrate(model, rows(8))
    new, _ = recalibrate(onnx.version_converter.convert_version(model, 15), rows(8))
    np.testing.assert_allclose(next(iter(frozen_layers(new).values())).mean, rows(8).mean(0), rtol=1e-5)


def test_statistics_that_can_be_overridden_are_warned_of():
    model = model_of()
    model.graph.input.append(helper.make_tensor_value_info("bn.mean", TensorProto.FLOAT, (3,)))
    with pytest.warns(UserWarning, match=r"so that a caller may give others: 'bn\.mean' of 'bn'"):
        new, _ = recalibrate(model, rows(8))
    np.testing.assert_allclose(frozen_mean(new), rows(8).mean(0), rtol=1e-5)
    assert new.graph.input == model.graph.input


def frozen_mean(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return frozen_layers(model)["bn"].mean


def test_constant_channels_are_named():
    x = rows(8)
    x[:, 1] = 0.1
    with pytest.warns(UserWarning, match="constant over the data: channel 1 of 'bn'"):
        new, report = recalibrate(model_of(), x)
    assert report.layers[0].constant == (1,)
    layer = frozen_layers(new)["bn"]
    assert (layer.mean[1], layer.var[1]) == (np.float32(0.1), 0)
    assert (layer.var[[0, 2]] > 0).all()


def test_a_division_by_zero_is_refused():
    x = rows(8)
    x[:, 1] = 0.1
    model = make([batch_norm(name="bn", epsilon=0.0)], parameters_of())
    with pytest.raises(ValueError, match="'bn': eps is 0, and so is the measured variance in channel 1"):
        recalibrate(model, x)
    with pytest.warns(UserWarning, match="constant"):  # half of the old variance is left
        assert recalibrate(model, x, blend=0.5)[1].layers[0].constant == (1,)


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (2e3, "'bn': var is beyond float16.* in channel 1"),
        (1e-6, "'bn': var is positive, but 0 in float16.* in channel 1"),
    ],
)
def test_statistics_that_float16_does_not_hold_are_refused(scale, match):
    x = rows(64).astype(np.float32)
    x[:, 1] = rows(64, 1)[:, 1] * scale
    with pytest.raises(ValueError, match=match):
        recalibrate(model_of(dtype="float16", opset=13), x.astype(np.float16))


def test_labels_and_reference():
    model, x = model_of(), rows(50)
    labels = x.argmax(1)
    (reference,) = run(recalibrate(model, x)[0], {"x": x})
    report = recalibrate(model, x, labels=labels, reference=reference)[1]
    (y,) = run(model, {"x": x})
    assert report.before.accuracy == (y.argmax(1) == labels).mean() < 1
    difference = abs(y.astype(float) - reference)
    assert report.before.rms == pytest.approx(np.sqrt((difference**2).mean()))
    assert report.before.largest == difference.max()
    assert (report.after.rms, report.after.largest) == (0, 0)
    assert report.after.accuracy == (reference.argmax(1) == labels).mean()
    alone = recalibrate(model, x, labels=labels)[1]
    assert (alone.after.accuracy, alone.after.rms) == (report.after.accuracy, None)
    assert recalibrate(model, x)[1].before is None
    # What fills no batch of a fixed size has labels all the same.
    with pytest.warns(UserWarning, match="2 examples"):
        fixed = recalibrate(model_of((4, 3)), x, labels=labels)[1]
    assert fixed.before.accuracy == (y.argmax(1) == labels)[:48].mean()


def test_outputs_that_are_not_finite_are_infinitely_far():
    model = model_of()
    gamma = next(t for t in model.graph.initializer if t.name == "bn.var")
    gamma.CopyFrom(onnx.numpy_helper.from_array(np.full(3, 1e-30, np.float32), "bn.var"))
    gamma = next(t for t in model.graph.initializer if t.name == "bn.gamma")
    gamma.CopyFrom(onnx.numpy_helper.from_array(np.full(3, 3e38, np.float32), "bn.gamma"))
    report = recalibrate(model, rows(8), reference=np.zeros((8, 3)))[1]
    assert report.before.rms == np.inf
    assert report.to_dict()["before"]["rms"] is None


@pytest.mark.parametrize("data", [rows(100), [rows(10)] * 4])
def test_progress_goes_up_to_one(data):
    seen = []
    model = model_of(names=("bn", "second"))
    recalibrate(
        model, data, layerwise=True, labels=np.zeros(100 if len(data) > 4 else 40, int), progress=seen.append
    )
    assert len(seen) == 16
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_paths_bytes_and_out(tmp_path):
    """Data in other files are tapped where they are, and copied beside `out`; errors leave no file."""
    model, x = model_of(names=("bn", "second")), rows(40)
    path, out = tmp_path / "m.onnx", tmp_path / "new" / "out.onnx"
    expected, _ = recalibrate(model, x)
    layerwise, _ = recalibrate(model, x, layerwise=True)
    assert recalibrate(model.SerializeToString(), x)[0] == expected
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    out.parent.mkdir()
    recalibrate(path, x, out=out)
    assert {p.name for p in out.parent.iterdir()} == {"out.onnx", "out.onnx.data"}
    assert frozen_layers(out) == frozen_layers(expected)
    np.testing.assert_array_equal(run(out, {"x": x})[0], run(expected, {"x": x})[0])
    assert frozen_layers(recalibrate(path, x, layerwise=True)[0]) == frozen_layers(layerwise)
    with pytest.raises(ValueError, match="not finite"):
        recalibrate(path, x * np.inf, out=tmp_path / "none.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.data", "new"}


@pytest.mark.parametrize("axis", [1, -1])
def test_our_exports_can_be_read_back(axis):
    layer = bn.FrozenBatchNorm([1, 2, 3], [1, 1, 2], channel_axis=axis)
    model = layer.to_onnx(rank=3)
    model.metadata_props.add(key="batchnorm.bn.fingerprint", value=layer.fingerprint)
    model.graph.node[len(model.graph.node) // 2].name = "bn"
    x = np.random.default_rng(0).normal(3, 2, (8, 3, 3)).astype(np.float32)
    new, _ = recalibrate(model, x)
    expected = bn.FrozenBatchNorm.from_moments(bn.moments(x, channel_axis=axis), channel_axis=axis)
    assert load_frozen(new) == expected
    kept = {prop.key for prop in model.metadata_props} - {"batchnorm.bn.fingerprint"}
    assert {prop.key for prop in new.metadata_props} == kept
