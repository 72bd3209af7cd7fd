"""Batch normalization as a function: our operators, or PyTorch's where there is no kernel of ours."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch._C import _increment_version as increment_version
from torch.compiler import is_compiling, is_exporting

from batchnorm.torch._formulas import composite
from batchnorm.torch._host import PLAIN, TYPES
from batchnorm.torch._ops import INFER, TRAIN, infer, infer_cpu, is_eager, train, train_cpu

# The dtype of the parameters that x of a dtype goes with.
PARAMETERS: Final = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


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
    compiling = is_compiling()
    if compiling:
        ours = not is_exporting() and _takes(x, weight, bias, residual, running_mean, running_var, training)
    else:
        ours = is_eager() and TYPES.takes(x, weight, bias, residual, running_mean, running_var, training)
    if not (ours and eps > 0.0):
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
    if training:
        args = x, weight, bias, residual, running_mean, running_var, update_weight, eps, activation
        y, _ = TRAIN(*args) if compiling else train(train_cpu, *args)
    else:
        given = x, weight, bias, residual, running_mean, running_var, eps, activation
        y = INFER(*given) if compiling else infer(infer_cpu, *given)
    return y


def count_batch(count: Tensor) -> None:
    """Add 1 to the number of batches, in place."""
    if not is_compiling() and is_eager() and TYPES.increment(count):
        increment_version((count,))
    else:
        count.add_(1)


def _takes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> bool:
    """Whether our operators take these tensors, which may have no memory, as while a compiler traces."""
    dtype = PARAMETERS.get(x.dtype)
    if dtype is None or not _is_plain(x) or x.dim() < 2 or x.numel() in (0, x.shape[1] if training else 0):
        return False
    if residual is not None and not (
        _is_plain(residual) and residual.dtype is x.dtype and residual.shape == x.shape
    ):
        return False
    running = [tensor for tensor in (running_mean, running_var) if tensor is not None]
    if len(running) not in ((0, 2) if training else (2,)) or any(tensor.requires_grad for tensor in running):
        return False
    channels = x.shape[1:2]
    for tensor in (*running, weight, bias):
        if tensor is not None and not (
            tensor.dtype is dtype
            and _is_plain(tensor)
            and tensor.shape == channels
            and tensor.is_contiguous()
        ):
            return False
    return True


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_nested
