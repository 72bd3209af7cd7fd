"""Inference is defined to the bit: contract 1."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
import cases
import oracle
from batchnorm._core import Coefficients
from cases import bits, strides


def test_layouts(rng, layout, dtype):
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype, mean, np.sqrt(var))
    y = bn.infer(x, mean, var, gamma, beta, eps=1e-3, channel_axis=layout.channel_axis)
    assert y.dtype == x.dtype
    assert strides(y) == strides(x)
    assert bits(y) == bits(oracle.infer(x, mean, var, gamma, beta, 1e-3, layout.channel_axis))


@given(st.data(), cases.layouts(min_values=1), st.sampled_from(cases.DTYPES), st.integers(0, 2**32 - 1))
def test_every_bit_pattern_of_x_and_any_finite_parameters(data, layout, dtype, seed):
    """Subnormals, infinities and NaN of any sign among the x, and parameters that overflow or vanish."""
    rng = np.random.default_rng(seed)
    x = layout.lay(
        rng.integers(0, 256, (*layout.shape, dtype.itemsize), np.uint8).view(dtype).reshape(layout.shape)
    )
    most = 1e38 if dtype.itemsize == 2 else 1e300
    finite = st.floats(-most, most, allow_subnormal=True)
    mean, gamma, beta = (data.draw(st.lists(finite, min_size=3, max_size=3)) for _ in range(3))
    var = data.draw(st.lists(st.floats(0, 1e300), min_size=3, max_size=3))
    mean, var, gamma, beta = (np.resize(p, layout.channels) for p in (mean, var, gamma, beta))
    eps = data.draw(st.floats(1e-300, 1e10))
    with np.errstate(over="ignore"):
        scale = (gamma / np.sqrt(var + eps)).astype(np.float32)
    if dtype.itemsize == 2 and np.isinf(scale).any():
        with pytest.raises(ValueError, match="for x of 16 bits"):
            bn.infer(x, mean, var, gamma, beta, eps=eps, channel_axis=layout.channel_axis)
        return
    y = bn.infer(x, mean, var, gamma, beta, eps=eps, channel_axis=layout.channel_axis)
    assert bits(y) == bits(oracle.infer(x, mean, var, gamma, beta, eps, layout.channel_axis))


def test_absent_parameters_are_one_and_zero(rng, dtype):
    x = rng.standard_normal((5, 7, 9)).astype(dtype)
    mean, var, gamma, beta = cases.parameters(rng, 7)
    assert bits(bn.infer(x, mean, var)) == bits(oracle.infer(x, mean, var))
    assert bits(bn.infer(x, mean, var, gamma)) == bits(oracle.infer(x, mean, var, gamma))
    assert bits(bn.infer(x, mean, var, beta=beta)) == bits(oracle.infer(x, mean, var, beta=beta))
    assert bits(bn.infer(x, 3, 0.25, 2, -1)) == bits(oracle.infer(x, 3, 0.25, 2, -1))


def test_eps_may_be_zero_where_every_variance_is_positive(rng, dtype):
    x = rng.standard_normal((5, 7)).astype(dtype)
    mean, var, gamma, beta = cases.parameters(rng, 7)
    assert bits(bn.infer(x, mean, var, gamma, beta, eps=0.0)) == bits(
        oracle.infer(x, mean, var, gamma, beta, 0.0)
    )


def test_coefficients_hold_the_same_coefficients(rng, layout, dtype):
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype)
    held = Coefficients(mean, var, gamma, beta, eps=1e-3)
    assert held.channels == layout.channels
    y = bn.infer(x, mean, var, gamma, beta, eps=1e-3, channel_axis=layout.channel_axis)
    assert bits(held.infer(x, channel_axis=layout.channel_axis)) == bits(y)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (0, 3, 0, 2)], ids=str)
def test_zero_rows_give_an_empty_array(shape, dtype):
    y = bn.infer(np.empty(shape, dtype), np.zeros(3), np.ones(3))
    assert y.shape == shape
    assert y.dtype == dtype


def test_a_value_that_is_not_finite_changes_its_own_element_only(rng, layout, dtype):
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype)
    where = tuple(n // 2 for n in x.shape)
    y = bn.infer(x, mean, var, gamma, beta, channel_axis=layout.channel_axis)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = x.copy(order="K")
        spoilt[where] = bad
        broken = bn.infer(spoilt, mean, var, gamma, beta, channel_axis=layout.channel_axis)
        assert not np.isfinite(broken[where])
        broken[where] = y[where]
        assert bits(broken) == bits(y)


@given(cases.layouts(min_values=1), st.sampled_from(cases.DTYPES), st.integers(0, 2**32 - 1), st.data())
def test_any_split_of_the_batch_and_any_neighbours(layout, dtype, seed, data):
    rng = np.random.default_rng(seed)
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype)
    axis = (layout.channel_axis + 1) % x.ndim
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, x.shape[axis])] * 2)))
    part = np.moveaxis(np.moveaxis(x, axis, 0)[first:last], 0, axis)
    whole = bn.infer(x, mean, var, gamma, beta, channel_axis=layout.channel_axis)
    alone = bn.infer(part, mean, var, gamma, beta, channel_axis=layout.channel_axis)
    assert bits(alone) == bits(np.moveaxis(np.moveaxis(whole, axis, 0)[first:last], 0, axis))
