"""`batchnorm import`: one frozen layer for each batch norm in the state of a network."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import batchnorm as bn
import onnx_models
from batchnorm.cli import main
from batchnorm.onnx import frozen_layers

EXAMPLE = shlex.split(main.commands["import"].epilog.removeprefix("Example: "))


def batch_norm(seed, channels=3, dtype=np.float32, affine=True):
    rng = np.random.default_rng(seed)
    state = {"running_mean": rng.normal(size=channels), "running_var": rng.gamma(2.0, size=channels)}
    if affine:
        state |= {"weight": rng.normal(size=channels), "bias": rng.normal(size=channels)}
    state = {name: values.astype(dtype) for name, values in state.items()}
    return state | {"num_batches_tracked": np.array(7)}


def network():
    state = {"conv1.weight": np.zeros((3, 3, 3, 3), np.float32), "fc.weight": np.zeros((2, 3), np.float32)}
    layers = {
        "bn1": batch_norm(1),
        "layer1.0.bn2": batch_norm(2, 5, np.float64),
        "layer1.0.downsample.1": batch_norm(3, affine=False),
        "half": batch_norm(4, dtype=np.float16),
        "brain": batch_norm(5, dtype=ml_dtypes.bfloat16),
    }
    for name, layer in layers.items():
        state |= {f"{name}.{key}": values for key, values in layer.items()}
    return state, layers


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(network()[0], "network.safetensors")


def run(*arguments):
    result = CliRunner().invoke(main, ["import", *map(str, arguments)])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def error_of(*arguments):
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(main, ["import", *map(str, arguments)])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert re.fullmatch(r"batchnorm: [^\n]+\n", result.stderr)
    assert sorted(Path().rglob("*")) == before
    return result.stderr.removeprefix("batchnorm: ").strip()


def test_a_layer_for_each_pair():
    printed = run("network.safetensors", "-o", "made/layers")
    state, layers = network()
    found = {path.name.removesuffix(".safetensors"): path for path in Path("made/layers").iterdir()}
    assert set(found) == set(layers)
    for name, path in found.items():
        layer = bn.FrozenBatchNorm.load(path)
        assert layer == bn.FrozenBatchNorm.from_torch(state, f"{name}.")
        assert layer.dtype == (np.float64 if name == "layer1.0.bn2" else np.float32)
        channels = layers[name]["running_mean"].size
        assert f"{path}: {channels} channels, fingerprint {layer.fingerprint}\n" in printed
    assert len(printed.splitlines()) == len(layers)


def test_the_example_in_a_process_without_pytorch():
    code = "import sys; sys.modules['torch'] = None; from batchnorm.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *EXAMPLE[1:]], check=True, timeout=60)
    assert len(list(Path(EXAMPLE[-1]).iterdir())) == 5


def test_json_and_eps():
    told = json.loads(run("network.safetensors", "-o", ".", "--eps", "1e-3", "--json"))
    layer = bn.FrozenBatchNorm.load("bn1.safetensors")
    assert told["path"] == "."
    assert told["eps"] == 1e-3
    assert told["fingerprints"]["bn1"] == layer.fingerprint
    assert layer == bn.FrozenBatchNorm.from_torch(network()[0], "bn1.", eps=1e-3)


def test_one_layer_by_itself_has_the_name_of_the_file():
    save_file(batch_norm(1), "alone.safetensors")
    run("alone.safetensors", "-o", "made")
    assert bn.FrozenBatchNorm.load("made/alone.safetensors").channels == 3


@pytest.mark.parametrize("name", ["a b", "ä", "x" * 129, "stats", "a/b", "../up"])
def test_a_name_that_cannot_be_served_is_an_error(name):
    save_file(
        {f"{name}.{key}": values for key, values in batch_norm(1).items()} | network()[0], "n.safetensors"
    )
    assert f"n.safetensors: a layer has the name {name!r}" in error_of("n.safetensors", "-o", "made")


def test_a_layer_that_cannot_be_made_is_an_error_by_name():
    save_file(network()[0] | {"bn1.running_var": -np.ones(3, np.float32)}, "n.safetensors")
    assert error_of("n.safetensors", "-o", "made").startswith("n.safetensors: layer bn1: var")
    assert not Path("made").exists()


def test_files_of_other_kinds():
    Path("state.bin").write_bytes(b"")
    assert "wanted a name that ends in .safetensors, .pt or .pth" in error_of("state.bin", "-o", "made")
    Path("damaged.safetensors").write_bytes(b"\0" * 20)
    assert "damaged.safetensors: not a whole safetensors file" in error_of(
        "damaged.safetensors", "-o", "made"
    )
    save_file({"fc.weight": np.zeros(2), "a.running_mean": np.zeros(2)}, "none.safetensors")
    assert "none.safetensors: 1 pair of running_mean" in error_of("none.safetensors", "-o", "made")
    Path("folder").write_text("")
    assert "folder" in error_of("network.safetensors", "-o", "folder")


def test_a_pickle_without_pytorch_says_what_to_install():
    Path("network.pt").write_bytes(b"")
    code = "import sys; sys.modules['torch'] = None; from batchnorm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "import", "network.pt", "-o", "made"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "pip install 'batchnorm[torch]'" in done.stderr


# ONNX models


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    names = ["/layer1/0/bn1", "layer1.0.bn1", "stats", "a b/ä", "", "x" * 200]
    prefixes = [f"{k}." for k in range(len(names))]
    values = ["x", *(f"h{k}" for k in range(1, len(names))), "y"]
    nodes = [
        onnx_models.batch_norm(*pair, prefix, name)
        for *pair, prefix, name in zip(values, values[1:], prefixes, names, strict=False)
    ]
    constants = {k: v for prefix in prefixes for k, v in onnx_models.parameters(rng, prefix=prefix).items()}
    made = onnx_models.make(nodes, constants)
    onnx.save(made, "network.onnx")
    return made


def test_a_layer_for_each_node_of_an_onnx_model(model):
    told = json.loads(run("network.onnx", "-o", "made", "--json"))
    layers = frozen_layers(model)
    assert told["nodes"] == {
        "layer1.0.bn1": "/layer1/0/bn1",
        "layer1.0.bn1_2": "layer1.0.bn1",
        "stats_": "stats",
        "a_b._": "a b/ä",
        "h5": "h5",
        "x" * 128: "x" * 200,
    }
    assert sorted(path.name for path in Path("made").iterdir()) == sorted(
        f"{name}.safetensors" for name in told["nodes"]
    )
    for name, node in told["nodes"].items():
        layer = bn.FrozenBatchNorm.load(f"made/{name}.safetensors")
        assert layer == layers[node]
        assert told["fingerprints"][name] == layer.fingerprint
    assert "eps" not in told


def test_nodes_that_cannot_be_read(model):
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("training_mode", 1))
    onnx.save(model, "network.onnx")
    assert "1 of 6 batch normalizations cannot be read: 'layer1.0.bn1': " in error_of(
        "network.onnx", "-o", "made"
    )
    result = CliRunner().invoke(main, ["import", "network.onnx", "-o", "made", "--skip"])
    assert result.exit_code == 0
    assert result.stderr.startswith("batchnorm: warning: network.onnx: 1 of 6 batch normalizations cannot")
    assert len(list(Path("made").iterdir())) == len(result.stdout.splitlines()) == 5


def test_options_and_files_that_are_not_for_onnx(model):
    assert (
        error_of("network.onnx", "-o", "made", "--eps", "1e-3")
        == "--eps: was 0.001, but an ONNX model holds ε"
    )
    assert error_of("network.safetensors", "-o", "made", "--skip") == "--skip: only for a .onnx"
    Path("damaged.onnx").write_bytes(b"\xff" * 9)
    assert error_of("damaged.onnx", "-o", "made").startswith("damaged.onnx: not an ONNX model")
    del model.graph.node[:]
    onnx.save(model, "empty.onnx")
    assert error_of("empty.onnx", "-o", "made") == (
        "empty.onnx: 1 batch normalization or more wanted, found none"
    )


def test_an_onnx_model_without_the_package_says_what_to_install(model):
    code = "import sys; sys.modules['onnx'] = None; from batchnorm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "import", "network.onnx", "-o", "made"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'batchnorm[onnx]'" in done.stderr
