"""Errors of the command line: one line on standard error, status 2, and every file left as it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import main
from test_cli import CSV, EXAMPLES, error_of, folder  # noqa: F401  (the fixture)


def good(shape=(4, 2), dtype=np.float32):
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape).astype(dtype)


BAD_SOURCES = {
    "no_number.csv": ("a,b\n1,2\n3,x\n", "line 3, column 2 (b): 'x' is not a number"),
    "no_header.csv": ("1,2\n3,4\n5,1_0\n", "line 3, column 2: '1_0' is not a number"),
    "empty_field.csv": ("a,b\n,2\n3,4\n", "line 2, column 1 (a): '' is not a number"),
    "nan.csv": ("a,b\n1,2\n3,nan\n", "line 3, column 2 (b): not finite as float64"),
    "huge.csv": ("a,b\n1,2\n-1e999,4\n", "line 3, column 1 (a): not finite as float64"),
    "short.csv": ("a,b\n1,2\n3\n", "line 3: 1 field, wanted 2"),
    "long.csv": ("a,b\n1,2\n3,4,\n", "line 3: 3 fields, wanted 2"),
    "header_alone_differs.csv": ("a,b,c\n1,2\n3,4\n", "line 2: 2 fields, wanted 3"),
    "blank.csv": ("a,b\n1,2\n\n\n3,4\n", "line 3: blank, wanted 2 numbers"),
    "half_header.csv": ("a,2\n1,2\n3,4\n", "line 1, column 1: 'a' is not a number"),
    "open_quote.csv": ('a,b\n1,"2\n3,4\n', "lines 2 to 3: wanted comma-separated numbers"),
    "semicolon.csv": ("a;b\n1;2\n3;4\n", "line 2, column 1 (a;b): '1;2' is not a number"),
    "empty.csv": ("", "line 1: blank, wanted numbers or the names of the columns"),
    "header_only.csv": ("a,b\n", "fewer than 2 values in a channel"),
    "one_line.csv": ("1,2\n", "fewer than 2 values in a channel"),
    "latin1.csv": ("a,b\n1,é\n".encode("latin-1"), "no comma-separated text: 'utf-8' codec can't decode"),
    "big_field.csv": ("a" * 200_000, "no comma-separated text: field larger than field limit"),
    "junk.npy": (b"junk", "no array can be read"),
    "int.npy": (good(dtype=np.int64), "dtype was int64, wanted float16, float32 or float64"),
    "longdouble.npy": (good(dtype=np.longdouble), f"dtype was {np.dtype(np.longdouble)}, wanted float16"),
    "bfloat16.npy": (good(dtype=ml_dtypes.bfloat16), "raw values of 2 bytes, as NumPy stores bfloat16"),
    "object.npy": (good(dtype=object), "no array can be read: Array can't be memory-mapped: Python objects"),
    "vector.npy": (good((4,)), "shape was (4,), wanted rank 2 or more and channels on axis 1"),
    "one_row.npy": (good((1, 2)), "fewer than 2 values in a channel"),
    "no_rows.npy": (good((0, 2)), "fewer than 2 values in a channel"),
    "no_channels.npy": (good((4, 0)), ""),
    "nan.npy": (
        np.array([[0, 1, np.nan], [0, 1, 2]]),
        "values or their variance are not finite in channel 2",
    ),
    "inf.npy": (np.array([[0, np.inf, -np.inf], [0, 1, 2]]), "are not finite in channels 1, 2"),
    "overflow.npy": (np.array([[1e300, 1], [-1e300, 2]]), "are not finite in channel 0"),
    "data.txt": ("1,2\n3,4\n", "wanted a name that ends in .npy or .csv"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources(name):
    content, message = BAD_SOURCES[name]
    path = Path(name)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    told = error_of("fit", name, "-o", "x.safetensors")
    assert message in told
    assert name in told or name == "no_channels.npy"


def test_a_npy_cut_short():
    np.save("x.npy", good((100, 2)))
    Path("x.npy").write_bytes(Path("x.npy").read_bytes()[:-1])
    assert error_of("fit", "x.npy", "-o", "x.safetensors").startswith("x.npy: no array can be read")


MISUSE = {
    "frobnicate": "No such command 'frobnicate'",
    "--frobnicate": "No such option",
    "fit": "Missing argument 'SRC'",
    "fit my.csv": "Missing option '-o'",
    "fit nosuch.csv -o x.safetensors": "File 'nosuch.csv' does not exist",
    "fit . -o x.safetensors": "File '.' is a directory",
    "fit my.csv -o nosuch/x.safetensors": "there is no folder 'nosuch' that can be written to",
    "fit my.csv -o x.safetensors --eps -1": "--eps is -1; wanted",
    "fit my.csv -o x.safetensors --eps nan": "--eps is NaN; wanted",
    "fit my.csv -o x.safetensors --eps small": "'small' is not a valid float",
    "fit my.csv -o x.safetensors --dtype float16": "'float16' is not one of 'float32', 'float64'",
    "fit my.csv -o x.safetensors --ddof 2": "'2' is not one of '0', '1'",
    "fit my.csv -o x.safetensors --channel-axis 0": "--channel-axis: was 0, but the channels of a .csv",
    "fit good.npy -o x.safetensors --channel-axis 2": "wanted rank 2 or more and channels on axis 2",
    "fit my.csv -o x.safetensors --channel-axis 9999": "--channel-axis: was 9999, but",
    "fit one.csv -o x.safetensors": "var: out of the range of float32 in channel 0; --dtype float64 would",
    "apply bn.safetensors one.csv -o x.csv": "one.csv: 1 channel, but bn.safetensors wants 2 on axis 1",
    "apply my.csv my.csv -o x.csv": "my.csv",
    "apply bn.safetensors my.csv -o x.npy": "x.npy: wanted a name that ends in .csv",
    "apply bn.safetensors nosuch.csv -o x.csv": "File 'nosuch.csv' does not exist",
    "apply bn.safetensors three.csv -o x.csv": "three.csv: 3 channels, but bn.safetensors wants 2 on axis 1",
    "apply last.safetensors my.csv -o x.csv": "my.csv: 2 channels, but last.safetensors wants 2 on axis 2",
    "apply bn.safetensors wide.npy -o x.npy": "wide.npy: float64, but bn.safetensors is float32; fit it with",
    "apply bn.safetensors my.txt -o x.txt": "my.txt: wanted a name that ends in .npy or .csv",
    "inspect my.csv": "my.csv",
    "inspect flipped.safetensors": "flipped.safetensors: damaged",
    "export bn.safetensors -o x.onnx --mode fast": "'fast' is not one of 'inference', 'exact'",
    "export bn.safetensors -o x.onnx --opset 99": "--opset: was 99, wanted 9 to ",
    "export bn.safetensors -o x.onnx --rank 1": "--rank: was 1, wanted 2 to 64, with an axis 1",
    "serve": "a directory of models must be given, either DIR or --model-dir",
    "serve nosuch": "DIR: Path does not point to a directory",
    "serve my.csv": "DIR: Path does not point to a directory",
    "serve . --keys my.csv": "keys: line 1: ",
    "serve . --new-key all": "'all'",
    "serve . --port 99999": "port: ",
    "serve . --workers none": "workers: ",
    "demo --output my.csv": "Directory 'my.csv' is a file",
}


@pytest.mark.parametrize("line", MISUSE)
def test_misuse(line):
    np.save("good.npy", good())
    np.save("wide.npy", good(dtype=np.float64))
    Path("three.csv").write_text("1,2,3\n4,5,6\n")
    Path("one.csv").write_text("1e30\n-1e30\n")
    Path("my.txt").write_text(CSV)
    bn.FrozenBatchNorm([0, 0], [1, 1], channel_axis=2).save("last.safetensors")
    flipped = bytearray(Path("bn.safetensors").read_bytes())
    flipped[-1] ^= 1
    Path("flipped.safetensors").write_bytes(flipped)
    assert MISUSE[line] in error_of(*line.split())


@pytest.mark.parametrize(
    ("missing", "line", "extra"),
    [
        ("onnx", "export bn.safetensors -o x.onnx", "onnx"),
        ("batchnorm_service", "serve .", "serve"),
        ("sklearn", "demo", "demo"),
    ],
)
def test_a_missing_extra_is_named(missing, line, extra):
    """In an interpreter that cannot import it, which is what None in sys.modules means."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from batchnorm.cli import main; main({line.split()})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert re.fullmatch(rf"batchnorm: [^\n]*{missing}[^\n]*pip install 'batchnorm\[{extra}\]'\n", done.stderr)


def test_without_arguments_comes_help():
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "Usage: batchnorm" in result.stderr.replace("main", "batchnorm")
    assert all(name in result.stderr for name in EXAMPLES)


def test_only_regular_files_are_replaced(tmp_path):
    source, pipe = tmp_path / "d.csv", tmp_path / "pipe.safetensors"
    source.write_text("1,2\n3,4\n")
    os.mkfifo(pipe)
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(target)
    CliRunner().invoke(main, ["fit", str(source), "-o", str(link)], catch_exceptions=False)
    assert link.is_symlink()
    assert bn.FrozenBatchNorm.load(target).channels == 2

    for command, words in (
        (["fit", source, "-o", pipe], "not a regular file"),
        (["fit", source, "-o", source], "ends in .safetensors"),
        (["export", target, "-o", source], "ends in .onnx"),
    ):
        result = CliRunner().invoke(main, list(map(str, command)))
        assert result.exit_code == 2
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert pipe.is_fifo()
    assert source.read_text() == "1,2\n3,4\n"
