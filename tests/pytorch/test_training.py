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
            ours = bt.BatchNorm2d(module.num_features, module.eps, module.momentum)
            ours.load_state_dict(module.state_dict())
            model.set_submodule(name, ours)
    return model


def losses(model, batches, order):
    """Losses of training steps of SGD with momentum."""
    model = model.to(memory_format=order)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    found = []
    for x, target in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x.to(memory_format=order)), target)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_resnet_18_follows_pytorch(order):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=10)
    ours = with_our_layers(theirs)
    assert sum(type(module) is bt.BatchNorm2d for module in ours.modules()) == 20
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(20)]
    wanted, got = losses(theirs, batches, order), losses(ours, batches, order)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-2, atol=1e-2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
