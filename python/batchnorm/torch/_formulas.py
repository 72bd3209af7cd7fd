"""The same results by PyTorch's own operators, where there is no kernel of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten: Any = torch.ops.aten


def composite(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    update_weight: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Do the same as `batch_norm` by PyTorch's operators, one after the other; TorchScript compiles this."""
    y = functional.batch_norm(x, running_mean, running_var, weight, bias, training, update_weight, eps)
    return epilogue(y, activation, residual)


def epilogue(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """Add the residual and apply the activation."""
    if residual is not None:
        y = torch.add(y, residual)
    if activation is not None:
        # ReLU6 as a module is hardtanh, and not the function relu6.
        y = functional.relu(y) if activation == "relu" else functional.hardtanh(y, 0.0, 6.0)
    return y


def native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    update_weight: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Return y as `composite` does, but without the checks of `torch.nn.functional`."""
    y: Tensor = aten.native_batch_norm(x, weight, bias, mean, var, training, update_weight, eps)[0]
    return epilogue(y, activation, residual)


def through(dy: Tensor, y: Tensor, activation: str) -> Tensor:
    """Return the gradient that passes the activation, which gave y."""
    if activation == "relu":
        passed: Tensor = aten.threshold_backward(dy, y, 0)
    else:
        passed = aten.hardtanh_backward(dy, y, 0, 6)
    return passed


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias; they can be differentiated once more.

    Args:
        dy: Gradient of what was normalized, before residual and activation.
        x: Input of the layer.
        weight: γ, or None.
        bias: β, or None.
        mean: Mean by which x was normalized, shape (channels,).
        var: Variance by which x was normalized, biased, shape (channels,).
        training: Whether mean and var are those of x.
        eps: ε.
    """
    wanted = [True, weight is not None, bias is not None]
    if training:
        precision = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, invstd = mean.to(precision), (var + eps).rsqrt().to(precision)
        results = aten.native_batch_norm_backward(dy, x, weight, None, None, mean, invstd, True, eps, wanted)
    else:
        none = mean.new_empty(0)
        results = aten.native_batch_norm_backward(dy, x, weight, mean, var, none, none, False, eps, wanted)
    dx, dweight, dbias = results
    return dx, dweight, dbias
