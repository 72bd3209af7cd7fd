"""torch.compile of our layers, and PyTorch's checks of our operators."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import SHAPES, pair, tensors
from torch import nn
from torch.library import opcheck

from batchnorm.torch import _ops

SHAPE = SHAPES[nn.BatchNorm2d]
MODES = pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled by another test counts against the limit of recompilations."""
    torch._dynamo.reset()


class Block(nn.Module):
    """A layer of ours amid other operators."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, residual=None):
        return self.layer(x.sin(), residual) * 2


def step(block, inputs):
    """y, all gradients and the state after a step."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = block(*inputs)
    y.square().sum().backward()
    return [y, *(tensor.grad for tensor in inputs), *(p.grad for p in block.parameters()), *block.buffers()]


@MODES
@pytest.mark.parametrize(("activation", "count"), [(None, 1), ("relu", 2), ("relu6", 1)])
def test_compiled_steps_are_those_of_eager(training, activation, count):
    layer, _ = pair(activation=activation, training=training)
    eager, compiled = Block(layer), Block(copy.deepcopy(layer))
    # The operators stay whole, so that y differs only by what the compiler makes of sin.
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    wrapped = lambda *inputs: call(*inputs)  # noqa: E731
    wrapped.parameters, wrapped.buffers = compiled.parameters, compiled.buffers
    for _ in range(2):
        inputs = tensors(SHAPE, count)
        for one, other in zip(step(wrapped, inputs), step(eager, inputs), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


@MODES
def test_inductor(training):
    layer, _ = pair(activation="relu", training=training)
    eager, compiled = Block(layer), Block(copy.deepcopy(layer))
    compiled.compile(fullgraph=True)
    inputs = tensors(SHAPE, 2, order=torch.channels_last)
    for one, other in zip(step(compiled, inputs), step(eager, inputs), strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()


def test_dynamic_shapes():
    layer, _ = pair(activation="relu")
    eager, compiled = Block(layer), Block(copy.deepcopy(layer))
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5, 3):
        (x,) = tensors((rows, 5, rows + 1, 4), 1)
        torch.testing.assert_close(call(x), eager(x))
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


def test_what_is_compiled_is_our_operator():
    layer, _ = pair(activation="relu")
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(layer, fullgraph=True, backend=backend)(*tensors(SHAPE, 2))
    assert _ops.TRAIN in seen


def test_compiled_wholly_in_16_bits():
    """There is no kernel of ours for it."""
    ours, theirs = pair(dtype=torch.bfloat16)
    (x,) = tensors(SHAPE, 1, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), theirs(x))


def test_refusals_while_compiling():
    ours, _ = pair()
    with pytest.raises(Exception, match="expected 4D input"):
        torch.compile(ours, fullgraph=True, backend="eager")(torch.ones(2, 5))


def operands(grad):
    x, residual = tensors(SHAPE, 2, order=torch.channels_last, grad=grad)
    weight, bias = (torch.rand(5).requires_grad_(grad) for _ in range(2))
    return x, weight, bias, residual


@pytest.mark.parametrize("activation", [None, "relu6"], ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("grad", [True, False], ids=("grad", "no grad"))
class TestOpcheck:
    """PyTorch's checks of schema, autograd registration, fake kernel and compilation."""

    def test_train(self, grad, activation):
        x, weight, bias, residual = operands(grad)
        running = torch.zeros(5), torch.ones(5)
        opcheck(_ops.TRAIN, (x, weight, bias, residual, *running, 0.1, 1e-5, activation))
        opcheck(_ops.TRAIN, (x, None, None, None, None, None, 0.1, 1e-5, activation))

    def test_infer(self, grad, activation):
        x, weight, bias, residual = operands(grad)
        running = torch.zeros(5), torch.ones(5)
        opcheck(_ops.INFER, (x, weight, bias, residual, *running, 1e-5, activation))
        opcheck(_ops.INFER, (x, None, None, None, *running, 1e-5, activation))

    def test_backward(self, grad, activation):
        x, weight, bias, _ = operands(grad)
        (dy,) = tensors(SHAPE, 1)
        _, moments = _ops.TRAIN(x, None, None, None, None, None, 0.1, 1e-5, None)
        opcheck(_ops.BACKWARD, (dy, x, weight, bias, moments, 1e-5, activation))
        opcheck(_ops.BACKWARD, (dy, x, None, None, moments, 1e-5, activation))

    def test_infer_backward(self, grad, activation):
        x, weight, bias, _ = operands(grad)
        (dy,) = tensors(SHAPE, 1)
        running = torch.zeros(5), torch.ones(5)
        opcheck(_ops.INFER_BACKWARD, (dy, x, weight, bias, *running, 1e-5, activation))
        opcheck(_ops.INFER_BACKWARD, (dy, x, None, None, *running, 1e-5, activation))
