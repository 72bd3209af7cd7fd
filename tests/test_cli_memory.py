"""Without memory a command ends with one line, and leaves every file as it was."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from test_cli import folder  # noqa: F401  (the fixture)

MIB = 2**20
# A limit on the address space, which holds for files that are mapped too.
CODE = """
import resource, sys
import batchnorm.cli, batchnorm.frozen, batchnorm._file
import numpy as np
batchnorm.moments(np.ones((2**20, 2)))  # threads have their stacks now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
batchnorm.cli.main(sys.argv[2:])
"""


def header(shape, fortran_order=False):
    file = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": fortran_order, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


FIT, APPLY = "fit {} -o bn.safetensors", "apply bn.safetensors {} -o old{}"
LINE, LATER_LINE = b"1,2\n", b"1,2\n" * 530_000  # then a long line, in the first chunk or the second
CHANNELS, ROW = header((2**28, 2)), header((1, 2, 2**26))
FORTRAN = header((2**40, 2), fortran_order=True)
NO_MEMORY = "not enough memory"
# The command, the name of its source, how it begins and its MiB, MiB that may be used, what is said.
CASES = {
    "a line": (FIT, "x.csv", LINE, 1024, 200, NO_MEMORY),
    "a line to apply": (APPLY, "x.csv", LINE, 1024, 200, NO_MEMORY),
    "a later line": (FIT, "x.csv", LATER_LINE, 1024, 300, NO_MEMORY),
    "a later line to apply": (APPLY, "x.csv", LATER_LINE, 1024, 300, NO_MEMORY),
    "an array": (FIT, "x.npy", CHANNELS, 2049, 200, "x.npy: Cannot allocate memory"),
    "an array to apply": (APPLY, "x.npy", CHANNELS, 2049, 200, "x.npy: Cannot allocate memory"),
    "an output": (APPLY, "x.npy", ROW, 513, 700, NO_MEMORY),
    "a stream": (FIT, "-", FORTRAN, 1, 200, NO_MEMORY),
    "a stream to apply": (APPLY, "-", FORTRAN, 1, 200, NO_MEMORY),
}


@pytest.mark.parametrize("name", CASES)
def test_no_memory(name):
    command, source, start, size, limit, message = CASES[name]
    data = Path("data" if source == "-" else source)
    data.write_bytes(start)
    os.truncate(data, size * MIB)  # the disk holds only the beginning
    suffix = Path(source).suffix or ".npy"
    old, layer = Path(f"old{suffix}"), Path("bn.safetensors")
    old.write_text("old")
    before = sorted(Path().iterdir()), layer.read_bytes()
    arguments = command.format(source, suffix).split()
    with data.open("rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(limit), *arguments],
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"batchnorm: {message}[^\n]*\n", done.stderr)
    assert (sorted(Path().iterdir()), layer.read_bytes()) == before
    assert old.read_text() == "old"
