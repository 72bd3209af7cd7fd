"""Whether the first line of a table is a header; if it is ambiguous, the user has to decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from test_cli import error_of, folder, run  # noqa: F401  (the fixture)

MODEL = "bn.safetensors"  # of two channels
EITHER = {
    "0,1\n100,50\n101,52\n99,51\n": "pandas, of an array",
    "0,1\n1.5,20\n2.5,40\n": "the same above floats",
    "0.0,1.0\n1.5,20\n2.5,40\n": "counted by floats",
    " 0, 1\r\n1.5,20\r\n2.5,40\r\n": "with spaces",
    '"0","1"\n1.5,20\n2.5,40\n': "quoted",
    "0,1\n": "nothing below",
    "2019,2020\n1.5,20.5\n2.5,40.5\n": "years above floats",
    "2019,2020\n1.5,20\n2.5,40\n": "years above one column of floats",
    "2019,2020\n15e-1,20\n2.5,40\n": "years above floats with exponents",
    "+7,-8\n1.5,20\n2.5,40\n": "signed",
    "2019,2020\n" + "1.5,20\n" * 2000: "years above many floats",
}
SAMPLE = {
    "1,2\n3,4\n5,6\n": [[1, 2], [3, 4], [5, 6]],
    "1,2\n3,4.5\n5,6\n": [[1, 2], [3, 4.5], [5, 6]],  # 6 is an integer too
    "1.5,20\n2.5,40\n": [[1.5, 20], [2.5, 40]],
    "1.0,2.0\n2.5,40\n": [[1, 2], [2.5, 40]],
    "1,0\n2,3\n": [[1, 0], [2, 3]],
    "1e3,2e3\n2.5,40\n": [[1000, 2000], [2.5, 40]],
}
HEADER = ("a,b\n1.5,20\n2.5,40\n", ",width\n1.5,20\n2.5,40\n", "sodium,NA\n1.5,20\n2.5,40\n")
HINT = " (--header yes makes line 1 a header)"
MISSING = {
    ",\n1.5,20\n2.5,40\n": f"line 1, column 1: '' is not a number{HINT}",
    "NA,NA\n1.5,20\n2.5,40\n": f"line 1, column 1: 'NA' is not a number{HINT}",
    "n/a,NULL\n1.5,20\n2.5,40\n": f"line 1, column 1: 'n/a' is not a number{HINT}",
    "nan,NaN\n1.5,20\n2.5,40\n": "line 1, column 1: not finite as float64",
    ",1\n1.5,20\n2.5,40\n": f"line 1, column 1: '' is not a number{HINT}",
    "1,NA\n1.5,20\n2.5,40\n": f"line 1, column 2: 'NA' is not a number{HINT}",
}


def fit(text, *options):
    Path("t.csv").write_bytes(text.encode())
    run("fit", "t.csv", "-o", "t.safetensors", *options)
    return bn.FrozenBatchNorm.load("t.safetensors")


def layer_of(rows):
    return bn.FrozenBatchNorm.from_moments(bn.moments(np.array(rows, np.float64)))


def body(text):
    return [[float(field) for field in line.split(",")] for line in text.splitlines()[1:]]


@pytest.mark.parametrize("command", ["fit t.csv -o x.safetensors", f"apply {MODEL} t.csv -o x.csv"])
@pytest.mark.parametrize("text", EITHER, ids=EITHER.values())
def test_it_may_be_either(text, command):
    Path("t.csv").write_bytes(text.encode())
    told = error_of(*command.split())
    assert told == "t.csv: line 1 may be a header or a sample; say which by --header yes or --header no"
    assert error_of(*command.split(), "--header", "auto") == told


def test_either_is_taken_when_told():
    text = "0,1\n100,50\n101,52\n99,51\n"
    assert fit(text, "--header", "yes") == layer_of([[100, 50], [101, 52], [99, 51]])
    assert fit(text, "--header", "no") == layer_of([[0, 1], [100, 50], [101, 52], [99, 51]])
    run("apply", MODEL, "t.csv", "-o", "named.csv", "--header", "yes")
    run("apply", MODEL, "t.csv", "-o", "sample.csv", "--header", "no")
    named, sample = (Path(name).read_text().splitlines() for name in ("named.csv", "sample.csv"))
    assert named[0] == "0,1"
    assert named[1:] == sample[1:]
    assert len(sample[0]) > len("0,1")


@pytest.mark.parametrize("text", SAMPLE, ids=repr)
def test_it_is_a_sample(text):
    assert fit(text) == layer_of(SAMPLE[text])


@pytest.mark.parametrize("text", HEADER, ids=repr)
def test_it_is_a_header(text):
    assert fit(text) == layer_of(body(text))
    run("apply", MODEL, "t.csv", "-o", "y.csv")
    assert Path("y.csv").read_text().splitlines()[0] == text.splitlines()[0]
    told = error_of("fit", "t.csv", "-o", "x.safetensors", "--header", "no")
    assert told.startswith("t.csv: line 1, column 1: ")


@pytest.mark.parametrize("text", MISSING, ids=repr)
def test_missing_values_are_no_header(text):
    Path("t.csv").write_text(text)
    told = error_of("fit", "t.csv", "-o", "x.safetensors")
    assert told == f"t.csv: {MISSING[text]}"
    assert fit(text, "--header", "yes") == layer_of(body(text))


def test_any_line_can_be_made_a_header():
    assert fit("3,x\n1.5,20\n2.5,40\n", "--header", "yes") == layer_of([[1.5, 20], [2.5, 40]])
    assert fit('"1\n2",x\n1.5,20\n2.5,40\n', "--header", "yes") == layer_of([[1.5, 20], [2.5, 40]])


def test_an_array_has_no_header():
    np.save("x.npy", np.ones((3, 2), np.float32))
    told = error_of("fit", "x.npy", "-o", "x.safetensors", "--header", "yes")
    assert told == "--header: was yes, but x.npy is a .npy, which has no such line"
    assert error_of("apply", MODEL, "x.npy", "-o", "y.npy", "--header", "no").startswith("--header: was no")
