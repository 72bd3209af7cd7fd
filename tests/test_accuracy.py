"""Contract 2: accuracy of y, as the contract counts it, over means from 0 to 1e6 deviations."""

from __future__ import annotations

from decimal import Decimal, getcontext
from fractions import Fraction

import numpy as np
import pytest

import accuracy
import batchnorm as bn
import oracle

SHAPES = ((8192, 5), (5000, 5), (60, 70), (16, 5, 256), (7, 5, 12, 59), (2, 9, 1))


@pytest.fixture(params=accuracy.MEANS, ids="mu={:g}".format)
def mu(request, dtype):
    return accuracy.mean_of(dtype, request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(rng, shape, dtype, mu):
    x = accuracy.sample(rng, shape, dtype, mu)
    gamma, beta = rng.normal(1, 1, shape[1]), rng.normal(0, 3, shape[1])
    y, _ = bn.train_forward(x, gamma, beta)
    share = oracle.share_of_bound(y, oracle.forward(x, gamma, beta, 1e-5), trained=True)
    assert share <= 1, f"{dtype}, mean {mu:g}, {shape}: error is {share:.3g} of the bound"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference(rng, shape, dtype, mu):
    x = accuracy.sample(rng, shape, dtype, mu)
    gamma, beta = rng.normal(1, 1, shape[1]), rng.normal(0, 3, shape[1])
    m = bn.moments(x)
    y = bn.infer(x, m.mean, m.var, gamma, beta)
    exact = oracle.forward(x, gamma, beta, 1e-5, population=(m.mean, m.var))
    share = oracle.share_of_bound(y, exact, trained=False)
    assert share <= 1, f"{dtype}, mean {mu:g}, {shape}: error is {share:.3g} of the bound"


def assert_within_bounds(errors):
    """y, variance and gradients."""
    assert len(errors) == 6
    shares = {name: error.share for name, error in errors.items() if not error.share <= 1}
    assert not shares, f"errors as shares of what the contract allows: {shares}"


@pytest.mark.parametrize(
    "setting",
    [*accuracy.SETTINGS, *(pytest.param(s, marks=pytest.mark.long) for s in accuracy.LARGE)],
    ids=lambda s: f"mean {s[0]:g}, {s[1]} values, {'planar' if s[2] else 'interleaved'}",
)
def test_everything_over_means_and_counts(rng, dtype, setting):
    assert_within_bounds(accuracy.normal(rng, dtype, *setting))


@pytest.mark.parametrize("scales", [accuracy.TINY, accuracy.HUGE], ids=["subnormal", "near overflow"])
def test_everything_at_the_ends_of_the_range(rng, dtype, scales):
    assert_within_bounds(accuracy.extreme(rng, dtype, scales))


def test_the_judge_agrees_with_rational_arithmetic(rng):
    """Mean and variance as fractions, the root in 60 decimal digits, of float64 values with κ = 1e6."""
    x, gamma, beta = rng.standard_normal((50, 1)) + 1e6, 1.5, -0.25
    f = oracle.forward(x, gamma, beta, 1e-5)
    exact = [Fraction(v) for v in x.ravel().tolist()]
    mu = sum(exact) / len(exact)
    sigma2 = sum((v - mu) ** 2 for v in exact) / len(exact)
    getcontext().prec = 60
    root = (Decimal(sigma2.numerator) / sigma2.denominator + Decimal.from_float(1e-5)).sqrt()
    for v, y in zip(exact, f.y.ravel(), strict=True):
        centred = v - mu
        judge = Decimal(gamma) * centred.numerator / centred.denominator / root + Decimal(beta)
        high = Decimal(float(y)) + Decimal(float(y - float(y)))  # a long double is the sum of two float64
        assert abs(high - judge) <= Decimal(2.0**-62) * (4 + 10**6)  # of float64's bound one part in 8192


def test_small_gamma_and_large_beta(rng, dtype):
    """The ulp is that of S: of the larger of γx̂ and β where they differ by far."""
    x = rng.standard_normal((4096, 4)).astype(dtype)
    gamma, beta = np.array([1e-4, 1e3, 0.0, -1.0]), np.array([1e3, 1e-4, 7.3, 0.0])
    y, _ = bn.train_forward(x, gamma, beta)
    share = oracle.share_of_bound(y, oracle.forward(x, gamma, beta, 1e-5), trained=True)
    assert share <= 1, f"error is {share:.3g} of the bound"


@pytest.mark.parametrize("dtype", [np.dtype(np.float32)], ids=str)
def test_the_folded_form_would_fail_here(rng, dtype):
    """x·s + t in float32, as many libraries fold it, does not pass the check above, so the check can fail."""
    x = accuracy.sample(rng, (8192, 5), dtype, 1e4)
    f = oracle.forward(x, 1.0, 0.0, 1e-5)
    s = (1 / np.sqrt(f.sigma2 + f.eps)).astype(dtype)
    folded = x * s + (-f.mu * s).astype(dtype)
    assert oracle.share_of_bound(folded, f, trained=True) > 100


def test_no_bias(rng):
    """The mean of y is β and its variance γ²·σ²/(σ²+ε), far below one last place: rounding is to nearest."""
    x = (rng.standard_normal((65536, 3)) + 100).astype(np.float32)
    y, cache = bn.train_forward(x, 2.0, 0.5)
    var = cache.moments.var
    np.testing.assert_allclose(y.mean(0, dtype=np.float64), 0.5, atol=1e-9)
    np.testing.assert_allclose(y.var(0, dtype=np.float64), 4 * var / (var + 1e-5), rtol=1e-8)


def test_subnormal_results_are_not_flushed():
    x = np.array([[1.0], [3.0]], np.float32)
    y, _ = bn.train_forward(x, 1e-40, 0.0, eps=1e-12)
    assert y.ravel().tolist() == pytest.approx([-1e-40, 1e-40], rel=1e-4)
    wide, _ = bn.train_forward(x.astype(np.float64), 1e-310, 0.0, eps=1e-12)
    assert wide.ravel().tolist() == pytest.approx([-1e-310, 1e-310], rel=1e-9)
