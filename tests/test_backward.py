"""The closed forms of the gradients against the paper's derivatives and finite differences; four slips."""

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
from cases import Layout, bits, strides

TRAINABLE = tuple(f for f in cases.LAYOUTS if np.prod(f.shape) >= 2 * f.channels)
SMALL = (
    Layout((7, 3)),
    Layout((2, 3, 5)),
    Layout((2, 3, 2, 3)),
    Layout((2, 3, 2, 4), channel_axis=-1),
    Layout((3, 5), channel_axis=0),
    Layout((2, 5, 3, 2), memory=cases.NHWC_AS_NCHW),
)


def assert_within_bounds(errors):
    shares = {name: share for name, (_, share) in errors.items()}
    assert max(shares.values()) <= 1, f"errors as shares of what is allowed: {shares}"


def check_training(x, dy, gamma, eps, axis):
    _, cache = bn.train_forward(x, gamma, 0.5, eps=eps, channel_axis=axis)
    got = bn.backward(dy, cache)
    assert got.dx.dtype == x.dtype
    assert strides(got.dx) == strides(x)
    assert all(g.dtype == np.float64 and g.shape == gamma.shape for g in got[1:])
    f = oracle.forward(x, gamma, 0.5, eps, axis)
    assert_within_bounds(oracle.gradient_errors(got, dy, f, trained=True))
    sums = bn.gradient_sums(dy, cache)
    assert (sums.count == f.m).all()
    assert bits(sums.dgamma) == bits(got.dgamma)
    assert bits(sums.dbeta) == bits(got.dbeta)
    assert bits(bn.gradient_apply(dy, cache, sums)) == bits(got.dx), (
        "backward = gradient_apply ∘ gradient_sums"
    )


@pytest.mark.parametrize("layout", TRAINABLE, ids=str)
def test_layouts(rng, layout, dtype):
    mean, var, gamma, _ = cases.parameters(rng, layout.channels)
    x, dy = (layout.normal(rng, dtype, mean, np.sqrt(var)) for _ in range(2))
    check_training(x, dy, gamma, 1e-3, layout.channel_axis)


@given(
    cases.layouts(), st.sampled_from(cases.DTYPES), st.integers(0, 2**32 - 1), st.sampled_from([1e-5, 0.1])
)
def test_any_layout(layout, dtype, seed, eps):
    rng = np.random.default_rng(seed)
    mean, var, gamma, _ = cases.parameters(rng, layout.channels)
    x, dy = (layout.normal(rng, dtype, 10 * mean, np.sqrt(var)) for _ in range(2))
    check_training(x, dy, gamma, eps, layout.channel_axis)


def test_layouts_with_frozen_statistics(rng, layout, dtype):
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    axis = layout.channel_axis
    x, dy = (layout.normal(rng, dtype, mean, np.sqrt(var)) for _ in range(2))
    got = bn.infer_backward(dy, x, mean, var, gamma, channel_axis=axis)
    f = oracle.forward(x, gamma, beta, 1e-5, axis, population=(mean, var))
    assert_within_bounds(oracle.gradient_errors(got, dy, f, trained=False))


def differences(loss, values, h=1e-5):
    """∂loss/∂values by central differences, in the shape of `values`."""
    result = np.empty(values.shape)
    for index in np.ndindex(values.shape):
        moved = [values.copy() for _ in range(2)]
        moved[0][index] += h
        moved[1][index] -= h
        result[index] = (loss(moved[0]) - loss(moved[1])) / (2 * h)
    return result


def problem(rng, layout):
    """A loss that is not linear in y, and where it is taken."""
    mean, var, gamma, beta = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, np.dtype(np.float64), mean, np.sqrt(var))
    w = layout.normal(rng, np.dtype(np.float64))
    return x, mean, var, gamma, beta, (lambda y: float((w * np.sin(y)).sum())), (lambda y: w * np.cos(y))


@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_finite_differences_through_the_statistics(rng, layout):
    x, _, _, gamma, beta, loss, slope = problem(rng, layout)

    def run(x=x, gamma=gamma, beta=beta):
        return bn.train_forward(x, gamma, beta, eps=0.1, channel_axis=layout.channel_axis)

    y, cache = run()
    dx, dgamma, dbeta = bn.backward(slope(y), cache)
    np.testing.assert_allclose(dx, differences(lambda v: loss(run(x=v)[0]), x), atol=1e-8)
    np.testing.assert_allclose(dgamma, differences(lambda v: loss(run(gamma=v)[0]), gamma), atol=1e-8)
    np.testing.assert_allclose(dbeta, differences(lambda v: loss(run(beta=v)[0]), beta), atol=1e-8)


@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_finite_differences_with_frozen_statistics(rng, layout):
    x, mean, var, gamma, beta, loss, slope = problem(rng, layout)
    axis = layout.channel_axis

    def run(x=x, gamma=gamma, beta=beta):
        return bn.infer(x, mean, var, gamma, beta, eps=0.1, channel_axis=axis)

    dx, dgamma, dbeta = bn.infer_backward(slope(run()), x, mean, var, gamma, eps=0.1, channel_axis=axis)
    np.testing.assert_allclose(dx, differences(lambda v: loss(run(x=v)), x), atol=1e-8)
    np.testing.assert_allclose(dgamma, differences(lambda v: loss(run(gamma=v)), gamma), atol=1e-8)
    np.testing.assert_allclose(dbeta, differences(lambda v: loss(run(beta=v)), beta), atol=1e-8)


def test_absent_gamma_has_a_gradient_too(rng, dtype):
    x, dy = rng.standard_normal((2, 9, 4, 5)).astype(dtype)
    absent = bn.backward(dy, bn.train_forward(x)[1])
    ones = bn.backward(dy, bn.train_forward(x, np.ones(4), np.zeros(4))[1])
    assert all(bits(a) == bits(b) for a, b in zip(absent, ones, strict=True))
    frozen = bn.infer_backward(dy, x, np.zeros(4), np.ones(4))
    assert bits(frozen.dbeta) == bits(absent.dbeta)


def test_the_batch_feels_no_common_push(rng):
    """y is the same for x + c, so Σ dx = 0; and up to ε for c·x, so Σ dx·(x−μ) ≈ 0."""
    x, dy = rng.standard_normal((2, 60, 8))
    dx = bn.backward(dy, bn.train_forward(x, 3.0, eps=1e-12)[1]).dx
    np.testing.assert_allclose(dx.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose((dx * (x - x.mean(0))).sum(0), 0, atol=1e-9)


def test_sums_of_micro_batches_merge_to_the_whole(rng):
    x, dy = rng.standard_normal((2, 12, 3, 8))
    merged = bn.moments(x[:5]).merge(bn.moments(x[5:]))
    caches = [bn.normalize(p, merged, 2.0)[1] for p in (x[:5], x[5:])]
    sums = bn.gradient_sums(dy[:5], caches[0]).merge(bn.gradient_sums(dy[5:], caches[1]))
    dx = np.concatenate(
        [bn.gradient_apply(d, c, sums) for d, c in zip((dy[:5], dy[5:]), caches, strict=True)]
    )
    whole = bn.backward(dy, bn.train_forward(x, 2.0)[1])
    assert (sums.count == 12 * 8).all()
    np.testing.assert_allclose(sums.dgamma, whole.dgamma, rtol=1e-13)
    np.testing.assert_allclose(sums.dbeta, whole.dbeta, rtol=1e-13)
    np.testing.assert_allclose(dx, whole.dx, atol=1e-14)
    empty = bn.gradient_sums(dy[:0], bn.normalize(x[:0], merged, 2.0)[1])
    assert (empty.count == 0).all()
    assert sums.merge(empty) == sums == empty.merge(sums)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(9, 5), (3, 5, 7), (2, 17, 100), (40, 33)], ids=str)
def test_a_gradient_that_is_not_finite_changes_its_own_channel_only(rng, shape, dtype, bad):
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    spoilt = dy.copy()
    spoilt[(1, 2, *[3] * (len(shape) - 2))] = bad
    _, cache = bn.train_forward(x)
    for a, b in zip(bn.backward(dy, cache), bn.backward(spoilt, cache), strict=True):
        axis = 1 if a.ndim > 1 else 0
        assert not np.isfinite(np.take(b, 2, axis).astype(np.float64)).any()
        assert bits(np.delete(a, 2, axis)) == bits(np.delete(b, 2, axis))


class TestFourSlips:
    """Slips of widely copied notes on the paper: finite differences show each wrong, and ours right."""

    @pytest.fixture
    def p(self, rng):
        layout = Layout((6, 4))
        x, _, _, gamma, beta, loss, slope = problem(rng, layout)
        y, cache = bn.train_forward(x, gamma, beta, eps=0.1)
        f = oracle.forward(x, gamma, beta, 0.1)
        f.numeric = differences(lambda v: loss(bn.train_forward(v, gamma, beta, eps=0.1)[0]), x)
        f.ours = bn.backward(slope(y), cache).dx
        f.root = np.sqrt(f.sigma2 + f.eps)
        f.dxhat = oracle.long(slope(y)) * f.gamma
        f.dsigma2 = (f.dxhat * (f.x - f.mu)).sum(0) * -0.5 / f.root**3
        f.dmu = (-f.dxhat / f.root).sum(0) + f.dsigma2 * (-2 * (f.x - f.mu)).sum(0) / f.m
        f.dx = f.dxhat / f.root + f.dsigma2 * 2 * (f.x - f.mu) / f.m + f.dmu / f.m
        return f

    @staticmethod
    def far(wrong, right):
        return float(abs(np.asarray(wrong, np.float64) - right).max()) > 1e-2 * abs(right).max()

    def test_ours_is_right_and_so_are_the_six_derivatives(self, p):
        np.testing.assert_allclose(p.ours, p.numeric, atol=1e-8)
        np.testing.assert_allclose(np.asarray(p.dx, np.float64), p.numeric, atol=1e-8)

    def test_1_the_identity_takes_the_root_of_the_variance(self, rng):
        x = rng.standard_normal((50, 4)) * [0.1, 2, 3, 4] + [1, 2, 3, 4]
        m = bn.moments(x)
        np.testing.assert_allclose(bn.train_forward(x, np.sqrt(m.var + 1e-5), m.mean)[0], x, rtol=1e-12)
        assert self.far(bn.train_forward(x, m.var, m.mean)[0], x)

    def test_2_the_mean_takes_the_sign_of_its_derivative_once(self, p):
        """∂x̂/∂μ = −1/√(σ²+ε) already carries the minus; a second one turns the term over."""
        dmu = -(-p.dxhat / p.root).sum(0) + p.dsigma2 * (-2 * (p.x - p.mu)).sum(0) / p.m
        assert self.far(p.dxhat / p.root + p.dsigma2 * 2 * (p.x - p.mu) / p.m + dmu / p.m, p.numeric)

    def test_3_every_example_moves_the_statistics_of_all(self, p):
        """∂ℓ/∂x̂ᵢ alone times a bracket leaves out what the other examples feel."""
        by_sigma2 = -0.5 * (p.x - p.mu) / p.root**3 * 2 * (p.x - p.mu) / p.m
        by_mu = -1 / p.root / p.m
        assert self.far(p.dxhat * (1 / p.root + by_sigma2 + by_mu), p.numeric)

    def test_4_the_last_term_is_a_product(self, p):
        """∂μ/∂xᵢ = 1/m alone, without ∂x̂/∂μ before it, is not a derivative of the loss."""
        last = p.dxhat.sum(0) / p.m
        assert self.far(p.dxhat / p.root + p.dsigma2 * 2 * (p.x - p.mu) / p.m + last, p.numeric)


def test_the_halves_over_parts_are_the_whole():
    """README's second example: with moments and sums merged, the parts give the gradient of the whole."""
    rng = np.random.default_rng(5)
    x, dy = rng.normal(2.0, 1.5, (2, 10, 3))
    parts = slice(0, 4), slice(4, 10)
    whole = bn.moments(x[parts[0]]).merge(bn.moments(x[parts[1]]))
    caches = [bn.normalize(x[part], whole)[1] for part in parts]
    sums = [bn.gradient_sums(dy[part], cache) for part, cache in zip(parts, caches, strict=True)]
    total = sums[0].merge(sums[1])
    dx = np.concatenate(
        [bn.gradient_apply(dy[part], cache, total) for part, cache in zip(parts, caches, strict=True)]
    )
    wanted = bn.backward(dy, bn.train_forward(x)[1])
    np.testing.assert_allclose(dx, wanted.dx, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(total.dgamma, wanted.dgamma, rtol=1e-12, atol=1e-13)
    for cache, part in zip(caches, sums, strict=True):
        with pytest.raises(ValueError, match="sums are over"):
            bn.gradient_apply(x[:4] if len(cache.x) == 4 else x[4:], cache, part)


def test_gradients_are_a_tuple_of_three_that_keeps_dresidual(rng):
    """Through `_replace`, copies and pickling; and equality looks at it."""
    x, dy, residual = rng.normal(size=(3, 8, 4))
    _, cache = bn.train_forward(x, activation="relu", residual=residual)
    gradients = bn.backward(dy, cache, dresidual=np.empty_like(x))
    dx, dgamma, dbeta = gradients
    assert gradients.dresidual is not None
    again = [copy.copy(gradients), copy.deepcopy(gradients), pickle.loads(pickle.dumps(gradients))]
    again += [pickle.loads(pickle.dumps(gradients, protocol)) for protocol in range(6)]
    again += [gradients._replace(), bn.Gradients(dx, dgamma, dbeta, gradients.dresidual)]
    for other in again:
        assert type(other) is bn.Gradients
        assert len(other) == 3
        assert other == gradients
        assert other.dresidual.tobytes() == gradients.dresidual.tobytes()
    changed = gradients._replace(dx=dy)
    assert changed.dx is dy
    assert changed.dresidual is gradients.dresidual
    others = [changed, gradients._replace(dresidual=None), gradients._replace(dresidual=dx), (dx, dgamma)]
    assert all(other != gradients for other in others)
    assert bn.Gradients(dx, dgamma, dbeta) == bn.Gradients(dx.copy(), dgamma, dbeta)
    assert bn.Gradients._make((dx, dgamma, dbeta)).dresidual is None
    with pytest.raises(TypeError):
        hash(gradients)
