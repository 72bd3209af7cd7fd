"""What tests of the layers share: PyTorch's layer beside ours, and its composition with other operators."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import batchnorm.torch as bt

OURS = {nn.BatchNorm1d: bt.BatchNorm1d, nn.BatchNorm2d: bt.BatchNorm2d, nn.BatchNorm3d: bt.BatchNorm3d}
SHAPES = {nn.BatchNorm1d: (6, 5, 7), nn.BatchNorm2d: (4, 5, 3, 6), nn.BatchNorm3d: (3, 5, 2, 3, 4)}
ACTIVATIONS = (None, "relu", "relu6")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def parameters_of(dtype):
    """The dtype of the parameters that go with x of a dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def pair(kind=nn.BatchNorm2d, *args, activation=None, training=True, **kwargs):
    """Ours and PyTorch's layer in the same state, with parameters and statistics that tell channels apart."""
    theirs = kind(*(args or (5,)), **kwargs)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
    ours = OURS[kind](*(args or (5,)), activation=activation, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def composed(layer, activation, x, residual=None):
    """What a layer of ours gives, by a layer of PyTorch and PyTorch's operators."""
    y = layer(x)
    if residual is not None:
        y = y + residual
    return {None: lambda v: v, "relu": functional.relu, "relu6": functional.relu6}[activation](y)


def tensors(shape, count, *, dtype=torch.float32, order=torch.contiguous_format, grad=True):
    """Some random tensors; with x around 1, so that relu6 cuts on both sides."""
    made = (torch.randn(shape, dtype=torch.float64) * 3 + 1 for _ in range(count))
    return [tensor.to(dtype).contiguous(memory_format=order).requires_grad_(grad) for tensor in made]


def is_ours(y):
    """Whether y, which requires grad, comes from our operators."""
    return y.grad_fn.name().startswith("BatchNorm")
