"""SyncBatchNorm: the batches of all processes of a group are normalized as one, on CPU.

Forward gathers the Moments of each rank's share and merges them in rank order. Backward gathers the sums
Σdy·x̂ and Σdy and adds them in rank order. So all ranks compute with the same bits, and no rank sends x.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional

from batchnorm._core import Moments
from batchnorm.torch._formulas import epilogue
from batchnorm.torch._halves import Pass, gradient_apply, gradient_sums, moments_of, normalize
from batchnorm.torch._layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer


class SyncBatchNorm(Layer):
    """Batch norm over the batches of all processes of a group as one batch, on CPU, which PyTorch's refuses.

    In training y, dx and the running statistics are those of one process that has the whole batch, however
    unequal the shares are; a share may be empty. Statistics and gradient sums have the same bits on all
    ranks. `weight.grad` and `bias.grad` are the rank's own share, as `DistributedDataParallel` expects them.

    In forward each rank sends three float64 numbers a channel (24 bytes) to each other rank, and in backward
    as many. Backward sends nothing if no rank wants a gradient of its input. In evaluation, in a group of one
    and without an initialized process group nothing is sent, and the layer does what `BatchNorm2d` does.

    All ranks of the group must run the same layers in the same order, forward and backward. If one of them
    dies or does not take part, the others get the RuntimeError of the communication, at the latest after the
    time-out of the group. There are no second derivatives between processes.

    Args:
        num_features: Channels of the input, C.
        eps: ε, which is added to the variance.
        momentum: Weight of the new value in the running statistics; None for the mean over all batches.
        affine: Whether the layer has γ and β.
        track_running_stats: Whether the layer has running statistics.
        process_group: The group whose ranks are synchronized; None for all ranks.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        bias: Whether the layer has β.
        activation: What is applied after normalization: "relu", "relu6" or None.

    Raises:
        ValueError: activation is another value.
    """

    process_group: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize the input, add the residual, apply the activation.

        Args:
            input: This rank's share of the batch, shape (N, C, ...); N may be 0.
            residual: Tensor of the same shape that is added before the activation.

        Returns:
            Tensor with the shape, dtype and memory order of the input.

        Raises:
            ValueError: The input has fewer than 2 axes or no channels; or, on every rank, the whole batch has
                one value a channel.
            RuntimeError: As PyTorch's layers raise it; or the communication failed.
        """
        group = self._group()
        if group is None:
            return super().forward(input, residual)
        self._check_input_dim(input)
        return self._synchronized(input, residual, group)

    def _group(self) -> Any:
        """The group whose ranks share a batch; None where there is nothing to synchronize."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    @_disable_dynamo  # as torch.compiler.disable, which would import the compiler at once
    def _synchronized(self, x: Tensor, residual: Tensor | None, group: Any) -> Tensor:
        self._check(x)
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            return epilogue(self._normalized(x, None, None, group), self.activation, residual)
        return self._normalized(x, residual, self.activation, group)

    @torch.no_grad()
    def _check(self, x: Tensor) -> None:
        """Raise PyTorch's errors of dtypes and numbers of channels, before anything is sent."""
        if not x.is_cpu:
            raise ValueError(
                f"the input is on {x.device}; SyncBatchNorm of batchnorm.torch wants it on the CPU"
            )
        running = (self.running_mean, self.running_var)
        zeros = x.new_zeros((2, x.shape[1]))
        functional.batch_norm(zeros, *running, self.weight, self.bias, training=self.running_mean is None)

    def _normalized(self, x: Tensor, residual: Tensor | None, activation: str | None, group: Any) -> Tensor:
        x = laid_as(x, torch.empty_like(x))
        if residual is not None:
            residual = laid_as(residual, x)
        # Without an activation, the gradient of the residual needs nothing of the other ranks.
        asked = (x,) if activation is None or residual is None else (x, residual)
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in asked)
        moments, wanted = _gather_moments(x, group, wanted)
        count = int(moments[0, 0])
        if count == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got 1 on all ranks together "
                f"(input size {x.size()} on this one)"
            )
        # If any rank wants a gradient of its x, all take part in backward: y of each wants a gradient then.
        joins = x.new_empty(0).requires_grad_() if wanted else None
        weight, bias = (_wide(parameter) for parameter in (self.weight, self.bias))
        y: Tensor = _Normalize.apply(group, joins, x, weight, bias, residual, moments, self.eps, activation)
        if self.track_running_stats:
            self._track(moments, count)
        return y

    @torch.no_grad()
    def _track(self, moments: Tensor, count: int) -> None:
        """Count the batch, and let its statistics enter the running ones unless it is empty."""
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        if count == 0:
            return
        update_weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        _, mean, m2 = moments
        for running, new in (self.running_mean, mean), (self.running_var, m2 / (count - 1)):
            running.copy_(running.double() * (1 - update_weight) + new * update_weight)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Put a SyncBatchNorm in the place of every batch norm layer of a module.

        Converted are layers of exactly PyTorch's types `BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d` and
        `SyncBatchNorm`, and of those of this package, which keep their activation. The new layers share
        parameters, buffers and hooks with the old ones. A layer with several names becomes one layer. A layer
        whose `forward` was overwritten is left as it is.

        Args:
            module: Changed in place, unless it is itself a batch norm layer.
            process_group: The group of the new layers; None for all ranks.

        Returns:
            The module; the new layer if the module is itself a batch norm layer.
        """
        converted: dict[nn.Module, nn.Module] = {}
        for layer in module.modules():
            if type(layer) in PYTORCHS | OURS and "forward" not in vars(layer):
                new = cls.__new__(cls)
                own = {name: vars(layer)[name].copy() for name in ("_parameters", "_buffers")}
                new.__dict__ = vars(layer) | own
                new.process_group, new.activation = process_group, getattr(layer, "activation", None)
                converted[layer] = new
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if child in converted:
                    setattr(parent, name, converted[child])
        return converted.get(module, module)


PYTORCHS: Final = frozenset((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
OURS: Final = frozenset((BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm))


class _Normalize(torch.autograd.Function):
    """Normalizes a share by the moments of the whole batch; backward gathers the gradient sums."""

    @staticmethod
    def forward(ctx: Any, group: Any, joins: Tensor | None, *given: Any) -> Tensor:
        """Return y, and save what backward needs."""
        whole = Pass(*given)
        # Without an activation the gradient of the residual is dy.
        *tensors, eps, activation = whole if whole.activation else whole._replace(residual=None)
        ctx.save_for_backward(*tensors)
        ctx.sends, ctx.group, ctx.settings = joins is not None, group, (eps, activation)
        return normalize(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: SyncBatchNorm has no second derivatives between processes")
        given = Pass(*ctx.saved_tensors, *ctx.settings)
        _, _, of_x, of_weight, of_bias, of_residual, *_ = ctx.needs_input_grad
        (dy,) = grads
        dy = laid_as(dy, given.x)
        dx, dresidual = None, dy
        sums = gradient_sums(dy, given)
        if ctx.sends:
            whole = reduce(torch.add, _gather(sums, ctx.group))
            dx, passed = gradient_apply(dy, given, whole)
            dresidual = dy if passed is None else passed
        (_, dgamma, dbeta), (_, weight, bias, *_) = sums, given
        return (
            None,
            None,
            dx if of_x else None,
            dgamma.to(weight.dtype) if weight is not None and of_weight else None,
            dbeta.to(bias.dtype) if bias is not None and of_bias else None,
            dresidual if of_residual else None,
            *(None, None, None),
        )


def laid_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor in the memory order of another one: a copy where it has a different one."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _wide(parameter: Tensor | None) -> Tensor | None:
    """The parameter as the core takes it: contiguous, of 32 or 64 bits."""
    if parameter is None:
        return None
    return (parameter.float() if parameter.itemsize == 2 else parameter).contiguous()


def _gather(table: Tensor, group: Any) -> Tensor:
    """The float64 tables of all ranks: shape (ranks, 3, channels)."""
    ranks = dist.get_world_size(group)
    tables = table.new_empty((ranks * table.shape[0], table.shape[1]))
    dist.all_gather_into_tensor(tables, table, group=group)
    return tables.view(ranks, *table.shape)


def _gather_moments(x: Tensor, group: Any, wanted: bool) -> tuple[Tensor, bool]:
    """The moments of the whole batch, and whether any rank wants a gradient of its x."""
    moments = moments_of(x)
    if wanted:  # is told by the sign of the counts, which zero has too
        moments[0].neg_()
    tables = _gather(moments, group)
    wanted = bool(tables[:, 0].signbit().any())
    tables[:, 0].abs_()
    whole = reduce(Moments.merge, (Moments(*table) for table in tables.numpy()))
    return torch.from_numpy(np.stack((whole.count, whole.mean, whole.m2))), wanted
