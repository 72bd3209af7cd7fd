"""A network trained with our layers follows the same network with PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import batchnorm.torch as bt


def with_our_layers(model):
    """A copy of the model in which each BatchNorm2d is ours, in the same state."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d:
            ours = bt.BatchNorm2d(module.num_features, dtype=module.weight.dtype)
            ours.load_state_dict(module.state_dict())
            model.set_submodule(name, ours)
    return model


def losses(model, batches, rate):
    """Losses of training steps of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    found = []
    for x, target in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


# At a usual rate rounding grows tenfold every step or two (a ReLU flips, and a gradient with it): after ten
# steps PyTorch in float32 is some percent off PyTorch in float64. So float32 is compared at a small rate, and
# with more values a channel.
@pytest.mark.parametrize(
    ("dtype", "rate", "size", "order"),
    [
        (torch.float64, 1e-2, 32, torch.contiguous_format),
        (torch.float32, 1e-5, 64, torch.contiguous_format),
        (torch.float32, 1e-5, 64, torch.channels_last),
    ],
    ids=str,
)
def test_resnet_18_follows_pytorch(dtype, rate, size, order):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=10).to(dtype=dtype, memory_format=order)
    ours = with_our_layers(theirs)
    assert sum(type(module) is bt.BatchNorm2d for module in ours.modules()) == 20
    batches = [(torch.randn(8, 3, size, size), torch.randint(10, (8,))) for _ in range(20)]
    batches = [(x.to(dtype=dtype, memory_format=order), target) for x, target in batches]
    wanted, got = losses(theirs, batches, rate), losses(ours, batches, rate)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if dtype is torch.float64:
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
