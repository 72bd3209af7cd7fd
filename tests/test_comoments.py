"""`CoMoments`: accuracy of mean and scatter matrix, merging, and bytes."""

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
import whitening_oracle

LAYOUTS = (
    cases.Layout((9, 6)),
    cases.Layout((4097, 12)),
    cases.Layout((33, 64)),
    cases.Layout((5, 6, 7)),
    cases.Layout((3, 12, 64, 65)),
    cases.Layout((3, 7, 5, 18), channel_axis=-1),
    cases.Layout((4, 30, 5), channel_axis=1, memory=(2, 1, 0)),
    cases.Layout((3, 18, 5, 7), memory=cases.NHWC_AS_NCHW),
    cases.Layout((6, 40), channel_axis=0),
)


def groups_of(scatter, channels):
    """The channels of each group, (groups, D)."""
    return np.arange(channels).reshape(len(scatter), -1)


def check(x, s, groups, axis):
    """Mean and scatter against extended precision, the latter in units of the root of two variances."""
    wanted = whitening_oracle.covariance(x, groups, axis)
    assert s.count == x.size // x.shape[axis]
    rows = oracle.long(whitening_oracle.rows(x, axis))
    mean, std = rows.mean(0), rows.std(0)
    assert (abs(s.mean - mean) <= 2.0**-50 * (abs(mean) + std)).all()
    kappa = (abs(mean) / np.where(std > 0, std, 1)).max()
    scale = np.stack([np.outer(std[k], std[k]) for k in groups_of(s.scatter, s.channels)])
    assert (abs(s.scatter / s.count - wanted) <= 1e-15 * (10 + kappa) * scale).all()
    assert (s.scatter == s.scatter.transpose(0, 2, 1)).all()


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(rng, layout, dtype, groups):
    if layout.channels % groups:
        pytest.skip("the groups do not divide the channels")
    mean, var, _, _ = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype, mean, np.sqrt(var))
    s = bn.comoments(x, groups=groups, channel_axis=layout.channel_axis)
    assert (s.channels, s.groups) == (layout.channels, groups)
    size = layout.channels // groups
    assert (s.mean.shape, s.scatter.shape) == ((layout.channels,), (groups, size, size))
    assert s.mean.dtype == s.scatter.dtype == np.float64
    assert isinstance(s.count, float)
    check(x, s, groups, layout.channel_axis)


@pytest.mark.parametrize("mean", [1e2, 1e6])
def test_far_from_zero(rng, mean):
    """Where E[xxᵀ] − E[x]E[x]ᵀ has lost all its digits."""
    x = rng.standard_normal((20_000, 5)) @ rng.standard_normal((5, 5)) + mean
    check(x, bn.comoments(x), 1, 1)
    naive = x.T @ x / len(x) - np.outer(x.mean(0), x.mean(0))
    with pytest.raises(AssertionError):
        check(x, bn.CoMoments(len(x), x.mean(0), [len(x) * (naive + naive.T) / 2]), 1, 1)


def test_the_diagonal_is_that_of_moments(rng, dtype):
    x = cases.Layout((7, 12, 5, 9)).normal(rng, dtype, 3.0, 2.0)
    for groups in (1, 3, 12):
        ours, theirs = bn.comoments(x, groups=groups).moments, bn.moments(x)
        np.testing.assert_array_equal(ours.count, theirs.count)
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(ours.m2, theirs.m2, rtol=1e-14)


@given(cases.layouts(max_size=4000, min_values=1), st.integers(0, 2**32 - 1), st.data())
def test_any_split_merges_to_the_whole(layout, seed, data):
    rng = np.random.default_rng(seed)
    if layout.channels > 50:  # a covariance in extended precision is slow
        return
    mean, var, _, _ = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, np.float64, 10 * mean, np.sqrt(var))
    groups = data.draw(st.sampled_from([g for g in range(1, 51) if layout.channels % g == 0]))
    axis = (layout.channel_axis + 1) % x.ndim
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[axis]), max_size=5)))
    options = {"groups": groups, "channel_axis": layout.channel_axis}
    parts = [bn.comoments(p, **options) for p in np.split(x, cuts, axis)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    check(x, merged, groups, layout.channel_axis)


def test_zero_rows_are_the_neutral_element(rng, dtype):
    s = bn.comoments(rng.standard_normal((9, 4, 3)).astype(dtype), groups=2)
    for empty in (np.empty((0, 4), dtype), np.empty((5, 4, 0), dtype)):
        neutral = bn.comoments(empty, groups=2)
        assert neutral == bn.CoMoments(0, np.zeros(4), np.zeros((2, 2, 2)))
        assert s.merge(neutral).to_bytes() == s.to_bytes()
        assert neutral.merge(s).to_bytes() == s.to_bytes()
        assert neutral.merge(neutral) == neutral


def test_merge_returns_a_new_value(rng):
    a, b = (bn.comoments(rng.standard_normal((n, 4))) for n in (5, 8))
    before = a.to_bytes(), b.to_bytes()
    assert a.merge(b).count == 13
    assert (a.to_bytes(), b.to_bytes()) == before


def test_merge_by_hand():
    a = bn.CoMoments(2, [1.0, 2.0], [[[2.0, -1.0], [-1.0, 4.0]]])
    b = bn.CoMoments(6, [5.0, 0.0], [[[1.0, 0.5], [0.5, 3.0]]])
    c = a.merge(b)
    assert c.count == 8
    assert c.mean.tolist() == [4.0, 0.5]
    # δδᵀ·2·6/8 of δ = (4, −2)
    assert c.scatter.tolist() == [[[3 + 24.0, -0.5 - 12.0], [-0.5 - 12.0, 7 + 6.0]]]


@pytest.mark.parametrize(
    ("channels", "groups"), [(4, 2), (8, 1), (2, 1)], ids=["other groups", "more channels", "fewer channels"]
)
def test_merge_refuses_other_shapes(rng, channels, groups):
    one = bn.comoments(rng.standard_normal((5, 4)))
    with pytest.raises(ValueError, match=r"channels|groups"):
        one.merge(bn.comoments(rng.standard_normal((5, channels)), groups=groups))


def test_biased_and_unbiased_covariance():
    s = bn.CoMoments(4, [1.0, 2.0], [[[12.0, -6.0], [-6.0, 3.0]]])
    assert s.cov.tolist() == [[[3.0, -1.5], [-1.5, 0.75]]]
    assert s.cov_unbiased.tolist() == [[[4.0, -2.0], [-2.0, 1.0]]]
    assert s.moments == bn.Moments([4, 4], [1.0, 2.0], [12.0, 3.0])


def test_too_few_positions_have_no_covariance():
    with pytest.raises(ValueError, match="count"):
        _ = bn.CoMoments(0, [0.0], [[[0.0]]]).cov
    with pytest.raises(ValueError, match="count"):
        _ = bn.CoMoments(1, [0.0], [[[0.0]]]).cov_unbiased


def test_bytes_round_trip(rng):
    for groups in (1, 2, 6):
        s = bn.comoments(rng.standard_normal((7, 6)), groups=groups)
        again = bn.CoMoments.from_bytes(s.to_bytes())
        assert again == s
        assert again.to_bytes() == s.to_bytes()
        assert (again.groups, again.count) == (groups, 7)
        assert cases.bits(again.scatter) == cases.bits(s.scatter)
        assert pickle.loads(pickle.dumps(s)) == s
        assert copy.deepcopy(s) == s
        assert s != s.merge(s)
        assert s != "comoments"


def test_bytes_cut_short_or_long_or_foreign_are_refused(rng):
    x = rng.standard_normal((7, 4))
    data = bn.comoments(x, groups=2).to_bytes()
    assert isinstance(data, bytes)
    for n in range(len(data)):
        with pytest.raises(ValueError, match="bytes"):
            bn.CoMoments.from_bytes(data[:n])
    for foreign in (data + b"\0", bn.moments(x).to_bytes()):
        with pytest.raises(ValueError, match="bytes"):
            bn.CoMoments.from_bytes(foreign)
    with pytest.raises(ValueError, match="bytes"):
        bn.Moments.from_bytes(data)


def test_arrays_given_out_are_not_the_value(rng):
    s = bn.comoments(rng.standard_normal((7, 5)))
    before = s.to_bytes()
    for name in ("mean", "scatter", "cov", "cov_unbiased"):
        array = getattr(s, name)
        if array.flags.writeable:
            array[:] = 0
    assert s.to_bytes() == before


def test_a_nan_stays_in_its_channel(rng):
    x = rng.standard_normal((50, 4))
    x[3, 2] = np.nan
    s = bn.comoments(x, groups=2)
    clean = bn.comoments(x[:, :2])
    assert np.isnan(s.mean).tolist() == [False, False, True, False]
    np.testing.assert_array_equal(s.scatter[0], clean.scatter[0])
    assert np.isnan(s.scatter[1]).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, [0.0], [[[0.0]]]), "count"),
        ((np.nan, [0.0], [[[0.0]]]), "count"),
        ((4, [0.0, 0.0], [[[1.0, 0.0], [0.0, -1.0]]]), "scatter"),
        ((4, [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), "scatter"),
        ((4, [0.0, 0.0, 0.0], np.zeros((1, 2, 2))), "scatter|mean"),
        ((4, [0.0, 0.0], np.zeros((1, 2, 1))), "scatter"),
    ],
)
def test_refused_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        bn.CoMoments(*arguments)


def test_of_each_matrix_the_lower_triangle_counts():
    s = bn.CoMoments(4, [0.0, 0.0], [[[1.0, np.nan], [0.5, 2.0]]])
    assert s.scatter.tolist() == [[[1.0, 0.5], [0.5, 2.0]]]


@pytest.mark.parametrize("groups", [0, 4, 7])
def test_groups_divide_the_channels(rng, groups):
    with pytest.raises(
        ValueError, match=rf"groups is {groups}; wanted a divisor of the number of channels, 6"
    ):
        bn.comoments(rng.standard_normal((5, 6)), groups=groups)
