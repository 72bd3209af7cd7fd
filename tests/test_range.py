"""Coefficients beyond the range of float32: an error for 16-bit tensors, which are normalized in float32."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
from cases import bits

NARROW = [np.float16, ml_dtypes.bfloat16]
# The last has channels enough that training normalizes each as soon as its statistics are known.
SHAPES = [(6, 3), (4, 3, 49), (300, 3, 64), (4, 3, 7, 7), (4, 20, 49)]
OUT_OF_RANGE = {
    "mean": {"mean": [0.0, 1e39, 0.0]},
    "beta": {"beta": [0.0, -1e39, 0.0]},
    "gamma/sqrt(var + eps)": {"gamma": [1.0, 1e30, 1.0], "var": [1.0, 1e-20, 1.0]},
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
@pytest.mark.parametrize("dtype", NARROW)
def test_frozen_statistics(rng, dtype, name):
    parameters = {"mean": np.zeros(3), "var": np.ones(3)} | OUT_OF_RANGE[name]
    x = rng.normal(size=(4, 3, 5)).astype(dtype)
    out = np.full_like(x, 7)
    frozen = bn.FrozenBatchNorm(**parameters, eps=0, dtype="float64")
    backward = {key: value for key, value in parameters.items() if key != "beta"}
    for call in (
        lambda: bn.infer(x, **parameters, eps=0, out=out),
        lambda: frozen(x, out),
        lambda: frozen.backward(x, x, out),
        lambda: bn.infer_backward(x, x, **backward, beta=parameters.get("beta"), eps=0, out=out),
    ):
        with pytest.raises(
            ValueError, match=rf"^{re.escape(name)} is .* in channel 1; wanted at most 3.4e38 "
        ):
            call()
        assert (out == 7).all()
    wide = x.astype(np.float32)
    assert not np.isnan(frozen(wide)).any()  # float64 arithmetic: numbers, or what is infinite in float32


@pytest.mark.parametrize("dtype", NARROW)
def test_a_float32_layer_whose_scale_is_out_of_range(dtype):
    frozen = bn.FrozenBatchNorm([0.0], [1e-30], gamma=[1e30], eps=0)
    assert frozen(np.zeros((2, 1), np.float32)).tolist() == [[0], [0]]
    with pytest.raises(ValueError, match=r"^gamma/sqrt\(var \+ eps\) is 1\.0\d*e45 in channel 0; wanted"):
        frozen(np.zeros((2, 1), dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NARROW)
def test_training(rng, dtype, shape):
    x = rng.normal(size=shape).astype(dtype)
    large = np.where(np.arange(shape[1]) == 1, 1e39, 1.0)
    for parameters, name in (({"gamma": large}, "gamma/sqrt(var + eps)"), ({"beta": large}, "beta")):
        out, over = np.full_like(x, 7), x.copy()
        for call in (
            lambda p=parameters, out=out: bn.train_forward(x, **p, out=out),
            lambda p=parameters, over=over: bn.train_forward(over, **p, out=over),
            lambda p=parameters, out=out: bn.normalize(x, bn.moments(x), **p, out=out),
        ):
            with pytest.raises(ValueError, match=rf"^{re.escape(name)} is .* in channel 1; wanted at most"):
                call()
            assert (out == 7).all()
            assert bits(over) == bits(x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_in_range_for_this_batch_is_taken(rng, dtype, shape):
    """γ/√ε is out of range, but not γ/√(σ² + ε)."""
    x = rng.normal(size=shape).astype(dtype)
    y, cache = bn.train_forward(x, 1e30, 0.5, eps=1e-30)
    assert bits(y) == bits(bn.normalize(x, bn.moments(x), 1e30, 0.5, eps=1e-30)[0])
    assert np.isfinite(cache.invstd).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_statistics_that_are_not_finite_propagate(dtype):
    x = np.ones((4, 3, 5), dtype)
    x[0, 1] = np.inf
    y, _ = bn.train_forward(x)
    assert np.isnan(y[:, 1]).all()
    assert (y[:, [0, 2]] == 0).all()
