"""Derivatives of our layers: first and second, in every mode of autograd, and what autograd checks."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from layer_cases import ACTIVATIONS, SHAPES, composed, is_ours, pair, tensors
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

MODES = pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
SHAPE = SHAPES[nn.BatchNorm2d]
SMALL = (2, 2, 2, 3)


def function_of(layer):
    """The layer as a function of x, weight, bias and, if given, the residual; its buffers stay."""

    def function(x, weight, bias, *residual):
        state = {"weight": weight, "bias": bias}
        return functional_call(copy.deepcopy(layer), state, (x, *residual))

    return function


def arguments(count=1, shape=SMALL):
    """x, weight and bias in float64, and a residual if count is 2, away from the kinks of the activations."""
    x, *residual = tensors(shape, count, dtype=torch.float64)
    weight, bias = (torch.rand(shape[1], dtype=torch.float64) + 0.5 for _ in range(2))
    return x, weight.requires_grad_(), bias.requires_grad_(), *residual


@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("count", [1, 2], ids=("alone", "residual"))
def test_first_and_second_derivatives(training, activation, count):
    layer, _ = pair(nn.BatchNorm2d, 2, activation=activation, training=training, dtype=torch.float64)
    function, inputs = function_of(layer), arguments(count)
    assert is_ours(function(*inputs))
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@MODES
@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
def test_a_penalty_on_gradients(training, activation):
    """create_graph=True in float32, through the layer and back into it."""
    layers = pair(activation=activation, training=training)
    x, dy = tensors(SHAPE, 2)
    results = []
    for layer, call in zip(
        layers, (lambda v: layers[0](v), lambda v: composed(layers[1], activation, v)), strict=True
    ):
        (dx,) = torch.autograd.grad(call(x), x, dy, create_graph=True)
        loss, inputs = dx.square().sum(), [x, dy, layer.weight]
        results.append(torch.autograd.grad(loss, inputs, materialize_grads=True))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@MODES
@pytest.mark.parametrize("alone", ["x", "weight", "bias", "residual", None])
@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
def test_gradients_of_each_alone(training, alone, activation):
    ours, theirs = pair(activation=activation, training=training)
    x, residual = tensors(SHAPE, 2, grad=False)
    results = []
    for layer, call in ((ours, ours), (theirs, lambda *args: composed(theirs, activation, *args))):
        layer.requires_grad_(False)
        wanted = {"x": x, "residual": residual, "weight": layer.weight, "bias": layer.bias}
        for tensor in wanted.values():
            tensor.requires_grad_(False)
        if alone is None:
            assert not call(x, residual).requires_grad
            continue
        wanted[alone].requires_grad_()
        y = call(x, residual)
        results.append(torch.autograd.grad(y.square().sum(), wanted[alone])[0])
    if alone is not None:
        torch.testing.assert_close(*results)


@MODES
def test_no_graph_where_none_is_wanted(training):
    ours, theirs = pair(training=training)
    (x,) = tensors(SHAPE, 1)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y, wanted = ours(x), theirs(x)
        assert not y.requires_grad
        assert y.is_inference() == wanted.is_inference()
        torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_a_layer_made_in_inference_mode():
    with torch.inference_mode():
        ours, theirs = pair()
        (x,) = tensors(SHAPE, 1, grad=False)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("changed", ["x", "y", "weight", "running_mean", "running_var"])
@MODES
def test_a_change_in_place_after_forward_is_caught(changed, training):
    layer, _ = pair(activation="relu", training=training)
    x, residual = (tensor * 1 for tensor in tensors(SHAPE, 2))
    y = layer(x, residual)
    with torch.no_grad():
        {"x": x, "y": y}.get(changed, getattr(layer, changed, None)).add_(1)
    if training and changed.startswith("running"):
        y.sum().backward()  # normalized by its own statistics
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@MODES
def test_the_residual_is_not_kept(training):
    """As in PyTorch: its memory is free after the forward pass, and may be written to."""
    ours, theirs = pair(activation="relu", training=training)
    x, residual = tensors(SHAPE, 2)
    gradients = []
    for call in (ours, lambda *args: composed(theirs, "relu", *args)):
        inner = residual * 1
        watched = weakref.ref(inner)
        y = call(x, inner)
        with torch.no_grad():
            inner.add_(1)
        del inner
        gc.collect()
        assert watched() is None
        gradients.append(torch.autograd.grad(y.square().sum(), [x, residual]))
    torch.testing.assert_close(*gradients)


def test_an_update_of_the_running_statistics_is_a_change_in_place():
    """An eval pass, a training pass, then backward of the first: PyTorch's gradient is wrong there."""
    layer, _ = pair(training=False)
    (x,) = tensors(SHAPE, 1)
    y = layer(x)
    versions = layer.running_mean._version, layer.running_var._version
    layer.train()(x)
    assert layer.running_mean._version > versions[0]
    assert layer.running_var._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_y_may_be_changed_in_place():
    """As ReLU(inplace=True) does after a layer without an activation."""
    ours, theirs = pair()
    (x,) = tensors(SHAPE, 1)
    gradients = [torch.autograd.grad(layer(x).relu_().sum(), x)[0] for layer in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_backward_twice():
    layer, _ = pair(activation="relu")
    (x,) = tensors(SHAPE, 1)
    y = layer(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_hooks_see_each_gradient_once():
    layer, _ = pair(activation="relu")
    (x,) = tensors(SHAPE, 1)
    seen = []
    inner = x * 1
    inner.register_hook(lambda gradient: seen.append("x"))
    layer.weight.register_hook(lambda gradient: seen.append("weight"))
    y = layer(inner)
    torch.autograd.grad(y.square().sum(), [x, layer.weight], create_graph=True)
    assert sorted(seen) == ["weight", "x"]


@pytest.mark.parametrize("with_activation", [False, True])
def test_backward_releases_what_forward_saved(with_activation):
    """Memory of x is free for the gradients of the layers before, as in PyTorch."""
    layer, _ = pair(activation="relu" if with_activation else None)
    leaf, residual = tensors(SHAPE, 2)
    inner = leaf * 1  # a view of it lets its storage be watched
    watched = weakref.ref(inner)
    y = layer(inner, residual)
    del inner
    gc.collect()
    assert watched() is not None
    seen = []
    leaf.register_hook(lambda gradient: seen.append(watched()))
    y.sum().backward()
    assert seen == [None]  # released before the backward pass came to the operator before


def test_saved_tensor_hooks_see_x_itself():
    layer, _ = pair(activation="relu")
    x, residual = tensors(SHAPE, 2)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = layer(x, residual)
    large = {tensor.data_ptr() for tensor in packed if tensor.numel() > 15}
    assert large == {x.data_ptr(), y.data_ptr()}
    assert sum(tensor.nbytes for tensor in packed if tensor.numel() <= 15) <= 5 * (24 + 4 + 4)


def test_checkpointing():
    ours, theirs = pair()
    (x,) = tensors(SHAPE, 1)
    results = []
    for layer in (ours, theirs):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        results.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
class TestTransforms:
    """PyTorch's operators take the place of ours."""

    def layers(self, activation):
        return pair(activation=activation, training=False)

    def test_grad(self, activation):
        ours, theirs = self.layers(activation)
        (x,) = tensors(SHAPE, 1, grad=False)
        got = torch.func.grad(lambda v: ours(v).square().sum())(x)
        torch.testing.assert_close(
            got, torch.func.grad(lambda v: composed(theirs, activation, v).square().sum())(x)
        )

    def test_vmap(self, activation):
        ours, theirs = self.layers(activation)
        (x,) = tensors((3, *SHAPE), 1, grad=False)
        torch.testing.assert_close(
            torch.vmap(ours)(x), torch.vmap(lambda v: composed(theirs, activation, v))(x)
        )

    def test_jvp(self, activation):
        ours, theirs = self.layers(activation)
        x, tangent = tensors(SHAPE, 2, grad=False)
        got = torch.func.jvp(ours, (x,), (tangent,))
        torch.testing.assert_close(
            got, torch.func.jvp(lambda v: composed(theirs, activation, v), (x,), (tangent,))
        )

    def test_dual_numbers(self, activation):
        ours, theirs = self.layers(activation)
        x, tangent = tensors(SHAPE, 2, grad=False)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            got, wanted = (
                forward_ad.unpack_dual(ours(dual)),
                forward_ad.unpack_dual(composed(theirs, activation, dual)),
            )
        assert got.tangent is not None
        torch.testing.assert_close(tuple(got), tuple(wanted))

    def test_jacobian_by_vmap_over_backward(self, activation):
        """The graph is ours, its backward runs under vmap."""
        ours, theirs = self.layers(activation)
        (x,) = tensors((2, 5, 1, 2), 1, grad=False)
        got = torch.autograd.functional.jacobian(ours, x, vectorize=True)
        torch.testing.assert_close(
            got, torch.autograd.functional.jacobian(lambda v: composed(theirs, activation, v), x)
        )
