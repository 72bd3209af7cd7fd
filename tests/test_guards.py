"""No function reads or writes outside its arrays, which lie next to guard pages."""

import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn
from test_streaming import FROM

SCRIPT = Path(__file__).with_name("guards.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="protects pages through Linux's C library")


def calls(dtype, level, *nbytes):
    done = subprocess.run(
        [sys.executable, SCRIPT, dtype.name, level, *map(str, nbytes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return int(done.stdout)


@pytest.mark.parametrize("level", bn.simd_levels())
def test_small(dtype, level):
    assert calls(dtype, level) > 2000


@pytest.mark.long
@pytest.mark.parametrize("level", bn.simd_levels())
def test_past_the_caches(dtype, level):
    assert calls(dtype, level, FROM) == 4 * 4 * 2 * 2  # shapes, verbs, ends, out and in place


def test_the_guards_guard():
    """A read one byte too far ends the process, a write beside the array is seen."""
    script = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import ctypes, numpy as np
from guards import Guarded
room = Guarded(100)
array = room.place(np.ones(10, np.float32), at_end=True)
assert room.is_whole()
ctypes.memset(array.ctypes.data - 1, 0, 1)
assert not room.is_whole()
ctypes.string_at(array.ctypes.data + 40, 1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -11, done.stderr
