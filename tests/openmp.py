"""The OpenMP runtime that tests borrow threads of: scikit-learn's own copy of GNU's, else the system's."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path

import pytest


@functools.cache
def found() -> str | None:
    """Its path, or the name by which the dynamic linker finds it; None where there is none."""
    if sys.platform != "linux":
        return None
    sklearn = importlib.util.find_spec("sklearn")
    if sklearn is not None and sklearn.origin is not None:
        libraries = Path(sklearn.origin).parent.parent / "scikit_learn.libs"
        for path in libraries.glob("libgomp*"):
            return str(path)
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        return None
    return "libgomp.so.1"


def runtime() -> str:
    """`found()`, or a test that is skipped."""
    library = found()
    if library is None:
        pytest.skip("there is no libgomp here, neither scikit-learn's nor the system's")
    return library
