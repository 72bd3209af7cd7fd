"""`fit` and `apply` warn where the dtype of the layer is too coarse for the values or for their mean."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from batchnorm import streaming
from batchnorm.cli import main
from test_cli import folder  # noqa: F401  (the fixture)

VALUES = (
    r"{}: rounding to float32 moves values by more than 0\.0001 standard deviations in {}; a layer fitted .*"
)
MEAN = r"mean: rounding to float32 moves it by .* standard deviations in {}; --dtype float64 keeps it"


def warnings_of(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert all(line.startswith("batchnorm: warning: ") for line in lines)
    return [line.removeprefix("batchnorm: warning: ") for line in lines]


def test_values_that_float32_does_not_hold():
    """Odd values above 2²⁴ move by one, while their mean, which is even, stays."""
    Path("x.csv").write_text("16777217,1\n16777219,2\n16777221,3\n16777219,4\n16777224,5\n")
    told = warnings_of("fit", "x.csv", "-o", "x.safetensors")
    assert [bool(re.fullmatch(VALUES.format(r"x\.csv", "channel 0"), line)) for line in told] == [True]
    told = warnings_of("apply", "x.safetensors", "x.csv", "-o", "y.csv")
    assert [bool(re.fullmatch(VALUES.format(r"x\.csv", "channel 0"), line)) for line in told] == [True]
    assert warnings_of("fit", "x.csv", "-o", "x.safetensors", "--dtype", "float64") == []
    assert warnings_of("apply", "x.safetensors", "x.csv", "-o", "y.csv") == []


def test_a_mean_that_float32_does_not_hold():
    np.save("x.npy", np.array([[16777216, 1], [16777218, 2]], np.float32))
    (told,) = warnings_of("fit", "x.npy", "-o", "x.safetensors")
    assert re.fullmatch(MEAN.format("channel 0"), told)
    assert warnings_of("fit", "x.npy", "-o", "x.safetensors", "--dtype", "float64") == []


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("row", [0, 600_000])  # in either chunk
def test_from_where_on_it_warns(row, factor):
    """One value moves by 0.0001 standard deviations times `factor`, and ε makes those."""
    x = np.ones((700_000, 2))
    x[row, 1] += 2.0**-24  # halfway to the next of float32, so the variance is far below ε
    np.save("x.npy", x)
    eps = (2.0**-24 / (1e-4 * factor)) ** 2
    told = warnings_of("fit", "x.npy", "-o", "x.safetensors", "--dtype", "float32", "--eps", eps)
    assert len(told) == (factor > 1)


@pytest.mark.parametrize("dtype", ["<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("channel_axis", [0, 1, -1])
def test_the_error_of_a_channel(rng, monkeypatch, dtype, order, channel_axis):
    x = np.array(rng.normal(1e6, 1, (7, 5, 9)), dtype, order=order)
    moved = np.moveaxis(np.abs(x - x.astype(np.float32)), channel_axis, 0)
    expected = moved.reshape(len(moved), -1).max(1)
    for size in (10, 100, 10_000):
        monkeypatch.setattr(streaming, "CHUNK_VALUES", size)
        got = streaming.rounding_error(x, np.dtype(np.float32), channel_axis)
        np.testing.assert_array_equal(got, expected)
    assert not streaming.rounding_error(x, np.dtype(np.float64), channel_axis).any()
    assert streaming.rounding_error(np.array([[1e300]]), np.dtype(np.float32), 1) == np.inf
