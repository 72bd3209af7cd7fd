"""Batch norms folded into the arrays of a linear map give what the two give in turn."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
import linear_oracle
from cases import parameters

KERNELS = {"1-D": (3,), "2-D": (3, 2), "3-D": (2, 1, 2), "1×1": (1, 1)}
GROUPS = [(6, 4, 1), (6, 4, 2), (6, 12, 6), (4, 4, 4)]  # in, out, groups


def layer_of(rng, channels, dtype="float64"):
    mean, var, gamma, beta = parameters(rng, channels)
    return bn.FrozenBatchNorm(mean, var, gamma, beta, dtype=dtype)


def normalized(layer, x):
    return linear_oracle.batch_norm(x, layer.gamma, layer.beta, layer.mean, layer.var, layer.eps)


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert found.size
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("before", [False, True])
def test_linear(rng, before, biased):
    layer = layer_of(rng, 5 if before else 7)
    x, weight = rng.normal(size=(9, 5)), rng.normal(size=(7, 5))
    bias = rng.normal(size=7) if biased else None
    folded = layer.fold_into_linear(weight, bias, before=before)
    assert [array.shape for array in folded] == [(7, 5), (7,)]
    if before:
        wanted = linear_oracle.linear(normalized(layer, x), weight, bias)
    else:
        wanted = normalized(layer, linear_oracle.linear(x, weight, bias))
    assert_close(linear_oracle.linear(x, *folded), wanted)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("inputs", "outputs", "groups"), GROUPS)
@pytest.mark.parametrize("biased", [True, False])
def test_conv(rng, kernel, inputs, outputs, groups, biased):
    x = rng.normal(size=(2, inputs, 6, 5, 4)[: 2 + len(kernel)])
    weight = rng.normal(size=(outputs, inputs // groups, *kernel))
    bias = rng.normal(size=outputs) if biased else None
    after = layer_of(rng, outputs)
    for how in ({"pads": 1, "strides": 2}, {"dilations": 2}):
        wanted = normalized(after, linear_oracle.conv(x, weight, bias, groups=groups, **how))
        folded = after.fold_into_conv(weight, bias, groups=groups)
        assert_close(linear_oracle.conv(x, *folded, groups=groups, **how), wanted)
    before = layer_of(rng, inputs)
    wanted = linear_oracle.conv(normalized(before, x), weight, bias, groups=groups, strides=2)
    folded = before.fold_into_conv(weight, bias, groups=groups, before=True, padded=False)
    assert_close(linear_oracle.conv(x, *folded, groups=groups, strides=2), wanted)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("inputs", "outputs", "groups"), GROUPS)
def test_conv_transpose(rng, kernel, inputs, outputs, groups):
    x = rng.normal(size=(2, inputs, 4, 5, 3)[: 2 + len(kernel)])
    weight = rng.normal(size=(inputs, outputs // groups, *kernel))
    layer = layer_of(rng, outputs)
    how = {"groups": groups, "strides": 2, "output_padding": 1}
    for bias in (None, rng.normal(size=outputs)):
        wanted = normalized(layer, linear_oracle.conv_transpose(x, weight, bias, **how))
        folded = layer.fold_into_conv_transpose(weight, bias, groups=groups)
        assert_close(linear_oracle.conv_transpose(x, *folded, **how), wanted)


def test_padding_before_is_exact_only_where_nothing_is_added(rng):
    weight, x = rng.normal(size=(4, 3, 3, 3)), rng.normal(size=(2, 3, 5, 5))
    scaling = bn.FrozenBatchNorm([0, 0, 0], [1, 2, 3], [1, -2, 3], dtype="float64")
    folded = scaling.fold_into_conv(weight, before=True, padded=True)
    wanted = linear_oracle.conv(normalized(scaling, x), weight, pads=1)
    assert_close(linear_oracle.conv(x, *folded, pads=1), wanted)

    adding = bn.FrozenBatchNorm([0, 1, 0], [1, 2, 3], dtype="float64")
    with pytest.raises(ValueError, match=r"^padded: .*is not 0 in channel 1$"):
        adding.fold_into_conv(weight, before=True, padded=True)
    folded = adding.fold_into_conv(weight, before=True, padded=False)
    wanted = linear_oracle.conv(normalized(adding, x), weight, pads=1)
    difference = np.abs(linear_oracle.conv(x, *folded, pads=1) - wanted)
    assert difference[:, :, 1:-1, 1:-1].max() < 1e-13 < 0.01 < difference.max()  # wrong at the border alone


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounded_once(rng, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    layer = layer_of(rng, 50, "float32")
    weight, bias = rng.normal(size=(50, 8)).astype(dtype), rng.normal(size=50).astype(dtype)
    folded = layer.fold_into_linear(weight, bias)
    assert [array.dtype for array in folded] == [dtype, dtype]
    gamma, beta, mean, var = (
        getattr(layer, name).astype(np.longdouble) for name in ("gamma", "beta", "mean", "var")
    )
    scale = gamma / np.sqrt(var + np.longdouble(layer.eps))
    weight, bias = weight.astype(np.longdouble), bias.astype(np.longdouble)
    exact = (scale[:, None] * weight, scale * (bias - mean) + beta)
    for found, wanted in zip(folded, exact, strict=True):
        found = found.astype(np.float64)
        for neighbour in (np.inf, -np.inf):
            other = np.nextafter(found.astype(dtype), dtype.type(neighbour)).astype(np.float64)
            assert np.all(np.abs(found - wanted) <= np.abs(other - wanted) * (1 + 1e-6))


def test_large_mean_and_bias_cancel_in_float64():
    layer = bn.FrozenBatchNorm([1e6], [1e-4], eps=0)
    weight, bias = layer.fold_into_linear(np.float32([[1]]), np.float32([1e6]))
    assert (weight.item(), bias.item()) == pytest.approx((100, 0), rel=1e-6, abs=1e-6)


LAYER = bn.FrozenBatchNorm([1, 2, 3, 4], 1)
ONES = np.ones((4, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LAYER.fold_into_linear(np.ones((4, 2), int)), TypeError, "weight: dtype was int64, wanted"),
        (lambda: LAYER.fold_into_linear(["a"]), TypeError, "weight has dtype"),
        (lambda: LAYER.fold_into_linear(ONES), ValueError, r"weight: shape was \(4, 2, 3\), wanted 2 axes"),
        (lambda: LAYER.fold_into_linear(ONES[0]), ValueError, "was of 2 output channels .*, wanted 4"),
        (lambda: LAYER.fold_into_linear(ONES[0], before=True), ValueError, "was of 3 input channels"),
        (lambda: LAYER.fold_into_linear(ONES[0].T[:1]), ValueError, "was of 1 output channel .*, wanted 4"),
        (lambda: LAYER.fold_into_conv(ONES[0]), ValueError, "wanted 3 or more axes"),
        (lambda: LAYER.fold_into_conv(ONES, np.ones(3)), ValueError, r"bias: shape was \(3,\), wanted \(4,"),
        (lambda: LAYER.fold_into_conv(ONES, np.ones(1)), ValueError, r"bias: shape was \(1,\), wanted \(4,"),
        (lambda: LAYER.fold_into_conv(ONES, np.ones((1, 4))), ValueError, r"bias: shape was \(1, 4\)"),
        (lambda: LAYER.fold_into_conv(ONES, groups=3), ValueError, "groups: was 3, wanted a divisor of 4"),
        (lambda: LAYER.fold_into_conv(ONES, groups=0), ValueError, "groups: was 0, wanted a divisor of 4"),
        (lambda: LAYER.fold_into_conv(ONES, groups=1.0), TypeError, "groups: was 1.0, wanted an integer"),
        (lambda: LAYER.fold_into_conv(ONES, groups=2, before=True), ValueError, "padded: was None, wanted"),
        (lambda: LAYER.fold_into_conv_transpose(ONES, groups=1), ValueError, "was of 2 output channels"),
        (lambda: LAYER.fold_into_conv(ONES * np.nan), ValueError, "weight: not finite in channels 0, 1"),
        (lambda: LAYER.fold_into_conv(ONES, [0, np.inf, 0, 0]), ValueError, "bias: not finite in channel 1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_overflow_is_refused():
    layer = bn.FrozenBatchNorm([0, 0], [1, 1e-8], eps=0)
    weight = np.full((2, 3), 10, np.float16)
    with pytest.raises(ValueError, match=r"^weight: out of the range of float16 after folding in channel 1$"):
        layer.fold_into_linear(weight)
    assert np.isfinite(layer.fold_into_linear(weight.astype(np.float32))[0]).all()
    layer = bn.FrozenBatchNorm([1e6, 0], 1)
    with pytest.raises(ValueError, match=r"^bias: out of the range of float16 after folding in channel 0$"):
        layer.fold_into_linear(weight)


def test_a_channel_that_vanishes_is_refused():
    layer = bn.FrozenBatchNorm([0.0, 0.0], [1.0, 1.0], [1e-9, 1.0])
    weight = np.array([[1.0, 1.0], [1.0, 1e-7]], np.float16)
    with pytest.raises(ValueError, match="weight: all values are 0 in float16 after folding in channel 0"):
        layer.fold_into_linear(weight)
    folded, _ = layer.fold_into_linear(np.array([[0.0, 0.0], [1.0, 1e-7]], np.float16))
    assert folded.tolist() == [[0, 0], [1, np.float16(1e-7)]]
