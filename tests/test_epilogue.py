"""A residual and an activation in the same pass as normalization, and their backward pass."""

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
from batchnorm._core import Coefficients
from cases import Layout, bits, strides

TRAINABLE = tuple(f for f in cases.LAYOUTS if np.prod(f.shape) >= 2 * f.channels)
FEW = (*TRAINABLE[::6], Layout((3, 20, 33)), Layout((9, 18, 7, 7)), Layout((600, 33)), Layout((2, 3, 4100)))
# activation, whether there is a residual
FOLLOWS = [(None, True), ("relu", False), ("relu", True), ("relu6", False), ("relu6", True)]

each_activation = pytest.mark.parametrize("activation", ["relu", "relu6"])


def setting(rng, layout, dtype):
    parameters = cases.parameters(rng, layout.channels)
    x = layout.normal(rng, dtype, parameters[0], np.sqrt(parameters[1]))
    residual, dy = layout.normal(rng, dtype, 1, 4), layout.normal(rng, dtype, 0, 2)
    return x, residual, dy, layout.channel_axis, parameters


def passing(dy, y, activation):
    """What passes an activation: dy where y > 0, and for ReLU6 y < 6."""
    y = np.asarray(y, np.float64)
    return np.where((y > 0) & ((y < 6) | (activation == "relu")), dy, np.zeros((), dy.dtype))


@pytest.mark.parametrize(("activation", "with_residual"), FOLLOWS)
def test_inference_is_the_defined_expression(rng, layout, dtype, activation, with_residual):
    x, residual, _, axis, p = setting(rng, layout, dtype)
    x.flat[:3], residual.flat[3:6] = [np.nan, np.inf, -np.inf], [np.nan, np.inf, -np.inf]
    residual = residual if with_residual else None
    wanted = oracle.infer(x, *p, channel_axis=axis, activation=activation, residual=residual)
    follows = {"activation": activation, "residual": residual}
    y = bn.infer(x, *p, channel_axis=axis, **follows)
    assert strides(y) == strides(x)
    assert bits(y) == bits(wanted)
    over = x.copy(order="K")
    assert bn.infer(over, *p, channel_axis=axis, out=over, **follows) is over
    assert bits(over) == bits(wanted)
    assert bits(Coefficients(*p).infer(x, channel_axis=axis, **follows)) == bits(wanted)


@given(cases.layouts(min_values=1), st.sampled_from(cases.DTYPES), st.integers(0, 2**32 - 1))
def test_every_bit_pattern(layout, dtype, seed):
    """Subnormals, infinities, zeros and NaN of any sign, in x and in the residual."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, (2, *layout.shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    x, residual = (layout.lay(values) for values in patterns)
    for activation in (None, "relu", "relu6"):
        wanted = oracle.infer(
            x, 0.0, 1.0, 1.0, 0.0, channel_axis=layout.channel_axis, activation=activation, residual=residual
        )
        y = bn.infer(x, 0, 1, channel_axis=layout.channel_axis, activation=activation, residual=residual)
        assert bits(y) == bits(wanted)


@each_activation
def test_zeros_and_what_is_not_finite(dtype, activation):
    x = np.array([[-0.0, 0.0, np.nan, -np.inf, np.inf, -1, 1]] * 9, dtype)
    follows = {"beta": -0.0, "eps": 0.0, "activation": activation}  # a β of -0 leaves -0 as it is
    y = bn.infer(x, np.zeros(7), np.ones(7), **follows).astype(np.float64)
    np.testing.assert_array_equal(y[8], [0, 0, np.nan, 0, np.inf if activation == "relu" else 6, 0, 1])
    assert not np.signbit(y[:, :2]).any()
    transposed = bn.infer(x.T.copy(), 0.0, 1.0, channel_axis=0, **follows).T.astype(np.float64)
    np.testing.assert_array_equal(transposed, y)
    assert not np.signbit(transposed[:, :2]).any()


def test_a_sum_is_rounded_once():
    """The bits of 1 + 2⁻²³ + 2⁻²⁴ beyond float32 are still there after 1 is subtracted."""
    x = np.array([[1 + 2.0**-23]], np.float32)
    y = bn.infer(x, 0.0, 1.0, 1.0, 2.0**-24, eps=0.0, residual=np.array([[-1.0]], np.float32))
    assert y == np.float32(2.0**-23 + 2.0**-24)
    assert y != bn.infer(x, 0.0, 1.0, 1.0, 2.0**-24, eps=0.0) - np.float32(1)


def test_a_residual_of_another_memory_order_is_copied(rng, dtype):
    x, _, _, _, p = setting(rng, Layout((3, 17, 5, 7)), dtype)
    wide = rng.standard_normal((3, 34, 5, 7)).astype(dtype)
    for residual in (wide[:, ::2], Layout((3, 17, 5, 7), memory=cases.NHWC_AS_NCHW).lay(wide[:, :17])):
        wanted = oracle.infer(x, *p, activation="relu", residual=residual)
        assert bits(bn.infer(x, *p, activation="relu", residual=residual)) == bits(wanted)
        y, cache = bn.train_forward(x, activation="relu", residual=residual)
        buffer = np.empty_like(x)
        assert bits(bn.backward(x, cache, dresidual=buffer).dresidual) == bits(passing(x, y, "relu"))


@pytest.mark.parametrize(("activation", "with_residual"), FOLLOWS)
@pytest.mark.parametrize("layout", FEW, ids=str)
def test_training(rng, layout, dtype, activation, with_residual):
    """Accurate in ulps at S, which counts |residual|; the same bits in halves, and in place."""
    x, residual, _, axis, (_, _, gamma, beta) = setting(rng, layout, dtype)
    follows = {"activation": activation, "residual": residual if with_residual else None}
    y, cache = bn.train_forward(x, gamma, beta, channel_axis=axis, **follows)
    f = oracle.forward(x, gamma, beta, 1e-5, axis)
    assert oracle.share_of_bound(y, oracle.followed(f, **follows), trained=True) <= 1
    assert cache.activation == activation
    assert cache.residual is follows["residual"]
    halves, _ = bn.normalize(x, bn.moments(x, channel_axis=axis), gamma, beta, channel_axis=axis, **follows)
    assert bits(halves) == bits(y)
    over = x.copy(order="K")
    _, in_place = bn.train_forward(over, gamma, beta, channel_axis=axis, out=over, **follows)
    assert bits(over) == bits(y)
    dy = layout.normal(rng, dtype)
    for a, b in zip(bn.backward(dy, in_place, x=x), bn.backward(dy, cache), strict=True):
        assert bits(a) == bits(b)


def assert_gradients(got, wanted):
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert bits(a) == bits(b), name


@each_activation
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("layout", FEW, ids=str)
def test_gradients_are_those_of_what_passes(rng, layout, dtype, activation, with_residual):
    """Gradients have the bits of the plain backward pass of what passes the activation."""
    x, residual, dy, axis, (mean, var, gamma, beta) = setting(rng, layout, dtype)
    residual = residual if with_residual else None
    y, cache = bn.train_forward(x, gamma, beta, channel_axis=axis, activation=activation, residual=residual)
    plain = bn.train_forward(x, gamma, beta, channel_axis=axis)[1]
    through = passing(dy, y, activation)
    wanted = bn.backward(through, plain)
    got = bn.backward(dy, cache)
    assert got.dresidual is None
    assert_gradients(got, wanted)
    sums = bn.gradient_sums(dy, cache)
    assert sums == bn.gradient_sums(through, plain)
    assert bits(bn.gradient_apply(dy, cache, sums)) == bits(wanted.dx)
    over = dy.copy(order="K")
    assert bn.backward(over, cache, out=over).dx is over
    assert bits(over) == bits(wanted.dx)

    follows = {"activation": activation, "residual": residual}
    y = bn.infer(x, mean, var, gamma, beta, channel_axis=axis, **follows)
    frozen = bn.infer_backward(passing(dy, y, activation), x, mean, var, gamma, channel_axis=axis)
    arguments = x, mean, var, gamma
    assert_gradients(bn.infer_backward(dy, *arguments, beta=beta, channel_axis=axis, **follows), frozen)
    over = dy.copy(order="K")
    assert_gradients(
        bn.infer_backward(over, *arguments, beta=beta, channel_axis=axis, out=over, **follows), frozen
    )
    held = Coefficients(mean, var, gamma, beta)
    assert_gradients(held.backward(dy, x, channel_axis=axis, **follows), frozen)


@each_activation
@pytest.mark.parametrize("layout", FEW, ids=str)
def test_the_gradient_of_the_residual(rng, layout, dtype, activation):
    x, residual, dy, axis, (mean, var, gamma, beta) = setting(rng, layout, dtype)
    follows = {"activation": activation, "residual": residual}
    y, cache = bn.train_forward(x, gamma, beta, channel_axis=axis, **follows)
    wanted, through = bn.backward(dy, cache), passing(dy, y, activation)
    for out in (None, np.empty_like(x), "over dy"):
        for over_dy in (False, True):
            if over_dy and isinstance(out, str):
                continue
            given = dy.copy(order="K")
            buffer = given if over_dy else np.empty_like(x)
            target = given if isinstance(out, str) else out
            got = bn.backward(given, cache, out=target, dresidual=buffer)
            assert got.dresidual is buffer
            assert bits(buffer) == bits(through)
            assert_gradients(got, wanted)
            assert len(got) == 3
    buffer = np.empty_like(x)
    assert bits(bn.gradient_apply(dy, cache, bn.gradient_sums(dy, cache), dresidual=buffer)) == bits(
        wanted.dx
    )
    assert bits(buffer) == bits(through)
    y = bn.infer(x, mean, var, gamma, beta, channel_axis=axis, **follows)
    got = bn.infer_backward(
        dy, x, mean, var, gamma, beta=beta, channel_axis=axis, dresidual=buffer, **follows
    )
    assert got.dresidual is buffer
    assert bits(buffer) == bits(passing(dy, y, activation))


def test_without_an_activation_the_gradient_of_the_residual_is_dy(rng, dtype):
    x, residual, dy = rng.standard_normal((3, 9, 4, 5)).astype(dtype)
    plain = bn.backward(dy, bn.train_forward(x)[1])
    assert plain.dresidual is None
    _, cache = bn.train_forward(x, residual=residual)
    got = bn.backward(dy, cache)
    assert got.dresidual is dy
    assert_gradients(got, plain)
    buffer = np.empty_like(x)
    assert bn.backward(dy, cache, dresidual=buffer).dresidual is buffer
    assert bits(buffer) == bits(dy)
    over = dy.copy()
    assert bn.backward(over, cache, out=over).dresidual is None, "dx was written over it"
    for same in (pickle.loads(pickle.dumps(got)), copy.deepcopy(got)):
        assert bits(same.dresidual) == bits(dy)
        assert_gradients(same, got)


def test_a_value_that_rounds_to_zero_passes_nothing():
    """The gradient passes where the rounded y > 0."""
    for name, least in (("float32", 2.0**-149), ("float16", 2.0**-24)):
        x = np.array([[1], [2], [3], [4]], np.float64) * least
        x = x.astype(name)
        y = bn.infer(x, 0.0, 1.0, 0.5, eps=0.0, activation="relu")
        dx = bn.infer_backward(np.ones_like(x), x, 0.0, 1.0, 0.5, eps=0.0, activation="relu").dx
        assert ((dx > 0) == (y > 0)).all()
        assert (dx[:, 0] > 0).tolist() == [False, True, True, True]


def test_a_value_that_rounds_to_six_passes_nothing():
    """The gradient passes where the rounded y < 6, and ReLU6 is not rounded on the way there."""
    for dtype in cases.DTYPES:
        step = {"float64": 2.0**-50, "float32": 2.0**-21, "float16": 2.0**-8, "bfloat16": 2.0**-5}[dtype.name]
        x = np.array([[6 - 2 * step], [6 - step], [6], [6 + 2 * step], [1e4]], np.float64).astype(dtype)
        for part, below in ((0, 2), (0.25, 2), (0.5, 1), (0.75, 1)):
            if part and dtype == np.float64:
                continue  # there is nothing between neighbours
            arguments = x, 0.0, 1.0, 1.0
            follows = {"beta": part * step, "eps": 0.0, "activation": "relu6"}
            y = bn.infer(*arguments, **follows)
            assert bits(y) == bits(oracle.infer(*arguments, **follows))
            assert (y < 6).sum() == below
            dx = bn.infer_backward(np.ones_like(x), *arguments, **follows).dx
            assert bits(dx) == bits((y < 6).astype(dtype))


@each_activation
@pytest.mark.parametrize(
    "layout", [Layout((7, 3)), Layout((2, 3, 2, 4), channel_axis=-1), Layout((2, 3, 40))], ids=str
)
def test_finite_differences(rng, layout, activation):
    x, residual, _, axis, (mean, var, gamma, beta) = setting(rng, layout, np.dtype(np.float64))
    w = layout.normal(rng, np.dtype(np.float64))

    def loss(y):
        return float((w * np.sin(y)).sum())

    def differences(f, values, h=1e-6):
        result = np.empty(values.shape)
        for index in np.ndindex(values.shape):
            up, down = values.copy(), values.copy()
            up[index] += h
            down[index] -= h
            result[index] = (f(up) - f(down)) / (2 * h)
        return result

    def train(x=x, gamma=gamma, beta=beta, residual=residual):
        return bn.train_forward(
            x, gamma, beta, eps=0.1, channel_axis=axis, activation=activation, residual=residual
        )

    def infer(x=x, gamma=gamma, beta=beta, residual=residual):
        return bn.infer(
            x, mean, var, gamma, beta, channel_axis=axis, activation=activation, residual=residual
        )

    y, cache = train()
    buffer = np.empty_like(x)
    trained = bn.backward(w * np.cos(y), cache, dresidual=buffer)
    y = infer()
    frozen = bn.infer_backward(
        w * np.cos(y),
        x,
        mean,
        var,
        gamma,
        beta=beta,
        channel_axis=axis,
        activation=activation,
        residual=residual,
        dresidual=np.empty_like(x),
    )
    assert (y == 0).any()
    assert (y > 0).any()
    assert (y == 6).any() == (activation == "relu6")
    for got, run in ((trained, lambda **p: train(**p)[0]), (frozen, infer)):
        for gradient, name, values in (
            (got.dx, "x", x),
            (got.dgamma, "gamma", gamma),
            (got.dbeta, "beta", beta),
            (got.dresidual, "residual", residual),
        ):
            numeric = differences(lambda v, name=name, run=run: loss(run(**{name: v})), values)
            np.testing.assert_allclose(gradient, numeric, atol=1e-6, err_msg=name)


def test_micro_batches_merge_to_the_whole(rng):
    x, residual, dy = rng.standard_normal((3, 12, 3, 8))
    follows = [{"activation": "relu", "residual": r} for r in (residual[:5], residual[5:])]
    moments = bn.moments(x[:5]).merge(bn.moments(x[5:]))
    caches = [bn.normalize(p, moments, 2.0, **f)[1] for p, f in zip((x[:5], x[5:]), follows, strict=True)]
    sums = bn.gradient_sums(dy[:5], caches[0]).merge(bn.gradient_sums(dy[5:], caches[1]))
    dx = [bn.gradient_apply(d, c, sums) for d, c in zip((dy[:5], dy[5:]), caches, strict=True)]
    whole = bn.backward(dy, bn.train_forward(x, 2.0, activation="relu", residual=residual)[1])
    np.testing.assert_allclose(np.concatenate(dx), whole.dx, atol=1e-14)
    np.testing.assert_allclose(sums.dgamma, whole.dgamma, rtol=1e-13)


@each_activation
@pytest.mark.parametrize("training", [True, False])
def test_the_layer(rng, training, activation):
    x, residual, dy = (3 * rng.standard_normal((3, 16, 3, 5))).astype(np.float32)
    layer, plain = bn.BatchNorm(3), bn.BatchNorm(3)
    for each in (layer, plain):
        each.gamma, each.beta = [1, 2, -1], [0.5, 0, -0.5]
        each(x)
        each.training = training
    y = layer(x, activation=activation, residual=residual)
    np.testing.assert_allclose(
        y, np.clip(plain(x) + residual, 0, 6 if activation == "relu6" else None), atol=1e-6
    )
    assert layer.freeze().fingerprint == plain.freeze().fingerprint
    buffer = np.empty_like(x)
    dx = layer.backward(dy, dresidual=buffer)
    assert bits(buffer) == bits(passing(dy, y, activation))
    assert bits(plain.backward(buffer)) == bits(dx)
    assert bits(plain.grad_gamma) == bits(layer.grad_gamma)
    assert bits(plain.grad_beta) == bits(layer.grad_beta)
    assert bits(layer.backward(dy)) == bits(dx)


X = np.ones((4, 3, 5), np.float32)
CALLS = {
    "train_forward": lambda **f: bn.train_forward(X, **f),
    "normalize": lambda **f: bn.normalize(X, bn.moments(X), **f),
    "infer": lambda **f: bn.infer(X, 0.0, 1.0, **f),
    "infer_backward": lambda **f: bn.infer_backward(X, X, 0.0, 1.0, **f),
    "Coefficients.infer": lambda **f: Coefficients(np.zeros(3), np.ones(3)).infer(X, **f),
    "layer": lambda **f: bn.BatchNorm(3)(X, **f),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_refused(call):
    with pytest.raises(ValueError, match=r'^activation is "gelu"; wanted None, "relu" or "relu6"$'):
        call(activation="gelu")
    with pytest.raises(TypeError, match=r'^activation is .*int; wanted None, "relu" or "relu6"$'):
        call(activation=1)
    with pytest.raises(ValueError, match=r"^residual has shape .*; wanted that of x"):
        call(residual=X[:3])
    with pytest.raises(TypeError, match=r"^residual has dtype float64; wanted that of x, float32"):
        call(residual=X.astype(np.float64))
    with pytest.raises(TypeError, match=r"^residual is "):
        call(residual=2.0)


def test_memory_that_is_shared_is_refused_by_name():
    x, residual, dy = np.ones((3, 4, 3, 5), np.float32)
    follows = {"activation": "relu", "residual": residual}
    before = residual.tobytes()
    for call in (
        lambda: bn.infer(x, 0.0, 1.0, out=residual, **follows),
        lambda: bn.train_forward(x, out=residual, **follows),
        lambda: bn.normalize(x, bn.moments(x), out=residual, **follows),
        lambda: bn.infer(x, 0.0, 1.0, out=x, residual=x),
        lambda: bn.backward(dy, bn.train_forward(x, **follows)[1], out=residual),
    ):
        with pytest.raises(ValueError, match=r"^out shares memory with residual; wanted memory of its own"):
            call()
    _, cache = bn.train_forward(x, **follows)
    for name, buffer in (("x", x), ("residual", residual)):
        with pytest.raises(ValueError, match=f"^dresidual shares memory with {name}; wanted"):
            bn.backward(dy, cache, dresidual=buffer)
    out = np.empty_like(x)
    with pytest.raises(ValueError, match=r"^dresidual shares memory with out; wanted"):
        bn.backward(dy, cache, out=out, dresidual=out)
    with pytest.raises(ValueError, match=r"^dresidual has shape"):
        bn.backward(dy, cache, dresidual=out[:2])
    assert residual.tobytes() == before


def test_a_gradient_that_nothing_asks_for_is_refused():
    _, cache = bn.train_forward(X, activation="relu")
    with pytest.raises(ValueError, match=r"^dresidual is given, but the forward pass had no residual"):
        bn.backward(X, cache, dresidual=np.empty_like(X))


def test_a_refused_backward_pass_writes_nothing():
    """Nothing is written before the sums are found to be over too few values."""
    dy = np.ones((4, 3, 5), np.float32)
    moments = bn.moments(X).merge(bn.moments(X))
    _, cache = bn.normalize(X, moments, activation="relu", residual=-X)
    with pytest.raises(ValueError, match="sums are over 20 values in channel 0; wanted 40"):
        bn.backward(dy, cache, dresidual=dy)
    with pytest.raises(ValueError, match="sums has 1 channels; wanted 3"):
        bn.gradient_apply(dy, cache, bn.GradientSums(40, 0, 0), dresidual=dy)
    assert (dy == 1).all()


def test_no_rows():
    empty = np.empty((0, 3, 5), np.float32)
    y = bn.infer(empty, 0.0, 1.0, activation="relu", residual=empty)
    assert y.shape == empty.shape
    got = bn.infer_backward(
        empty, empty, 0.0, 1.0, activation="relu", residual=empty, dresidual=np.empty_like(empty)
    )
    assert got.dbeta.tolist() == [0, 0, 0]
