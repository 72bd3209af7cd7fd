"""BatchNorm1d, BatchNorm2d and BatchNorm3d: PyTorch's layers, computed by our operators."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.torch._formulas import composite
from batchnorm.torch._functional import batch_norm, count_batch

ACTIVATIONS: Final = (None, "relu", "relu6")


class Layer(_BatchNorm):
    """What our layers have over PyTorch's: an activation, and a residual in forward.

    Args:
        *args: Those of PyTorch's layer.
        activation: What is applied after normalization: "relu", "relu6" or None.
        **kwargs: Those of PyTorch's layer.

    Raises:
        ValueError: activation is another value.
    """

    __constants__ = [*_BatchNorm.__constants__, "activation"]  # noqa: RUF012
    activation: str | None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f'activation must be None, "relu" or "relu6", but is {activation!r}')
        super().__init__(*args, **kwargs)
        self.activation = activation

    def extra_repr(self) -> str:
        """Return PyTorch's text for the layer, and the activation where it has one."""
        text = str(super().extra_repr())  # type: ignore[no-untyped-call]
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize the input, add the residual, apply the activation.

        Args:
            input: Tensor of the rank that the layer is for, whose axis 1 is that of the channels.
            residual: Tensor of the same shape that is added before the activation.

        Returns:
            Tensor with the shape, dtype and memory order of the input.

        Raises:
            ValueError, RuntimeError: As PyTorch's layer raises them.
        """
        if is_scripting():
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            return self._scripted(input, residual)
        return self._run(input, residual, self.activation)

    def _scripted(self, input: Tensor, residual: Tensor | None) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        return composite(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            training=batch_statistics,
            update_weight=factor,
            eps=self.eps,
            activation=self.activation,
            residual=residual,
        )

    @torch.jit.unused
    def _run(self, input: Any, residual: Tensor | None, activation: str | None) -> Tensor:
        tracer = input.tracer if isinstance(input, Proxy) else None
        if tracer is None:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
        training, momentum = self.training, self.momentum
        tracked = self.track_running_stats or not training
        parameters, buffers = self._parameters, self._buffers
        count: Any
        try:  # where `nn.Module.__getattr__` finds them, too, after several calls for each
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
            count = buffers["num_batches_tracked"]
        except KeyError:  # parametrized, pruned or deleted
            weight, bias = self.weight, self.bias
            mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
            count = self.num_batches_tracked if training and tracked else None
        factor = 0.0 if momentum is None else momentum
        if not tracked:
            mean = var = None
        elif training and count is not None:
            if tracer is not None:  # recorded, not done
                count = tracer.create_proxy("call_method", "add_", (count, 1), {})
            else:
                count_batch(count)
            if momentum is None:
                factor = 1.0 / count.item()
        function = batch_norm if tracer is None else composite
        return function(
            input,
            mean,
            var,
            weight,
            bias,
            training=training or (mean is None and var is None),
            update_weight=factor,
            eps=self.eps,
            activation=activation,
            residual=residual,
        )


class BatchNorm1d(Layer, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for inputs of shape (N, C) or (N, C, L), with an activation and a residual.

    Args:
        *args: Those of `torch.nn.BatchNorm1d`.
        activation: What is applied after normalization: "relu", "relu6" or None.
        **kwargs: Those of `torch.nn.BatchNorm1d`.
    """


class BatchNorm2d(Layer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for inputs of shape (N, C, H, W), with an activation and a residual.

    Args:
        *args: Those of `torch.nn.BatchNorm2d`.
        activation: What is applied after normalization: "relu", "relu6" or None.
        **kwargs: Those of `torch.nn.BatchNorm2d`.
    """


class BatchNorm3d(Layer, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for inputs of shape (N, C, D, H, W), with an activation and a residual.

    Args:
        *args: Those of `torch.nn.BatchNorm3d`.
        activation: What is applied after normalization: "relu", "relu6" or None.
        **kwargs: Those of `torch.nn.BatchNorm3d`.
    """
