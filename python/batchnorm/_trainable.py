"""What the trainable layers `BatchNorm` and `Whitening` share: γ and β, modes, gradients, and state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm import _core
from batchnorm._checks import finite_vector, integer, mapping, number, of_channels, parameter_dtype
from batchnorm._types import Gradients
from batchnorm.population import Estimator

_FLOAT64 = np.dtype(np.float64)
_PREFIX = "population."

P = TypeVar("P", bound=Estimator)
T = TypeVar("T")


class Trainable(Generic[P]):
    """A layer with γ, β and a population of protocol P; subclasses add the forward pass and `freeze`."""

    _STATISTICS: ClassVar[tuple[str, ...]]
    """The names of what the population estimates."""
    # Called with x and its moments after each forward pass in train mode. `shift.ShiftTrace` puts itself here
    # by a new tuple, so that one may leave while they are being called.
    _observers: tuple[Callable[[NDArray[Any], _core.Moments], None], ...] = ()

    def __init__(
        self, channels: int, *, eps: float, affine: bool, dtype: DTypeLike, channel_axis: int, population: P
    ) -> None:
        self.channels = integer("channels", channels)
        if self.channels < 1:
            raise ValueError(f"channels: was {channels}, wanted 1 or more")
        self.eps = number("eps", eps)
        self.dtype = parameter_dtype(dtype)
        self.channel_axis = integer("channel_axis", channel_axis)
        self.population = population
        self.training = True
        self.grad_gamma: Any = None
        self.grad_beta: Any = None
        self._parameters: dict[str, NDArray[Any]] = {}
        if affine:
            self._parameters["gamma"] = np.ones(self.channels, self.dtype)
            self._parameters["beta"] = np.zeros(self.channels, self.dtype)
        self._cache: Any = None  # of the last forward pass: it has a method `backward`
        self._last: tuple[tuple[Any, ...], Any] | None = None

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
    def population(self) -> P:
        """The estimator that train mode updates; it may be replaced by another one at any time."""
        return self._population

    @population.setter
    def population(self, value: P) -> None:
        wanted = ("update", *self._STATISTICS, "ready", "reset", "state_dict", "load_state_dict")
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

    def _backward(self, dy: Any, **options: Any) -> NDArray[Any]:
        """Go back through the last forward pass: set `grad_gamma` and `grad_beta`, and return dx."""
        if self._cache is None:
            raise RuntimeError("backward: there was no forward pass to go back through; call the layer first")
        gradients: Gradients = self._cache.backward(dy, **options)
        if self.affine:
            with np.errstate(all="ignore"):
                rounded = gradients.dgamma.astype(self.dtype), gradients.dbeta.astype(self.dtype)
            self.grad_gamma, self.grad_beta = rounded
        return gradients.dx

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
        if trial.ready:
            self._check_shapes(trial, "state: population of shape")
        self.population.load_state_dict(inner)
        for name, array in parameters.items():
            self._parameters[name][...] = array

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the population's statistics must have."""
        return {"mean": (self.channels,)}

    def _check_shapes(self, population: P, found: str) -> None:
        for name, wanted in self._shapes().items():
            shape = getattr(population, name).shape
            if shape != wanted:
                raise ValueError(f"{found} {shape}, wanted {wanted}")

    def _kept(self, make: Callable[[], T], *options: Any) -> T:
        """Return what `make` makes of options, population, γ and β, kept from the last call if all are equal.

        Freezing takes ten times as long as normalizing a small batch.
        """
        statistics = [getattr(self.population, name) for name in self._STATISTICS]
        key = *options, *(array.tobytes() for array in (*statistics, *self._parameters.values()))
        if self._last is None or self._last[0] != key:
            self._last = key, make()
        made: T = self._last[1]
        return made

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

    def _observe(self, x: NDArray[Any], moments: _core.Moments) -> None:
        for observe in self._observers:
            observe(x, moments)
