"""The trainable layer `BatchNorm`: parameters, population statistics, train and eval mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm import _core
from batchnorm._checks import finite_vector, integer, mapping, number, of_channels, parameter_dtype
from batchnorm._types import Gradients
from batchnorm.frozen import FrozenBatchNorm, FrozenCache
from batchnorm.population import MovingAverage, Population

_FLOAT64 = np.dtype(np.float64)
_PREFIX = "population."


class _TrainingCache(NamedTuple):
    """The cache of a forward pass in train mode, with the same `backward` method as that of eval mode."""

    cache: _core.Cache

    def backward(self, dy: Any, *, dresidual: NDArray[Any] | None = None) -> Gradients:
        return _core.backward(dy, self.cache, dresidual=dresidual)


class BatchNorm:
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

    # Called with x and its moments after each forward pass in train mode. `shift.ShiftTrace` puts itself here
    # by a new tuple, so that one may leave while they are being called.
    _observers: tuple[Callable[[NDArray[Any], _core.Moments], None], ...] = ()

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
        self.channels = integer("channels", channels)
        if self.channels < 1:
            raise ValueError(f"channels: was {channels}, wanted 1 or more")
        self.eps = number("eps", eps)
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps: was {eps!r}, wanted a finite number > 0")
        self.dtype = parameter_dtype(dtype)
        self.channel_axis = integer("channel_axis", channel_axis)
        self.population = MovingAverage(update_weight=0.1) if population is None else population
        self.training = True
        self.grad_gamma: Any = None
        self.grad_beta: Any = None
        self._parameters: dict[str, NDArray[Any]] = {}
        if affine:
            self._parameters["gamma"] = np.ones(self.channels, self.dtype)
            self._parameters["beta"] = np.zeros(self.channels, self.dtype)
        self._cache: _TrainingCache | FrozenCache | None = None
        self._kept: tuple[tuple[Any, ...], FrozenBatchNorm] | None = None

    # γ and β are typed Any: with a union with None, every optimizer step of a typed program would need an
    # assertion first.
    @property
    def gamma(self) -> Any:
        """γ, shape (channels,), `dtype`; None if not affine. Assignment copies into the same array."""
        return self._parameters.get("gamma")

    @gamma.setter
    def gamma(self, value: ArrayLike) -> None:
        self._set("gamma", value)

    @property
    def beta(self) -> Any:
        """β, shape (channels,), `dtype`; None if not affine. Assignment copies into the same array."""
        return self._parameters.get("beta")

    @beta.setter
    def beta(self, value: ArrayLike) -> None:
        self._set("beta", value)

    @property
    def affine(self) -> bool:
        """Whether there are γ and β."""
        return bool(self._parameters)

    @property
    def population(self) -> Population:
        """The estimator that train mode updates; `Algorithm2` says how to use it after training."""
        return self._population

    @population.setter
    def population(self, value: Population) -> None:
        wanted = ("update", "mean", "var", "ready", "reset", "state_dict", "load_state_dict")
        # Looked up on the class: `mean` of an estimator that is not ready raises. A class given for an object
        # (`Algorithm2` for `Algorithm2()`) has the type `type`, and is caught likewise.
        if missing := [name for name in wanted if not hasattr(type(value), name)]:
            raise TypeError(f"population: was {value!r}, wanted an estimator with {', '.join(missing)}")
        self._population = value

    def train(self) -> Self:
        """Switch to train mode, and return the layer."""
        self.training = True
        return self

    def eval(self) -> Self:
        """Switch to eval mode, and return the layer."""
        self.training = False
        return self

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
            y, self._cache = self._frozen()._forward(x, activation, residual)
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
        for observe in self._observers:
            observe(x, moments)
        return y

    def _batch(self, x: Any) -> NDArray[Any]:
        """Return x as a NumPy array, or raise if its shape or dtype is not that of a batch of this layer."""
        array, axis = _core.tensor("x", x), self.channel_axis
        if not -array.ndim <= axis < array.ndim or array.shape[axis] != self.channels:
            wanted = f"{of_channels(self.channels)} on axis {axis}"
            raise ValueError(f"x: shape was {array.shape}, wanted {wanted}")
        wide = self.dtype == _FLOAT64
        if (array.dtype.type is np.float64) != wide:
            wanted = "float64" if wide else "float16, bfloat16 or float32"
            raise TypeError(f"x: dtype was {array.dtype}, wanted {wanted} for a {self.dtype} layer")
        return array

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
        if self._cache is None:
            raise RuntimeError("backward: there was no forward pass to go back through; call the layer first")
        dx, dgamma, dbeta = self._cache.backward(dy, dresidual=dresidual)
        if self.affine:
            with np.errstate(all="ignore"):
                gradients = dgamma.astype(self.dtype), dbeta.astype(self.dtype)
            self.grad_gamma, self.grad_beta = gradients
        return dx

    def freeze(self, dtype: DTypeLike | None = None) -> FrozenBatchNorm:
        """Return the layer as a `FrozenBatchNorm`: γ, β, E[x], Var[x] and ε, rounded once.

        Args:
            dtype: dtype of the frozen parameters, float32 or float64; if None, that of this layer.

        Raises:
            ValueError: The population is not ready or has another number of channels, or rounding makes a
                parameter invalid.
        """
        mean, var = self.population.mean, self.population.var
        if mean.shape != (self.channels,):
            raise ValueError(f"population: shape was {mean.shape}, wanted ({self.channels},)")
        return FrozenBatchNorm(
            mean,
            var,
            self.gamma,
            self.beta,
            eps=self.eps,
            channel_axis=self.channel_axis,
            dtype=self.dtype if dtype is None else dtype,
        )

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return copies of γ and β (if affine) and of the population's state.

        Keys of the population's state begin with `population.`.
        """
        state = {name: array.copy() for name, array in self._parameters.items()}
        return state | {_PREFIX + name: array for name, array in self.population.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Load a copy of `state`.

        Args:
            state: What `state_dict` of a layer of the same kind returned.

        Raises:
            ValueError: Keys are missing or unknown, or an array has a wrong shape or values that are not
                finite; nothing is changed then.
            TypeError: `state` is not a mapping, or an array in it is not real, has a mask or requires grad;
                nothing is changed then.
        """
        mapping("state", state, "state_dict()")
        own = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
        if own.keys() != self._parameters.keys():
            wanted = sorted(self._parameters)
            raise ValueError(f"state: keys were {sorted(own)}, wanted {wanted} beside {_PREFIX}*")
        parameters = {name: self._checked(name, value) for name, value in own.items()}
        inner = {name.removeprefix(_PREFIX): value for name, value in state.items() if name not in own}
        trial = copy.deepcopy(self.population)
        trial.load_state_dict(inner)
        if trial.ready and trial.mean.shape != (self.channels,):
            raise ValueError(f"state: population of shape {trial.mean.shape}, wanted ({self.channels},)")
        self.population.load_state_dict(inner)
        for name, array in parameters.items():
            self._parameters[name][...] = array

    def _frozen(self) -> FrozenBatchNorm:
        """Return the frozen layer, kept from the last call if nothing has changed.

        Freezing takes ten times as long as normalizing a small batch.
        """
        arrays = self.population.mean, self.population.var, *self._parameters.values()
        key = self.eps, self.channel_axis, *(array.tobytes() for array in arrays)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.freeze()
        return self._kept[1]

    def _checked(self, name: str, value: ArrayLike) -> NDArray[Any]:
        vector = finite_vector(name, value, self.dtype)
        if vector.shape != (self.channels,):
            raise ValueError(f"{name}: shape was {vector.shape}, wanted ({self.channels},)")
        return vector

    def _set(self, name: str, value: ArrayLike) -> None:
        if not self.affine:
            raise ValueError(f"{name}: the layer was made with affine=False")
        self._parameters[name][...] = self._checked(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A copy (copy.deepcopy, pickle) starts without the last forward pass, which holds x by reference, and
        # without whoever observes this layer.
        return self.__dict__ | {"_cache": None, "_observers": ()}

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.channels}, eps={self.eps!r}, affine={self.affine}, dtype={self.dtype.name!r}, "
            f"channel_axis={self.channel_axis}, population={self.population!r})"
        )
