"""The training forward pass: Algorithm 1 within contract 2, ending in the expression of contract 1."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
import cases
import oracle
from cases import bits, moments_bits, strides


def at_least_two(layout):
    return np.prod(layout.shape) >= 2 * layout.channels


TRAINABLE = tuple(filter(at_least_two, cases.LAYOUTS))


def check(x, gamma, beta, eps, axis):
    y, cache = bn.train_forward(x, gamma, beta, eps=eps, channel_axis=axis)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert strides(y) == strides(x)
    f = oracle.forward(x, gamma, beta, eps, axis)
    share = oracle.share_of_bound(y, f, trained=True)
    assert share <= 1, f"error is {share:.3g} of what contract 2 allows"
    m = cache.moments
    assert (m.count == f.m).all()
    assert bits(y) == bits(oracle.infer(x, m.mean, m.var, gamma, beta, eps, axis)), (
        "training ends in the inference expression"
    )
    half, cache_of_half = bn.normalize(
        x, bn.moments(x, channel_axis=axis), gamma, beta, eps=eps, channel_axis=axis
    )
    assert bits(half) == bits(y), "train_forward = normalize ∘ moments"
    assert moments_bits(cache_of_half.moments) == moments_bits(m)


@pytest.mark.parametrize("layout", TRAINABLE, ids=str)
def test_layouts(rng, layout, dtype):
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    check(layout.normal(rng, dtype, mean, np.sqrt(var)), gamma, beta, 1e-3, layout.channel_axis)


@given(
    cases.layouts(),
    st.sampled_from(cases.DTYPES),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-12, 1e-5, 1e-3, 1.0]),
    st.floats(1e-3, 1e3),
)
def test_any_layout_and_scale(layout, dtype, seed, eps, scale):
    rng = np.random.default_rng(seed)
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    check(
        layout.normal(rng, dtype, mean * scale, np.sqrt(var) * scale), gamma, beta, eps, layout.channel_axis
    )


@pytest.mark.parametrize("layout", TRAINABLE, ids=str)
def test_a_constant_channel_gives_exactly_beta(layout, dtype):
    beta = np.resize([0.5, -3.0, 0.0, 40.0], layout.channels)
    for value in (0.0, -0.0, 0.1, -7.0, 6e4, 1e-6):
        x = layout.lay(np.full(layout.shape, value, dtype))
        y, cache = bn.train_forward(x, 1.7, beta, channel_axis=layout.channel_axis)
        assert (y.astype(np.float64) == oracle.along(beta, x, layout.channel_axis)).all()
        assert (cache.moments.mean == np.float64(x.flat[0])).all()
        assert (cache.moments.m2 == 0).all()


@pytest.mark.parametrize("layout", [f for f in TRAINABLE if f.channels > 1], ids=str)
def test_a_value_that_is_not_finite_changes_its_own_channel_only(rng, layout, dtype):
    axis = layout.channel_axis
    x = layout.normal(rng, dtype)
    where = tuple(n // 2 for n in x.shape)
    channel = where[axis]

    def others(a, axis=0):
        return bits(np.delete(a, channel, axis))

    y, cache = bn.train_forward(x, channel_axis=axis)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = x.copy(order="K")
        spoilt[where] = bad
        broken, broken_cache = bn.train_forward(spoilt, channel_axis=axis)
        assert not np.isfinite(broken_cache.moments.mean[channel])
        assert np.isnan(np.take(broken, channel, axis)).all()
        assert others(broken, axis) == others(y, axis)
        for name in ("mean", "m2", "count"):
            assert others(getattr(broken_cache.moments, name)) == others(getattr(cache.moments, name))


def test_the_cache_says_what_was_used(rng, dtype):
    x = rng.standard_normal((6, 4, 5)).astype(dtype)
    _, cache = bn.train_forward(x, eps=0.25)
    m = bn.moments(x)
    assert cache.x is x or np.shares_memory(cache.x, x)
    assert cache.channel_axis == 1
    assert moments_bits(cache.moments) == moments_bits(m)
    for values, wanted in ((cache.mean, m.mean), (cache.invstd, 1 / np.sqrt(m.var + 0.25))):
        assert values.dtype == np.float64
        assert values.shape == (4,)
        np.testing.assert_allclose(values, wanted, rtol=1e-15)


@pytest.mark.parametrize(
    "form",
    [
        lambda p: p.astype(np.float32),
        lambda p: p.astype(np.float16),
        lambda p: p.astype(np.float64).astype(">f8"),
        lambda p: np.repeat(p, 2)[::2],
        lambda p: p.astype(np.int64),
        lambda p: p.astype(np.float64).tolist(),
        lambda p: p.astype(cases.DTYPES[-1]),
        lambda p: p[:1],
        lambda p: float(p[0]),
    ],
    ids=["float32", "float16", "big-endian", "strided", "int64", "list", "bfloat16", "one", "scalar"],
)
def test_parameters_are_any_real_array_that_broadcasts(rng, form):
    x = rng.standard_normal((5, 4))
    gamma, beta = np.array([2.0, -1.0, 3.0, 0.0]), np.array([1.0, 5.0, -2.0, 4.0])
    wanted, _ = bn.train_forward(x, *(np.resize(form(p), 4).astype(np.float64) for p in (gamma, beta)))
    assert bits(bn.train_forward(x, form(gamma), form(beta))[0]) == bits(wanted)


def test_normalize_takes_the_statistics_of_more_than_its_own_batch(rng, dtype):
    """Micro-batches, each normalized with the merged moments, give the whole batch within the bound."""
    x = rng.standard_normal((12, 3, 8)).astype(dtype)
    parts = x[:5], x[5:]
    merged = bn.moments(parts[0]).merge(bn.moments(parts[1]))
    y = np.concatenate([bn.normalize(p, merged, 2.0, 0.5)[0] for p in parts])
    share = oracle.share_of_bound(y, oracle.forward(x, 2.0, 0.5, 1e-5), trained=True)
    assert share <= 1, f"error is {share:.3g} of what contract 2 allows"
