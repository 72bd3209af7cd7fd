"""`batchnorm export`: modes, types, names, and the errors that --verify prints."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.onnx import load_frozen, verify


@pytest.fixture(autouse=True)
def layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frozen = bn.FrozenBatchNorm([100.0, -200.0], [1.0, 4.0], [2.0, 3.0], [0.5, -1.0])
    frozen.save("bn.safetensors")
    return frozen


def export(*arguments, status=0, file="bn.safetensors"):
    done = CliRunner().invoke(main, ["export", file, "-o", "x.onnx", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_arguments_reach_the_model(layer, dtype):
    told = export(
        "--mode", "exact", "--dtype", dtype, "--shape", "n,2,8", "--name", "b.n", "--opset", 20, "--json"
    )
    assert json.loads(told) == {
        "path": "x.onnx", "fingerprint": layer.fingerprint, "mode": "exact", "opset": 20, "rank": 3
    }  # fmt: skip
    model = onnx.load("x.onnx")
    assert model == layer.to_onnx(mode="exact", dtype=dtype, shape=("n", 2, 8), name="b.n", opset=20)
    assert load_frozen("x.onnx") == layer


def test_training(layer):
    export("--mode", "training", "--update-weight", 0.1, "--count", 32, "--rank", 2)
    assert onnx.load("x.onnx") == layer.to_onnx(mode="training", update_weight=0.1, count=32, rank=2)


def test_verify_prints_errors(layer):
    told = export("--verify", "--rank", 2)
    report = verify(layer.to_onnx(rank=2), layer)
    assert f"ONNX Runtime, of the exact result: at most {report.runtime.max:.3g} ulps" in told
    assert f"{report.differing} of 8192 values differ in a bit" in told
    assert 0 < report.differing < 8192
    exact = json.loads(export("--verify", "--rank", 2, "--mode", "exact", "--json"))["verification"]
    assert exact["differing"] == 0
    assert exact["runtime"] == exact["ours"]
    assert exact["between"] == {"max": 0, "mean": 0}


def test_verify_with_data(layer):
    x = np.random.default_rng(0).normal(100, 1, size=(50, 2))
    np.save("data.npy", x)
    for dtype in ("float32", "bfloat16"):
        found = json.loads(
            export("--verify", "--input", "data.npy", "--rank", 2, "--dtype", dtype, "--json")
        )["verification"]
        model = layer.to_onnx(rank=2, dtype=dtype)
        assert found == verify(model, layer, x.astype(dtype)).as_dict()
        assert found["values"] == 100


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--input", "bn.safetensors"], "--input: is of --verify, which is not given"),
        (["--verify", "--input", "bn.safetensors"], "bn.safetensors: wanted a name that ends in .npy"),
        (["--mode", "training"], "--update-weight: was None, wanted a number for mode 'training'"),
        (["--shape", "1,x,"], "--shape: "),
        (["--shape", "1,3"], "--shape: was .*, wanted 2 channels on axis 1"),
        (["--dtype", "float64"], "--dtype: was float64, wanted one that the layer takes"),
        (
            ["--verify", "--mode", "training", "--update-weight", 0.1, "--count", 9],
            "--verify: is not of mode training",
        ),
    ],
)
def test_errors_are_one_line_and_write_nothing(tmp_path, arguments, match):
    told = export(*arguments, status=2)
    assert len(told.splitlines()) == 1
    import re

    assert re.search(match, told)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    "option", [["--verify"], ["--dtype", "float16"], ["--name", "w"], ["--shape", "n,2"]]
)
def test_a_whitening_layer_has_only_opset_and_rank(option):
    bn.FrozenWhitening(matrix=np.eye(2), mean=[0.0, 0.0]).save("w.safetensors")
    assert f"{option[0]}: is of a batch norm" in export(*option, file="w.safetensors", status=2)
    export("--rank", 2, file="w.safetensors")
