"""The trainable layer `BatchNorm`: parameters, population statistics, train and eval mode."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from numpy.typing import DTypeLike, NDArray

from batchnorm import _core
from batchnorm._trainable import Trainable
from batchnorm._types import Gradients
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.population import MovingAverage, Population


class _TrainingCache(NamedTuple):
    """The cache of a forward pass in train mode, with the same `backward` method as that of eval mode."""

    cache: _core.Cache

    def backward(self, dy: Any, *, dresidual: NDArray[Any] | None = None) -> Gradients:
        return _core.backward(dy, self.cache, dresidual=dresidual)


class BatchNorm(Trainable[Population]):
    """Batch normalization with trainable γ, β and an estimate of the population (Ioffe and Szegedy 2015).

    A new layer is in train mode: a call normalizes by the statistics of the batch (Algorithm 1) and updates
    `population` with them. In eval mode a call normalizes by the population statistics. It then uses the
    parameters as `freeze` rounds them, so that the output has exactly the bits of the frozen layer's.

    Args:
        channels: Number of channels.
        eps: ε, added to the variance; finite and positive. Train mode uses it as given, eval mode rounded to
            float32.
        affine: Whether there are γ and β; without them `gamma`, `beta` and their gradients are None.
        dtype: dtype of γ, β and their gradients: float32 (for x of 16 or 32 bits) or float64 (for float64 x).
        channel_axis: Axis of x that holds the channels; -1 is channels-last.
        population: Estimator of E[x] and Var[x]; if None, a new `MovingAverage(update_weight=0.1)`.

    Attributes:
        channels: Number of channels.
        eps: ε, as passed in.
        channel_axis: Axis of the channels, as passed in.
        dtype: The NumPy dtype of the parameters.
        training: Whether the layer is in train mode; set by `train()` and `eval()`.
        grad_gamma: ∂ℓ/∂γ of the last `backward`, shape (channels,), `dtype`; None before it.
        grad_beta: ∂ℓ/∂β of the last `backward`, shape (channels,), `dtype`; None before it.

    Raises:
        ValueError: A value is out of its range.
        TypeError: An argument is of a wrong type, or the population is not an estimator.

    Example:
        >>> import numpy as np
        >>> import batchnorm as bn
        >>> layer = bn.BatchNorm(2)
        >>> x = np.array([[1, 10], [3, 30]], dtype=np.float32)
        >>> layer(x).round(3).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
        >>> dx = layer.backward(np.ones_like(x))
        >>> layer.gamma -= 0.1 * layer.grad_gamma
        >>> layer.eval()(x).shape
        (2, 2)
    """

    _STATISTICS = ("mean", "var")

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: DTypeLike = "float32",
        channel_axis: int = 1,
        population: Population | None = None,
    ) -> None:
        super().__init__(
            channels,
            eps=eps,
            affine=affine,
            dtype=dtype,
            channel_axis=channel_axis,
            population=MovingAverage(update_weight=0.1) if population is None else population,
        )
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps: was {eps!r}, wanted a finite number > 0")

    def __call__(
        self, x: Any, activation: Literal["relu", "relu6"] | None = None, residual: Any | None = None
    ) -> NDArray[Any]:
        """Normalize a batch: y = activation(γ·x̂ + β + residual), rounded once.

        The layer keeps what `backward` needs, x and residual by reference. Activation and residual belong to
        this call, not to the layer: a frozen layer has neither.

        Args:
            x: Array of rank 2 or more with `channels` entries on `channel_axis`; float16, bfloat16 or
                float32 for a float32 layer, float64 for a float64 layer.
            activation: None, "relu" or "relu6".
            residual: Array of x's shape and dtype that is added before the activation.

        Returns:
            y, of the shape, dtype and memory order of x.

        Raises:
            ValueError: The number of channels, the activation or the residual's shape is wrong; in train mode
                also if channels (named) have non-finite statistics or fewer than 2 values; in eval mode also
                if the population is not ready. Nothing is changed then.
            TypeError: A layer of this dtype does not take x of its dtype.
        """
        if not self.training:
            frozen = self._kept(self.freeze, self.eps, self.channel_axis)
            y, self._cache = frozen._forward(x, activation, residual)
            return y
        x = self._batch(x)
        y, cache = _core.train_forward(
            x,
            self.gamma,
            self.beta,
            eps=self.eps,
            channel_axis=self.channel_axis,
            activation=activation,
            residual=residual,
        )
        moments = cache.moments
        self.population.update(moments)
        self._cache = _TrainingCache(cache)
        self._observe(x, moments)
        return y

    def backward(self, dy: Any, dresidual: NDArray[Any] | None = None) -> NDArray[Any]:
        """Compute the gradients of the last forward pass; overwrites `grad_gamma` and `grad_beta`.

        If that pass ran in train mode, the gradient passes through the batch statistics (section 3 of the
        paper); if in eval mode, the statistics are constants. It may be called again for the same forward
        pass.

        Args:
            dy: ∂ℓ/∂y, of y's shape and dtype.
            dresidual: Array of x's shape, dtype and memory order to write ∂ℓ/∂residual to, if there was a
                residual; may be dy itself.

        Returns:
            ∂ℓ/∂x, of the shape, dtype and memory order of x.

        Raises:
            RuntimeError: There was no forward pass.
            ValueError: dy has another shape than y, or dresidual is given but there was no residual.
            TypeError: dy has another dtype than y.
        """
        return self._backward(dy, dresidual=dresidual)

    def freeze(self, dtype: DTypeLike | None = None) -> FrozenBatchNorm:
        """Return the layer as a `FrozenBatchNorm`: γ, β, E[x], Var[x] and ε, rounded once.

        Args:
            dtype: dtype of the frozen parameters, float32 or float64; if None, that of this layer.

        Raises:
            ValueError: The population is not ready or has another number of channels, or rounding makes a
                parameter invalid.
        """
        self._check_shapes(self.population, "population: shape was")
        return FrozenBatchNorm(
            self.population.mean,
            self.population.var,
            self.gamma,
            self.beta,
            eps=self.eps,
            channel_axis=self.channel_axis,
            dtype=self.dtype if dtype is None else dtype,
        )

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.channels}, eps={self.eps!r}, affine={self.affine}, dtype={self.dtype.name!r}, "
            f"channel_axis={self.channel_axis}, population={self.population!r})"
        )
