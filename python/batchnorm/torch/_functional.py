"""Batch normalization as a function: our operators, or PyTorch's where there is no kernel of ours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    update_weight: float,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalize x, add the residual, apply the activation.

    Args:
        x: Tensor of rank 2 or more, whose axis 1 is that of the channels.
        running_mean: Shape (channels,): updated in training, taken as the mean in evaluation. None in
            training if nothing is to be updated.
        running_var: The same for the variance.
        weight: γ, shape (channels,); ones if None.
        bias: β, shape (channels,); zeros if None.
        training: Whether x is normalized by its own statistics.
        update_weight: Weight of the new statistics in the running ones (PyTorch's momentum).
        eps: ε, which is added to the variance.
        activation: "relu", "relu6" or None.
        residual: Tensor that is added before the activation; None for none.

    Returns:
        y, with the shape, dtype and memory order of x.

    Raises:
        ValueError, RuntimeError: As `torch.nn.functional.batch_norm` raises them.
    """
    return composite(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training=training,
        update_weight=update_weight,
        eps=eps,
        activation=activation,
        residual=residual,
    )


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
    """Do the same as `batch_norm` by PyTorch's own operators, one after the other."""
    y = functional.batch_norm(x, running_mean, running_var, weight, bias, training, update_weight, eps)
    return epilogue(y, activation, residual)


def epilogue(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """Add the residual and apply the activation by PyTorch's own operators."""
    if residual is not None:
        y = torch.add(y, residual)
    if activation is not None:
        y = functional.relu(y) if activation == "relu" else functional.relu6(y)
    return y
