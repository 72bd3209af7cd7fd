"""The command `batchnorm recalibrate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from batchnorm.cli import main
from batchnorm.onnx import frozen_layers, recalibrate
from onnx_models import run
from test_onnx_recalibrate_data import model_of, rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model, data, labels and wanted outputs."""
    monkeypatch.chdir(tmp_path)
    model, x = model_of(names=("bn", "second")), rows(70)
    onnx.save(model, "model.onnx")
    np.save("a.npy", x[:40])
    np.save("b.npy", x[40:])
    np.save("labels.npy", x.argmax(1))
    np.save("reference.npy", run(model, {"x": x})[0])
    return model, x


def command(*arguments):
    return CliRunner().invoke(main, ["recalibrate", *map(str, arguments)])


def test_it_writes_what_the_function_makes(folder):
    model, x = folder
    for options, arguments in (
        ({}, []),
        ({"layerwise": True, "blend": 0.5}, ["--layerwise", "--blend", "0.5"]),
        ({"population": "pooled", "batch_size": 10}, ["--population", "pooled", "--batch-size", 10]),
        ({"memory": 2**20}, ["--memory", 1]),
    ):
        result = command("model.onnx", "a.npy", "b.npy", "-o", "new.onnx", *arguments)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        assert onnx.load("new.onnx") == recalibrate(model, x, **options)[0]


def test_the_table_and_json_say_the_same(folder):
    arguments = ["model.onnx", "a.npy", "b.npy", "-o", "new.onnx", "--labels", "labels.npy"]
    arguments += ["--reference", "reference.npy"]
    result = command(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found = json.loads(command(*arguments, "--json").stdout)
    report = recalibrate(*folder, labels=np.load("labels.npy"), reference=np.load("reference.npy"))[1]
    assert found == json.loads(json.dumps({"path": "new.onnx", **report.to_dict()}))
    text = re.sub(r" +", " ", result.stdout)
    for layer in found["layers"]:
        row = next(line for line in text.splitlines() if f"│ {layer['name']} │" in line)
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells[:3] == [layer["name"], "3", "70"]
        assert cells[3:5] == [f"{layer['mean_shift'][key]:.3g}" for key in ("mean", "max")]
    assert "new.onnx: 2 layers, plain, blend 1, batches 3, gone over 1 time\n" in text
    assert f" population algorithm2: {report.reason}\n" in text
    assert f"accuracy {report.before.accuracy:.1%} before, {report.after.accuracy:.1%} after" in text
    assert f"rms error 0 before, {report.after.rms:.3g} after" in text
    assert "peak memory " in text
    assert found["memory"] == 2 * 32 * 3 * 4


def test_warnings_and_errors(folder):
    x = np.load("a.npy")
    x[:, 1] = 1
    np.save("constant.npy", x)
    result = command("model.onnx", "constant.npy", "-o", "new.onnx")
    assert result.exit_code == 0
    warned = "model.onnx: constant over the data: channel 1 of 'bn'; channel 1 of 'second'"
    assert result.stderr == f"batchnorm: warning: {warned}\n"
    for arguments, message in {
        (
            "model.onnx",
            "labels.npy",
            "-o",
            "e.onnx",
        ): "batches: batch 1: 'x': dtype was int64, wanted float32",
        ("model.onnx", "a.npy", "-o", "e.txt"): "e.txt: wanted a name that ends in .onnx",
        ("model.onnx", "a.npy", "-o", "e.onnx", "--blend", "2"): "--blend: was 2.0, wanted 0 < blend <= 1",
        ("a.npy", "a.npy", "-o", "e.onnx"): "a.npy: not an ONNX model",
        (
            "model.onnx",
            "a.npy",
            "-o",
            "e.onnx",
            "--labels",
            "model.onnx",
        ): "model.onnx: wanted a name that ends",
    }.items():
        result = command(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert command("model.onnx", "-o", "e.onnx").exit_code == 2
    assert not list(Path().glob("e.*"))


def test_the_model_may_be_replaced_by_its_copy(folder):
    assert command("model.onnx", "a.npy", "b.npy", "-o", "model.onnx").exit_code == 0
    assert frozen_layers("model.onnx") == frozen_layers(recalibrate(*folder)[0])
