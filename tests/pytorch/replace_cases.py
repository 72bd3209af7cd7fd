"""What the tests of `replace` share: results that are compared in whole, and a module with three parts."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def one_thread_in_float64():
    """Tensors are tiny, so threads would only wait; and in float64 a network does not magnify roundings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()


def run(model, x, seed=1):
    random.seed(seed)
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel()).view_as(y)).sum().backward()
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return y.detach(), gradients, [b.clone() for b in model.buffers()]


def assert_same(model, reference, x):
    """y, gradients and buffers agree, in both modes."""
    for mode in (True, False):
        model.train(mode), reference.train(mode)
        for seed in (1, 2):
            torch.testing.assert_close(run(model, x, seed), run(reference, x, seed), rtol=1e-7, atol=1e-9)
