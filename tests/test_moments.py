"""`Moments`: accuracy of mean and variance, merging, and bytes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
import cases
import oracle
from cases import moments_bits


def check_variance(x, m, axis=1):
    """Contract 2: the variance to a relative 1e-15·(10 + |mean|/std)."""
    f = oracle.forward(x, 1, 0, 0 if (oracle.forward(x, 1, 0, 1, axis).sigma2 > 0).all() else 1, axis)
    mu, sigma2 = f.mu.ravel(), f.sigma2.ravel()
    some = sigma2 > 0
    assert (m.m2[~some] == 0).all(), "a constant channel has no variance"
    error = abs(oracle.long(m.var[some]) - sigma2[some]) / sigma2[some]
    share = (error / (1e-15 * (10 + abs(mu[some]) / np.sqrt(sigma2[some])))).max(initial=0)
    assert share <= 1, f"the variance's error is {float(share):.3g} of what contract 2 allows"
    assert (abs(oracle.long(m.mean) - mu) <= 2.0**-50 * (abs(mu) + np.sqrt(sigma2))).all()


def test_layouts(rng, layout, dtype):
    mean, var, _, _ = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype, mean, np.sqrt(var))
    m = bn.moments(x, channel_axis=layout.channel_axis)
    assert m.channels == layout.channels
    assert (m.count == x.size / layout.channels).all()
    for values in (m.count, m.mean, m.m2, m.var):
        assert values.dtype == np.float64
        assert values.shape == (layout.channels,)
    check_variance(x, m, layout.channel_axis)


@pytest.mark.parametrize("mu", [0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    "shape", [(65536, 3), (50001, 3), (32, 3, 4096), (9, 3, 12544), (1, 2, 100_003)], ids=str
)
@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
def test_variance_far_from_zero(rng, mu, shape, dtype):
    x = (rng.standard_normal(shape) + mu).astype(dtype)
    check_variance(x, bn.moments(x))


@pytest.mark.parametrize(
    "series",
    [
        lambda n, rng: np.arange(n) + 1e6,
        lambda n, rng: np.where(np.arange(n) == 0, 1e8, rng.standard_normal(n)),
        lambda n, rng: np.where(np.arange(n) == n - 1, -1e8, rng.standard_normal(n)),
        lambda n, rng: 1e4 + (-1.0) ** np.arange(n),
        lambda n, rng: np.sort(rng.standard_normal(n)) + 1e5,
        lambda n, rng: rng.standard_normal(n) * 1e-140,
        lambda n, rng: rng.standard_normal(n) * 1e140,
        lambda n, rng: np.repeat([1e6, -1e6], n)[::2] + rng.standard_normal(n),
    ],
    ids=["trend", "first is far", "last is far", "alternating", "sorted", "tiny", "huge", "step"],
)
def test_variance_of_series_that_shortcuts_get_wrong(rng, series):
    x = np.stack([series(40_000, rng), series(40_000, rng)[::-1]])
    check_variance(x[None], bn.moments(x[None]))
    check_variance(x.T, bn.moments(x.T.copy()))


def test_the_textbook_formula_would_fail_here(rng):
    """E[x²] − E[x]² does not pass the check above, so the check can fail."""
    x = rng.standard_normal((65536, 3)) + 1e6
    n = float(len(x))
    naive = bn.Moments(np.full(3, n), x.mean(0), np.maximum((x * x).mean(0) - x.mean(0) ** 2, 0) * n)
    with pytest.raises(AssertionError, match="of what contract 2 allows"):
        check_variance(x, naive)


@given(cases.layouts(min_values=1), st.sampled_from(cases.DTYPES), st.integers(0, 2**32 - 1), st.data())
def test_any_split_merges_to_the_whole(layout, dtype, seed, data):
    rng = np.random.default_rng(seed)
    mean, var, _, _ = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype, 100 * mean, np.sqrt(var))
    axis = (layout.channel_axis + 1) % x.ndim
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[axis]), max_size=5)))
    parts = [bn.moments(p, channel_axis=layout.channel_axis) for p in np.split(x, cuts, axis)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert (merged.count == x.size / layout.channels).all()
    check_variance(x, merged, layout.channel_axis)


def test_zero_rows_are_the_neutral_element(rng, dtype):
    m = bn.moments(rng.standard_normal((9, 4, 3)).astype(dtype))
    for empty in (np.empty((0, 4), dtype), np.empty((5, 4, 0), dtype)):
        neutral = bn.moments(empty)
        assert (neutral.count == 0).all()
        assert neutral == bn.Moments(np.zeros(4), np.zeros(4), np.zeros(4))
        assert moments_bits(m.merge(neutral)) == moments_bits(m)
        assert moments_bits(neutral.merge(m)) == moments_bits(m)
        assert neutral.merge(neutral) == neutral


def test_merge_returns_a_new_value(rng):
    a, b = (bn.moments(rng.standard_normal((n, 4))) for n in (5, 8))
    before = a.to_bytes(), b.to_bytes()
    c = a.merge(b)
    assert (c.count == 13).all()
    assert (a.to_bytes(), b.to_bytes()) == before


def test_counts_may_differ_by_channel():
    """Counts may differ by channel; a channel without values is neutral by itself."""
    a = bn.Moments([0, 2, 4], [0, 1.0, 5.0], [0, 0.5, 8.0])
    b = bn.Moments([3, 0, 4], [7.0, 0, 1.0], [6.0, 0, 0.0])
    c = a.merge(b)
    assert c.count.tolist() == [3, 2, 8]
    assert c.mean.tolist() == [7.0, 1.0, 3.0]
    assert c.m2.tolist() == [6.0, 0.5, 8.0 + 4.0 * 4.0 * 16.0 / 8.0]


def test_biased_and_unbiased_variance():
    m = bn.Moments([4, 2], [1.0, 2.0], [12.0, 5.0])
    assert m.var.tolist() == [3.0, 2.5]
    assert m.var_unbiased.tolist() == [4.0, 5.0]


def values(rng):
    x = rng.standard_normal((7, 5))
    return bn.moments(x), bn.gradient_sums(rng.standard_normal((7, 5)), bn.train_forward(x)[1])


def test_bytes_round_trip(rng):
    for value in values(rng):
        again = type(value).from_bytes(value.to_bytes())
        assert again == value
        assert again.to_bytes() == value.to_bytes()
        assert pickle.loads(pickle.dumps(value)) == value
        assert copy.deepcopy(value) == value
        assert value != again.merge(again)
        assert value != "moments"


def test_bytes_cut_short_or_long_or_foreign_are_refused(rng):
    a, b = values(rng)
    for value in (a, b):
        data = value.to_bytes()
        assert isinstance(data, bytes)
        for n in range(len(data)):
            with pytest.raises(ValueError, match="bytes"):
                type(value).from_bytes(data[:n])
        with pytest.raises(ValueError, match="bytes"):
            type(value).from_bytes(data + b"\0")
    with pytest.raises(ValueError, match="bytes"):
        bn.Moments.from_bytes(b.to_bytes())
    with pytest.raises(ValueError, match="bytes"):
        type(b).from_bytes(a.to_bytes())


def test_arrays_given_out_are_not_the_value(rng):
    """Writing into `.mean` fails or changes a copy; the value itself stays."""
    m = bn.moments(rng.standard_normal((7, 5)))
    before = m.to_bytes()
    for name in ("count", "mean", "m2"):
        array = getattr(m, name)
        if array.flags.writeable:
            array[:] = 0
    assert m.to_bytes() == before
