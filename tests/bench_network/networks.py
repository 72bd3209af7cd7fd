"""A network in each variant: PyTorch's, ours, compiled, and the rest that stays without batch norm."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import fx, nn
from torch.nn import functional

import batchnorm.torch
from bench_network.rows import CHANNELS_LAST, COMPILED, FUSED, FUSED_COMPILED, OURS, PYTORCH, REST, Row

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6)
FUNCTIONS = (functional.relu, functional.relu_, functional.relu6, torch.relu, torch.relu_)
ADDITIONS = (operator.add, torch.add)  # torch.fx records += as +
CLASSES = 1000


class _Both(torch.autograd.Function):
    """One branch of two that were added: the gradient goes to both, as an addition passes it."""

    @staticmethod
    def forward(ctx: Any, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one.view_as(one)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dy, dy


def one_of_both(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What stands for an addition in the rest: it costs nothing, and the other branch is still trained."""
    return _Both.apply(one, other)


def tensors(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded images and classes."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(row.batch, 3, row.image, row.image, generator=made)
    return laid(x, row), torch.randint(0, CLASSES, (row.batch,), generator=made)


def laid(thing: Any, row: Row) -> Any:
    """A tensor or a network in the row's memory format."""
    last = row.memory == CHANNELS_LAST
    return thing.to(memory_format=torch.channels_last) if last else thing


def original(row: Row) -> nn.Module:
    """The network with seeded weights, the population statistics of its batch, and no dropout."""
    torch.manual_seed(0)
    model = laid(getattr(torchvision.models, row.network)(num_classes=CLASSES), row)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its random numbers are not those of the compiled form
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(tensors(row)[0])
    for norm in norms:
        norm.momentum = 0.1
    return model


def rest(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The network without batch norm, ReLU and additions, its weights scaled so that values stay about 1."""
    traced = fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, NORMS + ACTIVATIONS) or node.target in FUNCTIONS:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif node.target in ADDITIONS:
            node.target, node.kwargs = one_of_both, {}
    traced.delete_all_unused_submodules()
    traced.recompile()

    def scale(module: nn.Module, inputs: Any, y: torch.Tensor) -> torch.Tensor:
        deviation = y.std()
        module.weight.data /= deviation
        if module.bias is not None:
            module.bias.data /= deviation
        return y / deviation

    weighted = [m for m in traced.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(scale) for module in weighted]
    with torch.no_grad():
        traced(x)
    for hook in hooks:
        hook.remove()
    return traced


def made(variant: str, model: nn.Module, row: Row) -> nn.Module:
    """The variant of a network, in memory of its own."""
    model = copy.deepcopy(model)
    makers: dict[str, Callable[[], nn.Module]] = {
        PYTORCH: lambda: model,
        COMPILED: lambda: torch.compile(model),
        OURS: lambda: batchnorm.torch.replace(model, fuse=False)[0],
        FUSED: lambda: batchnorm.torch.replace(model, fuse=True)[0],
        FUSED_COMPILED: lambda: torch.compile(batchnorm.torch.replace(model, fuse=True)[0]),
        REST: lambda: rest(model, tensors(row)[0]),
    }
    return makers[variant]()


def step(model: nn.Module, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Forward, loss and backward, without an optimizer; gradients are made anew. Gives the loss."""
    model.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(model(x), classes)
    loss.backward()
    return loss.detach()


def evaluate(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output without gradients."""
    with torch.no_grad():
        return model(x)
