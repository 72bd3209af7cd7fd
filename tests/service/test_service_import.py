"""What `batchnorm import` writes is served, with dots in the names and all."""

from __future__ import annotations

import numpy as np
from click.testing import CliRunner
from safetensors.numpy import save_file
from serving import serve

import batchnorm as bn
from batchnorm.cli import main


def test_imported_layers_are_served(tmp_path):
    rng = np.random.default_rng(1)
    state = {}
    for prefix in ("bn1.", "layer1.0.downsample.1.", "module._orig_mod.x-1."):
        state |= {
            f"{prefix}{name}": rng.gamma(2.0, size=5) for name in ("running_mean", "running_var", "weight")
        }
    save_file(state, tmp_path / "network.safetensors")
    done = CliRunner().invoke(
        main, ["import", str(tmp_path / "network.safetensors"), "-o", str(tmp_path / "made")]
    )
    assert done.exit_code == 0, done.output
    x = rng.normal(size=(2, 5))
    body = {"inputs": [{"name": "x", "shape": [2, 5], "datatype": "FP64", "data": x.ravel().tolist()}]}
    with serve(tmp_path / "log", str(tmp_path / "made")) as server:
        for prefix in ("bn1.", "layer1.0.downsample.1.", "module._orig_mod.x-1."):
            answer = server.infer(prefix.removesuffix("."), body).json()
            expected = bn.FrozenBatchNorm.from_torch(state, prefix)(x)
            assert np.array_equal(np.array(answer["outputs"][0]["data"]), expected.ravel())
