"""Measures of shift, against numerical integration, NumPy on the data themselves, and a table of edges."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm.shift import Shift, Summary, shift

INF = math.inf
MEASURES = ("mean_shift", "log_variance_ratio", "kl", "w2", "z")


def moments(mean, var, count=11):
    """Moments with these means and unbiased variances."""
    mean, var = np.atleast_1d(mean).astype(float), np.atleast_1d(var).astype(float)
    return bn.Moments(np.full(len(mean), count), mean, var * (count - 1))


def frozen(mean, var, eps):
    return bn.FrozenBatchNorm(np.atleast_1d(mean), np.atleast_1d(var), eps=eps, dtype="float64")


def integrals(live, reference):
    """KL(live‖reference) by the midpoint rule on the line, and the distance W2 by that on the quantiles."""
    x, width = np.linspace(live.mean - 12 * live.stdev, live.mean + 12 * live.stdev, 200_001, retstep=True)
    p = np.array([live.pdf(value) for value in x])
    log_p = -(((x - live.mean) / live.stdev) ** 2) / 2 - math.log(live.stdev)
    log_q = -(((x - reference.mean) / reference.stdev) ** 2) / 2 - math.log(reference.stdev)
    u = (np.arange(20_000) + 0.5) / 20_000
    gaps = [live.inv_cdf(value) - reference.inv_cdf(value) for value in u]
    return float((p * (log_p - log_q)).sum() * width), float(np.sqrt(np.mean(np.square(gaps))))


@pytest.mark.parametrize("eps", [None, 0.5])
@pytest.mark.parametrize(
    ("live", "reference"), [((1, 4), (0, 1)), ((-3, 0.25), (2, 4)), ((5, 2), (5, 3)), ((0.3, 7), (0, 7))]
)
def test_kl_and_w2_are_the_integrals(live, reference, eps):
    other = moments(*reference) if eps is None else frozen(*reference, eps)
    found = shift(moments(*live), other)
    normals = [NormalDist(mean, math.sqrt(var + (eps or 0))) for mean, var in (live, reference)]
    kl, w2 = integrals(*normals)
    assert found.kl == pytest.approx(kl, rel=1e-6)
    assert found.w2 == pytest.approx(w2 / normals[1].stdev, rel=1e-3)


def test_the_measures_of_data(rng):
    a, b = rng.normal(3, 2, (50, 4)), rng.normal(2, 5, (70, 4))
    means, variances = (a.mean(0), b.mean(0)), (a.var(0, ddof=1), b.var(0, ddof=1))
    found = shift(bn.moments(a), bn.moments(b))
    wanted = {
        "mean_shift": (means[0] - means[1]) / np.sqrt(variances[1]),
        "log_variance_ratio": np.log(variances[0] / variances[1]),
        "z": (means[0] - means[1]) / np.sqrt(variances[0] / 50 + variances[1] / 70),
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-12)

    layer = frozen(means[1], variances[1], eps=0.25)
    found, scale = shift(bn.moments(a), layer), np.sqrt(variances[1] + 0.25)
    np.testing.assert_allclose(found.mean_shift, (means[0] - means[1]) / scale, rtol=1e-12)
    ratio = (variances[0] + 0.25) / (variances[1] + 0.25)
    np.testing.assert_allclose(found.log_variance_ratio, np.log(ratio), rtol=1e-12)
    np.testing.assert_allclose(found.z, (means[0] - means[1]) / np.sqrt(variances[0] / 50), rtol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_z_has_deviation_one_where_nothing_shifted(rng, exact):
    """Over 4,000 channels, with different counts, so that an exchanged or forgotten one would be seen."""
    live = bn.moments(rng.normal(7, 3, (200, 4000)))
    reference = frozen(np.full(4000, 7), 9, 1e-5) if exact else bn.moments(rng.normal(7, 3, (50, 4000)))
    z = shift(live, reference).z
    assert abs(z.mean()) < 0.1
    assert z.std() == pytest.approx(1, abs=0.06)


EDGES = {
    # live (mean, var), reference (mean, var), ε, then mean_shift, log_variance_ratio, kl, w2, z
    "equal": ((1, 2), (1, 2), None, (0, 0, 0, 0, 0)),
    "equal constants": ((1, 0), (1, 0), None, (0, 0, 0, 0, 0)),
    "constants, live above": ((2, 0), (1, 0), None, (INF, 0, INF, INF, INF)),
    "constants, live below": ((0, 0), (1, 0), None, (-INF, 0, INF, INF, -INF)),
    "live constant": ((2, 0), (1, 4), None, (0.5, -INF, INF, math.sqrt(1.25), math.sqrt(11) / 2)),
    "reference constant, same mean": ((1, 4), (1, 0), None, (0, INF, INF, INF, 0)),
    "reference constant": ((2, 4), (1, 0), None, (INF, INF, INF, INF, math.sqrt(11) / 2)),
    "frozen, equal constants": ((1, 0), (1, 0), 0.25, (0, 0, 0, 0, 0)),
    "frozen, constants": ((2, 0), (1, 0), 0.25, (2, 0, 2, 2, INF)),
    "frozen, live constant": (
        (1, 0),
        (1, 0.75),
        0.25,
        (0, math.log(0.25), (0.25 - 1 - math.log(0.25)) / 2, 0.5, 0),
    ),
    "frozen without eps, live constant": ((1, 0), (1, 4), 0, (0, -INF, INF, 1, 0)),
    "beyond float64": ((1e308, 1), (-1e308, 1), None, (INF, 0, INF, INF, INF)),
    "tiny and large": (
        (0, 1e-300),
        (0, 1e300),
        None,
        (0, -600 * math.log(10), (600 * math.log(10) - 1) / 2, 1, 0),
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    live, reference, eps, wanted = EDGES[name]
    with np.errstate(all="raise"):
        found = shift(moments(*live), moments(*reference) if eps is None else frozen(*reference, eps))
    for measure, value in zip(MEASURES, wanted, strict=True):
        assert getattr(found, measure)[0] == pytest.approx(value, rel=1e-12), measure


@pytest.mark.parametrize("change", [1e-3, -1e-6, 1e-9])
def test_a_small_change_keeps_its_digits(change):
    """KL of a small change c of the variance is (c − ln(1 + c))/2, whose terms cancel almost wholly."""
    live, reference = moments(0, 1e10 * (1 + change)), moments(0, 1e10)
    found = shift(live, reference)
    exact = [Fraction(float(each.var_unbiased[0])) for each in (live, reference)]
    change = float(exact[0] / exact[1] - 1)  # as float64 has it
    assert found.log_variance_ratio == pytest.approx(math.log1p(change), rel=1e-12, abs=0)
    assert found.kl == pytest.approx(change**2 / 4 - change**3 / 6 + change**4 / 8, rel=1e-5, abs=0)
    assert found.w2 == pytest.approx(abs(change) / 2, rel=1e-3, abs=0)


finite = st.floats(allow_nan=False, allow_infinity=False)
variances = st.one_of(st.just(0.0), st.floats(0, 1e308, allow_infinity=False))


@given(finite, variances, finite, variances, st.one_of(st.none(), st.floats(0, 1, width=32)))
def test_never_nan(mean, var, ref_mean, ref_var, eps):
    live = bn.Moments([3.0], [mean], [var])
    if eps is None:
        reference = bn.Moments([2.0], [ref_mean], [ref_var])
    else:
        ref_var = max(ref_var, 1e-300)  # a layer of neither variance nor ε cannot be made
        reference = bn.FrozenBatchNorm([ref_mean], [ref_var], eps=eps, dtype="float64")
    with np.errstate(all="raise"):
        found = shift(live, reference)
    for name in MEASURES:
        assert not np.isnan(getattr(found, name)).any(), name
    assert found.kl >= 0
    assert found.w2 >= abs(found.mean_shift)
    assert not any(math.isnan(summary.mean) for summary in found.summary().values())


def test_shapes_and_summary():
    found = shift(moments([0, -3, 2, 3], [1, 1, 1, 1]), moments([0, 0, 0, 0], [1, 1, 1, 1]))
    assert isinstance(found, Shift)
    for name in MEASURES:
        values = getattr(found, name)
        assert (values.shape, values.dtype) == ((4,), np.float64)
    summary = found.summary()
    assert tuple(summary) == MEASURES
    assert summary["mean_shift"] == Summary(2, 3, 1)  # the first of two that are equally large
    assert summary["kl"] == Summary(22 / 8, 4.5, 1)
    assert type(summary["kl"].channel) is int


def test_of_a_float32_layer(rng):
    """The parameters that the layer rounded are those that count."""
    layer = bn.FrozenBatchNorm([0.1], [0.3], eps=1e-3)
    live = moments(float(np.float32(0.1)), float(np.float32(0.3)))
    found = shift(live, layer)
    assert [getattr(found, name)[0] for name in MEASURES] == [0, 0, 0, 0, 0]


GOOD = moments([1, 2], [1, 1])
REFUSED = {
    "live frozen": ((frozen([1], [1], 1), GOOD), TypeError, "live: was FrozenBatchNorm, wanted Moments"),
    "reference array": ((GOOD, np.ones(2)), TypeError, "reference: was ndarray, wanted Moments or Frozen"),
    "channels": ((GOOD, moments(1, 1)), ValueError, "reference: was of 1 channel, wanted 2 as in live"),
    "layer's channels": ((GOOD, frozen([1] * 3, 1, 1)), ValueError, "reference: was of 3 channels, wanted 2"),
    "one value": (
        (bn.Moments([2, 1], [0, 0], [1, 0]), GOOD),
        ValueError,
        "live: 2 values or more wanted in each channel, found channel 1 with fewer",
    ),
    "no value": (
        (GOOD, bn.Moments([0, 0], [0, 0], [0, 0])),
        ValueError,
        "reference: 2 values .* channels 0, 1",
    ),
    "mean": ((bn.Moments([2, 2], [0, np.nan], [1, 1]), GOOD), ValueError, "live: .* not finite in channel 1"),
    "variance": (
        (GOOD, bn.Moments([2, 2], [0, 0], [INF, 1])),
        ValueError,
        "reference: .* not finite in channel 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        shift(*arguments)
