"""Whitening's gradients: by finite differences, against the oracle, and where they do not exist."""

from __future__ import annotations

import numpy as np
import pytest

import batchnorm as bn
import cases
import whitening_oracle as theory

LAYOUTS = (
    cases.Layout((11, 4)),
    cases.Layout((2, 4, 3, 2)),
    cases.Layout((3, 4, 4), channel_axis=1, memory=(0, 2, 1)),
    cases.Layout((2, 3, 2, 4), channel_axis=-1),
)
TOLERANCE = 1e-6


def differences(loss, array, h=1e-3):
    """∂loss/∂array by central differences of the fourth order; `loss` reads `array`, which is put back."""
    gradient = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        kept, at = array[index], {}
        for step in (-2, -1, 1, 2):
            array[index] = kept + step * h
            at[step] = loss()
        array[index] = kept
        gradient[index] = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    return gradient


def check(x, dy, gamma, beta, h=1e-3, **options):
    """dx, dγ and dβ of ℓ = Σ dy·y against finite differences of our own forward pass."""
    _, cache = bn.whiten_forward(x, gamma, beta, **options)
    if options.get("method") == "iterative":  # the number of steps is a constant; one dimension needs none
        options["steps"] = cache.steps or 1

    def loss():
        return (dy * bn.whiten_forward(x, gamma, beta, **options)[0]).sum()

    gradients = bn.whiten_backward(dy, cache)
    assert gradients.dx.shape == x.shape
    assert cases.strides(gradients.dx) == cases.strides(x)
    for array, ours in zip((x, gamma, beta), gradients, strict=True):
        wanted = differences(loss, array, h)
        assert abs(ours - wanted).max() < TOLERANCE * max(1, abs(wanted).max())
    return gradients


def tensors(rng, layout, spectrum):
    """x with this spectrum, dy, γ and β."""
    m = np.prod(layout.shape) // layout.channels
    like = np.empty(layout.shape)
    x = theory.unrows(theory.with_spectrum(rng, m, spectrum, 1.0), like, layout.channel_axis)
    channels = layout.channels
    return (
        layout.lay(x),
        layout.normal(rng, np.float64),
        rng.normal(1, 0.5, channels),
        rng.normal(0, 2, channels),
    )


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("method", theory.METHODS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_finite_differences(rng, layout, method, groups, eps):
    check(
        *tensors(rng, layout, [3, 2, 1.2, 0.7]),
        method=method,
        groups=groups,
        eps=eps,
        channel_axis=layout.channel_axis,
    )


@pytest.mark.parametrize("spectrum", [[2, 2, 2, 2], [3, 3, 1, 1], [3, 1, 1, 1], [2, 2 + 1e-9, 1, 1 - 1e-12]])
@pytest.mark.parametrize("method", ["zca", "cholesky", "iterative"])
def test_repeated_eigenvalues(rng, method, spectrum):
    """No division by differences of eigenvalues: these W are smooth where eigenvalues meet."""
    gradients = check(*tensors(rng, LAYOUTS[0], spectrum), method=method, eps=0.0)
    assert abs(gradients.dx).max() > 0.1


@pytest.mark.parametrize("ratio", [1.05, 1.1, 2.0])
@pytest.mark.parametrize("size", [2, 6])
def test_pca_on_spectra_with_gaps(rng, ratio, size):
    layout = cases.Layout((3 * size, size))
    spectrum = ratio ** -np.arange(size)
    # A step that moves the eigenvectors little, although their eigenvalues are near.
    check(*tensors(rng, layout, spectrum), method="pca", eps=0.0, h=2e-4)


@pytest.mark.parametrize(("gap", "refused"), [(1e-7, False), (1e-9, True), (0.0, True)])
def test_pca_has_no_derivative_where_eigenvalues_meet(gap, refused):
    """A relative gap below 1e-8 is an error that names the pair; forward, and other methods, go on."""
    u = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0
    roots = np.sqrt([4.0, 2.0 * (1 + gap), 2.0, 0.5])
    x = np.concatenate([u * roots, -u * roots])
    x = np.concatenate([x @ np.eye(4), 0 * x])  # the mean is 0, and Λ is diagonal
    y, cache = bn.whiten_forward(x, method="pca", eps=0)
    assert np.isfinite(y).all()
    dy = np.random.default_rng(0).standard_normal(x.shape)
    if refused:
        with pytest.raises(ValueError, match="components 1 and 2 of group 0"):
            bn.whiten_backward(dy, cache)
    else:
        assert np.isfinite(bn.whiten_backward(dy, cache).dx).all()
    for method in ("zca", "cholesky", "iterative"):
        _, cache = bn.whiten_forward(x, method=method, eps=0)
        assert np.isfinite(bn.whiten_backward(dy, cache).dx).all()


def test_pca_compares_eigenvalues_of_one_group_only(rng):
    """Two groups with the same spectrum have no pair that meets."""
    x = theory.with_spectrum(rng, 20, [2.0, 1.0])
    _, cache = bn.whiten_forward(np.concatenate([x, x], axis=1), method="pca", groups=2, eps=0)
    assert np.isfinite(bn.whiten_backward(rng.standard_normal((20, 4)), cache).dx).all()
    x = np.concatenate([x, theory.with_spectrum(rng, 20, [1.0, 1.0])], axis=1)
    _, cache = bn.whiten_forward(x, method="pca", groups=2, eps=0)
    with pytest.raises(ValueError, match="components 0 and 1 of group 1"):
        bn.whiten_backward(rng.standard_normal((20, 4)), cache)


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", theory.METHODS)
def test_finite_differences_through_the_shrinkage(rng, method, groups, eps):
    """δ depends on the batch too; these batches have one between 0 and 1, at neither end."""
    x = rng.standard_normal((30, 4)) * [3, 1.5, 3, 1] + 1
    options = {"groups": groups, "eps": eps, "shrinkage": "ledoit-wolf"}
    f = theory.forward(x, method="zca", **options)
    assert all(0.01 < part.delta < 0.99 for part in f.parts)
    dy, gamma, beta = rng.standard_normal(x.shape), rng.normal(1, 0.5, 4), rng.normal(0, 2, 4)
    check(x, dy, gamma, beta, method=method, **options)


@pytest.mark.parametrize("method", ["zca", "cholesky", "iterative"])
def test_finite_differences_where_the_shrinkage_is_whole(rng, method):
    """Where δ = 1, Λ' is a multiple of I, and only the trace passes a gradient to it."""
    x = theory.with_spectrum(rng, 11, [1.02, 1.0, 1.0, 0.97], 1.0)
    options = {"eps": 0.0, "shrinkage": "ledoit-wolf"}
    assert theory.forward(x, method="zca", **options).parts[0].delta == 1
    dy, gamma, beta = rng.standard_normal(x.shape), rng.normal(1, 0.5, 4), rng.normal(0, 2, 4)
    check(x, dy, gamma, beta, method=method, **options)


@pytest.mark.parametrize("shrinkage", [None, "ledoit-wolf"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("method", theory.METHODS)
def test_every_dtype_against_the_oracle(rng, dtype, method, groups, shrinkage):
    layout = cases.Layout((7, 12, 3, 5))
    spectrum = 1.3 ** -np.arange(12.0)
    x, dy, gamma, beta = tensors(rng, layout, spectrum)
    x, dy = x.astype(dtype), dy.astype(dtype)
    options = {"method": method, "groups": groups, "eps": 1e-3, "shrinkage": shrinkage}
    _, cache = bn.whiten_forward(x, gamma, beta, **options)
    f = theory.forward(x, gamma, beta, steps=cache.steps, **options)
    ours = bn.whiten_backward(dy, cache)
    assert (ours.dx.dtype, ours.dgamma.dtype, ours.dbeta.dtype) == (dtype, np.float64, np.float64)
    unit = {"float64": 1e-15, "float32": 1e-7, "float16": 1e-3, "bfloat16": 1e-2}[dtype.name]
    wanted = theory.backward(dy, f)
    scale = [abs(a).max() for a in wanted]
    assert abs(ours.dx.astype(np.float64) - wanted[0]).max() <= (unit + 1e-11) * scale[0]
    for a, b, s in zip(ours[1:], wanted[1:], scale[1:], strict=True):
        assert abs(a - b).max() <= 1e-11 * s


def test_without_gamma_and_beta(rng):
    x, dy = rng.standard_normal((2, 20, 4))
    plain = bn.whiten_backward(dy, bn.whiten_forward(x)[1])
    ones = bn.whiten_backward(dy, bn.whiten_forward(x, np.ones(4), np.zeros(4))[1])
    for a, b in zip(plain, ones, strict=True):
        assert cases.bits(a) == cases.bits(b)


@pytest.mark.parametrize("method", theory.METHODS)
def test_what_whitening_takes_out_gets_no_gradient(rng, method):
    """A shift of x, and with ε = 0 its scale, change nothing; for zca's relatives no linear map of x does."""
    x, dy, gamma, beta = tensors(rng, LAYOUTS[0], [3, 2, 1.2, 0.7])
    _, cache = bn.whiten_forward(x, gamma, beta, method=method, eps=0.0)
    dx = bn.whiten_backward(dy, cache).dx
    assert abs(dx).max() > 0.1
    np.testing.assert_allclose(dx.sum(0), 0, atol=1e-12)
    assert abs((dx * (x - x.mean(0))).sum()) < 1e-10


def test_out(rng):
    """It may share memory with nothing that is read: every value of dx needs all channels of dy and x."""
    x, dy = rng.standard_normal((2, 20, 4)).astype(np.float32)
    _, cache = bn.whiten_forward(x)
    wanted = bn.whiten_backward(dy, cache).dx
    out = np.empty_like(dy)
    assert bn.whiten_backward(dy, cache, out=out).dx is out
    assert cases.bits(out) == cases.bits(wanted)
    for shared in (x, dy):
        with pytest.raises(ValueError, match="out"):
            bn.whiten_backward(dy, cache, out=shared)


@pytest.mark.parametrize(
    ("dy", "error"),
    [
        (np.ones((20, 5)), ValueError),
        (np.ones((10, 4)), ValueError),
        (np.ones((20, 4), np.float32), TypeError),
    ],
)
def test_refused_gradients(rng, dy, error):
    _, cache = bn.whiten_forward(rng.standard_normal((20, 4)))
    with pytest.raises(error, match="dy"):
        bn.whiten_backward(dy, cache)


@pytest.mark.parametrize("scale", [1e-140, 1e140])
@pytest.mark.parametrize("method", theory.METHODS)
def test_values_far_from_one(rng, method, scale):
    """Whitening undoes a scale of x, so that dx is divided by it."""
    x, dy, gamma, beta = tensors(rng, LAYOUTS[0], [3, 2, 1.2, 0.7])
    wanted = bn.whiten_backward(dy, bn.whiten_forward(x, gamma, beta, method=method, eps=0)[1])
    ours = bn.whiten_backward(dy, bn.whiten_forward(scale * x, gamma, beta, method=method, eps=0)[1])
    np.testing.assert_allclose(scale * ours.dx, wanted.dx, atol=1e-12)
    np.testing.assert_allclose(ours.dgamma, wanted.dgamma, atol=1e-12)
