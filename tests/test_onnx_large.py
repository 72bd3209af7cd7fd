"""Models above 2 GB, which no message of protobuf holds: every verb takes a path and writes to another."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnx_models
from batchnorm.onnx import frozen_layers

GIB = 2**30
WEIGHT = 3 * GIB // 4  # bytes of each of three


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model of three Gemms of 768 MiB each, nearly all zeros that no disk holds, and a batch norm."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    rows, columns = 8, WEIGHT // 32
    nodes = [
        helper.make_node("Gemm", ["x", "up"], ["h"], name="up"),
        helper.make_node("Gemm", ["h", "down"], ["g"], name="down"),
        onnx_models.batch_norm("g", "f", name="bn"),
        helper.make_node("Gemm", ["f", "up2"], ["e"], name="up2"),
        helper.make_node("ReduceSum", ["e"], ["y"], keepdims=1),
    ]
    model = onnx_models.make(nodes, onnx_models.parameters(rng, rows), x=("n", rows), y=(1, 1))
    with (folder / "weights").open("wb") as file:
        for place, (name, dims) in enumerate(
            {"up": (rows, columns), "down": (columns, rows), "up2": (rows, columns)}.items()
        ):
            tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights"), ("offset", place * WEIGHT), ("length", WEIGHT)):
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
        file.seek(WEIGHT - 4)
        file.write(np.float32(2).tobytes())  # the last weight of up
        file.seek(WEIGHT + (columns - 1) * rows * 4)
        file.write(np.arange(1, rows + 1, dtype=np.float32).tobytes())  # the last row of down
        file.truncate(3 * WEIGHT)
    onnx.save(model, folder / "m.onnx")
    yield folder / "m.onnx"
    (folder / "weights").unlink()


@pytest.fixture(autouse=True)
def disk(tmp_path):
    """Gives gigabytes back after each test."""
    yield
    for file in tmp_path.glob("*.data"):
        file.unlink()


def in_child(code, *arguments, most):
    """Run a verb in a process of its own and return the most memory that it held, in bytes."""
    # Not by getrusage, whose peak includes that of the process from which this one was forked.
    peak_of = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    code = f"import sys\n{code}\n{peak_of}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-2]) * 1024
    assert 2**24 < peak < most
    return peak


@pytest.mark.long
def test_layers_are_read_and_put_back(path, tmp_path):
    """With less memory than one of the weights takes."""
    code = """
import batchnorm as bn
from batchnorm.onnx import frozen_layers, replace_layers
(key, layer), = frozen_layers(sys.argv[1]).items()
changed = bn.FrozenBatchNorm(layer.mean + 1, layer.var, layer.gamma, layer.beta, eps=layer.eps)
replace_layers(sys.argv[1], {key: changed}, out=sys.argv[2])
try:
    replace_layers(sys.argv[1], {key: changed})
except ValueError as error:
    assert "the result has 2415" in str(error) and "give out=" in str(error), error
else:
    raise SystemExit("a result above 2 GB without out=")
"""
    out = tmp_path / "out.onnx"
    in_child(code, path, out, most=GIB // 2)
    assert np.array_equal(frozen_layers(out)["bn"].mean, frozen_layers(path)["bn"].mean + 1)
    assert out.stat().st_size < 10_000
    assert out.with_name("out.onnx.data").stat().st_size >= 3 * WEIGHT


@pytest.mark.long
def test_statistics_are_recalibrated(path, tmp_path):
    """The tapped copy refers to the weights where they are; those behind the last layer are not loaded."""
    code = """
import numpy as np
from batchnorm.onnx import recalibrate
x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
recalibrate(sys.argv[1], x, batch_size=2, population="pooled", out=sys.argv[2])
"""
    out = tmp_path / "out.onnx"
    in_child(code, path, out, most=6 * GIB)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    # All weights of the first two Gemms are 0, but for one of up and one row of down.
    inputs = x[:, -1:].astype(np.float64) * 2 * np.arange(1, 9)
    layer = frozen_layers(out)["bn"]
    assert np.allclose(layer.mean, inputs.mean(0), rtol=1e-5)
    assert 0.9 < np.min(layer.var / inputs.var(0, ddof=1)) < np.max(layer.var / inputs.var(0, ddof=1)) < 1.1
    assert out.with_name("out.onnx.data").stat().st_size >= 3 * WEIGHT


@pytest.mark.long
def test_it_is_checked_and_folded(path, tmp_path):
    """Folding reads the one weight that it changes."""
    code = """
from batchnorm.onnx import fold, lint
assert [finding.name for finding in lint(sys.argv[1])] == ["unfolded"]
_, report = fold(sys.argv[1], verify=False, out=sys.argv[2])
assert report.nodes[0].into == "Gemm 'down'", report
"""
    out = tmp_path / "out.onnx"
    in_child(code, path, out, most=12 * WEIGHT)
    assert frozen_layers(out) == {}
    assert out.stat().st_size < 10_000
    layer = frozen_layers(path)["bn"]
    with out.with_name("out.onnx.data").open("rb") as file:
        (tensor,) = (
            t for t in onnx.load(out, load_external_data=False).graph.initializer if t.name == "down"
        )
        offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
        file.seek(offset + WEIGHT - 32)
        last = np.frombuffer(file.read(32), np.float32)
    scale = layer.gamma.astype(np.float64) / np.sqrt(layer.var.astype(np.float64) + layer.eps)
    assert np.allclose(last, np.arange(1, 9) * scale, rtol=1e-6)
