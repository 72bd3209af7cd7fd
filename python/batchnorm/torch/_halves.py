"""The halves of a training pass, between which SyncBatchNorm merges: by the core, or by PyTorch's operators.

x is dense; residual, dy, y, dx and dresidual have its shape, dtype and memory order. `moments` (count, mean,
M2) and `sums` (count, dγ, dβ) are float64 of shape (3, channels). Where the core refuses the value of a
parameter that PyTorch takes (a weight of NaN, say), PyTorch's operators do the same in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.torch._formulas import aten, epilogue
from batchnorm.torch._host import HOST
from batchnorm.torch._ops import TAKEN_BY_PYTORCH


class Pass(NamedTuple):
    """What a forward pass is given, and its backward pass needs."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    moments: Tensor
    eps: float
    activation: str | None


def moments_of(x: Tensor) -> Tensor:
    """Return the moments of x."""
    moments = x.new_empty((3, x.shape[1]), dtype=torch.float64)
    HOST.moments(x, moments, threads=torch.get_num_threads())
    return moments


def normalize(given: Pass) -> Tensor:
    """Return y."""
    y = torch.empty_like(given.x)
    _run(HOST.normalize, lambda: y.copy_(_y(given)), given, y)
    return y


def gradient_sums(dy: Tensor, given: Pass) -> Tensor:
    """Return dγ and dβ, with the number of values that they are over."""
    sums = torch.empty_like(given.moments)
    _run(HOST.gradient_sums, lambda: sums.copy_(_sums(dy, given)), given, sums, dy=dy)
    return sums


def gradient_apply(dy: Tensor, given: Pass, sums: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return dx, and dresidual where there is a residual."""
    dx = torch.empty_like(given.x)
    dresidual = None if given.residual is None else torch.empty_like(given.x)

    def by_pytorch() -> None:
        passed, value = _dx(dy, given, sums)
        dx.copy_(value)
        if dresidual is not None:
            dresidual.copy_(passed)

    _run(HOST.gradient_apply, by_pytorch, given, sums, dx, dresidual, dy=dy)
    return dx, dresidual


def _run(
    host_pass: Callable[..., None],
    by_pytorch: Callable[[], object],
    given: Pass,
    *rest: Tensor | None,
    dy: Tensor | None = None,
) -> None:
    *tensors, eps, activation = given
    first = () if dy is None else (dy,)
    try:
        host_pass(*(*first, *tensors, *rest), threads=torch.get_num_threads(), eps=eps, activation=activation)
    except ValueError as error:
        if getattr(error, "kind", None) not in TAKEN_BY_PYTORCH:
            raise
        by_pytorch()


# PyTorch's operators, in float64.


def _by_channel(x: Tensor, values: Tensor) -> Tensor:
    return values.double().view(-1, *(1,) * (x.dim() - 2))


def _normalized(given: Pass) -> tuple[Tensor, Tensor]:
    """x̂, and γ/√(σ²+ε) by channel."""
    count, mean, m2 = (_by_channel(given.x, row) for row in given.moments)
    invstd = (m2 / count + given.eps).rsqrt()
    scale = invstd if given.weight is None else invstd * _by_channel(given.x, given.weight)
    return (given.x - mean) * invstd, scale


def _y(given: Pass) -> Tensor:
    y, _ = _normalized(given)
    if given.weight is not None:
        y = y * _by_channel(given.x, given.weight)
    if given.bias is not None:
        y = y + _by_channel(given.x, given.bias)
    return epilogue(y, given.activation, given.residual)


def _passed(dy: Tensor, given: Pass) -> Tensor:
    """The gradient that passes the activation."""
    if given.activation is None:
        return dy.double()
    y = _y(given).to(dy.dtype)
    limits = (0,) if given.activation == "relu" else (0, 6)
    backward = aten.threshold_backward if given.activation == "relu" else aten.hardtanh_backward
    passed: Tensor = backward(dy, y, *limits)
    return passed.double()


def _sums(dy: Tensor, given: Pass) -> Tensor:
    x, passed = given.x, _passed(dy, given)
    over = [axis for axis in range(x.dim()) if axis != 1]
    dgamma, dbeta = (passed * _normalized(given)[0]).sum(over), passed.sum(over)
    return torch.stack((torch.full_like(dbeta, x.numel() // x.shape[1]), dgamma, dbeta))


def _dx(dy: Tensor, given: Pass, sums: Tensor) -> tuple[Tensor, Tensor]:
    count, dgamma, dbeta = (_by_channel(given.x, row) for row in sums)
    (normalized, scale), passed = _normalized(given), _passed(dy, given)
    return passed, scale * (passed - dbeta / count - normalized * dgamma / count)
