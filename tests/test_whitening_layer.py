"""The layer `Whitening`: its modes, gradients and state, and that a call that raises changes nothing."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

import batchnorm as bn
import cases
import whitening_oracle as theory
from test_layer import same, snapshot
from test_whitening_gradients import differences

LAYOUTS = [
    cases.Layout((16, 6)),
    cases.Layout((5, 6, 7)),
    cases.Layout((3, 6, 3, 4)),
    cases.Layout((3, 4, 6), channel_axis=-1),
    cases.Layout((3, 6, 3, 4), memory=cases.NHWC_AS_NCHW),
]


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


def layer_for(x, layout, rng=None, **options):
    wide = "float64" if x.dtype == np.float64 else "float32"
    layer = bn.Whitening(layout.channels, dtype=wide, channel_axis=layout.channel_axis, **options)
    if rng is not None:
        layer.gamma, layer.beta = rng.normal(1, 0.5, layout.channels), rng.normal(0, 2, layout.channels)
    return layer


OPTIONS = [
    {"method": "zca"},
    {"method": "pca", "groups": 2},
    {"method": "cholesky", "groups": 3, "eps": 0},
    {"method": "iterative", "steps": 9},
    {"method": "zca", "shrinkage": "ledoit-wolf"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_train_mode_is_the_core_and_feeds_the_population(rng, layout, dtype, options):
    x, dy = layout.normal(rng, dtype, 3.0, 2.0), layout.normal(rng, dtype)
    layer = layer_for(x, layout, rng, population=bn.MovingCovariance(update_weight=1), **options)
    y, cache = bn.whiten_forward(
        x, layer.gamma, layer.beta, channel_axis=layout.channel_axis, **{"eps": 1e-5} | options
    )
    same(layer(x), y)
    same(layer.population.mean, cache.comoments.mean)
    same(layer.population.cov, cache.comoments.cov_unbiased)
    gradients = bn.whiten_backward(dy, cache)
    same(layer.backward(dy), gradients.dx)
    same(layer.grad_gamma, gradients.dgamma.astype(layer.dtype))
    same(layer.grad_beta, gradients.dbeta.astype(layer.dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_eval_mode_is_the_frozen_layer(rng, layout, dtype, options):
    x, dy = layout.normal(rng, dtype, 3.0, 2.0), layout.normal(rng, dtype)
    layer = layer_for(x, layout, rng, **options)
    layer(x)
    before = snapshot(layer)[0]
    frozen = layer.freeze()
    assert frozen.dtype == layer.dtype
    assert frozen.groups == layer.groups
    assert layer.eval() is layer
    same(layer(x), frozen(x))
    same(layer.backward(dy), frozen.backward(dy))
    rows, size = theory.rows(dy, layout.channel_axis), layout.channels // layer.groups
    W = bn.whitening_matrix(layer.population.cov, method=layer.method, eps=layer.eps, steps=layer.steps)
    centred = theory.rows(x, layout.channel_axis) - layer.population.mean
    xhat = np.einsum("goi,ngi->ngo", W, centred.reshape(len(rows), -1, size)).reshape(rows.shape)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if layer.dtype == np.float64 else {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(layer.grad_gamma, (rows * xhat).sum(0), **tolerance)
    np.testing.assert_allclose(layer.grad_beta, rows.sum(0), **tolerance)
    assert snapshot(layer)[0] == before  # eval mode takes nothing in
    assert layer.train() is layer
    layer(x)
    assert snapshot(layer)[0] != before


def test_the_frozen_layer_whitens_the_population(rng):
    """After PooledCovariance has seen all batches, the whole data comes out white, by the unbiased Λ."""
    x = rng.standard_normal((10, 60, 5)) @ rng.standard_normal((5, 5)) + 3
    layer = bn.Whitening(5, eps=0, dtype="float64", population=bn.PooledCovariance())
    for batch in x:
        layer(batch)
    frozen = layer.freeze()
    y = frozen(x.reshape(-1, 5))
    assert abs(theory.covariance(y, ddof=1) - np.eye(5)).max() < 1e-11
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-12)


def test_an_average_of_w_would_not_whiten():
    """Why the population averages Λ: of two batches with variances 1 and 9, the mean of 1/σ is not 1/√5."""
    x = [np.array([[-1.0], [1.0]] * 50), np.array([[-3.0], [3.0]] * 50)]
    layer = bn.Whitening(1, eps=0, dtype="float64", population=bn.PooledCovariance())
    matrices = []
    for batch in x:
        layer(batch)
        matrices.append(bn.whiten_forward(batch, eps=0)[1].matrix[0])
    whole = np.concatenate(x)
    assert abs(layer.freeze()(whole).var(ddof=1) - 1) < 1e-12
    assert (whole @ np.mean(matrices, axis=0)).var() > 2


def test_eval_mode_follows_every_change(rng):
    """Eval mode keeps the last frozen layer, so each value that freezing reads is changed in place here."""
    x = rng.normal(3, 2, (16, 4)).astype(np.float32)
    layer = bn.Whitening(4, groups=2)
    layer(x)
    layer.eval()
    seen = {cases.bits(layer(x))}

    def population():
        layer.population.update(bn.comoments(x + 1, groups=2))

    def gamma():
        layer.gamma[1] = 7

    def beta():
        layer.beta[:] += 1

    def eps():
        layer.eps = 0.1

    def method():
        layer.method = "pca"

    def another_population():
        layer.population = bn.PooledCovariance()
        layer.population.update(bn.comoments(x, groups=2))

    changes = (population, gamma, beta, eps, method, another_population)
    for change in changes:
        change()
        same(layer(x), layer.freeze()(x))
        seen.add(cases.bits(layer(x)))
    assert len(seen) == 1 + len(changes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", theory.METHODS)
def test_gradients_by_finite_differences(rng, layout, method, training):
    """Gradients of ℓ = Σ dy·y with respect to every x, γ and β, in both modes."""
    x, dy = layout.normal(rng, np.float64, 1.0, 2.0), layout.normal(rng, np.float64)
    steps = 10 if method == "iterative" else None
    layer = layer_for(x, layout, rng, method=method, groups=2, steps=steps)
    layer(x + 1)  # a population that is not that of x
    layer.training = training
    layer(x)
    dx = layer.backward(dy)
    kept = layer.grad_gamma, layer.grad_beta

    def loss():
        return (dy * layer(x)).sum()

    for array, ours in zip((x, layer.gamma, layer.beta), (dx, *kept), strict=True):
        wanted = differences(loss, array)
        assert abs(ours - wanted).max() < 1e-6 * max(1, abs(wanted).max())


def test_backward_again_overwrites(rng):
    layer, x, dy = bn.Whitening(3), *rng.normal(size=(2, 8, 3)).astype(np.float32)
    for mode in (layer.train, layer.eval):
        mode()(x)
        dx = layer.backward(dy)
        first = layer.grad_gamma
        kept = first.copy()
        same(layer.backward(dy), dx)
        same(layer.grad_gamma, kept)
        layer.backward(2 * dy)
        same(first, kept)  # an array that was handed out stays as it was
        same(layer.grad_gamma, 2 * kept)


def test_backward_first_is_an_error():
    with pytest.raises(RuntimeError, match="backward: there was no forward pass"):
        bn.Whitening(3).backward(np.ones((4, 3), np.float32))


def x_with(**values):
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    for name, value in values.items():
        x[2, int(name[1:])] = value
    return x


REFUSED_BATCHES = {
    "NaN": (x_with(c1=np.nan), ValueError, "non-finite statistics in channel 1$"),
    "Inf": (x_with(c0=np.inf, c2=-np.inf), ValueError, "non-finite statistics in channels 0, 2$"),
    "one row": (x_with()[:1], ValueError, "x has shape .*, 1 value in each channel"),
    "no rows": (x_with()[:0], ValueError, "x has shape .*, 0 values in each channel"),
    "singular": (x_with()[:3], ValueError, "singular"),
    "channels": (np.ones((8, 4), np.float32), ValueError, r"x: shape was \(8, 4\), wanted 3 channels"),
    "rank 1": (np.ones(3, np.float32), ValueError, "x: shape was"),
    "float64": (x_with().astype(np.float64), TypeError, "x: dtype was float64, wanted float16"),
    "int": (np.ones((8, 3), np.int32), TypeError, "x"),
}


@pytest.mark.parametrize("name", REFUSED_BATCHES)
def test_a_refused_batch_changes_nothing(rng, name):
    bad, error, message = REFUSED_BATCHES[name]
    layer, dy = bn.Whitening(3, eps=0), rng.normal(size=(8, 3)).astype(np.float32)
    layer(x_with(c0=5))
    dx = layer.backward(dy)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer(bad)
    assert snapshot(layer) == before
    same(layer.backward(dy), dx)  # still through the good batch


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("dy", "error"),
    [(np.ones((8, 4)), ValueError), (np.ones((4, 3)), ValueError), (np.ones((8, 3)), TypeError)],
)
def test_a_refused_gradient_changes_nothing(rng, mode, dy, error):
    layer, x = bn.Whitening(3), x_with()
    layer(x)
    getattr(layer, mode)()(x)
    layer.backward(x)
    before = snapshot(layer)
    with pytest.raises(error, match=r"dy has (shape|dtype)"):
        layer.backward(dy.astype(np.float32) if error is ValueError else dy)
    assert snapshot(layer) == before


def test_eval_mode_wants_a_population():
    layer = bn.Whitening(3).eval()
    for call in (lambda: layer(x_with()), layer.freeze):
        with pytest.raises(ValueError, match="population: MovingCovariance has seen no batch"):
            call()


def test_a_singular_population_does_not_freeze(rng):
    layer = bn.Whitening(6, eps=1e-3, population=bn.PooledCovariance())
    layer(rng.standard_normal((4, 6)).astype(np.float32))
    layer.freeze()
    layer.eps = 0.0
    with pytest.raises(ValueError, match="singular"):
        layer.freeze()


def test_a_population_of_other_channels_or_groups_does_not_freeze(rng):
    for channels, groups, found in (
        (4, 1, r"\(4,\), wanted \(6,\)"),
        (6, 2, r"\(2, 3, 3\), wanted \(1, 6, 6\)"),
    ):
        layer = bn.Whitening(6)
        layer.population.update(bn.comoments(rng.normal(size=(9, channels)), groups=groups))
        with pytest.raises(ValueError, match=f"population: shape was {found}"):
            layer.freeze()
        state = bn.Whitening(6).state_dict() | {
            f"population.{name}": array for name, array in layer.population.state_dict().items()
        }
        other = bn.Whitening(6)
        with pytest.raises(ValueError, match=f"state: population of shape {found}"):
            other.load_state_dict(state)
        assert not other.population.ready


@pytest.mark.parametrize("make", [bn.MovingCovariance, bn.PooledCovariance])
def test_state_travels_with_every_bit(rng, make):
    x = rng.normal(3, 2, (16, 6)).astype(np.float32)
    layer = layer_for(x, LAYOUTS[0], rng, groups=2, population=make())
    other = bn.Whitening(6, groups=2, population=make())
    layer(x)
    file = io.BytesIO()
    np.savez(file, **layer.state_dict())
    file.seek(0)
    gamma = other.gamma
    other.load_state_dict(np.load(file))  # allow_pickle is off: numbers only
    assert other.gamma is gamma
    assert snapshot(other)[0] == snapshot(layer)[0]
    assert other.freeze() == layer.freeze()


def test_without_affine(rng):
    layer, x, dy = bn.Whitening(3, affine=False), *rng.normal(size=(2, 8, 3)).astype(np.float32)
    y, cache = bn.whiten_forward(x)
    same(layer(x), y)
    same(layer.backward(dy), bn.whiten_backward(dy, cache).dx)
    layer.eval()(x)
    same(layer.backward(dy), layer.freeze().backward(dy))
    assert layer.gamma is layer.beta is layer.grad_gamma is layer.grad_beta is None
    assert set(layer.state_dict()) == {"population.mean", "population.cov"}


def test_freeze_folds_gamma_into_the_matrix():
    layer = bn.Whitening(3)
    layer.gamma, layer.beta = [1, 2, 3], [4, 5, 6]
    layer(x_with())
    narrow, wide = layer.freeze(), layer.freeze(dtype="float64")
    assert (narrow.dtype, wide.dtype) == (np.float32, np.float64)
    W = bn.whitening_matrix(layer.population.cov, eps=layer.eps)[0]
    np.testing.assert_allclose(wide.matrix, np.array([[1], [2], [3]]) * W, rtol=1e-15)
    same(narrow.matrix, wide.matrix.astype(np.float32))
    same(wide.mean, layer.population.mean)
    np.testing.assert_array_equal(narrow.bias, [4, 5, 6])
    layer.gamma[:] = 7  # the frozen layer does not follow
    np.testing.assert_array_equal(narrow.bias, [4, 5, 6])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: was 0"),
        ({"channels": 2.5}, TypeError, "channels: was 2.5, wanted an integer"),
        ({"eps": -1e-5}, ValueError, "eps: was"),
        ({"eps": float("nan")}, ValueError, "eps: was"),
        ({"eps": float("inf")}, ValueError, "eps: was"),
        ({"eps": "0"}, TypeError, "eps: was '0', wanted a number"),
        ({"dtype": "float16"}, TypeError, "dtype: was 'float16', wanted float32 or float64"),
        ({"channel_axis": 1.0}, TypeError, r"channel_axis: was 1\.0, wanted an integer"),
        ({"method": "svd"}, ValueError, "method: was 'svd', wanted one of zca, pca, cholesky, iterative"),
        ({"groups": 4}, ValueError, "groups: was 4, wanted a divisor of 6 channels"),
        ({"groups": 0}, ValueError, "groups: was 0, wanted a divisor of 6 channels"),
        ({"groups": -2}, ValueError, "groups: was -2, wanted a divisor of 6 channels"),
        ({"groups": 2.0}, TypeError, r"groups: was 2\.0, wanted an integer"),
        ({"steps": 5}, ValueError, "steps: was 5 with method='zca'"),
        ({"steps": 0, "method": "iterative"}, ValueError, "steps: was 0, wanted 1 to 100"),
        ({"steps": 101, "method": "iterative"}, ValueError, "steps: was 101, wanted 1 to 100"),
        ({"steps": 2.0, "method": "iterative"}, TypeError, r"steps: was 2\.0, wanted an integer"),
        ({"shrinkage": "oas"}, ValueError, "shrinkage: was 'oas', wanted \"ledoit-wolf\" or None"),
        ({"population": bn.MovingAverage(0.1)}, TypeError, "wanted an estimator with cov"),
        ({"population": bn.MovingCovariance}, TypeError, "population: was"),
    ],
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        bn.Whitening(**({"channels": 6} | arguments))


def test_eps_zero_is_allowed(rng):
    x = rng.standard_normal((50, 3))
    y = bn.Whitening(3, eps=0, dtype="float64")(x)
    assert abs(theory.covariance(y) - np.eye(3)).max() < 1e-12


def test_repr_says_how_to_make_it():
    layer = bn.Whitening(
        6,
        method="iterative",
        groups=2,
        eps=1e-3,
        dtype="float64",
        steps=5,
        shrinkage="ledoit-wolf",
        population=bn.PooledCovariance(),
    )
    again = eval(repr(layer), {"Whitening": bn.Whitening, "PooledCovariance": bn.PooledCovariance})
    assert repr(again) == repr(layer)


def test_a_copy_starts_without_the_last_forward_pass():
    layer = bn.Whitening(3)
    layer(x_with())
    layer.eval()(x_with())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.freeze() == layer.freeze()
        with pytest.raises(RuntimeError, match="no forward pass"):
            twin.backward(x_with())
        twin.gamma += 1
        assert not np.array_equal(twin.gamma, layer.gamma)
    assert layer.backward(x_with()).shape == (8, 3)


def test_a_population_of_ones_own():
    class Fixed:
        ready, mean, cov = True, np.array([1.0, 2.0, 3.0]), np.diag([4.0, 9.0, 16.0])[None]

        def update(self, comoments):
            self.seen = comoments

        def reset(self):
            pass

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    layer = bn.Whitening(3, eps=0, population=Fixed())
    layer(x_with())
    assert layer.population.seen == bn.comoments(x_with())
    np.testing.assert_allclose(layer.freeze().matrix, np.diag([1 / 2, 1 / 3, 1 / 4]), rtol=1e-6)


def test_training_a_network_with_it(rng):
    """Gradient steps find the γ and β that the targets come from."""
    x = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 4)) + 2
    layer = bn.Whitening(4, method="pca", dtype="float64")
    target = 3 * layer(x) - 1
    for _ in range(200):
        layer.backward((layer(x) - target) / len(x))
        layer.gamma -= 0.5 * layer.grad_gamma
        layer.beta -= 0.5 * layer.grad_beta
    np.testing.assert_allclose((layer.gamma, layer.beta), ([3] * 4, [-1] * 4), rtol=1e-3)


def test_floating_point_errors_of_numpy_are_not_ours(rng):
    tiny = [1e-60, 1e-310, 5e-324]
    x = rng.normal(size=(8, 3)).astype(np.float32)
    narrow, small, large, wide = (x * np.float32(scale) for scale in (1e-30, 1e-38, 1e38, 1e18))
    with np.errstate(all="raise"):
        layer = bn.Whitening(3)
        layer.gamma = tiny
        layer.gamma = [1e-45, 1, 1]
        for batch in (narrow, x, wide):
            layer(batch)
            for dy in (small, large):
                layer.backward(dy)
        layer.population.load_state_dict({"mean": tiny, "cov": 1e-30 * np.eye(3)[None]})
        layer.freeze()
        layer.eval()(x)
        for dy in (small, large):
            layer.backward(dy)
