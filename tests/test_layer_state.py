"""The state of a BatchNorm: parameters, population, state dictionaries, and freezing."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

import batchnorm as bn
from test_layer import LAYOUTS, layer_for, same, snapshot, x_with


def test_parameters_start_at_the_identity_and_train_in_place(rng):
    layer, x = bn.BatchNorm(3, dtype="float64"), rng.normal(3, 2, (64, 3))
    gamma, beta = layer.gamma, layer.beta
    np.testing.assert_array_equal((gamma, beta), ([1, 1, 1], [0, 0, 0]))
    target = 4 * (x - x.mean(0)) / x.std(0) - 1
    for _ in range(100):
        layer.backward((layer(x) - target) / len(x))
        layer.gamma -= 0.5 * layer.grad_gamma
        layer.beta -= 0.5 * layer.grad_beta
    assert layer.gamma is gamma
    assert layer.beta is beta
    np.testing.assert_allclose((gamma, beta), ([4, 4, 4], [-1, -1, -1]), rtol=1e-3)


def test_assignment_copies_and_casts(rng):
    layer = bn.BatchNorm(3)
    mine, given = layer.gamma, [1, 2, 3]
    layer.gamma = given
    assert layer.gamma is mine
    assert mine.dtype == np.float32
    source = np.array([0.1, 0.2, 0.3])
    layer.beta = source
    same(layer.beta, source.astype(np.float32))
    source[:] = 7
    assert layer.beta[0] == np.float32(0.1)


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1, 2], ValueError, r"shape was \(2,\), wanted \(3,\)"),
        (1.0, ValueError, r"shape was \(\)"),
        ([[1, 2, 3]], ValueError, r"shape was \(1, 3\)"),
        ([1, np.nan, 3], ValueError, "not finite .* in channel 1$"),
        ([1, 2, 1e39], ValueError, "not finite as float32 in channel 2$"),
        ([1j, 2, 3], TypeError, "has dtype complex128; wanted real numbers"),
        (None, TypeError, "has dtype object; wanted real numbers"),
        (["a", "b", "c"], TypeError, "has dtype <U1; wanted real numbers"),
    ],
)
def test_refused_parameters(name, value, error, message):
    layer = bn.BatchNorm(3)
    before = snapshot(layer)
    with pytest.raises(error, match=f"^{name}:? {message}"):
        setattr(layer, name, value)
    assert snapshot(layer) == before


def test_without_affine(rng):
    layer, x, dy = bn.BatchNorm(3, affine=False), *rng.normal(size=(2, 8, 3)).astype(np.float32)
    y, cache = bn.train_forward(x)
    same(layer(x), y)
    same(layer.backward(dy), bn.backward(dy, cache).dx)
    layer.eval()(x)
    layer.backward(dy)
    assert layer.gamma is layer.beta is layer.grad_gamma is layer.grad_beta is None
    assert not layer.affine
    assert set(layer.state_dict()) == {"population.mean", "population.var"}
    np.testing.assert_array_equal(layer.freeze().gamma, [1, 1, 1])
    with pytest.raises(ValueError, match="gamma: the layer was made with affine=False"):
        layer.gamma = [1, 2, 3]


def test_state_travels_with_every_bit(rng):
    x = rng.normal(3, 2, (16, 5)).astype(np.float32)
    layer, other = layer_for(x, LAYOUTS[0], rng), bn.BatchNorm(5)
    layer(x)
    file = io.BytesIO()
    np.savez(file, **layer.state_dict())
    file.seek(0)
    gamma = other.gamma
    other.load_state_dict(np.load(file))
    assert other.gamma is gamma
    assert snapshot(other)[0] == snapshot(layer)[0]
    assert other.freeze() == layer.freeze()
    state = layer.state_dict()
    for array in state.values():
        array[:] = 7
    assert snapshot(other)[0] == snapshot(layer)[0]  # copies, out and in


def test_state_before_the_first_batch():
    layer, other = bn.BatchNorm(3), bn.BatchNorm(3)
    other(x_with())
    other.load_state_dict(layer.state_dict())
    assert not other.population.ready


REFUSED_STATES = {
    "missing": (lambda s: s.pop("beta"), ValueError, "state: keys were"),
    "unknown": (lambda s: s.update(other=1), ValueError, "state: keys were"),
    "unknown population key": (lambda s: s.update({"population.x": [1] * 3}), ValueError, "state: keys were"),
    "shape": (lambda s: s.update(gamma=[1, 2]), ValueError, "gamma: shape"),
    "not finite": (lambda s: s.update(beta=[1, 2, np.inf]), ValueError, "beta: not finite"),
    "dtype": (lambda s: s.update(beta=["a"] * 3), TypeError, "beta has dtype <U1"),
    "population": (lambda s: s.update({"population.var": [1, -1, 1]}), ValueError, "negative in channel 1"),
    "population of another layer": (
        lambda s: s.update({"population.mean": [0.0], "population.var": [1.0]}),
        ValueError,
        r"state: population of shape \(1,\), wanted \(3,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED_STATES)
def test_a_refused_state_changes_nothing(name):
    spoil, error, message = REFUSED_STATES[name]
    layer, other = bn.BatchNorm(3), bn.BatchNorm(3)
    layer(x_with())
    other(x_with(c0=99))
    other.gamma = [4, 5, 6]
    before, state = snapshot(layer), other.state_dict()
    spoil(state)
    with pytest.raises(error, match=message):
        layer.load_state_dict(state)
    assert snapshot(layer) == before


def test_each_layer_has_its_own_population():
    one, other = bn.BatchNorm(3), bn.BatchNorm(3)
    one(x_with())
    assert one.population is not other.population
    assert not other.population.ready
    assert one.population.update_weight == 0.1


def test_algorithm2_after_training(rng):
    x = rng.normal(5, 3, (10, 60, 3)).astype(np.float32)
    layer = bn.BatchNorm(3)
    for batch in x[:3]:
        layer(batch)
    layer.population = bn.Algorithm2()
    for batch in x:
        layer(batch)
    frozen = layer.freeze()
    np.testing.assert_allclose(frozen.mean, x.mean((0, 1), np.float64), rtol=1e-6)
    np.testing.assert_allclose(frozen.var, x.var(1, np.float64, ddof=1).mean(0), rtol=1e-6)


def test_a_population_of_ones_own():
    class Fixed:
        ready, mean, var = True, np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])

        def update(self, moments):
            self.seen = moments

        def reset(self):
            pass

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    layer = bn.BatchNorm(3, population=Fixed())
    layer(x_with())
    assert layer.population.seen == bn.moments(x_with())
    np.testing.assert_array_equal(layer.freeze().mean, [1, 2, 3])


@pytest.mark.parametrize("value", [bn.Algorithm2, None, 0.1])
def test_what_is_no_population(value):
    layer = bn.BatchNorm(3)
    kept = layer.population
    with pytest.raises(TypeError, match=r"population: was .*, wanted an estimator with update"):
        layer.population = value
    assert layer.population is kept


def test_a_population_of_other_channels_does_not_freeze(rng):
    layer = bn.BatchNorm(3)
    layer.population.update(bn.moments(rng.normal(size=(9, 1))))
    with pytest.raises(ValueError, match=r"population: shape was \(1,\), wanted \(3,\)"):
        layer.freeze()


def test_freeze_rounds_once(rng):
    layer = bn.BatchNorm(3, eps=1e-3, channel_axis=-1)
    layer(rng.normal(3, 2, (4, 5, 3)).astype(np.float32))
    narrow, wide = layer.freeze(), layer.freeze(dtype="float64")
    assert (narrow.dtype, wide.dtype) == (np.float32, np.float64)
    same(wide.mean, layer.population.mean)
    same(narrow.mean, layer.population.mean.astype(np.float32))
    assert narrow.eps == wide.eps == float(np.float32(1e-3)) != layer.eps
    assert narrow.channel_axis == -1
    layer.gamma[:] = 7  # the frozen layer does not follow
    np.testing.assert_array_equal(narrow.gamma, [1, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: was 0"),
        ({"channels": 2.5}, TypeError, "channels: was 2.5, wanted an integer"),
        ({"channels": True}, TypeError, "channels: was True, wanted an integer"),
        ({"eps": None}, TypeError, "eps: was None, wanted a number"),
        ({"eps": "1e-5"}, TypeError, "eps: was '1e-5', wanted a number"),
        ({"eps": True}, TypeError, "eps: was True, wanted a number"),
        ({"eps": 0}, ValueError, "eps: was"),
        ({"eps": -1e-5}, ValueError, "eps: was"),
        ({"eps": float("nan")}, ValueError, "eps: was"),
        ({"eps": float("inf")}, ValueError, "eps: was"),
        ({"dtype": "float16"}, TypeError, "dtype: was 'float16', wanted float32 or float64"),
        ({"dtype": "int32"}, TypeError, "dtype: was 'int32'"),
        ({"dtype": None}, TypeError, "dtype: was None, wanted float32 or float64"),
        ({"channel_axis": 1.0}, TypeError, r"channel_axis: was 1\.0, wanted an integer"),
        ({"channel_axis": None}, TypeError, "channel_axis: was None, wanted an integer"),
        ({"channel_axis": True}, TypeError, "channel_axis: was True, wanted an integer"),
        ({"population": bn.MovingAverage}, TypeError, "population: was"),
    ],
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        bn.BatchNorm(**({"channels": 3} | arguments))


def test_repr_says_how_to_make_it():
    layer = bn.BatchNorm(3, eps=1e-3, dtype="float64", population=bn.Algorithm2(weighting="equal"))
    again = eval(repr(layer), {"BatchNorm": bn.BatchNorm, "Algorithm2": bn.Algorithm2})
    assert repr(again) == repr(layer)


def test_a_copy_starts_without_the_last_forward_pass():
    layer = bn.BatchNorm(2)
    x = np.array([[1, 10], [3, 30]], np.float32)
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.freeze() == layer.freeze()
        with pytest.raises(RuntimeError, match="no forward pass"):
            twin.backward(x)
        twin.gamma += 1
        assert not np.array_equal(twin.gamma, layer.gamma)
    assert layer.backward(x).shape == x.shape


def test_floating_point_errors_of_numpy_are_not_ours(rng):
    tiny = [1e-60, 1e-310, 5e-324]
    x = rng.normal(size=(8, 3)).astype(np.float32)
    narrow, small, large = x * np.float32([1, 1e-38, 1e-30]), x * np.float32(1e-38), x * np.float32(1e38)
    with np.errstate(all="raise"):
        layer = bn.BatchNorm(3)
        layer.gamma = tiny
        layer.beta = np.array(tiny)
        assert layer.gamma.tolist() == layer.beta.tolist() == [0, 0, 0]
        layer.gamma = [1, 1, 1]
        layer.load_state_dict(layer.state_dict() | {"gamma": tiny})
        layer(narrow)
        for dy in (small, large):
            layer.backward(dy)
        layer.population.load_state_dict({"mean": tiny, "var": [1, 1, 1]})
        layer.freeze()
        layer.eval()(x)
        layer.backward(x)
