"""The demonstration of section 3.2: the convolution, and its bias before batch normalization."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import batchnorm as bn
from batchnorm.demo import convolution
from batchnorm.demo.convolution import Convolution, Reshape, convolutional_network

STEPS = 150


def plain_convolution(x, weight, bias, size, stride):
    """y by the definition, one element at a time; weights are in order of channel, row and column."""
    n, channels, height, width = x.shape
    kernel = weight.T.reshape(-1, channels, size, size)
    y = np.zeros((n, len(kernel), (height - size) // stride + 1, (width - size) // stride + 1))
    for example, o, i, j in np.ndindex(y.shape):
        window = x[example, :, i * stride : i * stride + size, j * stride : j * stride + size]
        y[example, o, i, j] = (kernel[o] * window).sum() + (0 if bias is None else bias[o])
    return y


def made(rng, *, size=3, stride=1, bias=True):
    """A convolution of two maps into three, in float64."""
    layer = Convolution(rng, 2, 3, size=size, stride=stride, bias=bias)
    layer.weight = layer.weight.astype(np.float64)
    if bias:
        layer.bias = rng.normal(size=3)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1), (2, 3)])
def test_forward_is_the_definition(size, stride, bias):
    rng = np.random.default_rng(0)
    layer, x = made(rng, size=size, stride=stride, bias=bias), rng.normal(size=(2, 2, 7, 6))
    expected = plain_convolution(x, layer.weight, layer.bias, size, stride)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1), (2, 3)])
def test_gradients_are_those_of_finite_differences(size, stride):
    rng = np.random.default_rng(1)
    layer, x = made(rng, size=size, stride=stride), rng.normal(size=(2, 2, 7, 6))
    dy = rng.normal(size=layer(x).shape)
    dx = layer.backward(dy)
    for array, gradient in (
        (x, dx),
        (layer.weight, layer.grad_weight.copy()),
        (layer.bias, layer.grad_bias.copy()),
    ):
        direction = rng.normal(size=array.shape)
        before = array.copy()
        losses = []
        for sign in (1, -1):
            array[...] = before + sign * 0.5 * direction  # y is linear in each, so any length will do
            losses.append((layer(x) * dy).sum())
        array[...] = before
        assert losses[0] - losses[1] == pytest.approx((gradient * direction).sum(), rel=1e-10)


def test_the_gradient_of_a_bias_before_batch_norm_is_zero_to_rounding():
    rng = np.random.default_rng(2)
    layer, norm, x = made(rng), bn.BatchNorm(3, dtype="float64"), rng.normal(size=(8, 2, 9, 9))
    y = norm(layer(x))
    dy = rng.normal(1, 1, y.shape)
    layer.backward(norm.backward(dy))
    terms = abs(norm.backward(dy)).sum((0, 2, 3))
    assert abs(layer.grad_bias / terms).max() < 1e-15
    layer.backward(dy)  # without batch norm
    assert (abs(layer.grad_bias) > 100).all()


def test_a_bias_before_batch_norm_changes_nothing():
    rng = np.random.default_rng(3)
    layer, norm, x = made(rng), bn.BatchNorm(3, dtype="float64"), rng.normal(size=(8, 2, 9, 9))
    y = norm(layer(x))
    layer.bias += 10
    np.testing.assert_allclose(norm(layer(x)), y, rtol=0, atol=1e-13)
    assert abs(layer(x)).max() > 5


def test_each_map_is_normalized_over_batch_and_positions():
    network = convolutional_network(normalized=True, bias=False)
    x = np.random.default_rng(4).random((60, 196), np.float32)
    network(x)
    assert [norm.channels for norm in network.norms] == [8, 16]
    counts = [norm._cache.cache.moments.count.tolist() for norm in network.norms]
    assert counts == [[60 * 12 * 12] * 8, [60 * 5 * 5] * 16]


def test_reshape_goes_back():
    layer, x = Reshape(2, 3), np.arange(24.0).reshape(4, 6)
    assert layer(x).shape == (4, 2, 3)
    assert np.array_equal(layer.backward(layer(x)), x)


@pytest.fixture(scope="module")
def watched():
    digits = convolution.load_small_mnist()
    with threadpool_limits(1, user_api="blas"):
        return {
            name: convolution.watch(
                digits, normalized=normalized, bias=bias, steps=STEPS, advance=lambda _: None
            )
            for name, (normalized, bias) in convolution.NETWORKS.items()
        }


def test_the_network_learns(watched):
    plain, normalized, _ = watched.values()
    assert len(normalized.run.accuracy) == STEPS // convolution.EVERY
    assert normalized.run.accuracy[-1] > 0.8
    assert plain.run.accuracy[-1] > 0.3  # a tenth would be by chance


def test_biases_do_not_move_before_batch_norm(watched):
    plain, without, with_biases = watched.values()
    assert without.share == []
    assert without.bias == 0
    assert max(with_biases.share) < 1e-5
    assert with_biases.bias < 1e-5
    assert min(plain.share) > 0.01
    assert plain.bias > 0.01
    assert abs(np.subtract(with_biases.run.accuracy, without.run.accuracy)).max() < 0.02


def test_the_demonstration(tmp_path):
    folder = tmp_path / "new" / "folder"
    convolution.main(folder, steps=50)
    assert {path.name for path in folder.iterdir()} == {"convolution.png", "report.md"}
    assert (folder / "convolution.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = (folder / "report.md").read_text("utf-8")
    assert "| with it and biases |" in report
    assert "| 50 |" in report
