"""Models in files: with their data in other files, and written over; and files that are no models."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from batchnorm.onnx import frozen_layers, replace_layers
from onnx_models import batch_norm, make, parameters, run
from test_onnx_layers import layer_of, other


@pytest.mark.parametrize("threshold", [0, 20])
def test_data_in_other_files(tmp_path, rng, threshold):
    """The result has its data in a file of its own, or within it; the model's own files stay as they are."""
    values = parameters(rng, 3000) | parameters(rng, 3000, "b.")
    nodes = [batch_norm("x", "h", name="a"), batch_norm("h", "y", "b.", name="b")]
    source = make(nodes, values, x=("n", 3000))
    wanted = frozen_layers(source)
    place = tmp_path / "model"
    place.mkdir()
    path = place / "m.onnx"
    onnx.save(source, path, save_as_external_data=True, location="weights", size_threshold=threshold)
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    assert set(before) == {"m.onnx", "weights"}
    changed = {"a": other(layer_of(values))}
    wanted |= changed

    whole = replace_layers(path, changed)
    assert frozen_layers(whole) == wanted
    for out in (tmp_path / "out.onnx", place / "out.onnx"):
        saved = replace_layers(path, changed, out=out)
        assert frozen_layers(out) == wanted
        assert out.with_name("out.onnx.data").exists()
        assert saved.SerializeToString() == out.read_bytes()
        assert out.stat().st_size < 4000 < len(before["weights"])
        onnx.checker.check_model(out, full_check=True)
        x = rng.normal(size=(2, 3000)).astype(np.float32)
        assert np.array_equal(run(out, {"x": x})[0], run(whole, {"x": x})[0])
    assert {name: (place / name).read_bytes() for name in before} == before


def test_a_model_may_be_replaced_by_the_result(tmp_path, rng):
    values = parameters(rng, 3000)
    path = tmp_path / "m.onnx"
    model = make([batch_norm(name="bn")], values, x=("n", 3000))
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data")
    changed = {"bn": other(layer_of(values))}
    replace_layers(path, changed, out=path)
    assert frozen_layers(path) == changed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, rng):
    values = parameters(rng)
    out = tmp_path / "folder"
    out.mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        replace_layers(make([batch_norm(name="bn")], values), {}, out=out)
    with pytest.raises(FileNotFoundError):
        replace_layers(make([batch_norm(name="bn")], values), {}, out=tmp_path / "none" / "m.onnx")


def test_data_of_the_model_are_never_written_over(tmp_path, rng):
    """The model was renamed, and the result gets its old name: the file with its data stays."""
    values = parameters(rng, 3000)
    path, renamed = tmp_path / "m.onnx", tmp_path / "old.onnx"
    model = make([batch_norm(name="bn")], values, x=("n", 3000))
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data")
    path.rename(renamed)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    layer = layer_of(values, eps=0.5)
    replace_layers(renamed, {"bn": layer}, out=path)
    assert frozen_layers(path) == {"bn": layer}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert {file.name for file in tmp_path.iterdir()} == {*before, "m.onnx", "m.onnx.2.data"}


@pytest.mark.parametrize("data", [b"", onnx.TensorProto(dims=[2], data_type=1, name="x").SerializeToString()])
def test_files_that_are_no_models(tmp_path, data):
    (tmp_path / "m.onnx").write_bytes(data)
    for source in (tmp_path / "m.onnx", data):
        with pytest.raises(ValueError, match="not an ONNX model"):
            frozen_layers(source)
