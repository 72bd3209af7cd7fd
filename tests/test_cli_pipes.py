"""`fit` and `apply` read a pipe once, with the same result as for a file with the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from cases import bits
from test_cli import CSV, error_of, folder, run  # noqa: F401  (the fixture)


def pipe(content):
    """The name of a pipe into which a thread writes, a little at first, as slow writers do."""
    path = Path("pipe")
    path.unlink(missing_ok=True)
    os.mkfifo(path)

    def write():
        try:
            with path.open("wb", buffering=0) as end:
                end.write(content[:3])
                end.write(content[3:])
        except BrokenPipeError:  # the reader has left early, which is its right
            pass

    threading.Thread(target=write, daemon=True).start()
    return path


def npy(x):
    np.save("source.npy", x)
    return Path("source.npy").read_bytes()


def wide_table(rng):
    """More than one chunk."""
    return "a,b\n" + "".join(f"{v!r},{v / 3!r}\n" for v in rng.normal(3, 2, 530_000).tolist())


@pytest.mark.parametrize("text", [CSV, CSV.partition("\n")[2], "\ufeff" + CSV, None], ids=repr)
def test_a_table(rng, text):
    content = (text or wide_table(rng)).encode()
    Path("source.csv").write_bytes(content)
    run("fit", "source.csv", "-o", "expected.safetensors")
    run("fit", pipe(content), "-o", "got.safetensors")
    assert Path("got.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    run("apply", "got.safetensors", "source.csv", "-o", "expected.csv")
    run("apply", "got.safetensors", pipe(content), "-o", "got.csv")
    assert Path("got.csv").read_bytes() == Path("expected.csv").read_bytes()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((7, 5, 4), 1), ((7, 5, 4), 0), ((530_000, 2), -1), ((3, 2**19, 2), 2)]
)
def test_an_array(rng, dtype, order, shape, channel_axis):
    content = npy(np.array(rng.normal(3, 2, shape), dtype, order=order))
    options = ("--channel-axis", channel_axis)
    run("fit", "source.npy", "-o", "expected.safetensors", *options)
    run("fit", pipe(content), "-o", "got.safetensors", *options)
    assert Path("got.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    run("apply", "got.safetensors", "source.npy", "-o", "expected.npy")
    run("apply", "got.safetensors", pipe(content), "-o", "got.npy")
    assert Path("got.npy").read_bytes() == Path("expected.npy").read_bytes()


def test_an_array_of_no_rows():
    run("apply", "bn.safetensors", pipe(npy(np.empty((0, 2, 3), np.float32))), "-o", "got.npy")
    assert np.load("got.npy").shape == (0, 2, 3)


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
@pytest.mark.parametrize("by", ["pipe", "redirection"])
def test_standard_input(name, by):
    x = np.array([[1.5, 20], [2.5, 40], [3.5, 30]], np.float32)
    for content in (CSV.encode(), npy(x)):
        Path("source").write_bytes(content)
        with Path("source").open("rb") as file:
            source = {"stdin": file} if by == "redirection" else {"input": content}
            command = [sys.executable, "-m", "batchnorm", "fit", name, "-o", "got.safetensors"]
            done = subprocess.run(command, **source, capture_output=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert bn.FrozenBatchNorm.load("got.safetensors") == bn.FrozenBatchNorm.load("bn.safetensors")


def test_apply_reads_standard_input():
    x = np.array([[1.5, 20], [2.5, 40], [3.5, 30]], np.float32)
    command = [sys.executable, "-m", "batchnorm", "apply", "bn.safetensors", "-", "-o", "got.npy"]
    subprocess.run(command, input=npy(x), check=True, timeout=60)
    assert bits(np.load("got.npy")) == bits(bn.FrozenBatchNorm.load("bn.safetensors")(x))


def header(text):
    data = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data


def test_errors():
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    cut = "no array can be read: it ends before its last value"
    for content, message in (
        (b"", "pipe: line 1: blank, wanted numbers or the names of the columns"),
        (b"a,b\n1,2\n3,x\n", "pipe: line 3, column 2 (b): 'x' is not a number"),
        (b"1,\xff\n", "pipe: no comma-separated text: 'utf-8' codec can't decode"),
        (b"\x93junk", "pipe: no array can be read"),
        (npy(x)[:40], "pipe: no array can be read"),
        (npy(x)[:-1], f"pipe: {cut}"),
        (npy(np.asfortranarray(x))[:-1], f"pipe: {cut}"),
        (npy(x.astype(np.int64)), "pipe: dtype was int64, wanted float16, float32 or float64"),
        (npy(x[0]), "pipe: shape was (2,), wanted rank 2 or more"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 2)}"), "pipe: no array can be read"),
        (header(f"{{'descr': '<f4', 'fortran_order': True, 'shape': (4, {2**70})}}"), "pipe: no array can"),
    ):
        assert message in error_of("fit", pipe(content), "-o", "x.safetensors")
    told = error_of("apply", "bn.safetensors", pipe(CSV.encode()), "-o", "x.npy")
    assert told == "x.npy: wanted a name that ends in .csv, the format of SRC"
    # Cut in the second chunk, when half of the output has been written.
    content = npy(np.zeros((2**20, 2), np.float32))[:-1]
    assert cut in error_of("apply", "bn.safetensors", pipe(content), "-o", "x.npy")


def test_a_standard_input_that_cannot_be_read():
    code = "import os; os.close(0); from batchnorm.cli import main; main(['fit', '-', '-o', 'x.safetensors'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (2, "batchnorm: standard input: Bad file descriptor\n")


@pytest.mark.parametrize("line", ["inspect pipe", "export pipe -o x.onnx", "apply pipe my.csv -o y.csv"])
def test_a_layer_is_no_pipe(line):
    """A layer is read more than once, and reading a pipe without a writer would hang."""
    os.mkfifo("pipe")
    assert "'pipe' is not a regular file" in error_of(*line.split())
