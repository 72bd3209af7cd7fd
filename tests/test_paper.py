"""What the paper says of its formulas, in the order of its sections; `docs/paper.md` has all of it."""

from __future__ import annotations

import numpy as np
import pytest

import batchnorm as bn
from cases import bits

EPS = 0.1


def test_section_2_the_derivative_by_the_batch_is_more_than_that_by_x(rng):
    """∂y_i/∂x_j has a part by the first argument of Norm(x, X), for i = j, and one by the batch X."""
    x, gamma, m = rng.normal(3.0, 2.0, (7, 1)), 1.5, 7
    y, cache = bn.train_forward(x, gamma, eps=EPS)
    mean, var, xhat, scale = cache.moments.mean, cache.moments.var, y / gamma, gamma * cache.invstd

    by_both = np.hstack([bn.backward(dy[:, None], cache).dx for dy in np.eye(m)]).T
    by_x = [bn.infer_backward(dy[:, None], x, mean, var, gamma, eps=EPS).dx for dy in np.eye(m)]
    np.testing.assert_allclose(np.hstack(by_x), scale * np.eye(m), rtol=1e-14)
    by_batch = -scale / m * (1 + xhat * xhat.T)
    np.testing.assert_allclose(by_both, scale * np.eye(m) + by_batch, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("m", [2, 3, 50])
def test_section_3_the_batch_has_mean_zero_and_variance_one_but_for_eps(rng, m):
    x = rng.normal(3.0, 2.0, (m, 4))
    xhat, cache = bn.train_forward(x, eps=EPS)
    var = cache.moments.var
    np.testing.assert_allclose(xhat.mean(0), 0, atol=1e-14)
    np.testing.assert_allclose((xhat**2).mean(0), var / (var + EPS), rtol=1e-13)


def test_section_3_normalized_channels_stay_correlated(rng):
    mixed = rng.standard_normal((100, 3)) @ rng.standard_normal((3, 3))
    y = bn.train_forward(mixed, eps=1e-12)[0]
    correlation = np.corrcoef(mixed.T)
    assert abs(np.triu(correlation, 1)).max() > 0.5
    np.testing.assert_allclose(y.T @ y / 100, correlation, atol=1e-11)


@pytest.mark.parametrize("a", [0.25, 3.0, 1000.0])
def test_section_3_3_the_scale_of_the_weights_does_not_matter(rng, a):
    """BN((aW)u) = BN(Wu), the derivatives by u are the same, and those by aW are 1/a of those by W."""
    u, w, dy = (rng.standard_normal(shape) for shape in ((60, 5), (5, 4), (60, 4)))

    def run(weight, eps):
        y, cache = bn.train_forward(u @ weight, 2.0, 0.5, eps=eps)
        dx = bn.backward(dy, cache).dx
        return y, dx @ weight.T, u.T @ dx

    # The paper leaves ε out. With it, both are equal if ε is scaled as the variance is.
    (y, du, dw), (scaled_y, scaled_du, scaled_dw) = run(w, EPS), run(a * w, a**2 * EPS)
    np.testing.assert_allclose(scaled_y, y, atol=1e-12)
    np.testing.assert_allclose(scaled_du, du, atol=1e-12)
    np.testing.assert_allclose(scaled_dw, dw / a, atol=1e-12 / a)


def test_section_3_4_an_output_depends_on_the_rest_of_the_batch_in_training_only(rng, dtype):
    x = rng.standard_normal((20, 4)).astype(dtype)
    one, batches = x[:1], [np.concatenate([x[:1], others]) for others in np.split(x[2:], 3)]
    layer = bn.BatchNorm(4, dtype=np.float64 if dtype == np.float64 else np.float32)
    trained = [layer(batch)[:1] for batch in batches]
    assert len({bits(y) for y in trained}) == 3
    frozen = layer.freeze()
    assert {bits(frozen(batch)[:1]) for batch in batches} == {bits(frozen(one))}
