"""The files of a release, checked: `make dist` runs it on `dist/`.

Both wheels are installed into an empty environment, with no Rust on the path, and do there what a user does
first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

MOST_MIB = 8
# Processor time of `import batchnorm` beyond that of `import numpy`, as a share of it.
MOST_OVER_NUMPY = 0.6
FIRST_STEPS = """
import numpy as np, batchnorm as bn, batchnorm_service
x = np.arange(8, dtype=np.float32).reshape(4, 2)
y, cache = bn.train_forward(x)
assert np.allclose(y.mean(0), 0, atol=1e-6) and np.allclose(y.var(0), 1, atol=1e-4)
frozen = bn.FrozenBatchNorm.from_moments(cache.moments)
frozen.save("bn.safetensors")
assert bn.FrozenBatchNorm.load("bn.safetensors") == frozen
print(bn.__file__)
"""


def one(files: list[Path], pattern: str) -> Path:
    """The only file whose name matches."""
    found = [path for path in files if re.fullmatch(pattern, path.name)]
    assert len(found) == 1, f"wanted one file {pattern} in {[path.name for path in files]}"
    return found[0]


def run(*command: object, cwd: Path) -> str:
    """The output of a command that sees no cargo and no rustc."""
    path = os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not any((Path(folder) / tool).exists() for tool in ("cargo", "rustc"))
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def milliseconds(python: Path, code: str, cwd: Path) -> float:
    """Processor time of one statement in a new interpreter: other work on the machine does not count."""
    timed = f"import time; start = time.process_time(); {code}; print((time.process_time() - start) * 1e3)"
    return float(run(python, "-c", timed, cwd=cwd))


def main(folder: Path) -> None:
    """Fail on the first thing that is not as it should be."""
    files = sorted(folder.resolve().iterdir())
    platform = r"manylinux_\w+" if sys.platform == "linux" else r"\w+"
    wheel = one(files, rf"batchnorm-[\d.]+-cp311-abi3-{platform}\.whl")
    service = one(files, r"batchnorm_service-.*-none-any\.whl")
    for name in ("batchnorm", "batchnorm_service"):
        one(files, rf"{name}-[\d.]+\.tar\.gz")
    for path in files:
        size = path.stat().st_size / 2**20
        assert size <= MOST_MIB, f"{path.name} has {size:.1f} MiB; wanted {MOST_MIB} or less"

    with TemporaryDirectory() as name:
        scratch = Path(name)
        venv.create(scratch / "venv", with_pip=True)
        python = scratch / "venv" / "bin" / "python"
        constraints = Path(__file__).parent / "constraints.txt"
        run(python, "-m", "pip", "install", "-q", "-c", constraints, wheel, service, cwd=scratch)
        where = run(python, "-c", FIRST_STEPS, cwd=scratch)
        assert str(scratch) in where, f"it was another installation that worked: {where}"
        for command in ("batchnorm", "batchnorm-service"):
            assert "Usage" in run(python.parent / command, "--help", cwd=scratch)
        # The least of several, in turn: the first start reads files, and other work slows any.
        starts = [
            (milliseconds(python, "import numpy", scratch), milliseconds(python, "import batchnorm", scratch))
            for _ in range(11)
        ]
        numpy, ours = (min(times) for times in zip(*starts, strict=True))
        over = f"{ours - numpy:.1f} ms over NumPy's {numpy:.1f} ms"
        assert ours - numpy <= MOST_OVER_NUMPY * numpy, f"`import batchnorm` takes {over}"
    size = wheel.stat().st_size / 2**20
    print(f"{wheel.name}: {size:.1f} MiB; import takes {over}; works without Rust")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
