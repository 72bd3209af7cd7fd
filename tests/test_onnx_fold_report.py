"""How folding is verified and reported; models in files; the command."""

from __future__ import annotations

import json
import subprocess
import sys

import click.testing
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import batchnorm.onnx
from batchnorm.cli import main
from batchnorm.commands.fold import fold as fold_command
from batchnorm.onnx import InexactFoldError, fold
from onnx_models import batch_norm, run
from test_onnx_fold_refused import CONV, NORM, PARAMETERS, RNG, conv_model, node


def test_errors_are_those_of_the_outputs():
    """The measured error is that of the two models on the given inputs, over all batches."""
    model = conv_model(CONV, NORM)
    batches = [{"x": RNG.normal(0, size, (1, 3, 4, 5)).astype(np.float32)} for size in (1, 100, 2)]
    folded, report = fold(model, inputs=iter(batches))
    old, new = (
        np.stack([run(m, batch, optimize=False)[0] for batch in batches]).astype(np.float64)
        for m in (model, folded)
    )
    (error,) = report.errors
    assert error.output == "y"
    assert error.absolute == np.abs(old - new).max() > 0
    assert error.relative == error.absolute / np.abs(old).max() == report.max_error
    assert error.ulps == error.absolute / np.spacing(np.float32(np.abs(old).max()))
    one = fold(model, inputs=batches[0])[1].errors[0]
    assert one.absolute <= error.absolute


def test_bound(tmp_path):
    model, out = conv_model(CONV, NORM), tmp_path / "out.onnx"
    measured = fold(model)[1].max_error
    assert 0 < measured < 1e-6
    with pytest.raises(InexactFoldError, match=r"model: folding changes 'y' by .* of its largest") as caught:
        fold(model, max_error=measured / 2, out=out)
    assert caught.value.report.max_error == measured
    assert not out.exists()
    fold(model, max_error=measured, out=out)
    assert out.exists()


def test_infinite_results_are_no_error_if_both_have_them():
    model = conv_model(CONV, NORM)
    x = np.ones((1, 3, 4, 5), np.float32)
    x[0, 0, 0, 0] = np.inf
    x[0, 0, 1, 1] = np.nan
    assert fold(model, inputs={"x": x})[1].max_error < 1e-6
    # Here x·w overflows in the original only, since γ is small enough for the folded weight.
    scale = {**PARAMETERS, "gamma": np.full(3, 1e-10, np.float32)}
    with pytest.raises(InexactFoldError, match="by inf of its largest"):
        fold(conv_model(CONV, NORM, constants=scale), inputs={"x": np.full_like(x, 3e38)}, max_error=1)


def test_generated_inputs():
    """The same each time; a name of a size means one size, wherever it stands."""
    sizes = ("batch", 3, None, "width")
    model = conv_model(CONV, NORM, x=sizes)
    assert fold(model)[1] == fold(model)[1]
    feeds = batchnorm.onnx.compare.generated(batchnorm.onnx.graph.Graph(model))
    assert {name: (x.shape, x.dtype.name) for name, x in feeds.items()} == {"x": ((4, 3, 32, 32), "float32")}
    model.graph.input.append(helper.make_tensor_value_info("x2", 11, ["width", "batch"]))
    feeds = batchnorm.onnx.compare.generated(batchnorm.onnx.graph.Graph(model))
    assert (feeds["x2"].shape, feeds["x2"].dtype) == ((32, 4), np.float64)


def with_input(element, shape):
    model = conv_model(CONV, NORM)
    model.graph.input.append(helper.make_tensor_value_info("other", element, shape))
    return model


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        (with_input(TensorProto.INT64, [2]), {}, "inputs: wanted, since 'other' of model is of int64"),
        (
            with_input(TensorProto.FLOAT, None),
            {},
            "inputs: wanted, since the rank of 'other' of model",
        ),
        (conv_model(CONV, NORM), {"inputs": []}, "inputs: there is none, wanted one or more"),
        (conv_model(CONV, NORM), {"inputs": {}}, r"inputs: batch 1: names were \[\], wanted"),
        (conv_model(CONV, NORM), {"max_error": -1}, "max_error: was -1, wanted 0 or more"),
        (conv_model(CONV, NORM), {"max_error": float("nan")}, "max_error: was nan, wanted 0 or more"),
        (conv_model(CONV, NORM), {"verify": False, "max_error": 1}, "verify: was False, wanted True"),
        (conv_model(CONV, NORM), {"verify": False, "inputs": {}}, "verify: was False, wanted True"),
        (conv_model(CONV, batch_norm("h", is_test=1), opset=6), {}, "no BatchNormalization of opset 6"),
    ],
)
def test_errors(model, how, message):
    with pytest.raises(ValueError, match=message):
        fold(model, **how)


@pytest.mark.parametrize("inputs", [3, [[1.0]], [None]])
def test_inputs_of_another_type(inputs):
    with pytest.raises(TypeError, match=r"inputs: (batch 1: )?was (int|list|NoneType), wanted a"):
        fold(conv_model(CONV, NORM), inputs=inputs)


def test_output_without_axes():
    model = conv_model(CONV, NORM, node("ReduceSum", "y", output="z", keepdims=0), opset=12)
    model.graph.output[0].name = "z"
    assert 0 < fold(model)[1].max_error < 1e-5


def test_outputs_of_other_types_are_left_out():
    model = conv_model(CONV, NORM, node("ArgMax", "y", output="z"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", TensorProto.INT64, None))
    assert fold(model)[1].errors == ()
    with pytest.raises(ValueError, match="max_error: was 1, but model has no output of floats"):
        fold(model, max_error=1)


def run_python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_without_onnxruntime(tmp_path):
    """Only running the models needs it."""
    code = """if True:
        import sys
        sys.modules["onnxruntime"] = None
        from batchnorm.onnx import fold
        print(fold(sys.argv[1], verify=False)[1].folded)
        try:
            fold(sys.argv[1], out=sys.argv[2])
        except ImportError as error:
            print(error)
    """
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(conv_model(CONV, NORM), path)
    folded, error = run_python(code, path, out)
    assert folded == "1"
    assert "pip install 'batchnorm[onnxruntime]'" in error
    assert not out.exists()


@pytest.fixture
def external(tmp_path):
    """A model whose data lie in files of their own, one for each tensor, and the path of it."""
    big = numpy_helper.from_array(np.ones((3, 3, 1, 64), np.float32), "v")
    model = conv_model(CONV, NORM, helper.make_node("Conv", ["y", "v"], ["z"], name="last"))
    model.graph.initializer.append(big)
    model.graph.output[0].name = "z"
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, [1, 3, 4, 80]))
    wanted = onnx.ModelProto()
    wanted.CopyFrom(model)
    for tensor in model.graph.initializer:
        (tmp_path / f"{tensor.name}.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{tensor.name}.bin")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return wanted, path


def test_external_data(external, tmp_path):
    model, path = external
    wanted, _ = fold(model)
    found, report = fold(path)
    assert report.folded == 1
    assert found.SerializeToString() == wanted.SerializeToString()
    out = tmp_path / "folder" / "out.onnx"
    out.parent.mkdir()
    fold(path, out=out)
    assert sorted(file.name for file in out.parent.iterdir()) == ["out.onnx", "out.onnx.data"]
    feeds = {"x": RNG.normal(size=(1, 3, 4, 80)).astype(np.float32)}
    assert np.array_equal(run(out, feeds)[0], run(wanted, feeds)[0])
    with pytest.raises(ValueError, match="which was not loaded; give the path of the model"):
        fold(path.read_bytes(), verify=False)


def test_only_what_is_folded_is_read(external):
    """Of the others, the data are copied to the result and no more."""
    code = """if True:
        import pathlib, sys
        from batchnorm.onnx.edit import Editor
        from batchnorm.onnx.fold import _fold_nodes
        from batchnorm.onnx.graph import Graph
        opened = set()
        sys.addaudithook(lambda event, given: opened.add(str(given[0])) if event == "open" else None)
        graph = Graph(sys.argv[1])
        nodes = _fold_nodes(Editor(graph), graph)
        print(*sorted(pathlib.Path(name).name for name in opened if name.endswith(".bin")))
        print(*(node.into for node in nodes))
    """
    _, path = external
    assert run_python(code, path) == ["beta.bin gamma.bin mean.bin var.bin w.bin", "Conv 'conv'"]


def command(*arguments):
    return click.testing.CliRunner().invoke(main, ["fold", *map(str, arguments)], env={"COLUMNS": "100"})


def test_command(tmp_path):
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(conv_model(CONV, NORM, node("Relu", "y", output="r"), batch_norm("r", "z", name="[red]")), path)
    done = command(path, "-o", out)
    assert done.exit_code == 0, done.output
    assert "folded into Conv 'conv'" in done.output
    assert "[red]" in done.output
    assert "left: no linear node beside it" in done.output
    assert "output 'y': changed by " in done.output
    assert f"{out}: 1 of 2 batch normalizations folded\n" in done.output
    assert out.read_bytes() == fold(path)[0].SerializeToString()


def test_command_example(tmp_path, monkeypatch):
    """That of --help."""
    monkeypatch.chdir(tmp_path)
    onnx.save(conv_model(CONV, NORM), "model.onnx")
    name, *example = fold_command.epilog.removeprefix("Example: batchnorm ").split()
    assert name == "fold"
    assert command(*example).exit_code == 0
    assert onnx.load("folded.onnx").graph.node[0].op_type == "Conv"


def test_command_prints_json(tmp_path):
    path, out, x = tmp_path / "model.onnx", tmp_path / "out.onnx", tmp_path / "x.npy"
    onnx.save(conv_model(CONV, NORM), path)
    np.save(x, RNG.normal(size=(1, 3, 4, 5)).astype(np.float32))
    _, report = fold(path, inputs={"x": np.load(x)})
    done = command(path, "-o", out, "--input", x, "--json")
    assert json.loads(done.stdout) == {
        "path": str(out),
        "folded": 1,
        "max_error": report.max_error,
        "nodes": [{"name": "bn", "into": "Conv 'conv'", "before": False, "reason": ""}],
        "errors": [
            {"output": "y", "absolute": e.absolute, "relative": e.relative, "ulps": e.ulps}
            for e in report.errors
        ],
    }
    archive = tmp_path / "x.npz"
    np.savez(archive, x=np.load(x))
    assert command(path, "-o", out, "--input", archive, "--json").stdout == done.stdout


def test_command_fails_above_the_bound(tmp_path):
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(conv_model(CONV, NORM), path)
    done = command(path, "-o", out, "--max-error", "1e-12")
    assert done.exit_code == 1
    assert "--max-error is exceeded, nothing is written: 1 of 1 batch normalization folded" in done.output
    assert not out.exists()
    assert json.loads(command(path, "-o", out, "--max-error", "1e-12", "--json").stdout)["path"] is None
    assert command(path, "-o", out, "--max-error", "1e-3").exit_code == 0
    assert out.exists()


def test_command_errors(tmp_path):
    path, out, x = tmp_path / "model.onnx", tmp_path / "out.onnx", tmp_path / "x.npy"
    onnx.save(with_input(TensorProto.FLOAT, [1]), path)
    np.save(x, np.ones(3))
    for arguments, message in (
        (["--input", x], "x.npy: found one array, wanted a .npz of the model's inputs: x, other"),
        (["--no-verify", "--max-error", "1"], "--verify: was False"),
        (["--max-error", "-1"], "--max-error: was -1.0, wanted 0 or more"),
    ):
        done = command(path, "-o", out, *arguments)
        assert done.exit_code == 2
        assert message in done.output
    assert not out.exists()


def test_nothing_would_be_compared_of_no_examples():
    model = conv_model(CONV, NORM)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    with pytest.raises(ValueError, match=r"inputs: batch 1: 'x': shape was \(0, .*, wanted one example"):
        fold(model)


def test_a_size_below_0_varies():
    """Some exporters write -1."""
    model = conv_model(CONV, NORM)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    _, report = fold(model)
    assert report.folded == 1
    assert report.errors[0].absolute > 0
