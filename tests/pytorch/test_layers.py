"""Our layers against PyTorch's: results, state, dtypes, memory orders, refusals."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_cases import ACTIVATIONS, DTYPES, OURS, SHAPES, composed, is_ours, pair, parameters_of, tensors
from torch import nn

import batchnorm.torch as bt

KINDS = pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
MODES = pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))


def same_state(ours, theirs, **tolerances):
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        assert value.dtype == state[name].dtype
        torch.testing.assert_close(value, state[name], equal_nan=True, **tolerances)


@KINDS
@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=("alone", "residual"))
def test_agrees_with_pytorch(kind, training, dtype, activation, with_residual):
    """Gradients of 16 bits are compared where no sum was rounded before the activation."""
    ours, theirs = pair(kind, activation=activation, training=training, dtype=parameters_of(dtype))
    inputs = tensors(SHAPES[kind], 1 + with_residual, dtype=dtype)
    y, wanted = ours(*inputs), composed(theirs, activation, *inputs)
    tolerance = {} if dtype.itemsize > 2 else {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0.05}
    assert is_ours(y)
    torch.testing.assert_close(y, wanted, **tolerance)
    assert y.stride() == wanted.stride()
    same_state(ours, theirs)
    if dtype.itemsize > 2 or activation is None:
        (dy,) = tensors(y.shape, 1, dtype=dtype, grad=False)
        got = torch.autograd.grad(y, [*inputs, ours.weight, ours.bias], dy)
        expected = torch.autograd.grad(wanted, [*inputs, theirs.weight, theirs.bias], dy)
        for one, other in zip(got, expected, strict=True):
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, **tolerance)


@MODES
@pytest.mark.parametrize(
    "arguments",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.5},
        {"eps": 0.5},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False, "momentum": None},
    ],
    ids=str,
)
def test_constructors(arguments, training):
    ours, theirs = pair(training=training, **arguments)
    for _ in range(3):
        (x,) = tensors(SHAPES[nn.BatchNorm2d], 1)
        y = ours(x)
        assert is_ours(y)
        torch.testing.assert_close(y, theirs(x))
    same_state(ours, theirs)
    if ours.track_running_stats:
        assert ours.num_batches_tracked.item() == 3 * training


def test_a_layer_that_stops_tracking():
    """PyTorch reads the flag at each call."""
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.track_running_stats = False
    (x,) = tensors(SHAPES[nn.BatchNorm2d], 1)
    torch.testing.assert_close(ours(x), theirs(x))
    same_state(ours, theirs)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_without_bias():
    try:
        ours, theirs = pair(bias=False)
    except TypeError:
        pytest.skip("this PyTorch has no layers with a weight and no bias")
    (x,) = tensors(SHAPES[nn.BatchNorm2d], 1)
    y, wanted = ours(x), theirs(x)
    assert is_ours(y)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@KINDS
def test_strict_loading_in_both_directions(kind):
    ours, theirs = pair(kind)
    ours(*tensors(SHAPES[kind], 1))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    same_state(ours, theirs, rtol=0, atol=0)
    fresh = OURS[kind](5)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    same_state(fresh, theirs, rtol=0, atol=0)
    assert isinstance(ours, kind)


def test_a_state_of_version_1_loads():
    """Such a state has no num_batches_tracked and no version."""
    state = {name: value for name, value in nn.BatchNorm2d(5).state_dict().items() if "batches" not in name}
    assert not hasattr(dict(state), "_metadata")
    bt.BatchNorm2d(5).load_state_dict(dict(state), strict=True)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_copies(activation):
    (x,) = tensors(SHAPES[nn.BatchNorm2d], 1)
    ours, _ = pair(activation=activation)
    ours(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)
    for one in copies:
        assert type(one) is bt.BatchNorm2d
        assert one.activation == activation
        same_state(one, ours, rtol=0, atol=0)
    wanted = ours(x)
    for one in copies:
        assert torch.equal(one(x), wanted)


def test_repr_shows_the_activation():
    assert repr(bt.BatchNorm2d(5)) == repr(nn.BatchNorm2d(5))
    assert (
        repr(bt.BatchNorm2d(5, activation="relu6")) == repr(nn.BatchNorm2d(5))[:-1] + ", activation='relu6')"
    )


@pytest.mark.parametrize("activation", ["gelu", "", 6])
def test_refuses_other_activations(activation):
    with pytest.raises(ValueError, match=r'activation must be None, "relu" or "relu6"'):
        bt.BatchNorm2d(5, activation=activation)


@MODES
@pytest.mark.parametrize("order", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_channels_last(order, training):
    kind = nn.BatchNorm2d if order is torch.channels_last else nn.BatchNorm3d
    ours, theirs = pair(kind, activation="relu", training=training)
    x, residual = tensors(SHAPES[kind], 2, order=order)
    y = ours(x, residual)
    assert is_ours(y)
    assert y.is_contiguous(memory_format=order)
    torch.testing.assert_close(y, composed(theirs, "relu", x, residual))


ODD = {
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
    "narrowed": lambda t: torch.cat([t, t], 2).narrow(2, 1, t.shape[2]),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "plain": lambda t: t,
}


@MODES
@pytest.mark.parametrize("of_x", ODD)
@pytest.mark.parametrize("of_residual", ODD)
@pytest.mark.parametrize("of_dy", ODD)
def test_any_memory_order(training, of_x, of_residual, of_dy):
    """Where x, the residual and dy lie differently, results are those of contiguous tensors."""
    ours, _ = pair(activation="relu", training=training)
    x, residual, dy = (
        ODD[name](tensor)
        for name, tensor in zip(
            (of_x, of_residual, of_dy), tensors(SHAPES[nn.BatchNorm2d], 3, grad=False), strict=True
        )
    )
    results = []
    for prepare in (torch.Tensor.detach, torch.Tensor.contiguous):
        inputs = [prepare(x).requires_grad_(), prepare(residual).requires_grad_()]
        layer = copy.deepcopy(ours)
        y = layer(*inputs)
        assert is_ours(y)
        gradients = torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], prepare(dy))
        results.append((y, *gradients, layer.running_mean, layer.running_var))
    for odd, plain in zip(*results, strict=True):
        torch.testing.assert_close(odd, plain, rtol=1e-6, atol=1e-6)


@MODES
@pytest.mark.parametrize("negated", ["x", "residual", "dy"])
def test_lazily_negated_tensors(training, negated):
    """PyTorch has views whose values are the negated ones in memory."""
    layer, _ = pair(activation="relu", training=training)
    plain = dict(zip(("x", "residual", "dy"), tensors(SHAPES[nn.BatchNorm2d], 3, grad=False), strict=True))
    view = torch.complex(plain[negated], -plain[negated]).conj().imag
    assert view.is_neg()
    results = []
    for given in (plain, plain | {negated: view}):
        inputs = [given[name].detach().requires_grad_() for name in ("x", "residual")]
        y = copy.deepcopy(layer)(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, given["dy"])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@MODES
def test_autocast(training):
    """The convolution gives bfloat16, and batch norm keeps that, with parameters of float32."""
    ours, theirs = pair(training=training)
    convolution = nn.Conv2d(5, 5, 3)
    (x,) = tensors((2, 5, 8, 8), 1)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = ours(convolution(x)), theirs(convolution(x))
    assert y.dtype == wanted.dtype == torch.bfloat16
    assert is_ours(y)
    torch.testing.assert_close(y, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == torch.float32
    y.float().square().sum().backward()
    assert ours.weight.grad.dtype == torch.float32


@MODES
def test_a_residual_of_another_dtype_is_promoted(training):
    ours, theirs = pair(activation="relu", training=training)
    (x,) = tensors(SHAPES[nn.BatchNorm2d], 1, dtype=torch.bfloat16)
    (residual,) = tensors(SHAPES[nn.BatchNorm2d], 1)
    y = ours(x, residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, composed(theirs, "relu", x, residual))


@MODES
def test_a_residual_of_another_shape_is_broadcast(training):
    ours, theirs = pair(training=training)
    (x,), (residual,) = tensors(SHAPES[nn.BatchNorm2d], 1), tensors((5, 1, 1), 1)
    torch.testing.assert_close(ours(x, residual), composed(theirs, None, x, residual))


@MODES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_modules_wholly_in_16_bits(dtype, training):
    ours, theirs = pair(training=training, dtype=dtype)
    (x,) = tensors(SHAPES[nn.BatchNorm2d], 1, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))
    same_state(ours, theirs, rtol=0, atol=0)


@MODES
@pytest.mark.parametrize(
    ("of_x", "of_parameters"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_mixed_dtypes_are_refused_as_pytorch_refuses_them(of_x, of_parameters, training):
    (x,) = tensors(SHAPES[nn.BatchNorm2d], 1, dtype=of_x)
    texts = []
    for layer in pair(training=training, dtype=of_parameters):
        with pytest.raises(RuntimeError) as caught:
            layer(x)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("kind", "shape", "wrong"),
    [
        (nn.BatchNorm1d, (3, 5, 2, 2), "rank"),
        (nn.BatchNorm2d, (3, 5), "rank"),
        (nn.BatchNorm3d, (3, 5, 2, 2), "rank"),
        (nn.BatchNorm2d, (3, 4, 2, 2), "channels"),
        (nn.BatchNorm1d, (1, 5), "one value per channel"),
        (nn.BatchNorm2d, (1, 5, 1, 1), "one value per channel"),
        (nn.BatchNorm1d, (5,), "rank"),
    ],
)
@MODES
def test_refusals_are_those_of_pytorch(kind, shape, wrong, training):
    ours, theirs = pair(kind, training=training)
    x = torch.ones(shape)
    if wrong == "one value per channel" and not training:
        torch.testing.assert_close(ours(x), theirs(x))
        return
    texts = []
    for layer in (ours, theirs):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            layer(x)
        texts.append((caught.type, str(caught.value)))
    assert texts[0] == texts[1]
    same_state(ours, theirs, rtol=0, atol=0)


@KINDS
@MODES
def test_an_empty_batch(kind, training):
    ours, theirs = pair(kind, activation="relu", training=training)
    before = copy.deepcopy(ours.state_dict())
    x = torch.empty((0, *SHAPES[kind][1:]), requires_grad=True)
    y = ours(x)
    theirs(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert not ours.weight.grad.any()
    assert not ours.bias.grad.any()
    same_state(ours, theirs, rtol=0, atol=0)
    assert torch.equal(ours.running_mean, before["running_mean"])
    assert torch.equal(ours.running_var, before["running_var"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_enters_the_running_statistics(value):
    ours, theirs = pair()
    (x,) = tensors(SHAPES[nn.BatchNorm2d], 1)
    with torch.no_grad():
        x[1, 2] = value
    y, wanted = ours(x), theirs(x)
    assert is_ours(y)
    torch.testing.assert_close(y, wanted, equal_nan=True)
    assert ours.running_mean.isfinite().tolist() == [True, True, False, True, True]
    assert ours.running_var.isnan().tolist() == [False, False, True, False, False]
    for layer in (ours, theirs):  # the mean of a channel with an infinity is inf to PyTorch, to us NaN
        layer.running_mean[2] = float("nan")
    same_state(ours, theirs)
    # NaN stays in its channel, in the gradients too.
    gradients = torch.autograd.grad(y, [x, ours.weight, ours.bias], torch.ones_like(y))
    for gradient, axis in zip(gradients[:2], (1, 0), strict=True):
        bad = gradient.movedim(axis, 0).flatten(1).isnan().any(1) if gradient.dim() > 1 else gradient.isnan()
        assert bad.nonzero().flatten().tolist() == [2]
    assert torch.equal(gradients[2], torch.full((5,), float(x[:, 0].numel())))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), equal_nan=True)


PARAMETERS_OUT_OF_RANGE = [
    ("weight", float("inf")),
    ("weight", float("nan")),
    ("bias", float("-inf")),
    ("bias", float("nan")),
    ("running_mean", float("nan")),
    ("running_var", float("inf")),
    ("running_var", -3.0),
]


@MODES
@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
@pytest.mark.parametrize(("name", "value"), PARAMETERS_OUT_OF_RANGE)
def test_values_of_parameters_that_pytorch_takes(name, value, activation, training):
    """The core refuses them, so PyTorch's operators compute y and the gradients."""
    ours, theirs = pair(activation=activation, training=training)
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.state_dict()[name][3] = value
    x, residual = tensors(SHAPES[nn.BatchNorm2d], 2)
    y, wanted = ours(x, residual), composed(theirs, activation, x, residual)
    torch.testing.assert_close(y, wanted, equal_nan=True)
    same_state(ours, theirs)
    got = torch.autograd.grad(y, [x, residual, ours.weight, ours.bias], torch.ones_like(y))
    expected = torch.autograd.grad(wanted, [x, residual, theirs.weight, theirs.bias], torch.ones_like(y))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("value", [1e39, 1e-30])
def test_coefficients_out_of_the_range_of_float32(value):
    """16-bit tensors are normalized in float32, in which s = γ/√(σ² + ε) may not be finite."""
    ours, theirs = pair(eps=1e-10)
    x = (torch.randn(SHAPES[nn.BatchNorm2d]) * 1e-3).bfloat16().requires_grad_()
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.weight[1] = 3e38 if value > 1 else value
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted, equal_nan=True)
    same_state(ours, theirs)


def test_eps_zero_in_evaluation():
    ours, theirs = pair(eps=0.0, training=False)
    (x,) = tensors(SHAPES[nn.BatchNorm2d], 1)
    torch.testing.assert_close(ours(x), theirs(x))
