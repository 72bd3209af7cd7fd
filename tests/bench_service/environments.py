"""Environments for peers that need their own, made once for their requirements."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECONDS = 600


class AbsentError(Exception):
    """A peer cannot be had here; the message says why."""


def python_of(name: str) -> Path:
    """Return the interpreter of the environment for `requirements-NAME.txt`, made if need be.

    The files pin everything that is needed, so nothing else is resolved.

    Raises:
        AbsentError: it cannot be installed.
    """
    requirements = HERE / f"requirements-{name}.txt"
    home = ROOT / f".venv-{name}"
    python, done = home / "bin" / "python", home / "requirements.txt"
    if done.exists() and done.read_bytes() == requirements.read_bytes():
        return python
    venv.create(home, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        result = subprocess.run(
            [*pip, "-r", str(requirements)], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise AbsentError(f"not installed within {SECONDS} s") from None
    if result.returncode:
        raise AbsentError(f"cannot be installed: {result.stderr.strip().splitlines()[-1]}")
    done.write_bytes(requirements.read_bytes())
    return python
