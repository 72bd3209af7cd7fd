"""Whitening's forward pass: its accuracy, its methods by their definitions, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf

import batchnorm as bn
import cases
import oracle
import whitening_oracle as theory

EXACT = ("zca", "pca", "cholesky")
WIDE = cases.DTYPES[:2]
CONDITIONS = (1, 1e2, 1e4, 1e6)
LAYOUTS = (
    cases.Layout((40, 6)),
    cases.Layout((5, 6, 8)),
    cases.Layout((4, 6, 3, 5)),
    cases.Layout((4, 5, 3, 6), channel_axis=-1),
    cases.Layout((4, 6, 3, 5), memory=cases.NHWC_AS_NCHW),
)


def bound(dtype, condition, size):
    """How far the covariance of the output may be from what it should be."""
    return 1e-6 if dtype == np.float32 else max(1e-12, 1e-16 * condition * np.sqrt(size))


def distance(y, wanted, groups=1, axis=1):
    """The largest entry of |Cov(y) − wanted|, Cov(y) with 1/m and in extended precision."""
    return float(abs(theory.covariance(y, groups, axis) - wanted).max())


def lay(x, layout):
    """Rows (m, channels) as a tensor of this layout."""
    return layout.lay(theory.unrows(x, np.empty(layout.shape), layout.channel_axis).astype(x.dtype))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("size", [1, 2, 12, 64])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_the_output_is_white(rng, dtype, method, size, condition):
    spectrum = np.geomspace(1, 1 / condition, size)
    x = theory.with_spectrum(rng, 4 * size + 3, spectrum, 0.5).astype(dtype)
    y, _ = bn.whiten_forward(x, method=method, eps=0)
    assert y.dtype == dtype
    assert distance(y, np.eye(size)) <= bound(dtype, condition, size)
    assert abs(theory.rows(y).mean(0)).max() < (1e-6 if dtype == np.float32 else 1e-12 * condition**0.5)


@pytest.mark.parametrize("eps", [1e-5, 0.1, 10.0])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_with_eps_the_output_has_covariance_i_minus_eps_w_wt(rng, dtype, method, eps):
    x = theory.with_spectrum(rng, 50, np.geomspace(3, 1e-3, 12), 0.5).astype(dtype)
    y, cache = bn.whiten_forward(x, method=method, eps=eps)
    W = oracle.long(cache.matrix[0])
    assert distance(y, np.eye(12) - oracle.LONG(eps) * W @ W.T) <= bound(dtype, 3e3, 12)
    assert distance(y, np.eye(12)) > 1e-4  # so it is not white


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_and_groups(rng, layout, method, groups, dtype):
    """All dtypes against the oracle; γ and β come after W."""
    m = np.prod(layout.shape) // 6
    x = lay(theory.with_spectrum(rng, m, [6, 5, 4, 3, 2, 1], 2.0), layout).astype(dtype)
    gamma, beta = rng.normal(1, 0.5, 6), rng.normal(0, 2, 6)
    options = {"method": method, "groups": groups, "eps": 1e-3, "channel_axis": layout.channel_axis}
    y, cache = bn.whiten_forward(x, gamma, beta, **options)
    f = theory.forward(x, gamma, beta, **options)
    size = np.maximum(abs(f.y), 8)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert cases.strides(y) == cases.strides(x)
    assert (abs(y.astype(np.float64) - f.y) <= oracle.ulp(size, dtype) + 1e-12).all()
    assert cache.matrix.shape == (groups, 6 // groups, 6 // groups)
    np.testing.assert_allclose(cache.matrix, f.W, atol=1e-12)
    wanted = bn.comoments(x, groups=groups, channel_axis=layout.channel_axis)
    assert cache.comoments == wanted
    assert cache.x is x
    out = np.empty_like(x)
    assert bn.whiten_forward(x, gamma, beta, out=out, **options)[0] is out
    assert cases.bits(out) == cases.bits(y)


@given(
    st.integers(1, 20),
    st.integers(0, 60),
    st.sampled_from(EXACT),
    st.floats(0, 3),
    st.floats(-100, 100),
    st.integers(0, 2**32 - 1),
)
def test_any_full_rank_batch_is_whitened(size, more, method, decades, mean, seed):
    rng = np.random.default_rng(seed)
    x = theory.with_spectrum(rng, size + 1 + more, 10.0 ** rng.uniform(-decades, 0, size), mean)
    y, _ = bn.whiten_forward(x, method=method, eps=0)
    lost = 1e-15 * (mean**2 + 1) * 10**decades  # of x itself, by its mean
    assert distance(y, np.eye(size)) <= bound(np.float64, 10**decades, size) + lost


class TestMethods:
    """W by what defines it, for a Λ with a spectrum far from flat."""

    @pytest.fixture
    def A(self, rng):  # noqa: N802
        x = theory.with_spectrum(rng, 40, np.geomspace(5, 0.01, 9))
        return x.T @ x / 40

    def matrix(self, A, method, **options):
        W = bn.whitening_matrix(A[None], method=method, **options)
        assert (W.shape, W.dtype) == ((1, *A.shape), np.float64)
        return W[0]

    def test_zca_is_symmetric_and_positive_definite(self, A):
        W = self.matrix(A, "zca")
        np.testing.assert_allclose(W, W.T, atol=1e-14 * abs(W).max())
        assert np.linalg.eigvalsh(W).min() > 0
        np.testing.assert_allclose(W @ A @ W, np.eye(9), atol=1e-12)

    def test_pca_has_eigenvalues_descending_and_each_largest_entry_positive(self, A):
        W = self.matrix(A, "pca")
        lam = 1 / (W**2).sum(1)
        np.testing.assert_allclose(lam, np.geomspace(5, 0.01, 9), rtol=1e-12)
        np.testing.assert_allclose(W @ A, lam[:, None] * W, atol=1e-12)
        largest = np.argmax(abs(W), axis=1)
        assert (W[np.arange(9), largest] > 0).all()

    def test_pca_takes_the_first_of_equally_large_entries(self):
        """The eigenvectors of this Λ are (1, −1)/√2 and (1, 1)/√2."""
        W = self.matrix(np.array([[2.0, -1.0], [-1.0, 2.0]]), "pca")
        np.testing.assert_allclose(W, [[6**-0.5, -(6**-0.5)], [2**-0.5, 2**-0.5]], rtol=1e-14)

    def test_cholesky_is_lower_triangular_with_positive_diagonal(self, A):
        W = self.matrix(A, "cholesky")
        assert (np.tril(W) == W).all()
        assert (np.diagonal(W) > 0).all()
        np.testing.assert_allclose(W, np.linalg.inv(np.linalg.cholesky(A)), rtol=1e-10, atol=1e-11)

    def test_iterative_is_newton_schulz(self, A):
        for steps in (1, 5, 9, 14):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                W = self.matrix(A, "iterative", steps=steps)
            np.testing.assert_allclose(W, theory.whitening(A, "iterative", steps), rtol=1e-9, atol=1e-11)

    def test_iterative_tends_to_zca(self, A):
        W = self.matrix(A, "iterative", steps=25)
        np.testing.assert_allclose(W, self.matrix(A, "zca"), atol=1e-9)

    def test_eps_is_added_to_the_diagonal(self, A):
        for method in EXACT:
            W = self.matrix(A, method, eps=0.5)
            np.testing.assert_allclose(W, self.matrix(A + 0.5 * np.eye(9), method), atol=1e-13)


# By dimension and condition: the steps that bring the residual below 1e-3, and what is left after them.
ENOUGH = {
    (2, 6): (5, 4.0e-4),
    (12, 6): (7, 3.5e-4),
    (12, 100): (10, 4.1e-5),
    (64, 6): (9, 1.5e-4),
    (64, 100): (12, 5.1e-6),
}


class TestIterative:
    """The error of the iteration by steps, dimension and condition."""

    def x(self, size, condition):
        rng = np.random.default_rng(7)
        return theory.with_spectrum(rng, 4 * size, np.geomspace(condition, 1, size))

    @pytest.mark.parametrize(("size", "condition"), ENOUGH)
    def test_residual_by_steps_dimension_and_condition(self, size, condition):
        """The trace-normalized matrix starts near 1/D: the larger D and the condition, the more steps."""
        x = self.x(size, condition)
        A = x.T @ x / len(x)
        steps, left = ENOUGH[size, condition]
        residuals: list[float] = []
        for n in range(1, steps + 4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y, cache = bn.whiten_forward(x, method="iterative", steps=n, eps=0)
            assert cache.steps == n
            # The residual is what the batch sees, and what theory says.
            assert abs(cache.residual - distance(y, np.eye(size))) < 1e-12
            wanted = theory.residual(theory.whitening(A, "iterative", n), A)
            np.testing.assert_allclose(cache.residual, wanted, rtol=1e-6, atol=1e-12)
            residuals.append(cache.residual)
        assert residuals[:steps] == sorted(residuals[:steps], reverse=True)
        assert residuals[steps - 2] > 1e-3  # one step fewer does not do
        assert residuals[steps - 1] < 1.1 * left
        assert residuals[-1] < 1e-13  # three more do all

    @pytest.mark.parametrize(("steps", "error"), [(7, 3.6e-4), (10, 1.5e-12)])
    def test_twelve_dimensions_of_condition_six(self, steps, error):
        _, cache = bn.whiten_forward(self.x(12, 6), method="iterative", steps=steps, eps=0)
        assert cache.residual <= error

    def test_a_large_residual_warns(self):
        x = self.x(12, 6)
        with pytest.warns(UserWarning, match="steps: too few to whiten"):
            bn.whiten_forward(x, method="iterative", steps=6)
        with pytest.warns(UserWarning, match="steps: too few to whiten"):
            bn.whitening_matrix(bn.comoments(x).cov, method="iterative", steps=6)

    def test_steps_are_chosen_from_dimension_and_condition(self):
        """And no warning comes of them."""
        chosen = {}
        for size in (2, 12, 64):
            for condition in (1, 100, 1e4):
                y, cache = bn.whiten_forward(self.x(size, condition), method="iterative", eps=0)
                assert distance(y, np.eye(size)) <= cache.residual + 1e-9
                assert cache.residual <= 1e-3
                chosen[size, condition] = cache.steps
        assert chosen[2, 1] < chosen[12, 1] < chosen[64, 1]
        assert chosen[12, 1] < chosen[12, 100] < chosen[12, 1e4]


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("method", theory.METHODS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_batch_norm_is_the_diagonal_case(rng, layout, method, eps):
    """With one channel a group, Λ is the variance and W = 1/√(σ² + ε): y and gradients are batch norm's."""
    x, dy = layout.normal(rng, np.float64, 3.0, 2.0), layout.normal(rng, np.float64)
    gamma, beta = rng.normal(1, 0.5, 6), rng.normal(0, 2, 6)
    axis = {"channel_axis": layout.channel_axis}
    y, cache = bn.whiten_forward(x, gamma, beta, method=method, groups=6, eps=eps, **axis)
    wanted, batch = bn.train_forward(x, gamma, beta, eps=eps, **axis)
    np.testing.assert_allclose(y, wanted, atol=1e-13)
    for ours, theirs in zip(bn.whiten_backward(dy, cache), bn.backward(dy, batch), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    np.testing.assert_allclose(cache.matrix.ravel(), batch.invstd, rtol=1e-13)


class TestLedoitWolf:
    @pytest.mark.parametrize("size", [1, 2, 5, 40])
    @pytest.mark.parametrize("m", [3, 12, 200])
    def test_it_is_that_of_scikit_learn(self, rng, m, size):
        x = rng.standard_normal((m, size)) * np.geomspace(1, 5, size) + 3
        shrunk, delta = ledoit_wolf(x)
        assert size == 1 or 0 < delta <= 1
        for method in EXACT:
            y, cache = bn.whiten_forward(x, method=method, eps=0, shrinkage="ledoit-wolf")
            W = cache.matrix[0]
            np.testing.assert_allclose(W @ shrunk @ W.T, np.eye(size), atol=1e-10)
            np.testing.assert_allclose(cache.shrinkage, [delta if size > 1 else 0.0], rtol=1e-9)
            np.testing.assert_allclose(y, (x - x.mean(0)) @ W.T, atol=1e-11)
            # What is kept of the batch is not shrunk.
            np.testing.assert_allclose(cache.comoments.cov[0], np.cov(x.T, ddof=0).reshape(size, size))

    def test_each_group_has_its_own(self, rng):
        x = rng.standard_normal((9, 6)) * [1, 2, 3, 1, 1, 1]
        _, cache = bn.whiten_forward(x, groups=2, eps=0, shrinkage="ledoit-wolf")
        for k, part in enumerate((x[:, :3], x[:, 3:])):
            W = cache.matrix[k]
            np.testing.assert_allclose(W @ ledoit_wolf(part)[0] @ W.T, np.eye(3), atol=1e-12)

    def test_it_suits_fewer_rows_than_channels(self, rng):
        x = rng.standard_normal((8, 20)) + 1
        y, cache = bn.whiten_forward(x, eps=0, shrinkage="ledoit-wolf")
        W = cache.matrix[0]
        assert np.isfinite(y).all()
        np.testing.assert_allclose(W @ ledoit_wolf(x)[0] @ W.T, np.eye(20), atol=1e-12)


def thin(rng):
    return rng.standard_normal((8, 12))


def constant_channel(rng):
    x = rng.standard_normal((50, 5))
    x[:, 2] = 3.25
    return x


def dependent(rng):
    x = rng.standard_normal((50, 5))
    x[:, 4] = x[:, 0] - 2 * x[:, 1]
    return x


def constant(rng):
    return np.full((50, 5), 3.25)


SINGULAR = {f.__name__: f for f in (thin, constant_channel, dependent, constant)}


@pytest.mark.parametrize("method", theory.METHODS)
@pytest.mark.parametrize("name", SINGULAR)
class TestSingular:
    """A Λ without an inverse is an error with ε = 0, and whitened as far as it goes with ε > 0."""

    def test_without_eps_it_is_an_error(self, rng, name, method):
        with pytest.raises(ValueError, match=r"singular|did not converge"):
            bn.whiten_forward(SINGULAR[name](rng), method=method, eps=0)

    def test_with_eps_it_is_whitened_as_far_as_it_goes(self, rng, name, method):
        x, eps = SINGULAR[name](rng), 1e-3
        y, cache = bn.whiten_forward(x, method=method, eps=eps)
        W = cache.matrix[0]
        assert distance(y, np.eye(len(W)) - eps * W @ W.T) <= (1e-10 if method in EXACT else 1e-3)
        dx = bn.whiten_backward(rng.standard_normal(x.shape), cache).dx if method != "pca" else y
        assert np.isfinite(dx).all()


@pytest.mark.parametrize("method", theory.METHODS)
def test_a_constant_batch_gives_exactly_beta(rng, method):
    beta = rng.normal(0, 2, 5)
    y, _ = bn.whiten_forward(constant(rng), np.ones(5), beta, method=method)
    assert (y == beta).all()


@pytest.mark.parametrize("method", EXACT)
def test_a_condition_of_1e12_is_whitened_to_what_float64_holds_of_it(rng, method):
    x = theory.with_spectrum(rng, 60, np.geomspace(1, 1e-12, 12))
    y, _ = bn.whiten_forward(x, method=method, eps=0)
    assert distance(y, np.eye(12)) <= 1e-16 * 1e12 * np.sqrt(12)


@pytest.mark.parametrize("method", theory.METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("eps", [0, 1e-3])
def test_values_that_are_not_finite_are_refused(rng, method, value, eps):
    x = rng.standard_normal((50, 5))
    x[7, 3] = value
    for shrinkage in (None, "ledoit-wolf"):
        with pytest.raises(ValueError, match="wanted a finite number"):
            bn.whiten_forward(x, method=method, eps=eps, shrinkage=shrinkage)
    with pytest.raises(ValueError, match="wanted a finite number"):
        bn.whitening_matrix(bn.comoments(x).cov, method=method, eps=eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "svd"}, 'method is "svd"; wanted'),
        ({"groups": 4}, "groups is 4; wanted a divisor"),
        ({"groups": 0}, "groups is 0; wanted a divisor"),
        ({"eps": -1e-9}, "eps is"),
        ({"eps": np.nan}, "eps is"),
        ({"eps": np.inf}, "eps is"),
        ({"steps": 5}, "steps is 5 for method"),
        ({"method": "iterative", "steps": 0}, "steps is 0 for method"),
        ({"method": "iterative", "steps": 101}, "steps is 101 for method"),
        ({"shrinkage": "oas"}, 'shrinkage is "oas"; wanted None or "ledoit-wolf"'),
        ({"x": np.ones((1, 6))}, "x has shape .*, 1 value in each channel; .* wants 2 or more"),
        ({"x": np.ones((0, 6))}, "x has shape .*, 0 values in each channel"),
        ({"gamma": np.ones(5)}, "gamma"),
        ({"beta": [np.nan] * 5}, "beta"),
    ],
)
def test_refused_arguments(rng, change, message):
    arguments = {"x": rng.standard_normal((20, 6))} | change
    with pytest.raises(ValueError, match=message):
        bn.whiten_forward(arguments.pop("x"), **arguments)
