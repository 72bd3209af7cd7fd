"""Whitening layers on the command line: fit --whiten, and the commands that take either kind of layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm._core import comoments
from batchnorm.onnx import load_frozen
from cases import bits
from test_cli import CSV, error_of, folder, read_csv, run  # noqa: F401  (the fixture)
from test_cli_rounding import warnings_of

METHODS = ("zca", "pca", "cholesky", "iterative")


def fit(source, *options):
    run("fit", source, "-o", "fitted.safetensors", *options)
    return bn.FrozenWhitening.load("fitted.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_fit_csv(method):
    together = comoments(read_csv("my.csv"))
    expected = bn.FrozenWhitening.from_comoments(together, method=method)
    assert fit("my.csv", "--whiten", method) == expected
    assert np.count_nonzero(expected.matrix) >= 3


def test_fit_reports():
    layer = fit("my.csv", "--whiten", "zca")
    told = json.loads(run("fit", "my.csv", "-o", "w.safetensors", "--whiten", "zca", "--json"))
    assert told == {"path": "w.safetensors", "fingerprint": layer.fingerprint, "count": 3, "channels": 2}
    plain = run("fit", "my.csv", "-o", "w.safetensors", "--whiten", "zca")
    assert plain == f"w.safetensors: 2 channels of 3 values, fingerprint {layer.fingerprint}\n"


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize(("channel_axis", "groups"), [(1, 1), (1, 3), (-1, 2), (0, 4)])
def test_fit_npy(rng, dtype, channel_axis, groups):
    x = np.array(rng.normal(3, 2, (8, 6, 5, 4)), dtype)
    np.save("x.npy", x)
    wide = "float64" if x.dtype.itemsize == 8 else "float32"
    together = comoments(x, groups=groups, channel_axis=channel_axis)
    layer = fit("x.npy", "--channel-axis", channel_axis, "--whiten", "zca", "--groups", groups)
    assert layer == bn.FrozenWhitening.from_comoments(together, channel_axis=channel_axis, dtype=wide)
    assert layer.groups == groups


def test_fit_options(rng):
    x = rng.normal(3, 2, (50, 4))
    np.save("x.npy", x)
    options = ("--eps", "1e-3", "--dtype", "float32", "--ddof", "0", "--whiten", "pca", "--groups", "2")
    expected = bn.FrozenWhitening.from_comoments(comoments(x, groups=2), method="pca", eps=1e-3, ddof=0)
    assert fit("x.npy", *options) == expected


def test_fit_merges_chunks_in_the_tree_of_moments(rng):
    x = rng.integers(-9, 9, (1_400_000, 2)).astype(np.float64)
    x[:, 1] += x[:, 0]
    parts = [comoments(part) for part in np.split(x, [2**19, 2**20])]
    expected = parts[0].merge(parts[1]).merge(parts[2])
    np.save("x.npy", x)
    layer = fit("x.npy", "--whiten", "cholesky")
    assert layer == bn.FrozenWhitening.from_comoments(expected, method="cholesky", dtype="float64")


@pytest.mark.parametrize(("dtype", "order"), [("<f2", "C"), ("<f4", "F"), ("<f8", "C")])
def test_apply_npy(rng, dtype, order):
    x = np.array(rng.normal(3, 2, (40, 6, 5)), dtype, order=order)
    np.save("x.npy", x)
    layer = fit("x.npy", "--whiten", "zca", "--groups", 2)
    assert run("apply", "fitted.safetensors", "x.npy", "-o", "y.npy") == ""
    y = np.load("y.npy")
    assert y.dtype == x.dtype
    assert bits(y) == bits(layer(x))


def test_apply_csv():
    layer = fit("my.csv", "--whiten", "zca")
    run("apply", "fitted.safetensors", "my.csv", "-o", "y.csv")
    assert Path("y.csv").read_text().splitlines()[0] == "height,width"
    assert bits(read_csv("y.csv", np.float32)) == bits(layer(read_csv("my.csv", np.float32)))


def test_inspect(rng):
    layer = fit("my.csv", "--whiten", "zca")
    told = json.loads(run("inspect", "fitted.safetensors", "--json"))
    assert told == {
        "path": "fitted.safetensors",
        "fingerprint": layer.fingerprint,
        "channels": 2,
        "channel_axis": 1,
        "dtype": "float32",
        "groups": 1,
        "mean": layer.mean.tolist(),
        "bias": layer.bias.tolist(),
        "matrix": layer.matrix.tolist(),
    }
    shown = run("inspect", "fitted.safetensors")
    assert all(" ".join(map(str, row)) in shown for row in layer.matrix)
    wide = bn.FrozenWhitening(rng.normal(size=(300, 300)), 0.0)
    wide.save("wide.safetensors")
    shown = run("inspect", "wide.safetensors")
    assert shown.count("…") == 300  # long rows are cut


def test_export():
    layer = fit("my.csv", "--whiten", "zca")
    told = run("export", "fitted.safetensors", "-o", "w.onnx", "--rank", "2")
    assert told == f"w.onnx: mode inference, opset 15, rank 2, fingerprint {layer.fingerprint}\n"
    assert load_frozen("w.onnx") == layer


def test_one_channel_a_group_is_batch_norm():
    whitening = fit("my.csv", "--whiten", "zca", "--groups", 2, "--eps", 0, "--dtype", "float64")
    run("fit", "my.csv", "-o", "norm.safetensors", "--eps", 0, "--dtype", "float64")
    x = read_csv("my.csv")
    norm = bn.FrozenBatchNorm.load("norm.safetensors")
    np.testing.assert_allclose(whitening(x), norm(x), rtol=1e-14, atol=1e-14)


MISUSE = {
    "fit my.csv -o x.safetensors --whiten qr": "'qr' is not one of 'zca', 'pca', 'cholesky', 'iterative'",
    "fit my.csv -o x.safetensors --groups 2": "--groups: was 2, but only --whiten has groups",
    "fit my.csv -o x.safetensors --whiten zca --groups 0": "0 is not in the range x>=1",
    "fit my.csv -o x.safetensors --whiten zca --groups 3": "--groups: was 3, wanted a divisor of the 2 ",
    f"fit my.csv -o x.safetensors --whiten zca --groups {10**30}": "--groups: was 10000000000000000",
    "fit one_row.csv -o x.safetensors --whiten zca": "one_row.csv: fewer than 2 values in a channel",
    "fit constant.csv -o x.safetensors --whiten zca --eps 0": "covariance of group 0 of channels is singular",
    "fit my.csv -o x.safetensors --whiten zca --eps -1": "--eps",
    "fit inf.npy -o x.safetensors --whiten zca": "inf.npy: values or their variance are not finite in",
    "apply w.safetensors three.csv -o x.csv": "three.csv: 3 channels, but w.safetensors wants 2 on axis 1",
    "apply w.safetensors wide.npy -o x.npy": "wide.npy: float64, but w.safetensors is float32; fit it with",
    "inspect flipped.safetensors": "flipped.safetensors: damaged",
    "export w.safetensors -o x.onnx --mode exact": "--mode: was exact, wanted inference for the whitening",
    "export w.safetensors -o x.onnx --opset 99": "--opset: was 99, wanted 15 to ",
}


@pytest.mark.parametrize("line", MISUSE)
def test_misuse(line):
    bn.FrozenWhitening(np.eye(2), 0.0).save("w.safetensors")
    flipped = bytearray(Path("w.safetensors").read_bytes())
    flipped[-1] ^= 1
    Path("flipped.safetensors").write_bytes(flipped)
    np.save("wide.npy", np.ones((3, 2)))
    np.save("inf.npy", np.array([[0, 1], [1, np.inf], [2, 3]]))
    Path("three.csv").write_text("1,2,3\n4,5,6\n")
    Path("one_row.csv").write_text("1.5,2\n")
    Path("constant.csv").write_text("a,b\n1.5,2\n2.5,2\n3.5,2\n")
    assert MISUSE[line] in error_of(*line.split())


def test_values_that_float32_does_not_hold():
    """Odd values above 2²⁴ move by one, while their mean, which is even, stays."""
    told = r"may move results by more than 0.0001 in channel"
    Path("x.csv").write_text("16777217,1\n16777219,2\n16777221,3\n16777219,4\n16777224,5\n")
    for command in (
        ("fit", "x.csv", "-o", "x.safetensors", "--whiten", "pca", "--groups", 2),
        ("apply", "x.safetensors", "x.csv", "-o", "y.csv"),
    ):
        (line,) = warnings_of(*command)
        assert line.startswith(f"x.csv: rounding to float32 {told} 0; a layer fitted with --dtype float64 k")
    (line,) = warnings_of("fit", "x.csv", "-o", "x.safetensors", "--whiten", "zca")
    assert f"{told}s 0, 1;" in line  # within a group every channel is in every result
    wide = ("--whiten", "zca", "--dtype", "float64")
    assert warnings_of("fit", "x.csv", "-o", "x.safetensors", *wide) == []
    assert warnings_of("apply", "x.safetensors", "x.csv", "-o", "y.csv") == []


def test_a_mean_that_float32_does_not_hold():
    np.save("x.npy", np.array([[16777216, 1], [16777218, 2], [16777217, 5]], np.float64))
    told = warnings_of("fit", "x.npy", "-o", "x.safetensors", "--whiten", "zca", "--dtype", "float32")
    assert any(
        line.startswith("--dtype: rounding to float32 moves y by more than 0.0001 standard deviations in ch")
        and line.endswith("; --dtype float64 keeps it")
        for line in told
    )
