"""BatchNorm: its modes and gradients, and that a call that raises changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

import batchnorm as bn
import cases
from test_golden_torch import TOLERANCE, case  # noqa: F401  (the fixture)

LAYOUTS = [
    cases.Layout((6, 5)),
    cases.Layout((3, 5, 7)),
    cases.Layout((2, 5, 3, 4)),
    cases.Layout((3, 4, 5), channel_axis=-1),
    cases.Layout((2, 5, 3, 4), memory=cases.NHWC_AS_NCHW),
]


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


def layer_for(x, layout, rng=None, **options):
    wide = "float64" if x.dtype == np.float64 else "float32"
    layer = bn.BatchNorm(layout.channels, dtype=wide, channel_axis=layout.channel_axis, **options)
    if rng is not None:
        layer.gamma, layer.beta = rng.normal(1, 0.5, layout.channels), rng.normal(0, 2, layout.channels)
    return layer


def same(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert cases.bits(a) == cases.bits(b)


def snapshot(layer):
    """All that a call that raises must not change, as bytes."""
    grads = (layer.grad_gamma, layer.grad_beta)
    state = {name: array.tobytes() for name, array in layer.state_dict().items()}
    return state, layer.training, [None if g is None else g.tobytes() for g in grads]


def test_train_mode_is_the_core_and_feeds_the_population(rng, layout, dtype):
    x, dy = layout.normal(rng, dtype, 3.0, 2.0), layout.normal(rng, dtype)
    layer = layer_for(x, layout, rng, population=bn.MovingAverage(update_weight=1))
    y, cache = bn.train_forward(x, layer.gamma, layer.beta, channel_axis=layout.channel_axis)
    same(layer(x), y)
    same(layer.population.mean, cache.moments.mean)
    same(layer.population.var, cache.moments.var_unbiased)
    dx, dgamma, dbeta = bn.backward(dy, cache)
    same(layer.backward(dy), dx)
    same(layer.grad_gamma, dgamma.astype(layer.dtype))
    same(layer.grad_beta, dbeta.astype(layer.dtype))


def test_eval_mode_is_the_frozen_layer(rng, layout, dtype):
    x, dy = layout.normal(rng, dtype, 3.0, 2.0), layout.normal(rng, dtype)
    layer = layer_for(x, layout, rng, eps=1.2345e-3)
    layer(x)
    before = snapshot(layer)[0]
    frozen = layer.freeze()
    assert frozen.dtype == layer.dtype
    assert layer.eval() is layer
    same(layer(x), frozen(x))
    dx, dgamma, dbeta = frozen.backward(dy, x)
    same(layer.backward(dy), dx)
    same(layer.grad_gamma, dgamma.astype(layer.dtype))
    same(layer.grad_beta, dbeta.astype(layer.dtype))
    assert snapshot(layer)[0] == before  # eval mode takes nothing in
    assert layer.train() is layer
    layer(x)
    assert snapshot(layer)[0] != before


def test_eval_mode_follows_every_change(rng):
    """Eval mode keeps the last frozen layer, so each value that freezing reads is changed in place here."""
    x = rng.normal(3, 2, (8, 3)).astype(np.float32)
    layer = bn.BatchNorm(3)
    layer(x)
    layer.eval()
    seen = {cases.bits(layer(x))}

    def population():
        layer.population.update(bn.moments(x + 1))

    def gamma():
        layer.gamma[1] = 7

    def beta():
        layer.beta[:] += 1

    def eps():
        layer.eps = 0.1

    def another_population():
        layer.population = bn.Algorithm2()
        layer.population.update(bn.moments(x))

    changes = (population, gamma, beta, eps, another_population)
    for change in changes:
        change()
        same(layer(x), layer.freeze()(x))
        seen.add(cases.bits(layer(x)))
    assert len(seen) == 1 + len(changes)


def test_running_statistics_and_eval_outputs_of_torch(case):  # noqa: F811
    """PyTorch's `momentum` is our `update_weight`; its eval mode is ours."""
    layer = bn.BatchNorm(
        case.x.shape[1],
        eps=case.eps,
        affine=case.affine,
        dtype=case.param_dtype,
        population=bn.MovingAverage(update_weight=case.momentum),
    )
    if case.affine:
        layer.gamma, layer.beta = case.weight, case.bias
    layer.population.load_state_dict({"mean": case.running_mean, "var": case.running_var})
    if case.training:
        for _ in range(case.steps):
            y = layer(case.x)
    else:
        y = layer.eval()(case.x)
    # In eval mode ε is rounded to float32: 2.5e-8 of 1e-5, half of that in y.
    tolerance = TOLERANCE[case.dtype] if case.training else max(TOLERANCE[case.dtype], 1e-12)
    pairs = [(y, case.y), (layer.backward(case.dy), case.dx)]
    if case.affine:
        pairs += [(layer.grad_gamma, case.dweight), (layer.grad_beta, case.dbias)]
    for ours, theirs in pairs:
        a, b = (np.asarray(v).astype(np.float64) for v in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, abs(b).max()))
    tolerance = 1e-13 if case.param_dtype == "float64" else 2e-6
    mean, var = layer.population.mean, layer.population.var
    np.testing.assert_allclose(mean, case.running_mean_after, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(var, case.running_var_after, rtol=tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_gradients_by_finite_differences(rng, layout, training):
    """Gradients of ℓ = Σ dy·y with respect to every x, γ and β agree with central differences in float64."""
    x, dy = layout.normal(rng, np.float64, 1.0, 2.0), layout.normal(rng, np.float64)
    layer = layer_for(x, layout, rng)
    layer(x + 1)  # a population that is not that of x
    layer.training = training
    layer(x)
    dx = layer.backward(dy)
    for array, gradient in ((x, dx), (layer.gamma, layer.grad_gamma), (layer.beta, layer.grad_beta)):
        assert gradient.shape == array.shape
        for index in np.ndindex(array.shape):
            kept, h, loss = array[index], 1e-6, []
            for step in (h, -h):
                array[index] = kept + step
                loss.append((dy * layer(x)).sum())
            array[index] = kept
            assert abs((loss[0] - loss[1]) / (2 * h) - gradient[index]) < 1e-7


def test_backward_again_overwrites(rng):
    layer, x, dy = bn.BatchNorm(3), *rng.normal(size=(2, 8, 3)).astype(np.float32)
    layer(x)
    dx = layer.backward(dy)
    first = layer.grad_gamma
    kept = first.copy()
    same(layer.backward(dy), dx)
    same(layer.grad_gamma, kept)
    layer.backward(2 * dy)
    same(first, kept)  # an array that was handed out stays as it was
    same(layer.grad_gamma, 2 * kept)


def test_backward_goes_through_the_mode_of_the_forward_pass(rng):
    layer, x, dy = bn.BatchNorm(3), *rng.normal(size=(2, 8, 3)).astype(np.float32)
    layer(x)
    dx = layer.backward(dy)
    same(layer.eval().backward(dy), dx)
    layer(x)
    frozen_dx = layer.freeze().backward(dy, x).dx
    same(layer.train().backward(dy), frozen_dx)
    assert cases.bits(dx) != cases.bits(frozen_dx)


def test_backward_first_is_an_error():
    with pytest.raises(RuntimeError, match="backward: there was no forward pass"):
        bn.BatchNorm(3).backward(np.ones((4, 3), np.float32))


def x_with(**values):
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    for name, value in values.items():
        x[2, int(name[1:])] = value
    return x


REFUSED_BATCHES = {
    "NaN": (x_with(c1=np.nan), ValueError, "non-finite statistics in channel 1$"),
    "Inf": (x_with(c0=np.inf, c2=-np.inf), ValueError, "non-finite statistics in channels 0, 2$"),
    "one row": (x_with()[:1], ValueError, "channel"),
    "no rows": (x_with()[:0], ValueError, "channel"),
    "channels": (
        np.ones((8, 4), np.float32),
        ValueError,
        r"x: shape was \(8, 4\), wanted 3 channels on axis 1$",
    ),
    "rank 1": (np.ones(3, np.float32), ValueError, "x: shape was"),
    "float64": (
        x_with().astype(np.float64),
        TypeError,
        "x: dtype was float64, wanted float16, bfloat16 or float32",
    ),
    "int": (np.ones((8, 3), np.int32), TypeError, "x"),
}


@pytest.mark.parametrize("name", REFUSED_BATCHES)
def test_a_refused_batch_changes_nothing(rng, name):
    bad, error, message = REFUSED_BATCHES[name]
    layer, dy = bn.BatchNorm(3), rng.normal(size=(8, 3)).astype(np.float32)
    layer(x_with(c0=5))
    dx = layer.backward(dy)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer(bad)
    assert snapshot(layer) == before
    same(layer.backward(dy), dx)  # still through the good batch


def test_float32_is_too_narrow_for_a_float64_layer():
    layer = bn.BatchNorm(3, dtype="float64")
    with pytest.raises(TypeError, match="x: dtype was float32, wanted float64 for a float64 layer"):
        layer(x_with())
    assert not layer.population.ready


def test_one_channel_does_not_broadcast():
    for affine in (True, False):
        with pytest.raises(ValueError, match="x: shape was"):
            bn.BatchNorm(1, affine=affine)(x_with())


def test_a_refused_gradient_changes_nothing(rng):
    layer, x, dy = bn.BatchNorm(3), *rng.normal(size=(2, 8, 3)).astype(np.float32)
    for mode in (layer.train, layer.eval):
        mode()(x)
        layer.backward(dy)
        before = snapshot(layer)
        for bad, error in ((dy[:5], ValueError), (dy.astype(np.float64), TypeError)):
            with pytest.raises(error, match="dy"):
                layer.backward(bad)
            assert snapshot(layer) == before


def test_not_ready(rng):
    layer = bn.BatchNorm(3)
    with pytest.raises(ValueError, match="population: MovingAverage has seen no batch"):
        layer.freeze()
    with pytest.raises(ValueError, match="population: MovingAverage has seen no batch"):
        layer.eval()(x_with())
    with pytest.raises(RuntimeError, match="no forward pass"):
        layer.backward(x_with())


def test_dlpack_without_a_shape(rng):
    class Bare:
        def __dlpack__(self, **kwargs):
            return array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return array.__dlpack_device__()

    array = rng.normal(size=(8, 3)).astype(np.float32)
    same(bn.BatchNorm(3)(Bare()), bn.BatchNorm(3)(array))
