"""The source distributions install into an empty environment and work there."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import numpy as np, batchnorm as bn, batchnorm_service.http.app
x = np.arange(8, dtype=np.float32).reshape(4, 2)
y, cache = bn.train_forward(x)
frozen = bn.FrozenBatchNorm.from_moments(cache.moments)
frozen.save("bn.safetensors")
assert bn.FrozenBatchNorm.load("bn.safetensors") == frozen
print("works", bn.__file__)
"""


@pytest.mark.long
def test_sdists_install_into_an_empty_environment(tmp_path):
    # Our own crates are compiled from the sdist, their dependencies are those that are compiled already.
    environ = os.environ | {"CARGO_TARGET_DIR": str(ROOT / "target")}

    def run(*command, cwd=ROOT):
        command = [str(part) for part in command]
        done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    dist, environment = tmp_path / "dist", tmp_path / "venv"
    run(sys.executable, "-m", "maturin", "sdist", "--out", dist)
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", dist, cwd=ROOT / "service")
    archives = sorted(dist.iterdir())
    assert [archive.name.rsplit("-", 1)[0] for archive in archives] == ["batchnorm", "batchnorm_service"]

    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    constraints = ROOT / "tests" / "constraints.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, *archives, cwd=tmp_path)
    out = run(python, "-c", SCRIPT, cwd=tmp_path)
    assert out.startswith("works")
    assert str(environment) in out, "it was another installation that worked"
    assert "Usage" in run(environment / "bin" / "batchnorm", "--help", cwd=tmp_path)
